"""The segments of a vector: how its numbers are taken apart into leaves, and put together. Without JAX."""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any, Protocol, TypeAlias

import numpy as np

from .names import join_path


# As `types.Shape`, in a file that does without JAX.
Shape: TypeAlias = tuple[int, ...]


class Numbers(Protocol):
    """An array of JAX or of NumPy."""

    @property
    def shape(self) -> Shape: ...

    def __array_namespace__(self) -> Any: ...


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A leaf with a place of its own; `start` is counted from the start of the enclosing block."""

    path: str
    start: int
    size: int
    shape: Shape


@dataclasses.dataclass(frozen=True)
class Block:
    """A stack: `copies` times `length` numbers, each copy taken apart by `segments`."""

    path: str
    start: int
    size: int
    copies: Shape
    length: int
    segments: tuple["Leaf | Block", ...]


Segment: TypeAlias = Leaf | Block


class Splitting(Protocol):
    """The functions that take an array apart: `jax.lax` has them, and `ByNamespace`."""

    def reshape(self, operand: Any, new_sizes: Shape) -> Any: ...
    def split(self, operand: Any, sizes: Sequence[int], axis: int) -> Sequence[Any]: ...


@dataclasses.dataclass(frozen=True)
class ByNamespace:
    """The functions of the namespace of an array, such as `numpy`."""

    xp: ModuleType

    def reshape(self, operand: Any, new_sizes: Shape) -> Any:
        return self.xp.reshape(operand, new_sizes)

    def split(self, operand: Any, sizes: Sequence[int], axis: int) -> Sequence[Any]:
        return self.xp.split(operand, list(itertools.accumulate(sizes))[:-1], axis=axis)


def split(segments: tuple[Segment, ...], data: Numbers, by: Splitting) -> dict[str, Any]:
    """Return the leaves of `data`, of shape `(..., length)`, by path, in one split per level of stacks."""
    if not segments:
        return {}
    lead = tuple(data.shape[:-1])
    row = by.reshape(data, (*lead, *_row_axis(segments), data.shape[-1]))
    leaves: dict[str, Any] = {}
    pieces = by.split(row, [segment.size for segment in segments], axis=len(row.shape) - 1)
    for segment, piece in zip(segments, pieces, strict=True):
        if isinstance(segment, Leaf):
            leaves[segment.path] = by.reshape(piece, lead + segment.shape)
        else:
            inner = by.reshape(piece, (*lead, *segment.copies, segment.length))
            leaves |= split(segment.segments, inner, by)
    return leaves


def _row_axis(segments: tuple[Segment, ...]) -> Shape:
    """Return the axis of size 1 in front of the numbers, where they are split and concatenated as rows.

    The transpose of a split is a concatenation. XLA:CPU fuses a 1-D concatenation of 8 operands or
    fewer into what consumes it, such as the loop that accumulates a gradient, which makes it up to
    100 times slower; rows it does not fuse. See benchmarks/README.md.
    """
    return (1,) if len(segments) <= 8 else ()


def join(
    segments: tuple[Segment, ...], leaves: Mapping[str, Any], lead: Shape, dtype: Any, xp: ModuleType
) -> Any:
    """Return the inverse of `split` for leaves of one dtype."""
    rows = []
    for segment in segments:
        if isinstance(segment, Leaf):
            row = leaves[segment.path]
        else:
            row = join(segment.segments, leaves, lead + segment.copies, dtype, xp)
        rows.append(row.reshape(*lead, *_row_axis(segments), segment.size))
    if not rows:
        return xp.zeros((*lead, 0), dtype)
    whole = xp.concatenate(rows, axis=-1)
    return whole.reshape(*lead, whole.shape[-1])


def labels_of(segments: tuple[Segment, ...], prefix: str = "", cut: int = 0) -> Iterator[str]:
    """Return a name for each number, one after another."""
    for segment in segments:
        path = segment.path[cut:].lstrip(".")
        name = join_path(prefix, path)
        if isinstance(segment, Leaf):
            for index in np.ndindex(segment.shape):
                yield f"{name}[{','.join(map(str, index))}]" if index else name
        else:
            for index in np.ndindex(segment.copies):
                copy = f"{name}[{','.join(map(str, index))}]"
                yield from labels_of(segment.segments, copy, len(segment.path))


def label_at(segments: tuple[Segment, ...], position: int) -> str:
    """Return the name of the number at a position."""
    name, cut = "", 0
    while True:
        segment = next(s for s in segments if s.start <= position < s.start + s.size)
        name = join_path(name, segment.path[cut:].lstrip("."))
        position -= segment.start
        if isinstance(segment, Leaf):
            return name + _index_text(position, segment.shape)
        copy, position = divmod(position, segment.length)
        name += _index_text(copy, segment.copies)
        segments, cut = segment.segments, len(segment.path)


def _index_text(position: int, shape: Shape) -> str:
    return f"[{','.join(map(str, np.unravel_index(position, shape)))}]" if shape else ""
