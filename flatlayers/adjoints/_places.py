"""Places in buffers, which are never negative and always inside, and so need none of the care for others."""

import jax.numpy as jnp
from jax import lax

from ..types import Array, ArrayLike


def get_at(buffer: Array, *place: ArrayLike) -> Array:
    """Return what is at a place of an array, or inside of a loop of what stands for one."""
    return buffer[...].at[place].get(mode="promise_in_bounds", wrap_negative_indices=False)


def quotient(a: Array, b: ArrayLike) -> Array:
    """Return `a // b`."""
    return lax.div(a, jnp.asarray(b, a.dtype))


def remainder(a: Array, b: ArrayLike) -> Array:
    """Return `a % b`."""
    return lax.rem(a, jnp.asarray(b, a.dtype))


def rounded_up(a: Array, b: ArrayLike) -> Array:
    """Return `a / b`, rounded up."""
    return quotient(a + jnp.asarray(b, a.dtype) - 1, b)
