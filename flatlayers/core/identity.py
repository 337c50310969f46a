"""When two fields mean the same to a compiled program."""

import dataclasses
import functools
import inspect
from collections.abc import Hashable as HasHash
from typing import Any

import jax
import numpy as np


def identity(value: Any) -> HasHash:
    """What stands for a value where layers are compared: equal for values that compute the same, else not.

    Python's `==` is not that: `2 == 2.0 == True` and `0.0 == -0.0`, which give other dtypes or signs, and a
    NaN is not equal to itself, which would compile anew at each call. So a number counts with its type and
    its bits.
    """
    kind = type(value)
    if isinstance(value, complex | np.complexfloating):
        return kind, identity(value.real), identity(value.imag)
    if isinstance(value, float | np.floating):
        return kind, float(value).hex()
    if isinstance(value, tuple):
        return kind, tuple(map(identity, value))
    if _is_value(value):
        return kind, tuple(identity(getattr(value, field.name)) for field in dataclasses.fields(value))
    leaves, structure = jax.tree.flatten(value)
    if len(leaves) != 1 or leaves[0] is not value:
        return kind, structure, tuple(map(identity, leaves))
    return kind, value


def _is_value(value: Any) -> bool:
    """Whether it is a frozen dataclass that is compared by its fields."""
    options = getattr(type(value), "__dataclass_params__", None)
    return options is not None and options.frozen and options.eq and jax.tree.leaves(value) == [value]


class Value:
    """The base of frozen dataclasses (with `eq=False`) that are compared by the `identity` of their fields.

    The hash is computed once: a compiled call asks for it each time.
    """

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, Value) or type(self) is not type(other):
            return False
        return self._hash == other._hash and self._identity == other._identity

    def __hash__(self) -> int:
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:
        return hash((type(self), self._identity))

    @functools.cached_property
    def _identity(self) -> HasHash:
        fields = dataclasses.fields(self)  # pyright: ignore[reportArgumentType]
        return tuple(identity(getattr(self, field.name)) for field in fields if field.compare)

    def __getstate__(self) -> dict[str, Any]:
        # Without what is computed from the fields, which need not be something that can be pickled.
        kept = {name: inspect.getattr_static(type(self), name, None) for name in self.__dict__}
        computed = {name for name, kind in kept.items() if isinstance(kind, functools.cached_property)}
        return {name: value for name, value in self.__dict__.items() if name not in computed}
