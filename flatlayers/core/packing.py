"""Numbers into a vector and out of it again."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from .plan import Leaf, Segment, Shape


def split(segments: tuple[Segment, ...], data: Any, leaves: dict[str, Any]) -> None:
    """Add the leaves of `data` to `leaves`: one split a level of stacks."""
    if not segments:
        return
    lead = tuple(data.shape[:-1])
    # As `(..., 1, n)`, so that the transpose is a concatenation of rows. XLA:CPU fuses a 1-D
    # concatenation into the loop that accumulates a gradient, which makes it up to 100 times
    # slower: see benchmarks/README.md.
    row = jax.lax.reshape(data, (*lead, 1, data.shape[-1]))
    pieces = jax.lax.split(row, [segment.size for segment in segments], axis=len(lead) + 1)
    for segment, piece in zip(segments, pieces, strict=True):
        if isinstance(segment, Leaf):
            leaves[segment.path] = jax.lax.reshape(piece, lead + segment.shape)
        else:
            inner = jax.lax.reshape(piece, (*lead, *segment.copies, segment.length))
            split(segment.segments, inner, leaves)


def join(
    segments: tuple[Segment, ...], leaves: Mapping[str, Any], lead: Shape, concatenate: Callable[..., Any]
) -> Any:
    """The inverse of `split`, with `numpy.concatenate` or JAX's."""
    rows = []
    for segment in segments:
        if isinstance(segment, Leaf):
            row = leaves[segment.path]
        else:
            row = join(segment.segments, leaves, lead + segment.copies, concatenate)
        rows.append(row.reshape(*lead, 1, segment.size))
    if not rows:
        return np.zeros((*lead, 0))
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
    return {path: jnp.asarray(value, dtype) for path, value in leaves.items()}


def check_tied(path: str, value: Any, array: Any, place: str, other: Any, other_array: Any) -> None:
    if value is other:
        return
    if isinstance(array, Tracer) or isinstance(other_array, Tracer):
        raise ValueError(
            f"{path!r} and {place!r} have one place, and whether two traced values are the same "
            "cannot be known: expected the same array for both"
        )
    if not np.array_equal(array, other_array, equal_nan=True):
        raise ValueError(
            f"{path!r} and {place!r} have one place: expected equal values, found different ones"
        )
