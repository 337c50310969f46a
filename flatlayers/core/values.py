"""Values in the fields of a layer: compared by content, given a hash, written as a program writes them."""

import dataclasses
import functools
import inspect
from collections.abc import Hashable as HasHash, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from ..types import PyTree
from ..vectors.immutable import Immutable


# Comparing


def comparison_key(value: object) -> HasHash:
    """Return what stands for a value where layers are compared: equal for values that compute the same.

    Python's `==` is not that: `2 == 2.0 == True` and `0.0 == -0.0`, which give other dtypes or signs, and a
    NaN is not equal to itself, which would compile anew at each call. So a number counts with its type and
    its bits.
    """
    kind = type(value)
    if isinstance(value, complex | np.complexfloating):
        return kind, comparison_key(value.real), comparison_key(value.imag)
    if isinstance(value, float | np.floating):
        return kind, float(value).hex()
    if isinstance(value, tuple):
        return kind, tuple(map(comparison_key, value))
    if _is_compared_by_fields(value):
        return kind, tuple(
            comparison_key(getattr(value, field.name))
            for field in dataclasses.fields(value)  # pyright: ignore[reportArgumentType]
        )
    leaves, structure = jax.tree.flatten(value)
    if len(leaves) != 1 or leaves[0] is not value:
        return kind, structure, tuple(map(comparison_key, leaves))
    return kind, value


def _is_compared_by_fields(value: object) -> bool:
    """Tell whether it is a frozen dataclass with an `==` of its own, and no pytree of other values."""
    options = getattr(type(value), "__dataclass_params__", None)
    return options is not None and options.frozen and options.eq and jax.tree.leaves(value) == [value]


class Value:
    """The base of frozen dataclasses (with `eq=False`) that are compared by their `comparison_key`s.

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
        return tuple(comparison_key(getattr(self, field.name)) for field in fields if field.compare)

    def __getstate__(self) -> dict[str, object]:
        # Without what is computed from the fields, which need not be something that can be pickled.
        kept = {name: inspect.getattr_static(type(self), name, None) for name in self.__dict__}
        computed = {name for name, kind in kept.items() if isinstance(kind, functools.cached_property)}
        return {name: value for name, value in self.__dict__.items() if name not in computed}


# Giving a hash to what has none


class FrozenDict(Immutable, Mapping[Any, Any]):
    """An immutable, hashable mapping. Order counts: layers in another order are another model."""

    __slots__ = ("_values",)
    _values: dict[Any, Any]

    def __init__(self, values: Mapping[Any, Any] = {}, /):
        self._fill(_values=dict(values))

    def __getitem__(self, key: object) -> Any:
        return self._values[key]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FrozenDict) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    def _identity(self) -> HasHash:
        return comparison_key(tuple(self.items()))

    def __repr__(self) -> str:
        return repr(self._values)


jax.tree_util.register_pytree_node(
    FrozenDict,
    lambda frozen: (tuple(frozen.values()), tuple(frozen)),
    lambda names, values: FrozenDict(dict(zip(names, values, strict=True))),
)


@dataclasses.dataclass(frozen=True)
class ArrayContent:
    """An array as bytes, so that it can be compared and hashed."""

    shape: tuple[int, ...]
    dtype: str
    content: bytes

    @staticmethod
    def of(array: Any) -> "ArrayContent":
        array = np.asarray(array)
        array = array.astype(array.dtype.newbyteorder("="))
        return ArrayContent(array.shape, array.dtype.name, array.tobytes())

    def array(self) -> np.ndarray:
        return np.frombuffer(self.content, np.dtype(self.dtype)).reshape(self.shape)


@dataclasses.dataclass(frozen=True, eq=False)
class Hashable(Value):
    """A pytree (an array, a `SaveAt` with times, an adjoint with keywords) with a hash by content.

    Arrays inside are kept as NumPy data; `value` gives the pytree back.
    """

    leaves: tuple[Any, ...]
    structure: Any

    @property
    def value(self) -> Any:
        leaves = [leaf.array() if isinstance(leaf, ArrayContent) else leaf for leaf in self.leaves]
        return jax.tree.unflatten(self.structure, leaves)

    def __repr__(self) -> str:
        return repr(self.value)


def hashable(tree: PyTree) -> Any:
    """Return the pytree as it is if it has a hash, else as `Hashable`."""
    leaves, structure = jax.tree.flatten(tree)
    if not has_hash(tree) or any(map(is_array, leaves)):
        return Hashable(
            tuple(ArrayContent.of(leaf) if is_array(leaf) else leaf for leaf in leaves), structure
        )
    return tree


def plain(tree: object) -> Any:
    """Undo `hashable`."""
    return tree.value if isinstance(tree, Hashable) else tree


def is_array(value: object) -> bool:
    """Tell whether it is an array of JAX or of NumPy."""
    return isinstance(value, jax.Array | np.ndarray)


def has_hash(value: object) -> bool:
    """Tell whether a value, with all that is in it, has a hash."""
    try:
        hash(value)
    except TypeError:
        return False
    return True


# Writing


def value_text(value: object) -> str:
    """Write a hyper-parameter as one writes it in a program: functions by their names."""
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        inside = ", ".join(map(value_text, value))
        return f"({inside},)" if len(value) == 1 else f"({inside})"
    if isinstance(value, FrozenDict):
        return "{" + ", ".join(f"{name!r}: {value_text(part)}" for name, part in value.items()) + "}"
    if isinstance(value, functools.partial):
        named = "".join(f", {name}={value_text(part)}" for name, part in value.keywords.items())
        return f"partial({', '.join(map(value_text, (value.func, *value.args)))}{named})"
    text = repr(value)  # once: a layer has layers inside
    return getattr(value, "__name__", type(value).__name__) if callable(value) and text[0] == "<" else text
