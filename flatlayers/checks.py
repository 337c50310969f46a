"""Errors of a program that runs, which let it be divided over devices."""

from collections.abc import Callable
from typing import TypeVar

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec

from .dtypes import is_traced
from .types import Array, PyTree


T = TypeVar("T", bound=PyTree)


def error_if(tree: T, bad: Array, message: str) -> T:
    """Return `tree`; as `equinox.error_if`, raise if `bad` when the program runs."""
    return checked_by(lambda token, bad: eqx.error_if(token, bad, message), tree, bad)


def raising(token: Array, result: PyTree, failed: Array) -> Array:
    """Return `token`; raise the message of a result of diffrax or optimistix if the solve `failed`."""
    return result.error_if(token, failed)


def checked_by(check: Callable[..., Array], tree: T, *args: PyTree) -> T:
    """Return `tree`, bit for bit, if `check(token, *args)` lets a number through.

    An error is raised on the host, by a callback that runs on one device. If an array went through it, XLA
    would have it on this device alone, and all that is computed from it whole on each: a solve of a batch
    that lies on several devices would not be divided. So a scalar goes there, and the arrays are chosen by
    it. That they always are, nothing but the check knows: else they would be what Equinox gives where it
    does not raise, such as NaN.
    """
    passed = _on_each_device(check, tree, args)(jnp.zeros((), jnp.float32), *args) == 0
    if not is_traced(passed) and passed:
        return tree
    return jax.tree.map(lambda x: _chosen(passed, x) if isinstance(x, jax.Array) else x, tree)


def _on_each_device(check: Callable[..., Array], tree: PyTree, args: PyTree) -> Callable[..., Array]:
    """Return the check for all devices that the arrays are on: if one alone raised, the others would wait."""
    kinds: list[PyTree] = [jax.typeof(x) for x in jax.tree.leaves((args, tree)) if isinstance(x, jax.Array)]
    mesh = next((kind.sharding.mesh for kind in kinds if not kind.sharding.mesh.empty), None)
    if mesh is None or AxisType.Manual in mesh.axis_types or not any(map(is_traced, jax.tree.leaves(args))):
        return check
    whole = PartitionSpec()

    def on_each(token: Array, *args: PyTree) -> Array:
        args = jax.tree.map(_of_all_samples, args)
        divided = jax.shard_map(check, mesh=mesh, in_specs=whole, out_specs=whole, check_vma=False)
        return divided(token, *args)

    return on_each


def _of_all_samples(x: Array) -> Array:
    """Return one number for all samples of `jax.vmap`: whether one is bad, and the worst code of a result."""
    x = jnp.asarray(x)
    return eqxi.unvmap_any(x) if x.dtype == np.bool_ else eqxi.unvmap_max(x)


def _chosen(passed: Array, x: Array) -> Array:
    other = _like_an_error(x.dtype)
    return x if other is None else jax.lax.select(passed, x, jnp.full_like(x, other))


def _like_an_error(dtype: np.dtype) -> float | int | bool | None:
    """Return what Equinox gives in the place of a number; `None` for what is no number, such as a key."""
    if jnp.issubdtype(dtype, jnp.inexact):
        return np.nan
    if jnp.issubdtype(dtype, jnp.integer):
        return int(jnp.iinfo(dtype).max)
    return True if dtype == np.bool_ else None
