"""The dtypes of numbers: questions about them, and conversions."""

from typing import TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from .types import Array, ArrayLike, DType, Key, PyTree


def floating(x: ArrayLike) -> jax.Array:
    """Return `x` as an array of floating numbers: integers in JAX's default float dtype."""
    x = jnp.asarray(x)
    return x if jnp.issubdtype(x.dtype, jnp.inexact) else x.astype(float)


def as_floating(x: ArrayLike) -> jax.Array:
    """Return `x` as an array. **Raises:** `TypeError` if its numbers are not floating."""
    return _of_kinds(x, "floating x", jnp.floating)


def as_inexact(x: ArrayLike) -> jax.Array:
    """Return `x` as an array. **Raises:** `TypeError` if its numbers are neither floating nor complex."""
    return _of_kinds(x, "floating x", jnp.inexact)


def as_real(x: ArrayLike) -> jax.Array:
    """Return `x` as an array of ordered numbers. **Raises:** `TypeError` for bools and complex numbers."""
    return _of_kinds(x, "floating x or integers", jnp.floating, jnp.integer)


def _of_kinds(x: ArrayLike, expected: str, *kinds: type) -> jax.Array:
    x = jnp.asarray(x)
    if not any(jnp.issubdtype(x.dtype, kind) for kind in kinds):
        raise TypeError(f"expected {expected}, found {x.dtype}{list(x.shape)}")
    return x


def in_common_dtype(*arrays: ArrayLike) -> tuple[jax.Array, ...]:
    """Return the arrays in the dtype that JAX's promotion gives them together."""
    dtype = jnp.result_type(*arrays)
    return tuple(jnp.asarray(array, dtype) for array in arrays)


def at_least_float32(dtype: DType) -> DType:
    """Return the dtype to compute in: float32 for half precisions, else the dtype itself."""
    return jnp.float32 if jnp.finfo(dtype).bits < 32 else dtype


def real_dtype(dtype: DType) -> np.dtype:
    """Return the dtype of the real part: of a real dtype the dtype itself."""
    return jnp.finfo(dtype).dtype


def float_dtype(tree: PyTree, default: DType) -> DType:
    """Return the dtype of the first floating array in a pytree."""
    dtypes = map(jnp.result_type, jax.tree.leaves(tree))
    return next((dtype for dtype in dtypes if jnp.issubdtype(dtype, jnp.floating)), default)


def common_real_dtype(*trees: PyTree) -> np.dtype:
    """Return the real dtype that the inexact numbers of pytrees promote to; JAX's own if there are none."""
    inexact = dict.fromkeys(leaf.dtype for leaf in jax.tree.leaves(trees) if is_inexact(leaf))
    return promoted(*(real_dtype(dtype) for dtype in inexact))


def promoted(*dtypes: DType) -> np.dtype:
    """Promote dtypes, whatever promotion is allowed elsewhere; of none, return JAX's own."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*(dtypes or (float,)))


def is_floating(x: object) -> bool:
    """Tell whether it is an array of real floating numbers."""
    return isinstance(x, jax.Array | np.ndarray) and jnp.issubdtype(x.dtype, jnp.floating)


def is_complex(x: Array) -> bool:
    """Tell whether it has complex numbers."""
    return jnp.issubdtype(x.dtype, jnp.complexfloating)


def is_inexact(x: Array) -> bool:
    """Tell whether it has floating or complex numbers."""
    return jnp.issubdtype(x.dtype, jnp.inexact)


def is_traced(x: object) -> bool:
    """Tell whether its numbers are known only when a compiled function runs."""
    return isinstance(x, Tracer)


def is_key(x: object) -> TypeGuard[Key]:
    """Tell whether it is an array of typed PRNG keys."""
    dtype = getattr(x, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)


def is_number(value: object) -> bool:
    """Tell whether it is a Python number, or a list of them: it has no dtype of its own."""
    if isinstance(value, list | tuple):
        return all(map(is_number, value))
    return isinstance(value, int | float) and not isinstance(value, bool | np.generic)
