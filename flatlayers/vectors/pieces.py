"""The pieces of a vector: its leaves, each copy of a stack on its own, in vector order. Without JAX."""

import math
from collections.abc import Iterator

import numpy as np

from .names import join_path
from .places import Places
from .segments import Leaf, Segment, Shape


def pieces(places: Places) -> Iterator[tuple[str, int, Shape]]:
    """Return the name, the start and the shape of each piece: `blocks.1.weight` for copy 1 of a stack.

    They lie one after another and together are the vector. Tied names are there once, by the name that has
    the place.
    """
    return _pieces(places._segments, "", 0, 0)


def piece_count(places: Places) -> int:
    """Return how many pieces there are, without walking through copies."""
    return _count(places._segments)


def _pieces(
    segments: tuple[Segment, ...], prefix: str, cut: int, start: int
) -> Iterator[tuple[str, int, Shape]]:
    for segment in segments:
        name, first = join_path(prefix, segment.path[cut:].lstrip(".")), start + segment.start
        if isinstance(segment, Leaf):
            yield name, first, segment.shape
        elif _count(segment.segments):
            for number, index in enumerate(np.ndindex(segment.copies)):
                copy = join_path(name, *map(str, index))
                yield from _pieces(segment.segments, copy, len(segment.path), first + number * segment.length)


def _count(segments: tuple[Segment, ...]) -> int:
    return sum(
        1 if isinstance(segment, Leaf) else math.prod(segment.copies) * _count(segment.segments)
        for segment in segments
    )
