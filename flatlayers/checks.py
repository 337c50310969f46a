"""Errors of a program that runs, which let it be divided over devices."""

import functools
from collections.abc import Callable, Sequence
from typing import TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

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
    token, (leaves, structure) = jnp.zeros((), jnp.float32), jax.tree.flatten(args)
    if any(map(is_traced, leaves)) and AxisType.Manual not in jax.sharding.get_abstract_mesh().axis_types:
        leaves = jax.lax.stop_gradient([jnp.asarray(x) for x in leaves])
        passed = _checked.bind(token, *leaves, check=check, structure=structure) == 0
    else:
        passed = check(token, *args) == 0
    if not is_traced(passed) and passed:
        return tree
    return jax.tree.map(lambda x: _chosen(passed, x) if isinstance(x, jax.Array) else x, tree)


def _check(token: Array, *leaves: Array, check: Callable[..., Array], structure: PyTree) -> Array:
    return check(token, *jax.tree.unflatten(structure, leaves))


def _of_all_samples(
    args: Sequence[Array], axes: Sequence[int | None], **params: PyTree
) -> tuple[Array, None]:
    """Check one number for all samples of `jax.vmap`: whether one is bad, and the worst code of a result."""
    args = [x if axis is None else x.max(axis) for x, axis in zip(args, axes, strict=True)]
    return _checked.bind(*args, **params), None


def _on_each_device(ctx: mlir.LoweringRuleContext, *args: PyTree, **params: PyTree) -> PyTree:
    """Check on all devices of a program: if one alone raised, the others would wait."""
    check = functools.partial(_check, **params)
    # In the part of a device, which has no such number, each has a check of its own.
    number = getattr(ctx.module_context.axis_context, "num_devices", 1)
    if number <= 1:
        return mlir.lower_fun(check, multiple_results=False)(ctx, *args)
    mesh = jax.sharding.get_abstract_mesh()  # that of `jax.set_mesh`
    mesh = AbstractMesh((number,), ("devices",)) if mesh.empty else mesh
    whole = PartitionSpec()
    check = jax.shard_map(check, mesh=mesh, in_specs=whole, out_specs=whole, check_vma=False)
    return mlir.lower_fun(check, multiple_results=False)(ctx, *args)


# How many devices a program has is known when it is lowered: an array that it closes over may lie on several
# ones while it runs on one.
_checked = Primitive("checked")
_checked.def_impl(_check)
_checked.def_abstract_eval(lambda token, *_, **__: token)
batching.primitive_batchers[_checked] = _of_all_samples
mlir.register_lowering(_checked, _on_each_device)


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
