"""Where the parts of a layout lie: slots, and the segments a vector is made of."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np

from .names import join_path


if TYPE_CHECKING:
    from .layout import Layout

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Slot:
    """The place of one leaf: `size` numbers from `offset` on, in row-major order.

    A leaf inside a stack has one such place in every copy. `offset`, `shape` and `size` are
    those of copy 0, `copies` counts the copies of each enclosing stack, outermost first,
    and `strides` says how far apart they lie. `stride` is the outermost one, 0 without a stack.
    """

    offset: int
    shape: Shape
    size: int
    copies: Shape = ()
    strides: Shape = ()

    @property
    def stride(self) -> int:
        return self.strides[0] if self.strides else 0

    def positions(self) -> np.ndarray:
        """The positions in the vector, of shape `(*copies, *shape)`."""
        positions = np.arange(self.offset, self.offset + self.size).reshape(self.shape)
        for copies, stride in zip(reversed(self.copies), reversed(self.strides), strict=True):
            starts = stride * np.arange(copies).reshape(copies, *[1] * positions.ndim)
            positions = starts + positions
        return positions

    def take(self, data: np.ndarray) -> np.ndarray:
        """The numbers there, of shape `(..., *copies, *shape)`: for displays, which compile nothing."""
        if self.copies:
            return data[..., self.positions()]
        return data[..., self.offset : self.offset + self.size].reshape((*data.shape[:-1], *self.shape))


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


Segment = Leaf | Block


def place(layout: "Layout", prefix: str, ties: Mapping[str, str]) -> tuple[Segment, ...]:
    """The segments of one copy of `layout`, one after another, nested groups flattened."""
    segments: list[Segment] = []
    start = 0
    for name, child in layout.entries.items():
        path = join_path(prefix, name)
        if not isinstance(child, tuple):
            inner = place(child, path, ties)
            new = [block(path, 0, child.copies, inner)] if child.copies else inner
        else:
            new = [] if path in ties else [Leaf(path, 0, math.prod(child), child)]
        for segment in new:
            segments.append(dataclasses.replace(segment, start=start))
            start += segment.size
    return tuple(segments)


def block(path: str, start: int, copies: Shape, segments: tuple[Segment, ...]) -> Block:
    length = sum(segment.size for segment in segments)
    return Block(path, start, math.prod(copies) * length, copies, length, segments)


def slots(
    segments: tuple[Segment, ...], offset: int, copies: Shape, strides: Shape
) -> Iterator[tuple[str, Slot]]:
    for segment in segments:
        start = offset + segment.start
        if isinstance(segment, Leaf):
            yield segment.path, Slot(start, segment.shape, segment.size, copies, strides)
        else:
            counts = segment.copies
            own = tuple(segment.length * math.prod(counts[i + 1 :]) for i in range(len(counts)))
            yield from slots(segment.segments, start, copies + counts, strides + own)


def labels(segments: tuple[Segment, ...], prefix: str, cut: int) -> Iterator[str]:
    for segment in segments:
        path = segment.path[cut:].lstrip(".")
        name = join_path(prefix, path)
        if isinstance(segment, Leaf):
            for index in np.ndindex(segment.shape):
                yield f"{name}[{','.join(map(str, index))}]" if index else name
        else:
            for index in np.ndindex(segment.copies):
                copy = f"{name}[{','.join(map(str, index))}]"
                yield from labels(segment.segments, copy, len(segment.path))
