"""Numbers into a vector and out of it again."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from .names import NamedArray, UnknownNameError, join_path, listing, unknown_name
from .places import Leaf, Segment, Shape


if TYPE_CHECKING:
    from .layout import Layout


def split(segments: tuple[Segment, ...], data: Any, leaves: dict[str, Any]) -> None:
    """Add the leaves of `data` to `leaves`: one split a level of stacks."""
    if not segments:
        return
    lead = tuple(data.shape[:-1])
    row = jax.lax.reshape(data, (*lead, *_row_axis(segments), data.shape[-1]))
    pieces = jax.lax.split(row, [segment.size for segment in segments], axis=row.ndim - 1)
    for segment, piece in zip(segments, pieces, strict=True):
        if isinstance(segment, Leaf):
            leaves[segment.path] = jax.lax.reshape(piece, lead + segment.shape)
        else:
            inner = jax.lax.reshape(piece, (*lead, *segment.copies, segment.length))
            split(segment.segments, inner, leaves)


def _row_axis(segments: tuple[Segment, ...]) -> Shape:
    """The axis of size 1 in front of the numbers, where they are split and concatenated as rows.

    The transpose of a split is a concatenation. XLA:CPU fuses a 1-D concatenation of 8 operands or
    fewer into what consumes it, such as the loop that accumulates a gradient, which makes it up to
    100 times slower; rows it does not fuse. See benchmarks/README.md.
    """
    return (1,) if len(segments) <= 8 else ()


def join(
    segments: tuple[Segment, ...],
    leaves: Mapping[str, Any],
    lead: Shape,
    dtype: Any,
    concatenate: Callable[..., Any],
) -> Any:
    """The inverse of `split` for leaves of one dtype, with `numpy.concatenate` or JAX's."""
    rows = []
    for segment in segments:
        if isinstance(segment, Leaf):
            row = leaves[segment.path]
        else:
            row = join(segment.segments, leaves, lead + segment.copies, dtype, concatenate)
        rows.append(row.reshape(*lead, *_row_axis(segments), segment.size))
    if not rows:
        return np.zeros((*lead, 0), dtype)
    whole = concatenate(rows, axis=-1)
    return whole.reshape(*lead, whole.shape[-1])


def view(segments: tuple[Segment, ...], data: Any, path: str) -> jax.Array:
    """The leaf at `path` alone: a slice of `data` a level of stacks."""
    inside = [s for s in segments if s.path in ("", path) or path.startswith(s.path + ".")]
    segment = inside[0]
    piece = jax.lax.slice_in_dim(data, segment.start, segment.start + segment.size, axis=-1)
    if isinstance(segment, Leaf):
        return piece
    inner = piece.reshape(*data.shape[:-1], *segment.copies, segment.length)
    return view(segment.segments, inner, path)


def is_number(value: Any) -> bool:
    """A Python number, or a list of them: it has no dtype of its own."""
    if isinstance(value, list | tuple):
        return all(map(is_number, value))
    return isinstance(value, int | float) and not isinstance(value, bool | np.generic)


def same_dtype(leaves: Mapping[str, Any], dtype: Any) -> dict[str, jax.Array]:
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


def check_tied(path: str, value: Any, array: Any, place: str, other: Any, other_array: Any) -> None:
    if value is other:
        return
    if isinstance(array, Tracer) or isinstance(other_array, Tracer):
        return  # not known before it runs
    if not np.array_equal(array, other_array, equal_nan=True):
        raise ValueError(
            f"{path!r} and {place!r} have one place: expected equal values, found different ones"
        )


def leaves_of(layout: "Layout", tree: Any, prefix: str = "") -> dict[str, Any]:
    """The values of a nested mapping by path, if it has the names of the layout."""
    if isinstance(tree, NamedArray):
        tree = tree.layout.unpack(tree.data)
    if not isinstance(tree, Mapping):
        where = f" at {prefix!r}" if prefix else ""
        raise TypeError(
            f"expected a mapping{where} with the names {listing(layout)}, found {type(tree).__name__}"
        )
    for name in tree:
        if name not in layout.entries:
            path = join_path(prefix, str(name))
            raise UnknownNameError(f"{path!r}: {unknown_name(str(name), layout.entries)}")
    leaves = {}
    for name, child in layout.entries.items():
        path = join_path(prefix, name)
        if name not in tree:
            raise UnknownNameError(f"expected a value for {path!r}, found none; there are: {listing(tree)}")
        if isinstance(child, tuple):
            leaves[name] = tree[name]
        else:
            below = leaves_of(child, tree[name], path)
            leaves |= {join_path(name, inner): value for inner, value in below.items()}
    return leaves


def leading_axes(arrays: Mapping[str, jax.Array], shapes: Mapping[str, Shape]) -> Shape:
    """The axes in front of the expected shapes, if they are the same for all arrays."""
    lead: Shape | None = None
    for path, array in arrays.items():
        split = array.ndim - len(shapes[path])
        front, back = array.shape[: max(split, 0)], array.shape[max(split, 0) :]
        if back != shapes[path] or front != (front if lead is None else lead):
            behind = f" behind the leading axes {lead}" if lead else ""
            raise ValueError(f"expected shape {shapes[path]} for {path!r}{behind}, found shape {array.shape}")
        lead = front
    return lead or ()
