"""Step size controllers as a solve needs them: tolerances that can be reached, and an end of every solve."""

from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp

from .solver_dtypes import Dtypes


Adaptive = diffrax.AbstractAdaptiveStepSizeController


def fitted(controller: Any, dtypes: Dtypes, max_steps: int | None) -> Any:
    """The controller with arrays of the solver's dtype, tolerances for the state's, and an end of its own.

    The end is for adaptive steps without `max_steps`: `Halting`.
    """
    controller = dtypes.options(controller)
    eps = float(jnp.finfo(dtypes.state).eps)
    if eps > jnp.finfo(jnp.float32).eps:
        controller = _with_least_rtol(controller, eps / 4)
    if max_steps is None and isinstance(controller, Adaptive):
        return Halting(controller)
    return controller


def _with_least_rtol(controller: Any, least: float) -> Any:
    """Below a quarter of a half precision's epsilon (measured), the steps follow the model's rounding.

    An absolute tolerance stays as it is: a state may well be small.
    """

    def is_pid(x: Any) -> bool:
        return isinstance(x, diffrax.PIDController)

    def raised(x: Any) -> Any:
        return eqx.tree_at(lambda c: c.rtol, x, jnp.maximum(x.rtol, least)) if is_pid(x) else x

    return jax.tree.map(raised, controller, is_leaf=is_pid)


class Halting(Adaptive):
    """An adaptive controller that ends the solve where a step is too short to change the time, or is NaN.

    Without `max_steps` such a solve, of a solution that becomes infinite, would never end.
    """

    controller: Any

    def __init__(self, controller: Any):
        self.controller = controller

    @property
    def rtol(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.controller.rtol

    @property
    def atol(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.controller.atol

    @property
    def norm(self) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.controller.norm

    def wrap(self, direction: Any) -> "Halting":
        return Halting(self.controller.wrap(direction))

    def init(self, *args: Any, **kwargs: Any) -> Any:
        return self.controller.init(*args, **kwargs)

    def adapt_step_size(self, t0: Any, t1: Any, *args: Any, **kwargs: Any) -> Any:
        keep, new_t0, new_t1, *rest, result = self.controller.adapt_step_size(t0, t1, *args, **kwargs)
        # Of a few units of the last place, a rejected step may round to the same again.
        shorter = (new_t1 < t1) | (t1 - t0 > 100 * jnp.finfo(t0.dtype).eps * abs(t0))
        moves = (new_t1 > new_t0) & (keep | shorter)
        stopped: Any = diffrax.RESULTS.dt_min_reached
        return keep, new_t0, new_t1, *rest, diffrax.RESULTS.where(moves, result, stopped)
