"""Errors of a program that runs, which let it be divided over devices."""

from collections.abc import Callable
from typing import TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from .dtypes import is_traced
from .types import Array, PyTree


T = TypeVar("T", bound=PyTree)


def error_if(tree: T, bad: Array, message: str) -> T:
    """Return `tree`; as `equinox.error_if`, raise if `bad` when the program runs."""
    return checked_by(lambda token: eqx.error_if(token, bad, message), tree)


def checked_by(check: Callable[[Array], Array], tree: T) -> T:
    """Return `tree`, bit for bit, if `check` lets a number through; what uses the one waits for the other.

    An error is raised on the host, by a callback that runs on one device. If an array went through it, XLA
    would have it on this device alone, and all that is computed from it whole on each: a solve of a batch
    that lies on several devices would not be divided. So a scalar goes there, and the arrays are chosen by
    it. That they always are, nothing but the check knows: else they would be what Equinox gives where it
    does not raise, such as NaN.
    """
    passed = check(jnp.zeros((), jnp.float32)) == 0
    if not is_traced(passed) and passed:
        return tree
    return jax.tree.map(lambda x: _chosen(passed, x) if isinstance(x, jax.Array) else x, tree)


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
