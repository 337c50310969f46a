"""An explicit Runge-Kutta method in place of diffrax's own solver, in diffrax's own loop."""

from collections.abc import Callable

import diffrax
import equinox.internal as eqxi
import jax.numpy as jnp

from ..types import Array, PyTree, Y
from ._explicit import ExplicitMethod, Step


class ExplicitSolver:
    """The steps of a method, as diffrax's loop asks for them."""

    def __init__(self, method: ExplicitMethod):
        self.method = method

    @property
    def interpolation_cls(self) -> Callable[..., diffrax.AbstractPath]:
        return self.method.stages.interpolation_cls

    def error_order(self, terms: PyTree) -> PyTree:
        del terms
        return self.method.stages.order

    @property
    def is_chained(self) -> bool:
        """Tell whether a step begins with the field that the one before it ended with."""
        return self.method.last_is_first

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        del terms, args
        start = {}
        if self.is_chained:
            is_first, f0 = solver_state
            # As diffrax does: of samples side by side all make their first stage if one of them has to.
            again = eqxi.unvmap_any(is_first | made_jump)
            start = {"f0": f0, "first": jnp.where(again, 0, 1)}
        step = self.make(t0, t1, y0, **start)
        if self.is_chained:
            solver_state = False, step.f1
        successful = diffrax.RESULTS.successful
        return step.y1, self.method.error(step.ks), step.dense(y0), solver_state, successful

    def make(self, t0: Array, t1: Array, y0: Y, **start: PyTree) -> Step:
        """Make a step with all its stages."""
        return self.method.step(t0, t1, y0, self.method.tableau.num_stages, **start)[0]
