"""The solution of a solve at every time, kept for a second solve that goes back over it.

A step is kept as the values of its dense output at a few times, so that its polynomial can be had again.
The last `segment` steps are kept so. Of those before them there is a state for each `segment` steps, from
which one segment at a time is solved again: about `2 sqrt(max_steps)` steps in all.
"""

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from . import _diffrax


SHORTEST = 64


class Sampled(eqx.Module):
    """A solver whose state also has the solution of its last step, at some times from start to end."""

    solver: _diffrax.FrozenSolver
    points: tuple[float, ...] = eqx.field(static=True)

    @classmethod
    def of(cls, solver: _diffrax.FrozenSolver, order: int | None) -> "Sampled":
        """The dense output of a method of some order is a polynomial whose degree is below it, or cubic."""
        number = max(order or 5, 4)
        return cls(solver, tuple((0.5 - 0.5 * np.cos(np.pi * np.linspace(0, 1, number))).tolist()))

    @property
    def interpolation_cls(self) -> Any:
        return self.solver.interpolation_cls

    def error_order(self, terms: Any) -> Any:
        return self.solver.error_order(terms)

    def empty(self, y: Any) -> Any:
        return jax.tree.map(lambda y: jnp.zeros((len(self.points), *y.shape), y.dtype), y)

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        inner, _ = solver_state
        y1, error, dense, inner, result = self.solver.step(terms, t0, t1, y0, args, inner, made_jump)
        path = self.interpolation_cls(t0=t0, t1=t1, **dense)
        times = t0 + (t1 - t0) * jnp.asarray(self.points, t0.dtype)
        values = jax.tree.map(lambda x, y: x.astype(y.dtype), jax.vmap(path.evaluate)(times), y0)
        return y1, error, dense, (inner, values), result


class Trajectory(eqx.Module):
    """What a solve with `Sampled` leaves: the times of all steps, and the values of the last ones.

    Each attempt of a step writes; a rejected one is written over by the next.
    """

    t0: Any
    t1: Any
    jumps: Any
    starts: Any
    values: Any
    segment: int = eqx.field(static=True)

    @classmethod
    def empty(cls, state: Any, max_steps: int) -> "Trajectory":
        segment = min(max_steps, max(SHORTEST, math.isqrt(max_steps - 1) + 1))
        segments = -(-max_steps // segment)
        inner, values = state.solver_state
        times = jnp.full(segments * segment, jnp.inf, state.tprev.dtype)
        starts = _room(segments, (state.y, inner)) if segments > 1 else None
        jumps = jnp.zeros(times.shape, bool)
        return cls(times, times, jumps, starts, _room(segment, values), segment)

    def buffers(self) -> list[Any]:
        return [self.t0, self.t1, self.jumps, self.starts, self.values]

    def write(self, state: Any) -> "Trajectory":
        """The start of an attempt, and the values of the accepted step before it."""
        n, size = state.num_accepted_steps, self.segment
        inner, values = state.solver_state
        starts = self.starts
        if starts is not None:  # the last step to come to a place is the one that belongs there
            starts = set_at(starts, -(-n // size), (state.y, inner))
        return Trajectory(
            self.t0.at[n].set(state.tprev),
            self.t1.at[n].set(state.tnext),
            self.jumps.at[n].set(jnp.asarray(state.made_jump)),
            starts,
            set_at(self.values, (n - 1) % size, values),
            size,
        )

    def finished(self, state: Any) -> "Trajectory":
        """With the values of the last step, at the end of the solve."""
        n = state.num_accepted_steps
        values = set_at(self.values, (n - 1) % self.segment, state.solver_state[1])
        found = (self.t0.at[n].set(jnp.inf), values)
        return eqx.tree_at(lambda s: (s.t0, s.values), self, found, is_leaf=lambda x: x is None)

    def of_segment(self, k: Any, solver: Sampled, again: Any) -> "Trajectory":
        """The same with the values of segment `k`, solved again from its first state if `again`."""
        if self.starts is None:
            return self
        y, inner = jax.tree.map(lambda x: x[jnp.maximum(k, 0)], self.starts)
        first = k * self.segment

        def body(carry: Any) -> Any:
            i, y, (inner, values), kept = carry
            t0, t1, jump = (x[first + i] for x in (self.t0, self.t1, self.jumps))
            y, _, _, state, _ = solver.step(None, t0, t1, y, None, (inner, values), jump)
            inner, values = jax.tree.map(jnp.asarray, state)
            return i + 1, y, (inner, values), set_at(kept, i, values)

        carry = (0, y, (inner, solver.empty(y)), self.values)
        count = jnp.where(again, self.segment, 0)
        _, _, _, values = _diffrax.while_loop(
            lambda carry: carry[0] < count, body, carry, buffers=lambda carry: carry[3]
        )
        return eqx.tree_at(lambda s: s.values, self, values, is_leaf=lambda x: x is None)

    def window(self, k: Any, points: tuple[float, ...]) -> "Window":
        """The solution over segment `k`, whose values it has."""
        t0, t1 = (lax.dynamic_slice_in_dim(x, k * self.segment, self.segment) for x in (self.t0, self.t1))
        return Window(t0, t1, self.values, points)


class Window(eqx.Module):
    """The solution over some steps in a row; the start of what is no step is infinite."""

    t0: Any
    t1: Any
    values: Any
    points: tuple[float, ...] = eqx.field(static=True)

    def step_before(self, t: Any) -> Any:
        """The number of the step that ends at `t`, or that has it inside."""
        return jnp.maximum(jnp.sum(self.t0 < t) - 1, 0)

    def length(self, t: Any) -> Any:
        """That of the step that ends at `t`, or that has it inside."""
        i = self.step_before(t)
        return self.t1[i] - self.t0[i]

    def evaluate(self, t: Any) -> Any:
        i = jnp.maximum(jnp.sum(self.t0 <= t) - 1, 0)
        t0, t1 = self.t0[i], self.t1[i]
        weights = self._weights((t - t0) / (t1 - t0))
        return jax.tree.map(lambda x: jnp.tensordot(weights.astype(x.dtype), x[i], axes=1), self.values)

    def _weights(self, x: Any) -> Any:
        """The polynomials of Lagrange: one at one of the points, zero at the others."""
        points = np.asarray(self.points)
        others = np.array([np.delete(points, j) for j in range(len(points))])
        scale = np.prod(points[:, None] - others, axis=1)
        return jnp.prod(x - jnp.asarray(others, x.dtype), axis=1) / jnp.asarray(scale, x.dtype)


def _room(number: int, tree: Any) -> Any:
    return jax.tree.map(lambda x: jnp.zeros((number, *x.shape), x.dtype), tree)


def set_at(buffers: Any, i: Any, values: Any) -> Any:
    """`values` at place `i` of `buffers`: of arrays, or inside of a loop of what stands for them."""
    leaves, structure = jax.tree.flatten(values)
    places = structure.flatten_up_to(buffers)
    return structure.unflatten([b.at[i].set(x) for b, x in zip(places, leaves, strict=True)])
