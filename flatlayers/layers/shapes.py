"""Checks of the shapes that layers expect, and the broadcasting they share."""

import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from ..types import ArrayLike


def check_trailing(x: ArrayLike, expected: tuple[int, ...]) -> None:
    """Raise unless the last axes of `x` are the expected ones."""
    shape = jnp.shape(x)
    if len(shape) < len(expected) or shape[len(shape) - len(expected) :] != expected:
        axes = ", ".join(map(str, expected))
        raise ValueError(f"expected x of shape (..., {axes}), found shape {shape}")


def check_count(found: int, expected: int, what: str) -> None:
    """Raise unless a tuple input has as many parts as there are layers for them."""
    if found != expected:
        raise ValueError(f"expected a tuple of {expected} inputs, one for each {what}, found {found}")


def along_last(parameter: jax.Array, ndim: int) -> jax.Array:
    """Give a parameter leading axes of size 1, so that it broadcasts over batch axes."""
    return jax.lax.expand_dims(parameter, range(ndim - parameter.ndim))


def as_dims(dims: int | Sequence[int]) -> tuple[int, ...]:
    """Return one size or several as a tuple."""
    return tuple(map(operator.index, dims if isinstance(dims, Sequence) else (dims,)))


def per_axis(sizes: int | tuple[int, ...], rank: int, where: str) -> tuple[int, ...]:
    """Return a size for each spatial axis: an integer serves all of them.

    **Raises:** `ValueError` for another number of sizes, which says `where` they are from.
    """
    if not isinstance(sizes, tuple):
        return (sizes,) * rank
    if len(sizes) != rank:
        raise ValueError(f"{where}: expected an integer or {rank} of them, found {sizes}")
    return sizes


def broadcasts_to(shape: Sequence[int], target: Sequence[int]) -> bool:
    """Tell whether an array of that shape broadcasts to the target, and no further."""
    sizes = zip(reversed(shape), reversed(target), strict=False)
    return len(shape) <= len(target) and all(size in (1, wanted) for size, wanted in sizes)
