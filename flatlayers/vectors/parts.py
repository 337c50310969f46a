"""One part out of the array of a vector, and into it: by slices alone, however far behind it lies."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..dtypes import is_inexact, is_number, is_traced
from ..types import Array, ArrayLike, Shape
from .layout import Layout
from .names import describe
from .places import Slot
from .segments import Block, Segment, join


@dataclasses.dataclass(frozen=True)
class Region:
    """`size` numbers from `start` on, taken apart into copies of `length` if it is a stack."""

    start: int
    size: int
    copies: Shape = ()
    length: int = 0


def too_long(length: int) -> bool:
    """Tell whether a vector has places that JAX's integers do not count up to."""
    return length > np.iinfo(jnp.result_type(int)).max


@functools.lru_cache(maxsize=1024)
def regions_of(layout: Layout, path: str) -> tuple[Region, ...] | None:
    """Return the stacks that lead to a part, outermost first, and its region in each of their copies.

    It is `None` for a group with a name that is tied to a place outside: its numbers are no region.
    """
    part, place = layout[path], layout.ties.get(path, path)
    if isinstance(part, Slot) and not part.copies:
        return (Region(part.offset, part.size),)
    segments, found = layout._segments, []
    while block := next((s for s in segments if isinstance(s, Block) and _encloses(s, place)), None):
        found.append(Region(block.start, block.size, block.copies, block.length))
        segments = block.segments
    inside = [s for s in segments if s.path == place or s.path.startswith(place + ".")]
    size = sum(segment.size for segment in inside)
    length = math.prod((part.size, *part.copies)) if isinstance(part, Slot) else part.length
    if size * math.prod(math.prod(region.copies) for region in found) != length:
        return None
    return (*found, Region(inside[0].start if inside else 0, size))


def _encloses(segment: Segment, path: str) -> bool:
    return segment.path == "" or path.startswith(segment.path + ".")


def of_numbers(f: Callable[[Any], Any], data: Any) -> Any:
    """Return `f(data)`; where the data are abstract, a `jax.ShapeDtypeStruct` of each array of it."""
    return jax.eval_shape(f, data) if isinstance(data, jax.ShapeDtypeStruct) else f(data)


def of_arrays(f: Callable[[Any, Any], Any], a: Any, b: Any) -> Any:
    """Return `f(a, b)`; where one of both is abstract, a `jax.ShapeDtypeStruct`."""
    return jax.eval_shape(f, a, b) if jax.ShapeDtypeStruct in (type(a), type(b)) else f(a, b)


def part_of(layout: Layout, data: Array, path: str) -> Array:
    """Return the numbers of a leaf or a group, in its order, behind the leading axes."""
    regions = regions_of(layout, path)
    if regions is not None:
        return _taken(data, regions)
    if not too_long(layout.length):
        return jnp.take(data, layout.indices(path), axis=-1)
    group, lead = layout[path], data.shape[:-1]
    assert isinstance(group, Layout)
    leaves = {leaf: leaf_of(layout, data, f"{path}.{leaf}") for leaf in group.view_shapes}
    return join(group._segments, leaves, lead, data.dtype, jnp)


def leaf_of(layout: Layout, data: Array, path: str) -> Array:
    """Return the leaf at `path` alone, by a slice of `data` per level of stacks."""
    regions = regions_of(layout, path)
    assert regions is not None
    return _taken(data, regions, layout.view_shapes[path])


def pick_of(layout: Layout, data: Array, picked: Layout) -> Array:
    """Return the numbers of a layout that has some of the leaves of another, by the same paths."""
    if too_long(layout.length):
        leaves = {path: leaf_of(layout, data, path) for path in picked.view_shapes}
        return join(picked._segments, leaves, data.shape[:-1], data.dtype, jnp)
    where = np.empty(picked.length, int)
    for path, slot in picked.slots():
        mine = layout[path]
        assert isinstance(mine, Slot)
        where[slot.positions()] = mine.positions()
    return jnp.take(data, where, axis=-1)


def leaves_one_by_one(layout: Layout, data: Array) -> dict[str, Array] | None:
    """Return all leaves by path, each taken by a program for its shape; `None` where one split is better.

    A split of many leaves is compiled for seconds, as long as a piece of code for each takes.
    """
    if len(layout._segments) <= _FEW or not _is_at_hand(data):
        return None
    return {path: leaf_of(layout, data, path) for path in layout.view_shapes if path not in layout.ties}


_FEW = 32


def _taken(data: Array, regions: tuple[Region, ...], shape: Shape | None = None) -> Array:
    """Return the numbers of a region, of a `shape` behind the leading axes."""
    starts = tuple(region.start for region in regions)
    if not _is_at_hand(data):
        return _slices(data, starts, regions, shape)
    # One program serves all parts of a shape: their starts are arguments.
    kind = jnp.result_type(int).type
    regions = tuple(dataclasses.replace(region, start=0) for region in regions)
    return _slices_compiled(data, tuple(map(kind, starts)), regions, shape)


def _is_at_hand(data: Array) -> bool:
    """Tell whether numbers are known, on one device, and few enough to be counted."""
    known = isinstance(data, jax.Array) and not is_traced(data)
    return known and len(data.sharding.device_set) == 1 and not too_long(data.shape[-1])


def _slices(data: Array, starts: tuple[Any, ...], regions: tuple[Region, ...], shape: Shape | None) -> Array:
    lead, copies = data.shape[:-1], math.prod(math.prod(region.copies) for region in regions)
    for start, region in zip(starts, regions, strict=True):
        if isinstance(start, int):
            data = jax.lax.slice_in_dim(data, start, start + region.size, axis=-1)
        else:
            data = jax.lax.dynamic_slice_in_dim(data, start, region.size, axis=-1)
        if region.copies:
            data = data.reshape(*data.shape[:-1], *region.copies, region.length)
    return data.reshape(*lead, *((copies * regions[-1].size,) if shape is None else shape))


_slices_compiled = jax.jit(_slices, static_argnames=("regions", "shape"), inline=True)


def changed_part(layout: Layout, data: Array, path: str, method: str, value: ArrayLike) -> Array:
    """Return the array with the part at `path` changed by `value`, which broadcasts to its numbers.

    `method` is one of those of `v.at[...]`: "set", "add", "multiply".
    """
    regions = regions_of(layout, path)
    if regions is not None:
        return _changed_in(data, regions, method, value)
    if too_long(layout.length):
        raise ValueError(
            f"{path!r} has names that are tied to places outside of it: change its leaves one by one, since "
            f"JAX counts up to {_largest()} only"
        )
    return getattr(data.at[..., layout.indices(path)], method)(value)


def changed_at(data: Array, index: Any, method: str, value: ArrayLike) -> Array:
    """Return the array with the numbers at an index of it changed by `value`."""
    if not too_long(data.shape[-1]):
        return getattr(data.at[index], method)(value)
    region, _ = _region_at(data.shape[-1], index)
    return _changed_in(data, (region,), method, value)


def numbers_at(data: Array, index: Any) -> Array:
    """Return `data[index]`."""
    # Data that is no array, such as an axis under `jax.vmap`, says itself what is wrong.
    shape = getattr(data, "shape", ())
    if index is Ellipsis or not shape or not too_long(shape[-1]):
        return data[index]
    region, is_one = _region_at(data.shape[-1], index)
    piece = _taken(data, (region,))
    return piece.reshape(data.shape[:-1]) if is_one else piece


def _region_at(length: int, index: Any) -> tuple[Region, bool]:
    """Return the region that an index along the last axis means, and whether it is one number."""
    key = slice(None) if index is Ellipsis else index[-1]
    if isinstance(key, slice) and key.step in (None, 1):
        start, stop, _ = key.indices(length)
        return Region(start, max(stop - start, 0)), False
    if isinstance(key, int | np.integer) and not isinstance(key, bool):
        if not -length <= key < length:
            raise IndexError(f"expected a position below {length}, found {key}")
        return Region(int(key) % length, 1), True
    raise ValueError(
        f"of a vector of {length} numbers expected a name, an integer or a slice without a step, found "
        f"{describe(key)}: JAX counts up to {_largest()} only, unless jax.enable_x64(True) says otherwise"
    )


def _largest() -> int:
    return np.iinfo(jnp.result_type(int)).max


def _changed_in(data: Array, regions: tuple[Region, ...], method: str, value: ArrayLike) -> Array:
    value = jnp.asarray(value, data.dtype if is_number(value) and is_inexact(data) else None)
    starts = tuple(region.start for region in regions)
    if too_long(data.shape[-1]):
        return _changed_by_joining(data, value, starts, regions, method)
    # One program serves all parts of a shape: their starts are arguments.
    kind = jnp.result_type(int).type
    shapes = tuple(dataclasses.replace(region, start=0) for region in regions)
    return _changed_in_place(data, value, tuple(map(kind, starts)), shapes, method)


def _changed(
    data: Array, value: Array, starts: tuple[Any, ...], shapes: tuple[Region, ...], method: str
) -> Array:
    (start, *starts_below), (region, *below) = starts, shapes
    if isinstance(start, int):
        piece = jax.lax.slice_in_dim(data, start, start + region.size, axis=-1)
    else:
        piece = jax.lax.dynamic_slice_in_dim(data, start, region.size, axis=-1)
    if below:
        copies = piece.reshape(*data.shape[:-1], *region.copies, region.length)
        if value.ndim:
            value = value.reshape(*copies.shape[:-1], value.size // math.prod(copies.shape[:-1]))
        new = _changed(copies, value, tuple(starts_below), tuple(below), method).reshape(piece.shape)
    else:
        new = _combined(piece, method, value)
    return _placed(data, new, start)


def _combined(old: Array, method: str, value: Array) -> Array:
    if old.dtype != value.dtype:
        # With JAX's own errors and warnings about dtypes.
        return getattr(old.at[...], method)(value)
    value = jnp.broadcast_to(value, old.shape)
    return {"set": lambda: value, "add": lambda: old + value, "multiply": lambda: old * value}[method]()


def _placed(data: Array, new: Array, start: Any) -> Array:
    if not isinstance(start, int):
        return jax.lax.dynamic_update_slice_in_dim(data, new, start, axis=-1)
    axis, stop = data.ndim - 1, start + new.shape[-1]
    before = jax.lax.slice_in_dim(data, 0, start, axis=axis)
    behind = jax.lax.slice_in_dim(data, stop, data.shape[-1], axis=axis)
    return jax.lax.concatenate([before, new, behind], axis)


_changed_in_place = jax.jit(_changed, static_argnames=("shapes", "method"), inline=True)
_changed_by_joining = jax.jit(_changed, static_argnames=("starts", "shapes", "method"), inline=True)
