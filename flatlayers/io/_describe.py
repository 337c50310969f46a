"""From the parts that are saved to their description, which JSON can hold, and arrays of their numbers."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, TypeAlias, TypeGuard, runtime_checkable

import jax
import numpy as np

from ..dtypes import is_key, is_traced
from ..types import Shape
from ..vectors.json_text import MAX_DEPTH, to_plain
from ..vectors.names import join_path
from ..vectors.pieces import piece_count, pieces
from ..vectors.record import Record
from ..vectors.sharded import ShardedVector
from ..vectors.vector import ComponentVector
from ._format import CODES
from ._processes import on_host


# A mapping of one name, the kind of a part, to what there is to say about it.
Description: TypeAlias = dict[str, Any]

MAX_TENSORS = 1_000_000
_COMPLEX128 = np.dtype(np.complex128)
_SAVED = "vectors, records, mappings, tuples, lists, arrays, keys, numbers and text"


@dataclasses.dataclass(frozen=True)
class Block:
    """Numbers that lie together in a file: the named pieces of a vector, or one array. `numbers` is flat."""

    code: str
    numbers: np.ndarray
    pieces: tuple[tuple[str, Shape], ...]


def describe(value: object, path: str, blocks: list[Block], depth: int = 0) -> Description:
    """Return the description of a part, and append its arrays to `blocks`.

    **Raises:** `TypeError` with the path of what cannot be saved.
    """
    if depth > MAX_DEPTH:
        raise ValueError(f"{path[:80]!r}: expected at most {MAX_DEPTH} parts inside each other, found more")
    if isinstance(value, ComponentVector):
        return _vector(value, path, blocks)
    if isinstance(value, ShardedVector):
        return _vector(_gathered(value, path), path, blocks)
    if isinstance(value, Mapping):
        kind = "record" if isinstance(value, Record) else "mapping"
        return {kind: _named(value, path, blocks, depth)}
    if is_named_tuple(value):
        return {"named": _named(fields_of(value), path, blocks, depth)}
    if isinstance(value, tuple | list):
        parts = [describe(part, f"{path}.{i}", blocks, depth + 1) for i, part in enumerate(value)]
        return {"tuple" if isinstance(value, tuple) else "list": parts}
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        return _array(value, path, blocks)
    return _plain(value, path)


@runtime_checkable
class NamedTuple(Protocol):
    """A named tuple, such as the states of optax."""

    _fields: tuple[str, ...]

    def __iter__(self) -> Iterator[object]: ...


def is_named_tuple(value: object) -> TypeGuard[NamedTuple]:
    """Tell whether it is a tuple with names."""
    return isinstance(value, tuple) and isinstance(value, NamedTuple)


def fields_of(value: NamedTuple) -> dict[str, object]:
    """Return the parts of a named tuple by name."""
    return dict(zip(value._fields, value, strict=True))


def stored(dtype: np.dtype) -> tuple[str, Shape] | None:
    """Return the code of the dtype in a file and the axes behind those of the array, if there is one.

    The format has no complex128: a real and an imaginary part are an axis of two numbers.
    """
    if dtype == _COMPLEX128:
        return "F64", (2,)
    return (CODES[dtype], ()) if dtype in CODES else None


def _named(parts: Mapping[Any, object], path: str, blocks: list[Block], depth: int) -> Description:
    for name in parts:
        if not isinstance(name, str):
            raise TypeError(f"cannot save {path!r}: expected names that are text, found {name!r}")
    return {name: describe(part, f"{path}.{name}", blocks, depth + 1) for name, part in parts.items()}


def _vector(vector: ComponentVector, path: str, blocks: list[Block]) -> Description:
    if not isinstance(vector.data, jax.Array | np.ndarray):
        raise TypeError(f"cannot save {path!r}: expected a vector of numbers, found {vector!r}")
    numbers, code, behind = _numbers(vector.data, path)
    shape = tuple(vector.shape)
    # An optimiser may have something else in the place of the numbers, such as one number for all.
    if shape != (vector.layout.length,):
        named = [(path, shape + behind)]
    elif (count := piece_count(vector.layout)) > MAX_TENSORS:
        raise ValueError(f"cannot save {path!r}: expected at most {MAX_TENSORS} names, found {count}")
    else:
        named = [(join_path(path, name), own + behind) for name, _, own in pieces(vector.layout)]
    if named:
        blocks.append(Block(code, numbers, tuple(named)))
    layout = to_plain(vector.layout)
    return {"vector": {"layout": layout, "dtype": vector.dtype.name, "shape": list(shape)}}


def _gathered(vector: ShardedVector, path: str) -> ComponentVector:
    """Return the whole vector on the host, without the zeros behind it."""
    data = vector.data
    if isinstance(data, jax.Array) and not is_traced(data):
        data = on_host(data, path)
    if isinstance(data, jax.Array | np.ndarray) and vector.is_whole:
        data = data[..., : vector.layout.length]
    return ComponentVector._new(data=data, layout=vector.layout)


def _array(value: jax.Array | np.ndarray | np.generic, path: str, blocks: list[Block]) -> Description:
    if is_key(value):
        assert isinstance(value, jax.Array)
        numbers, code, _ = _numbers(jax.random.key_data(value), path)
        shape = jax.random.key_data(value).shape
        blocks.append(Block(code, numbers, ((path, shape),)))
        return {"key": {"implementation": str(jax.random.key_impl(value)), "shape": list(shape)}}
    numbers, code, behind = _numbers(value, path)
    blocks.append(Block(code, numbers, ((path, np.shape(value) + behind),)))
    kind = "array" if isinstance(value, jax.Array) else "numpy" if isinstance(value, np.ndarray) else "scalar"
    return {kind: {"dtype": value.dtype.name, "shape": list(np.shape(value))}}


def _numbers(value: jax.Array | np.ndarray | np.generic, path: str) -> tuple[np.ndarray, str, Shape]:
    """Return the numbers of an array, flat and in the format's order of bytes, with code and axes behind."""
    if is_traced(value):
        raise TypeError(f"cannot save {path!r}: its numbers are known only when a compiled function runs")
    if isinstance(value, jax.Array):
        value = on_host(value, path)
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"cannot save {path!r}: expected {_SAVED}, found a masked array")
    numbers = np.asarray(value, order="C")
    if numbers.dtype.byteorder == ">":
        numbers = numbers.astype(numbers.dtype.newbyteorder("<"))
    form = stored(numbers.dtype)
    if form is None:
        raise TypeError(f"cannot save {path!r}: the format has no numbers of dtype {numbers.dtype}")
    code, behind = form
    if behind:
        numbers = numbers[..., None].view(np.float64)
    return numbers.reshape(math.prod(numbers.shape)), code, behind


def _plain(value: object, path: str) -> Description:
    if value is None:
        return {"none": None}
    if type(value) is float:
        return {"float": repr(value)}  # JSON has no NaN
    for kind, name in ((bool, "bool"), (int, "int"), (str, "text")):
        if type(value) is kind:
            return {name: value}
    raise TypeError(f"cannot save {path!r}: expected {_SAVED}, found {type(value).__name__}")
