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


def per_axis(value: Any, rank: int, name: str, least: int = 0) -> tuple[int, ...]:
    """A size for each spatial axis: an integer serves all of them.

    **Raises:** `TypeError` for other kinds, `ValueError` for another number of sizes or one under `least`.
    """
    sizes = (value,) * rank if isinstance(value, int) else value
    if not isinstance(sizes, tuple | list) or not all(isinstance(size, int) for size in sizes):
        raise TypeError(f"expected {name} to be an integer or a tuple of integers, found {value!r}")
    if len(sizes) != rank or min(sizes, default=least) < least:
        count = f"an integer or {rank} of them" if rank != 1 else "one integer"
        raise ValueError(f"expected {name} to be {count}, at least {least}, found {value!r}")
    return tuple(sizes)


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


def at_least_float32(dtype: Any) -> Any:
    """The dtype to compute in: float32 for half precisions, else the dtype itself."""
    return jnp.float32 if jnp.finfo(dtype).bits < 32 else dtype


def broadcasts_to(shape: Sequence[int], target: Sequence[int]) -> bool:
    """Whether an array of that shape broadcasts to the target, and no further."""
    sizes = zip(reversed(shape), reversed(target), strict=False)
    return len(shape) <= len(target) and all(size in (1, wanted) for size, wanted in sizes)
