"""`FrozenDict`: what a dict in a field of a layer becomes."""

import functools
from collections.abc import Hashable as HasHash, Iterator, Mapping
from typing import Any

import jax

from .identity import identity


class FrozenDict(Mapping[Any, Any]):
    """An immutable, hashable mapping. Order counts: layers in another order are another model."""

    __slots__ = ("_values",)
    _values: dict[Any, Any]

    def __init__(self, values: Mapping[Any, Any] = {}, /):
        object.__setattr__(self, "_values", dict(values))

    def __getitem__(self, key: Any) -> Any:
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
        return identity(tuple(self.items()))

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError("frozen dicts are immutable")

    def __delattr__(self, name: str) -> None:
        raise AttributeError("frozen dicts are immutable")

    def __reduce__(self) -> Any:
        return FrozenDict, (self._values,)

    def __repr__(self) -> str:
        return repr(self._values)


def value_text(value: object) -> str:
    """Write a hyper-parameter as one does in code: functions by their names."""
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        inside = ", ".join(map(value_text, value))
        return f"({inside},)" if len(value) == 1 else f"({inside})"
    if isinstance(value, FrozenDict):
        return "{" + ", ".join(f"{name!r}: {value_text(part)}" for name, part in value.items()) + "}"
    if isinstance(value, functools.partial):
        return f"partial({', '.join(map(value_text, (value.func, *value.args)))}{_named(value.keywords)})"
    if callable(value) and repr(value).startswith("<"):
        return getattr(value, "__name__", type(value).__name__)
    return repr(value)


def _named(values: Mapping[str, object]) -> str:
    return "".join(f", {name}={value_text(value)}" for name, value in values.items())


jax.tree_util.register_pytree_node(
    FrozenDict,
    lambda frozen: (tuple(frozen.values()), tuple(frozen)),
    lambda names, values: FrozenDict(dict(zip(names, values, strict=True))),
)
