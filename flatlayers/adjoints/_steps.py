"""Steps of a solve, recorded on the way forward and made again on the way back: alone, or with their vjps.

In all of this a `start` is the pair of `y` and the solver's state, which is `None` if it is not carried from
step to step; `params` are what the steps depend on.
"""

from collections.abc import Callable
from typing import Protocol, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp

from ..types import Array, ArrayLike, Cotangent, PyTree, Y
from . import _diffrax
from ._checkpoints import CheckpointReader, Checkpoints
from ._diffrax import DenseInfo, LoopState, SolverState, TracedSolver, get_at, set_at
from ._explicit import ExplicitMethod, Kept
from ._places import remainder
from ._ring import Ring, merged
from ._trees import cast_like, rows_of, wide_zeros


Start: TypeAlias = tuple[Y, SolverState]
# From the cotangents of a step's `y1`, dense output and solver state to those of its start and its params,
# and of its products, where the gradients of weights are put off.
Pull: TypeAlias = Callable[
    [Cotangent, Cotangent, Cotangent], tuple[tuple[Cotangent, Cotangent], Cotangent, PyTree]
]


class StepRecord(eqx.Module):
    """The times of each accepted step, and its start. `jumps` is `None` if no solver state is carried.

    `ring` is `None` if no residuals are kept.
    """

    t0: Array
    t1: Array
    jumps: Array | None
    starts: Checkpoints
    ring: Ring | None

    @classmethod
    def empty(
        cls, state: LoopState, max_steps: int, every: int, carries: bool, ring: Ring | None = None
    ) -> "StepRecord":
        times = jnp.zeros(max_steps, state.t0.dtype)
        jumps = jnp.zeros(max_steps, bool) if carries else None
        start = (state.y, state.solver_state if carries else None)
        return cls(times, times, jumps, Checkpoints.empty(start, max_steps, every), ring)

    @property
    def carries(self) -> bool:
        return self.jumps is not None

    def write(self, state: LoopState) -> "StepRecord":
        n = state.accepted_steps
        t0, t1 = set_at(self.t0, state.t0, n), set_at(self.t1, state.t1, n)
        jumps = None if self.jumps is None else set_at(self.jumps, jnp.asarray(state.made_jump), n)
        start = (state.y, state.solver_state if self.carries else None)
        return StepRecord(t0, t1, jumps, self.starts.write(n, start), self.ring)

    def with_ring(self, ring: Ring | None) -> "StepRecord":
        return StepRecord(self.t0, self.t1, self.jumps, self.starts, ring)

    def buffers(self) -> list[Array]:
        jumps = [] if self.jumps is None else [self.jumps]
        ring = [] if self.ring is None else self.ring.buffers()
        return [self.t0, self.t1, *jumps, *self.starts.slots.buffers, *ring]


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

    def cotangents(self, total: Cotangent) -> Cotangent:
        """Return those of the solver for such a sum."""
        ...


class ExplicitSteps:
    """Steps of an explicit Runge-Kutta method, each made from its start alone."""

    def __init__(self, method: ExplicitMethod, record: StepRecord):
        self.method, self.record = method, record

    def zero_cotangents(self) -> Cotangent:
        return self.method.zero_cotangents()

    def cotangents(self, total: Cotangent) -> Cotangent:
        return self.method.cotangents(total)

    def advance(self, i: Array, start: Start) -> Start:
        t0, t1, count = self.record.t0[i], self.record.t1[i], self.method.count(is_dense=False)
        step, _ = self.method.step(t0, t1, start[0], count)
        return step.y1, None

    def step_with_vjp(self, i: Array, start: Start, needs_dense: bool) -> tuple[Y, DenseInfo, Pull]:
        # A ring of one step.
        y0, count = start[0], self.method.count(needs_dense)
        dense = {"y0": y0, "y1": y0, "k": rows_of(count, y0)} if needs_dense else None
        ring = Ring.empty(1, count, self.method.residuals, dense)
        y1, ring = self.remake(i, y0, ring, is_dense=needs_dense)

        def pull(ct_y1: Cotangent, ct_dense: Cotangent, _: None) -> PyTree:
            cotangents = ct_y1, ct_dense if needs_dense else None
            deltas = self.method.empty_deltas(1, count)
            y0, (plain, control), deltas = self.pull(i, ring.residuals, deltas, (0, 0), cotangents)
            weights = self.method.weight_gradients(ring.calls(0, 1, 1), [merged(rows) for rows in deltas])
            return (y0, None), (plain, weights, control), None

        return y1, ring.dense[0], pull

    def remake(self, i: Array, y0: Y, ring: Ring, *, is_dense: bool) -> tuple[Y, Ring]:
        """Make step `i` again, and put what it leaves into the ring; return its end, and the ring."""
        slot = remainder(i, ring.size)

        def keep(kept: Kept, k: Array, residuals: list[Array]) -> Kept:
            return [set_at(row, x, slot, k) for row, x in zip(kept, residuals, strict=True)]

        times = self.record.t0[i], self.record.t1[i]
        step, rows = self.method.step(*times, y0, self.method.count(is_dense), keep, ring.residuals)
        ring = ring.replace(rows)
        return step.y1, ring.set_dense(i, step.dense(y0)) if is_dense else ring

    def pull(
        self,
        i: Array,
        residuals: Kept,
        deltas: Kept,
        places: tuple[ArrayLike, ArrayLike],
        cotangents: tuple[Cotangent, Cotangent],
    ) -> tuple[Cotangent, tuple[Cotangent, Cotangent], Kept]:
        """Pull cotangents back over step `i`, as `ExplicitMethod.pull` does.

        `places`: of the step in the buffers of residuals, and in those of the cotangents of products.
        """
        slot, place = places

        def read(k: Array) -> list[Array]:
            return [get_at(row, slot, k) for row in residuals]

        def keep(kept: Kept, k: Array, deltas: list[Array]) -> Kept:
            return [set_at(row, x, place, k) for row, x in zip(kept, deltas, strict=True)]

        return self.method.pull(self.record.t0[i], self.record.t1[i], read, cotangents, deltas, keep)


class StepBack(Protocol):
    """Walks back over one step."""

    def __call__(
        self, i: Array, y1: Y, dense: DenseInfo, pull: Pull, position: PyTree
    ) -> tuple[PyTree, PyTree]:
        """Return the position before step `i`, and what `pull` gives besides cotangents."""
        ...


class RemadeSteps:
    """The walk back over steps that are made again one by one, from states read of the record."""

    def __init__(self, steps: Stepper, record: StepRecord, number: Array, needs_dense: bool):
        self.steps, self.record, self.number, self.needs_dense = steps, record, number, needs_dense
        self.zero_params, self.cotangents = steps.zero_cotangents, steps.cotangents

    def walk(self, position: PyTree, step_back: StepBack) -> PyTree:
        """Walk back over all steps."""
        reader = CheckpointReader(self.record.starts, self.number, self.steps.advance)

        def body(carry: PyTree) -> PyTree:
            # The start comes first: to compute it again may take more steps than one, but no cotangents.
            position, refilled = carry
            i = position[0] - 1
            start, refilled = reader.read(i, refilled)
            y1, dense, pull = self.steps.step_with_vjp(i, start, self.needs_dense)
            return step_back(i, y1, dense, pull, position)[0], refilled

        position, _ = _diffrax.while_loop(
            lambda carry: carry[0][0] > 0,
            body,
            (position, reader.start()),
            buffers=lambda carry: carry[1].buffers(),
        )
        return position


class TracedSteps:
    """Steps by diffrax's `solver.step`, of any solver. `ExplicitSteps` are faster where there are such."""

    def __init__(self, solver: TracedSolver, perturbed: PyTree, record: StepRecord):
        self.solver, self.record = solver, record
        self.params, self.rest = eqx.partition(solver, perturbed)

    def zero_cotangents(self) -> Cotangent:
        return wide_zeros(self.params)

    def cotangents(self, total: Cotangent) -> Cotangent:
        return cast_like(total, self.params)

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
        return y1, dense, lambda *cotangents: (*pull(cotangents), None)

    def _step(self, solver: TracedSolver, i: Array, start: Start) -> tuple[Y, DenseInfo, SolverState]:
        y, solver_state = start
        record = self.record
        jump = None if record.jumps is None else record.jumps[i]
        y1, _, dense, solver_state, _ = solver.step(
            None, record.t0[i], record.t1[i], y, None, solver_state, jump
        )
        return y1, dense, jax.tree.map(jnp.asarray, solver_state)
