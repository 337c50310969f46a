"""Steps of any solver, made again: alone, or with their vjps.

`ExplicitSteps` does the same for explicit Runge-Kutta methods, faster. In both a `start` is the pair of
`y` and the solver's state, which is `None` if it is not carried from step to step; `params` are what
the steps depend on.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from ._diffrax import FrozenSolver
from ._outputs import zeros


class TracedSteps:
    """Steps by diffrax's `solver.step`."""

    def __init__(self, solver: FrozenSolver, perturbed: FrozenSolver, record: Any, solver_state: Any):
        self.solver, self.record, self.solver_state = solver, record, solver_state
        self.params, self.rest = eqx.partition(solver, perturbed)

    def zeros(self) -> Any:
        return zeros(self.params)

    def finish(self, total: Any) -> tuple[Any, Any]:
        """The cotangents of `Problem.solver` and `Problem.stages` from what was added up over the steps."""
        return total, None

    def advance(self, i: Any, start: Any) -> Any:
        """The start of step `i + 1`."""
        y1, _, solver_state = self._step(self.solver, i, start)
        return y1, solver_state

    def redo(self, i: Any, start: Any, needs_dense: bool) -> tuple[Any, Any, Callable[..., Any]]:
        """`(y1, dense_info, pull)` of step `i`, where `pull` gives the cotangents of start and params."""
        start, rest = eqx.partition(start, eqx.is_inexact_array)

        def step(start: Any, params: Any) -> Any:
            out = self._step(eqx.combine(params, self.rest), i, eqx.combine(start, rest))
            y1, dense, solver_state = eqx.filter(out, eqx.is_inexact_array)
            return y1, dense if needs_dense else None, solver_state

        (y1, dense, _), pull = jax.vjp(step, start, self.params)
        return y1, dense, lambda *cotangents: pull(cotangents)

    def _step(self, solver: FrozenSolver, i: Any, start: Any) -> Any:
        y, solver_state = start
        record, carries = self.record, self.record.jumps is not None
        jump = record.jumps[i] if carries else False
        solver_state = solver_state if carries else self.solver_state
        y1, _, dense, solver_state, _ = solver.step(
            None, record.t0[i], record.t1[i], y, None, solver_state, jump
        )
        return y1, dense, jax.tree.map(jnp.asarray, solver_state) if carries else None
