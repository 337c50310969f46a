"""Drawing initial values: leaf by leaf, each with a key of its own, and large ones in pieces."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any
from zlib import crc32

import jax
import jax.numpy as jnp
import numpy as np

from ..types import Array, DType, Key, Shape
from ..vectors.layout import Layout
from ..vectors.places import Slot
from .counters import counts


# A vector of more numbers is drawn in pieces, of so many numbers each.
LARGE = 2**22
PIECE = 2**20


def fold_in_name(key: Key, name: str) -> Key:
    """Return a key of its own for a name: it does not depend on what else there is."""
    return jax.random.fold_in(key, crc32(name.encode()))


def for_each_key(draw: Callable[[Key], Any], keys: Key) -> Any:
    """Call `draw` for each of an array of keys, of any number of axes; for one key, with it."""
    for _ in range(keys.ndim):
        draw = jax.vmap(draw)
    return draw(keys)


class Keys:
    """The keys of leaves, made of that of the model: what leaves have in common is folded in once."""

    def __init__(self, key: Key):
        self._known: dict[tuple[str | int, ...], Key] = {(): key}

    def of(self, folds: tuple[str | int, ...]) -> Key:
        """Return the key after some folds: with a name, or with 0, 1, ... for so many copies."""
        if folds not in self._known:
            *above, last = folds
            self._known[folds] = for_each_key(lambda key: _folded(key, last), self.of(tuple(above)))
        return self._known[folds]


def _folded(key: Key, fold: str | int) -> Key:
    if isinstance(fold, str):
        return fold_in_name(key, fold)
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(fold))


@dataclasses.dataclass(frozen=True)
class Drawing:
    """The drawing of the leaf at a path: its key, its numbers, and what the vector holds of them.

    - `shape`: the shape of one copy.
    - `folds`: what the key of the model is folded with, outermost first: a name, or a number of copies.
    - `initial`: `initial(key, dtype)`, the values of one copy.
    - `part`: `part(key, dtype, start, stop)`, some of its numbers in row-major order; `None` if they cannot
        be drawn without the others.
    - `free`: from values to what the vector holds, number by number.
    """

    path: str
    shape: Shape
    folds: tuple[str | int, ...]
    initial: Callable[[Key, DType], Array]
    part: Callable[[Key, DType, int, int], Array] | None = None
    free: Callable[[Array], Array] | None = None

    def whole(self, keys: Keys, dtype: DType) -> Array:
        """Draw the leaf: behind the axes of the keys, the copies and the shape."""
        return self._freed(for_each_key(lambda key: self._one(key, dtype), keys.of(self.folds)))

    def pieces(self, layout: Layout, keys: Keys, dtype: DType) -> Iterator["Piece"]:
        """Return the pieces of the leaf, which has a place of its own in a layout. They are not drawn yet.

        With several keys the vectors lie one after another.
        """
        key, size = keys.of(self.folds), math.prod(self.shape)
        if not key.size or not size:
            return
        slot = layout[self.path]
        assert isinstance(slot, Slot)
        starts = _starts(slot, size, layout.length, key.size)
        rows = np.asarray(jax.random.key_data(key)).reshape(len(starts), -1)
        impl = jax.random.key_impl(key)
        if size > PIECE and self.part is not None and counts(key):
            for start, row in zip(starts, rows, strict=True):
                one = jax.random.wrap_key_data(jnp.asarray(row), impl=impl)
                yield from self._parts(start, size, one, dtype)
            return
        if not key.ndim:
            yield Piece(starts, size, lambda: self._freed(self._one(key, dtype)))
            return
        draw, count = jax.vmap(lambda key: self._one(key, dtype)), max(PIECE // size, 1)
        for first in range(0, len(starts), count):
            some = jax.random.wrap_key_data(jnp.asarray(rows[first : first + count]), impl=impl)
            yield Piece(starts[first : first + count], size, lambda some=some: self._freed(draw(some)))

    def _parts(self, start: int, size: int, key: Key, dtype: DType) -> Iterator["Piece"]:
        assert self.part is not None
        for first in range(0, size, PIECE):
            last = min(first + PIECE, size)
            draw = functools.partial(self._part, key, dtype, first, last)
            yield Piece(np.asarray([start + first]), last - first, draw)

    def _one(self, key: Key, dtype: DType) -> Array:
        with self._noted():
            return self.initial(key, dtype)

    def _part(self, key: Key, dtype: DType, start: int, stop: int) -> Array:
        assert self.part is not None
        with self._noted():
            return self._freed(self.part(key, dtype, start, stop))

    def _freed(self, values: Array) -> Array:
        return values if self.free is None else self.free(values)

    @contextlib.contextmanager
    def _noted(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            error.add_note(f"in the initial value of the parameter {self.path!r}")
            raise


@dataclasses.dataclass(frozen=True)
class Piece:
    """Numbers that are drawn together: rows of `size` numbers each, which start at increasing places."""

    starts: np.ndarray
    size: int
    draw: Callable[[], Array]

    def rows(self, dtype: DType) -> Array:
        """Draw them, in the shape `(rows, size)`."""
        return jnp.asarray(self.draw(), dtype).reshape(len(self.starts), self.size)


def _starts(slot: Slot, size: int, length: int, count: int) -> np.ndarray:
    """Return where each of `count` copies of `size` numbers starts, in the order of their keys."""
    starts = size * np.arange(slot.size // size)
    for copies, stride in zip(reversed(slot.copies), reversed(slot.strides), strict=True):
        starts = (stride * np.arange(copies)[:, None] + starts[None]).ravel()
    vectors = count // len(starts)
    return (slot.offset + length * np.arange(vectors)[:, None] + starts[None]).ravel()
