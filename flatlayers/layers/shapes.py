"""What layers say of the shapes they expect, and the broadcasting they share."""

import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp


def check_trailing(x: Any, expected: tuple[int, ...]) -> None:
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


def floating(x: Any) -> jax.Array:
    """`x` as an array of floating numbers: integers in JAX's default float dtype."""
    x = jnp.asarray(x)
    return x if jnp.issubdtype(x.dtype, jnp.inexact) else x.astype(float)


def as_dims(dims: int | Sequence[int]) -> tuple[int, ...]:
    """One size or several, as a tuple."""
    return tuple(map(operator.index, dims if isinstance(dims, Sequence) else (dims,)))


def per_axis(sizes: int | tuple[int, ...], rank: int, where: str) -> tuple[int, ...]:
    """A size for each spatial axis: an integer serves all of them.

    **Raises:** `ValueError` for another number of sizes, which says `where` they are from.
    """
    if not isinstance(sizes, tuple):
        return (sizes,) * rank
    if len(sizes) != rank:
        raise ValueError(f"{where}: expected an integer or {rank} of them, found {sizes}")
    return sizes


def in_common_dtype(*arrays: Any) -> tuple[jax.Array, ...]:
    """The arrays in the dtype that JAX's promotion gives them together."""
    dtype = jnp.result_type(*arrays)
    return tuple(jnp.asarray(array, dtype) for array in arrays)


def as_floating(x: Any) -> jax.Array:
    """`x` as an array. **Raises:** `TypeError` if its numbers are not floating."""
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"expected floating x, found {x.dtype}{list(x.shape)}")
    return x


def as_inexact(x: Any) -> jax.Array:
    """`x` as an array. **Raises:** `TypeError` if its numbers are neither floating nor complex."""
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        raise TypeError(f"expected floating x, found {x.dtype}{list(x.shape)}")
    return x


def as_real(x: Any) -> jax.Array:
    """`x` as an array of numbers with an order. **Raises:** `TypeError` for bools and complex numbers."""
    x = jnp.asarray(x)
    if not (jnp.issubdtype(x.dtype, jnp.floating) or jnp.issubdtype(x.dtype, jnp.integer)):
        raise TypeError(f"expected floating x or integers, found {x.dtype}{list(x.shape)}")
    return x


def at_least_float32(dtype: Any) -> Any:
    """The dtype to compute in: float32 for half precisions, else the dtype itself."""
    return jnp.float32 if jnp.finfo(dtype).bits < 32 else dtype


def real_dtype(dtype: Any) -> Any:
    """The dtype of the real part: of a real dtype the dtype itself."""
    return jnp.finfo(dtype).dtype


def broadcasts_to(shape: Sequence[int], target: Sequence[int]) -> bool:
    """Whether an array of that shape broadcasts to the target, and no further."""
    sizes = zip(reversed(shape), reversed(target), strict=False)
    return len(shape) <= len(target) and all(size in (1, wanted) for size, wanted in sizes)
