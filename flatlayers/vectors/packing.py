"""Numbers into the array of a vector."""

import contextlib
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from ..dtypes import is_number, is_traced
from ..types import Array, DType, Shape
from .layout import Layout


def pack(layout: Layout, leaves: Mapping[str, object], dtype: DType | None) -> Array:
    """Return the array of the values of all leaves, by path: as `ComponentVector.of` does with a tree."""
    arrays = _in_one_dtype(leaves, dtype)
    lead = _leading_axes(arrays, layout.view_shapes)
    for path, place in layout.ties.items():
        if leaves[path] is not leaves[place]:
            _check_tied(path, arrays[path], place, arrays[place])
    dtype = next((array.dtype for array in arrays.values()), dtype)
    return layout.join(arrays, lead, dtype, jnp)


def write_rows(buffer: Array, rows: Array, starts: np.ndarray) -> Array:
    """Return an array with rows of numbers written into it, each from its start on. It is given up.

    Starts count all its numbers, those of leading axes too.
    """
    # The type of a place that is far behind is made for this program alone.
    wide = buffer.size > np.iinfo(np.int32).max
    with jax.enable_x64(True) if wide else contextlib.nullcontext():
        return _write_rows(buffer, rows, starts.astype(np.int64 if wide else np.int32))


@functools.partial(jax.jit, donate_argnums=0)
def _write_rows(buffer: Array, rows: Array, starts: Array) -> Array:
    def write(i: Array | int, buffer: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(buffer, rows[i], starts[i], axis=0)

    flat = buffer.reshape(-1)
    flat = write(0, flat) if len(rows) == 1 else jax.lax.fori_loop(0, len(rows), write, flat)
    return flat.reshape(buffer.shape)


def _in_one_dtype(leaves: Mapping[str, object], dtype: DType | None) -> dict[str, Array]:
    if dtype is None:
        kinds = {path: jnp.asarray(value).dtype for path, value in leaves.items() if not is_number(value)}
        for path, kind in kinds.items():
            if not jnp.issubdtype(kind, jnp.inexact):
                raise TypeError(f"expected floating numbers for {path!r}, found {kind}; `dtype=` converts")
        if len(set(kinds.values())) > 1:
            first = next(iter(kinds))
            path = next(path for path in kinds if kinds[path] != kinds[first])
            raise TypeError(
                f"expected one dtype, found {kinds[first]} for {first!r} and {kinds[path]} for "
                f"{path!r}; `dtype=` converts"
            )
        dtype = next(iter(kinds.values()), jnp.result_type(float))
    # NumPy's arrays are copied: a vector's numbers are its own.
    return {
        path: jnp.array(value, dtype) if isinstance(value, np.ndarray) else jnp.asarray(value, dtype)
        for path, value in leaves.items()
    }


def _leading_axes(arrays: Mapping[str, Array], shapes: Mapping[str, Shape]) -> Shape:
    """Return the axes in front of the expected shapes, if they are the same for all arrays."""
    lead: Shape | None = None
    for path, array in arrays.items():
        split = array.ndim - len(shapes[path])
        front, back = array.shape[: max(split, 0)], array.shape[max(split, 0) :]
        if back != shapes[path] or front != (front if lead is None else lead):
            behind = f" behind the leading axes {lead}" if lead else ""
            raise ValueError(f"expected shape {shapes[path]} for {path!r}{behind}, found shape {array.shape}")
        lead = front
    return lead or ()


def _check_tied(path: str, array: Array, place: str, other: Array) -> None:
    if is_traced(array) or is_traced(other):
        return  # not known before it runs
    if not np.array_equal(array, other, equal_nan=True):
        raise ValueError(
            f"{path!r} and {place!r} have one place: expected equal values, found different ones"
        )


def broadcast_to_part(value: object, shape: Shape, dtype: DType, path: str) -> Array:
    """Return a value, broadcast to the shape of the part at `path`."""
    array = jnp.asarray(value, dtype if is_number(value) else None)
    try:
        return jnp.broadcast_to(array, shape)
    except ValueError:
        raise ValueError(
            f"expected a value that broadcasts to {shape} for {path!r}, found shape {array.shape}"
        ) from None
