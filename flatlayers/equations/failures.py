"""Numbers that are not finite: an error or a result code of the solve that met them."""

import dataclasses
import functools
from typing import Any, TypeVar

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp

from ..checks import checked_by, error_if
from ..core.values import plain
from ..dtypes import is_traced
from ..types import Array, DType, PyTree, Y


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


@dataclasses.dataclass(frozen=True)
class Failing:
    """Raises the message of the code of a failed solve, one for each code of diffrax's `RESULTS`."""

    messages: tuple[str, ...]

    def __call__(self, token: Array, code: Array, failed: Array) -> Array:
        if is_traced(failed) or is_traced(code):
            return eqx.branched_error_if(token, failed, code, self.messages)
        if failed.any():
            raise RuntimeError(self.messages[int(jnp.where(failed, code, 0).max())])
        return token


def advice(layer: Any, state: DType) -> Failing:
    """Return the messages of a solver layer: the meaning of a code, and on the next line what to change.

    `state`: the dtype of the state.
    """
    eps = float(jnp.finfo(state).eps)
    half = f"; tolerances below the precision of {state}, {eps:.1g}, are never met" if eps > 1e-4 else ""
    constant = isinstance(plain(layer.stepsize_controller), diffrax.ConstantStepSize)
    fewer = (
        "take longer steps (dt0)."
        if constant
        else f"loosen the tolerances (rtol, atol){half}. Steps that stay tiny tell of a stiff equation: an "
        "implicit solver takes long ones, such as solver=diffrax.Kvaerno5()."
    )
    cures = {
        "max_steps_reached": f"Here max_steps={layer.max_steps}: raise it, or {fewer}",
        "dt_min_reached": f"Loosen the tolerances (rtol, atol){half}, or stop before a time where the "
        "solution becomes infinite. A stiff equation needs an implicit solver, such as diffrax.Kvaerno5().",
        "nonfinite": "The solution grew too large, or the model gave NaN: try smaller initial weights, a "
        "nearer t1, or tighter tolerances (with constant steps, a smaller dt0).",
    }
    where, results = type(layer).__name__, diffrax.RESULTS
    known = {jax.tree.leaves(getattr(results, name))[0].item(): cure for name, cure in cures.items()}
    texts = [str(text) for text in results._index_to_message]  # pyright: ignore[reportAttributeAccessIssue]
    firsts = [text.split(" Try increasing")[0] for text in texts]
    return Failing(
        tuple(
            f"{where}: {first}\n{known[code]}" if code in known else f"{where}: {first}"
            for code, first in enumerate(firsts)
        )
    )


def check_solution(solution: diffrax.Solution, y0: Y, failing: Failing | None) -> diffrax.Solution:
    """Return the solution, with the code `nonfinite` if its start, or what it saved, is not finite.

    Steps of any kind can end there, adaptive ones by an overflow. A code of diffrax's own stays, unless the
    start was not finite. With `failing`, all codes but success and that of an event raise its messages.
    """
    throw = failing is not None
    fine = _saved_finite(solution) | ~diffrax.is_okay(solution.result)
    fine = fine if throw else fine & all_finite(y0)  # `check_start` has raised
    result = diffrax.RESULTS.where(fine, solution.result, diffrax.RESULTS.nonfinite)  # pyright: ignore
    solution = eqx.tree_at(lambda s: s.result, solution, result)
    failed = ~diffrax.is_okay(result)
    (code,) = jax.tree.leaves(result)
    return solution if failing is None else checked_by(failing, solution, code, failed)


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
