"""Fitting parts that were read to those of a program: the same names, shapes and dtypes, and its types."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from ..dtypes import is_key
from ..types import Shape
from ..vectors.names import describe, listing
from ..vectors.record import Record
from ..vectors.sharded import ShardedVector, cut
from ..vectors.vector import ComponentVector
from ._describe import fields_of, is_named_tuple
from .errors import LayoutMismatchError


_NUMBERS = jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct


def fit(value: object, like: object, path: str) -> Any:
    """Return `value` as the types of `like`, which may have `jax.ShapeDtypeStruct` in the place of arrays.

    **Raises:** `LayoutMismatchError` with a line for each difference, `TypeError` for parts of `like` that a
    file cannot have.
    """
    fitting = _Fit()
    fitted = fitting.part(value, like, path)
    if fitting.lines:
        ending = ": another optimiser?" if fitting.other_fields else ":"
        raise LayoutMismatchError(f"{path!r} in the file is not like the one given{ending}", fitting.lines)
    return fitted


@dataclasses.dataclass
class _Fit:
    """Collects a line for each difference, from the file to what is given."""

    lines: list[str] = dataclasses.field(default_factory=list)
    other_fields: bool = False

    def part(self, value: Any, like: Any, path: str) -> Any:
        if isinstance(like, ComponentVector | ShardedVector):
            return self.vector(value, like, path)
        if is_named_tuple(like):
            parts = self.named(value, fields_of(like), path)
            return None if parts is None else type(like)(**parts)
        if isinstance(like, Mapping):
            return self.mapping(value, like, path)
        if isinstance(like, tuple | list):
            return self.sequence(value, like, path)
        if isinstance(like, _NUMBERS):
            return self.array(value, like, path)
        if like is None or isinstance(like, bool | int | float | str):
            if type(value) is not type(like):
                self.lines.append(f"{path}: {describe(value)} became {describe(like)}")
            return value
        raise TypeError(f"{path!r}: expected parts that a file can have, found {type(like).__name__}")

    def vector(self, value: Any, like: ComponentVector | ShardedVector, path: str) -> Any:
        if not isinstance(value, ComponentVector):
            self.lines.append(f"{path}: {describe(value)} became {describe(like)}")
        elif value.layout != like.layout:
            self.lines += [f"{path}.{line}" for line in value.layout.diff(like.layout)]
        elif (value.shape, value.dtype) != (_unpadded(like), like.dtype):
            self.lines.append(f"{path}: {describe(value)} became {describe(like)}")
        elif not isinstance(like, ShardedVector):
            return ComponentVector._new(data=_placed(value.data, like.data), layout=like.layout)
        elif like.is_whole:
            return cut(value.data, value.layout, like.mesh, like.axis)
        else:
            return like.with_data(_placed(value.data, like.data))
        return value

    def named(self, value: Any, like: Mapping[str, object], path: str) -> dict[str, Any] | None:
        """Return the parts in the order of `like`, or nothing if the names differ."""
        if not isinstance(value, Mapping) or set(value) != set(like):
            found = listing(value) if isinstance(value, Mapping) else describe(value)
            self.lines.append(f"{path}: {found} became {listing(like)}")
            self.other_fields |= not isinstance(like, Record)
            return None
        # By the own name: the one with dots in a record is a path.
        own = dict(value.items())
        return {name: self.part(own[name], part, f"{path}.{name}") for name, part in like.items()}

    def mapping(self, value: Any, like: Mapping[str, object], path: str) -> Any:
        parts = self.named(value, like, path)
        if parts is None or type(like) is dict:
            return parts
        return Record._of(parts) if isinstance(like, Record) else type(like)(parts)  # pyright: ignore[reportCallIssue]

    def sequence(self, value: Any, like: tuple[object, ...] | list[object], path: str) -> Any:
        if type(value) is not type(like) or len(value) != len(like):
            found = len(value) if isinstance(value, tuple | list) else describe(value)
            self.lines.append(f"{path}: {found} became {type(like).__name__} of {len(like)} parts")
            self.other_fields = True
            return None
        pairs = enumerate(zip(value, like, strict=True))
        return type(like)([self.part(part, wanted, f"{path}.{i}") for i, (part, wanted) in pairs])

    def array(self, value: Any, like: Any, path: str) -> Any:
        same = isinstance(value, _NUMBERS) and (value.shape, value.dtype) == (like.shape, like.dtype)
        if not same:
            self.lines.append(f"{path}: {describe(value)} became {describe(like)}")
            return None
        if isinstance(value, jax.Array) and is_key(value):
            return _placed_keys(value, like)
        if isinstance(like, jax.Array | jax.ShapeDtypeStruct):
            return _placed(np.asarray(value), like)
        return np.asarray(value)[()] if isinstance(like, np.generic) else np.asarray(value)


def _unpadded(like: ComponentVector | ShardedVector) -> Shape:
    whole = isinstance(like, ShardedVector) and like.is_whole
    return like.shape if whole else tuple(like.data.shape)


def _placed(numbers: np.ndarray, like: Any) -> jax.Array:
    """Return an array on the devices of `like`, if these are several, or else on the default one."""
    sharding = getattr(like, "sharding", None)
    if sharding is None or len(sharding.device_set) == 1:
        # Nothing else writes to the numbers: so on a CPU JAX can have them where they are.
        return jax.device_put(numbers)
    return jax.make_array_from_callback(numbers.shape, sharding, lambda index: numbers[index])


def _placed_keys(keys: jax.Array, like: Any) -> jax.Array:
    sharding = getattr(like, "sharding", None)
    if sharding is None or len(sharding.device_set) == 1 or not sharding.is_fully_replicated:
        return keys
    everywhere = NamedSharding(sharding.mesh, PartitionSpec())
    numbers = np.asarray(jax.random.key_data(keys))
    placed = jax.make_array_from_callback(numbers.shape, everywhere, lambda index: numbers[index])
    return jax.random.wrap_key_data(placed, impl=jax.random.key_impl(keys))
