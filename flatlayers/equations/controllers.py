"""Step size controllers as a solve needs them: tolerances that can be reached, and an end of every solve."""

from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ..types import Array, PyTree
from .solver_dtypes import Dtypes


Adaptive = diffrax.AbstractAdaptiveStepSizeController


def fitted(
    controller: diffrax.AbstractStepSizeController, dtypes: Dtypes, max_steps: int | None
) -> diffrax.AbstractStepSizeController:
    """Return the controller with arrays of the solver's dtype and tolerances for the state's.

    With adaptive steps and without `max_steps` it has an end of its own, by `Halting`.
    """
    controller = dtypes.options(controller)
    eps = float(jnp.finfo(dtypes.state).eps)
    if eps > jnp.finfo(jnp.float32).eps:
        controller = _with_least_rtol(controller, eps / 4)
    if max_steps is None and isinstance(controller, Adaptive):
        return Halting(controller)
    return controller


def _with_least_rtol(
    controller: diffrax.AbstractStepSizeController, least: float
) -> diffrax.AbstractStepSizeController:
    """Return the controller with a relative tolerance of at least `least`.

    Below a quarter of a half precision's epsilon (measured), the steps follow the model's rounding. An
    absolute tolerance stays as it is: a state may well be small.
    """

    def is_pid(x: object) -> bool:
        return isinstance(x, diffrax.PIDController)

    def raised(x: PyTree) -> PyTree:
        return eqx.tree_at(lambda c: c.rtol, x, jnp.maximum(x.rtol, least)) if is_pid(x) else x

    return jax.tree.map(raised, controller, is_leaf=is_pid)


class Halting(Adaptive):
    """An adaptive controller that ends the solve where a step is too short to change the time, or is NaN.

    Without `max_steps` such a solve, of a solution that becomes infinite, would never end.
    """

    controller: diffrax.AbstractStepSizeController

    def __init__(self, controller: diffrax.AbstractStepSizeController):
        self.controller = controller

    @property
    def rtol(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.controller.rtol  # pyright: ignore

    @property
    def atol(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.controller.atol  # pyright: ignore

    @property
    def norm(self) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.controller.norm  # pyright: ignore

    def wrap(self, direction: int | np.ndarray | Array) -> "Halting":
        return Halting(self.controller.wrap(direction))

    def init(self, *args: Any, **kwargs: Any) -> Any:
        return self.controller.init(*args, **kwargs)

    def adapt_step_size(self, t0: Array, t1: Array, *args: Any, **kwargs: Any) -> Any:
        keep, new_t0, new_t1, *rest, result = self.controller.adapt_step_size(t0, t1, *args, **kwargs)
        # Of a few units of the last place, a rejected step may round to the same again.
        shorter = (new_t1 < t1) | (t1 - t0 > 100 * jnp.finfo(t0.dtype).eps * abs(t0))
        moves = (new_t1 > new_t0) & (keep | shorter)
        result = diffrax.RESULTS.where(moves, result, diffrax.RESULTS.dt_min_reached)  # pyright: ignore
        return keep, new_t0, new_t1, *rest, result
