"""Steps of a solve, recorded on the way forward and made again on the way back: alone, or with their vjps.

In all of this a `start` is the pair of `y` and the solver's state, which is `None` if it is not carried from
step to step; `params` are what the steps depend on.
"""

from collections.abc import Callable
from typing import Protocol, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp

from ..types import Array, Cotangent, PyTree, Y
from ._checkpoints import Checkpoints
from ._diffrax import DenseInfo, LoopState, SolverState, TracedSolver
from ._trees import cast_like, wide_zeros


Start: TypeAlias = tuple[Y, SolverState]
# From the cotangents of a step's `y1`, dense output and solver state to those of its start and its params.
Pull: TypeAlias = Callable[[Cotangent, Cotangent, Cotangent], tuple[tuple[Cotangent, Cotangent], Cotangent]]


class StepRecord(eqx.Module):
    """The times of each accepted step, and its start. `jumps` is `None` if no solver state is carried."""

    t0: Array
    t1: Array
    jumps: Array | None
    starts: Checkpoints

    @classmethod
    def empty(cls, state: LoopState, max_steps: int, every: int, carries: bool) -> "StepRecord":
        times = jnp.zeros(max_steps, state.t0.dtype)
        jumps = jnp.zeros(max_steps, bool) if carries else None
        start = (state.y, state.solver_state if carries else None)
        return cls(times, times, jumps, Checkpoints.empty(start, max_steps, every))

    @property
    def carries(self) -> bool:
        return self.jumps is not None

    def write(self, state: LoopState) -> "StepRecord":
        n = state.accepted_steps
        t0, t1 = self.t0.at[n].set(state.t0), self.t1.at[n].set(state.t1)
        jumps = None if self.jumps is None else self.jumps.at[n].set(jnp.asarray(state.made_jump))
        start = (state.y, state.solver_state if self.carries else None)
        return StepRecord(t0, t1, jumps, self.starts.write(n, start))

    def buffers(self) -> list[Array]:
        jumps = [] if self.jumps is None else [self.jumps]
        return [self.t0, self.t1, *jumps, *self.starts.slots.buffers]


class Stepper(Protocol):
    """Makes the steps of a solve again, from its record."""

    def advance(self, i: Array, start: Start) -> Start:
        """Return the start of step `i + 1`."""
        ...

    def step_with_vjp(self, i: Array, start: Start, needs_dense: bool) -> tuple[Y, DenseInfo, Pull]:
        """Return `y1` and the dense output of step `i`, and its vjp."""
        ...

    def zero_cotangents(self) -> Cotangent:
        """Return zeros, to which the cotangents of the params are added, step by step."""
        ...

    def cotangents(self, total: Cotangent) -> tuple[Cotangent, Cotangent]:
        """Return those of the solver and of the stage functions for such a sum, one of them `None`."""
        ...


class TracedSteps:
    """Steps by diffrax's `solver.step`, of any solver. `ExplicitSteps` are faster where there are such."""

    def __init__(
        self, solver: TracedSolver, perturbed: TracedSolver, record: StepRecord, solver_state: SolverState
    ):
        self.solver, self.record, self.solver_state = solver, record, solver_state
        self.params, self.rest = eqx.partition(solver, perturbed)

    def zero_cotangents(self) -> Cotangent:
        return wide_zeros(self.params)

    def cotangents(self, total: Cotangent) -> tuple[Cotangent, Cotangent]:
        return cast_like(total, self.params), None

    def advance(self, i: Array, start: Start) -> Start:
        y1, _, solver_state = self._step(self.solver, i, start)
        return y1, solver_state

    def step_with_vjp(self, i: Array, start: Start, needs_dense: bool) -> tuple[Y, DenseInfo, Pull]:
        start, rest = eqx.partition(start, eqx.is_inexact_array)

        def step(start: Start, params: PyTree) -> tuple[Y, DenseInfo, SolverState]:
            out = self._step(eqx.combine(params, self.rest), i, eqx.combine(start, rest))
            y1, dense, solver_state = eqx.filter(out, eqx.is_inexact_array)
            return y1, dense if needs_dense else None, solver_state

        (y1, dense, _), pull = jax.vjp(step, start, self.params)
        return y1, dense, lambda *cotangents: pull(cotangents)

    def _step(self, solver: TracedSolver, i: Array, start: Start) -> tuple[Y, DenseInfo, SolverState]:
        y, solver_state = start
        record = self.record
        # Where no state is carried a step does not depend on it, and the first one serves for all.
        jump = False if record.jumps is None else record.jumps[i]
        solver_state = solver_state if record.carries else self.solver_state
        y1, _, dense, solver_state, _ = solver.step(
            None, record.t0[i], record.t1[i], y, None, solver_state, jump
        )
        return y1, dense, jax.tree.map(jnp.asarray, solver_state) if record.carries else None
