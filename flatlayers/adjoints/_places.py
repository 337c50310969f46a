"""Arithmetic of places in buffers, which are never negative: without the care that others need."""

import jax.numpy as jnp
from jax import lax

from ..types import Array, ArrayLike


def quotient(a: Array, b: ArrayLike) -> Array:
    """Return `a // b`."""
    return lax.div(a, jnp.asarray(b, a.dtype))


def remainder(a: Array, b: ArrayLike) -> Array:
    """Return `a % b`."""
    return lax.rem(a, jnp.asarray(b, a.dtype))


def rounded_up(a: Array, b: ArrayLike) -> Array:
    """Return `a / b`, rounded up."""
    return quotient(a + jnp.asarray(b, a.dtype) - 1, b)
