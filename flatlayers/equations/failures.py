"""Numbers that are not finite: an error or a result code of the solve that met them."""

import functools
from typing import TypeVar

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp

from ..checks import checked_by, error_if, raising
from ..dtypes import is_traced
from ..types import Array, PyTree, Y


T = TypeVar("T")


def require(ok: Array, message: str, token: T) -> T:
    """Return `token`, a pytree of arrays.

    **Raises:** unless `ok`: `ValueError` if that is known, else Equinox's error at run time.
    """
    if is_traced(ok):
        return error_if(token, ~ok, message)
    if not ok:
        raise ValueError(message)
    return token


def check_start(y0: Y, throw: bool) -> Y:
    """Return `y0` as arrays. With `throw`, numbers that are not finite raise."""
    y0 = jax.tree.map(jnp.asarray, y0)
    if not throw or not jax.tree.leaves(y0):
        return y0
    return require(all_finite(y0), "expected an initial state of finite numbers, found NaN or infinity", y0)


def check_solution(solution: diffrax.Solution, y0: Y, throw: bool) -> diffrax.Solution:
    """Return the solution, with the code `nonfinite` if its start, or what it saved, is not finite.

    Steps of any kind can end there, adaptive ones by an overflow. A code of diffrax's own stays, unless the
    start was not finite. With `throw`, all codes but success and that of an event raise.
    """
    fine = _saved_finite(solution) | ~diffrax.is_okay(solution.result)
    fine = fine if throw else fine & all_finite(y0)  # `check_start` has raised
    result = diffrax.RESULTS.where(fine, solution.result, diffrax.RESULTS.nonfinite)  # pyright: ignore
    solution = eqx.tree_at(lambda s: s.result, solution, result)
    failed = ~diffrax.is_okay(result)
    return checked_by(raising, solution, result, failed) if throw else solution


def _saved_finite(solution: diffrax.Solution) -> Array | bool:
    """Tell whether all that was saved is finite; after the end, times and values are infinite."""
    if solution.ys is None:
        return all_finite(solution.evaluate(solution.t1)) if solution.interpolation is not None else True

    def until_end(t: Array, y: Array) -> Array:
        return jnp.where(jnp.isfinite(jnp.expand_dims(t, range(1, y.ndim))), y, jnp.zeros_like(y))

    values = jax.tree.map(
        lambda t, ys: jax.tree.map(functools.partial(until_end, t), ys), solution.ts, solution.ys
    )
    return all_finite(values)


def all_finite(tree: PyTree) -> Array:
    """Tell whether all floating numbers of a pytree are finite."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return functools.reduce(jnp.logical_and, [jnp.isfinite(leaf).all() for leaf in leaves], jnp.array(True))
