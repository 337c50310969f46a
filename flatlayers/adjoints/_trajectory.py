"""The solution of a solve at every time, kept for a second solve that goes back over it.

A step is kept as the values of its dense output at a few times, from which its polynomial is made again.
The last `segment` steps are kept so. Of those before them there is a state for each `segment` steps, from
which one segment at a time is solved again: about `2 sqrt(max_steps)` steps in all.
"""

import math
from collections.abc import Callable

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ..types import Array, PyTree, Time, Y
from . import _diffrax
from ._diffrax import LoopState, SolverState
from ._trees import cast_like, rows_of, set_row


# Solves of up to so many steps are kept as a whole.
SHORTEST = 64


class SampledSolver(eqx.Module):
    """A solver whose state also has the solution of its last step, at some times from start to end.

    Diffrax's loop has the dense output of a step only while it makes the step; the solver's state is what
    comes out of it.
    """

    solver: _diffrax.TracedSolver
    points: tuple[float, ...] = eqx.field(static=True)

    @classmethod
    def of(cls, solver: _diffrax.TracedSolver, order: int | None) -> "SampledSolver":
        """Take as many times as the dense output of a method of some order has coefficients."""
        # It is a polynomial whose degree is below the order, or a cubic one.
        number = max(order or 5, 4)
        return cls(solver, tuple((0.5 - 0.5 * np.cos(np.pi * np.linspace(0, 1, number))).tolist()))

    @property
    def interpolation_cls(self) -> Callable[..., diffrax.AbstractPath]:
        return self.solver.interpolation_cls

    def error_order(self, terms: PyTree) -> PyTree:
        return self.solver.error_order(terms)

    def initial_state(self, solver_state: SolverState, y: Y) -> SolverState:
        """Return a state of this solver for one of the solver inside, before any step."""
        return solver_state, rows_of(len(self.points), y)

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        inner, _ = solver_state
        # The values before the step are of no use to it: they only pass through the loop to its recorder.
        y1, error, dense, inner, result = self.solver.step(terms, t0, t1, y0, args, inner, made_jump)
        path = self.interpolation_cls(t0=t0, t1=t1, **dense)
        times = t0 + (t1 - t0) * jnp.asarray(self.points, t0.dtype)
        values = cast_like(jax.vmap(path.evaluate)(times), y0)
        return y1, error, dense, (inner, values), result


class Trajectory(eqx.Module):
    """The outcome of a solve with a `SampledSolver`: the times of all steps, and the values of the last ones.

    Each attempt of a step writes; a rejected one is written over by the next. Row `i % segment` of `values`
    is of step `i`, row `k` of `starts` the start of step `k * segment`. An infinite `t0` is of no step.
    """

    t0: Array
    t1: Array
    jumps: Array
    starts: PyTree
    values: Y
    segment: int = eqx.field(static=True)

    @classmethod
    def empty(cls, state: LoopState, max_steps: int) -> "Trajectory":
        # Segments of about the root of the number: as many starts as values are kept.
        segment = min(max_steps, max(SHORTEST, math.isqrt(max_steps - 1) + 1))
        segments = -(-max_steps // segment)
        inner, values = state.solver_state
        times = jnp.full(segments * segment, jnp.inf, state.t0.dtype)
        starts = rows_of(segments, (state.y, inner)) if segments > 1 else None
        jumps = jnp.zeros(times.shape, bool)
        return cls(times, times, jumps, starts, rows_of(segment, values), segment)

    def buffers(self) -> list[PyTree]:
        return [self.t0, self.t1, self.jumps, self.starts, self.values]

    def write(self, state: LoopState) -> "Trajectory":
        """Keep the start of an attempt, and the values of the accepted step before it."""
        n, size = state.accepted_steps, self.segment
        inner, values = state.solver_state
        starts = self.starts
        if starts is not None:  # the last step to come to a row is the one that belongs there
            starts = set_row(starts, -(-n // size), (state.y, inner))
        return Trajectory(
            self.t0.at[n].set(state.t0),
            self.t1.at[n].set(state.t1),
            self.jumps.at[n].set(jnp.asarray(state.made_jump)),
            starts,
            set_row(self.values, (n - 1) % size, values),
            size,
        )

    def finished(self, state: LoopState) -> "Trajectory":
        """Return the same with the values of the last step, at the end of the solve."""
        n = state.accepted_steps
        values = set_row(self.values, (n - 1) % self.segment, state.solver_state[1])
        # The last attempt may have been rejected, and has left its times.
        return eqx.tree_at(
            lambda s: (s.t0, s.values),
            self,
            (self.t0.at[n].set(jnp.inf), values),
            is_leaf=lambda x: x is None,
        )

    def with_segment(self, k: Array, solver: SampledSolver, recompute: Array) -> "Trajectory":
        """Return the same with the values of segment `k`, solved again from its first state if asked for."""
        if self.starts is None:
            return self
        y, inner = jax.tree.map(lambda x: x[jnp.maximum(k, 0)], self.starts)
        first = k * self.segment

        def body(carry: PyTree) -> PyTree:
            i, y, solver_state, values = carry
            t0, t1, jump = (x[first + i] for x in (self.t0, self.t1, self.jumps))
            y, _, _, solver_state, _ = solver.step(None, t0, t1, y, None, solver_state, jump)
            solver_state = jax.tree.map(jnp.asarray, solver_state)
            return i + 1, y, solver_state, set_row(values, i, solver_state[1])

        # The times after the last step are of none, but the last segment is never solved again.
        count = jnp.where(recompute, self.segment, 0)
        *_, values = _diffrax.while_loop(
            lambda carry: carry[0] < count,
            body,
            (0, y, solver.initial_state(inner, y), self.values),
            buffers=lambda carry: carry[3],
        )
        return eqx.tree_at(lambda s: s.values, self, values, is_leaf=lambda x: x is None)

    def path(self, k: Array, points: tuple[float, ...]) -> "SegmentPath":
        """Return the solution over segment `k`, whose values it has."""
        t0, t1 = (lax.dynamic_slice_in_dim(x, k * self.segment, self.segment) for x in (self.t0, self.t1))
        return SegmentPath(t0, t1, self.values, points)


class SegmentPath(eqx.Module):
    """The solution over some steps in a row, whose values need not be in the order of time."""

    t0: Array
    t1: Array
    values: Y
    points: tuple[float, ...] = eqx.field(static=True)

    def step_before(self, t: Time) -> Array:
        """Return the number of the step that ends at `t`, or that has it inside."""
        return jnp.maximum(jnp.sum(self.t0 < t) - 1, 0)

    def length(self, t: Time) -> Array:
        """Return the length of the step that ends at `t`, or that has it inside."""
        i = self.step_before(t)
        return self.t1[i] - self.t0[i]

    def evaluate(self, t: Time) -> Y:
        # Counted and not searched for: one reduction, where a search is a loop. At a time between two steps
        # this is the later one, where `step_before` is the earlier one.
        i = jnp.maximum(jnp.sum(self.t0 <= t) - 1, 0)
        t0, t1 = self.t0[i], self.t1[i]
        # Relative to the step, so that the points of all steps are the same numbers.
        weights = self._weights((t - t0) / (t1 - t0))
        return jax.tree.map(lambda x: jnp.tensordot(weights.astype(x.dtype), x[i], axes=1), self.values)

    def _weights(self, x: PyTree) -> Array:
        """Return the polynomials of Lagrange at `x`: one at one of the points, zero at the others."""
        points = np.asarray(self.points)
        others = np.array([np.delete(points, j) for j in range(len(points))])
        scale = np.prod(points[:, None] - others, axis=1)
        return jnp.prod(x - jnp.asarray(others, x.dtype), axis=1) / jnp.asarray(scale, x.dtype)
