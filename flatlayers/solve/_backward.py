"""The backward solve of `GaussAdjoint`: the adjoint state alone, and the nodes of the parameter integral."""

import math
from typing import Any, get_origin

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from . import _diffrax
from ._trajectory import Trajectory, Window, set_at


# How many rows of states go through one vjp: enough for fast matrix products, more only takes memory.
ROWS = 320


class Place(eqx.Module):
    """Where the backward solve has come to: to the time `-s`, with the adjoint state `y` there."""

    s: Any
    next: Any
    y: Any
    solver_state: Any
    controller_state: Any
    jump: Any
    left: Any
    attempts: Any
    result: Any


class Nodes(eqx.Module):
    """The nodes of a block of steps: times, weights, states and adjoint states, steps and nodes leading."""

    count: Any
    t: Any
    weight: Any
    y: Any
    adjoint: Any

    @classmethod
    def empty(cls, t: Any, y: Any, number: int) -> "Nodes":
        rows = max(math.prod(y.shape[:-1]) for y in jax.tree.leaves(y))
        shape = (min(max(ROWS // max(rows * number, 1), 2), 16), number)
        ys = jax.tree.map(lambda y: jnp.broadcast_to(y, (*shape, *y.shape)), y)
        return cls(0, jnp.full(shape, t), jnp.zeros(shape, t.dtype), ys, jax.tree.map(jnp.zeros_like, ys))

    @property
    def is_full(self) -> Any:
        return self.count == len(self.weight[...])

    def buffers(self) -> list[Any]:
        return [self.t, self.weight, self.y, self.adjoint]

    def put(self, kept: Any, *values: Any) -> "Nodes":
        """With the values for a step, which the next one writes over unless it is kept."""
        buffers = [set_at(b, self.count, x) for b, x in zip(self.buffers(), values, strict=True)]
        return Nodes(self.count + jnp.where(kept, 1, 0), *buffers)


class Backward:
    """The backward solve: what does not change on the way."""

    def __init__(self, setting: Any, trajectory: Trajectory, ts: Any, cts: Any, moving: Any, fixed: Any):
        self.setting, self.trajectory, self.ts, self.fields = setting, trajectory, ts, setting.fields
        self.moving, self.fixed = moving, fixed
        largest = [jnp.max(jnp.abs(ct), initial=0) for ct in jax.tree.leaves(cts)]
        scale = jnp.max(jnp.stack([x.astype(largest[0].dtype) for x in largest]))
        self.scale = jnp.where(scale == 0, jnp.ones_like(scale), scale)
        self.cts = jax.tree.map(lambda ct: ct / self.scale.astype(ct.dtype), cts)
        self.solver, self.controller = setting.back.solver, setting.back.controller
        self.adaptive = isinstance(self.controller, diffrax.AbstractAdaptiveStepSizeController)
        self.terms = self._terms()
        points, weights = np.polynomial.legendre.leggauss(setting.back.nodes)
        self.points = jnp.asarray(0.5 + 0.5 * points, ts.dtype)
        self.weights = jnp.asarray(0.5 * weights, ts.dtype)

    # The adjoint equation, in s = -t: dl/ds = (df/dy)^T l

    def _terms(self) -> Any:
        if get_origin(self.solver.term_structure) is diffrax.MultiTerm:
            return diffrax.MultiTerm(*(diffrax.ODETerm(self._adjoint([field])) for field in self.fields))
        return diffrax.ODETerm(self._adjoint(self.fields))

    def _adjoint(self, fields: list[Any]) -> Any:
        params = eqx.combine(self.moving, self.fixed)

        def field(s: Any, adjoint: Any, window: Window) -> Any:
            y = window.evaluate(-s)
            _, pull = jax.vjp(lambda y: _sum(field(-s, y, params) for field in fields), y)
            return pull(adjoint)[0]

        return field

    def _gradient(self, nodes: Nodes) -> Any:
        """The parameter integral over a block of steps."""
        used = jnp.arange(len(nodes.weight))[:, None] < nodes.count
        weight = jnp.where(used, nodes.weight, jnp.zeros_like(nodes.weight)).ravel()
        times = jax.vmap(lambda w, y: jax.tree.map(lambda x: w.astype(x.dtype) * x, y))

        def values(moving: Any) -> Any:
            params = eqx.combine(moving, self.fixed)
            at = jax.vmap(lambda t, y: _sum(field(t, y, params) for field in self.fields))
            return at(*_flat((nodes.t, nodes.y)))

        _, pull = jax.vjp(values, self.moving)
        return pull(times(weight, _flat(nodes.adjoint)))[0]

    # The solve: segments of the trajectory, in them blocks of steps, in them steps

    def solve(self, steps: Any) -> Any:
        left = jnp.sum(jnp.isfinite(self.ts))
        t = jnp.where(left > 0, self.ts[left - 1], self.setting.options["t0"])
        size = self.trajectory.segment
        last = (steps - 1) // size
        k = jnp.maximum(jnp.sum(self.trajectory.t0 < t) - 1, 0) // size
        window = self._window(k, k != last)
        place = self._start(t, left, window)
        total = jax.tree.map(jnp.zeros_like, self.moving)

        def segment(carry: Any) -> Any:
            k, window, place, total = carry
            place, total = self._blocks(window, place, total)
            return k - 1, self._window(k - 1, k > 0), place, total

        carry = (jnp.where(steps > 0, k, -1), window, place, total)
        _, _, place, total = _diffrax.while_loop(
            lambda carry: (carry[0] >= 0) & self._is_going(carry[2]), segment, carry
        )
        return self._finish(place, total)

    def _window(self, k: Any, again: Any) -> Window:
        solver = self.setting.solver
        return self.trajectory.of_segment(k, solver, again).window(jnp.maximum(k, 0), solver.points)

    def _is_going(self, place: Place) -> Any:
        finite = jnp.isfinite(self.scale)
        return finite & (place.attempts < self.setting.options["max_steps"]) & diffrax.is_okay(place.result)

    def _start(self, t: Any, left: Any, window: Window) -> Place:
        zero = jax.tree.map(lambda ct: jnp.zeros(ct.shape[1:], ct.dtype), self.cts)
        y, left, _ = self._jumps(-t, zero, left)
        s, end = -t, -self.setting.options["t0"]
        s_next, controller_state = end, None
        if self.adaptive:
            order, first = self.solver.error_order(self.terms), window.length(t)
            s_next, controller_state = self.controller.init(
                self.terms, s, end, y, first, window, self.solver.func, order
            )
        solver_state = self.solver.init(self.terms, s, self._stop(s, s_next, left, window), y, window)
        solver_state, controller_state = jax.tree.map(jnp.asarray, (solver_state, controller_state))
        no = jnp.asarray(False)
        result = diffrax.RESULTS.where(no, diffrax.RESULTS.successful, diffrax.RESULTS.successful)
        return Place(s, s_next, y, solver_state, controller_state, no, left, jnp.asarray(0), result)

    def _finish(self, place: Place, total: Any) -> Any:
        results = diffrax.RESULTS
        before_end = (place.s < -self.setting.options["t0"]) & jnp.isfinite(self.scale)
        stopped = before_end & diffrax.is_okay(place.result)
        result = results.where(stopped, results.max_steps_reached, place.result)
        failed = ~diffrax.is_okay(result)
        scale = jnp.where(failed, jnp.full_like(self.scale, jnp.nan), self.scale)
        found = jax.tree.map(lambda x: x * scale.astype(x.dtype), (place.y, total))
        return result.error_if(found, failed) if self.setting.throw else found

    def _blocks(self, window: Window, place: Place, total: Any) -> Any:
        def inside(place: Place) -> Any:
            return (place.s < -window.t0[0]) & self._is_going(place)

        def block(carry: Any) -> Any:
            place, total = carry
            nodes = Nodes.empty(-place.s, window.evaluate(-place.s), self.points.size)
            place, nodes = _diffrax.while_loop(
                lambda carry: inside(carry[0]) & ~carry[1].is_full,
                lambda carry: self._attempt(window, *carry),
                (place, nodes),
                buffers=lambda carry: carry[1].buffers(),
            )
            return place, jax.tree.map(jnp.add, total, self._gradient(nodes))

        return _diffrax.while_loop(lambda carry: inside(carry[0]), block, (place, total))

    def _attempt(self, window: Window, place: Place, nodes: Nodes) -> tuple[Place, Nodes]:
        s0, s1 = place.s, self._stop(place.s, place.next, place.left, window)
        y1, error, dense, solver_state, result = self.solver.step(
            self.terms, s0, s1, place.y, window, place.solver_state, place.jump
        )
        keep, s, s_next, jump, controller_state, control_result = self._control(place, s1, y1, error, window)
        results = diffrax.RESULTS
        result = results.where(keep, result, results.successful)
        result = results.where(diffrax.is_okay(result), control_result, result)
        nodes = self._put(nodes, keep, window, s0, s1, dense)
        old, new = (place.y, place.solver_state), (y1, solver_state)
        y, solver_state = jax.tree.map(lambda a, b: jnp.where(keep, a, b), new, old)
        y, left, jumped = self._jumps(s, y, place.left)
        solver_state = self._after(jumped, s, s_next, y, left, window, solver_state)
        jump = jnp.where(keep, jump | jumped, place.jump)
        attempts = jnp.where(jumped, 0, place.attempts + 1)  # max_steps is for each saved time, as a solve
        rest = (y, solver_state, controller_state, jump, left, attempts, result)
        return Place(s, s_next, *jax.tree.map(jnp.asarray, rest)), nodes

    def _after(
        self, jumped: Any, s: Any, s_next: Any, y: Any, left: Any, window: Window, solver_state: Any
    ) -> Any:
        """The solver's state: made anew after a jump where it holds the adjoint state before it."""
        if _diffrax.sees_jumps(self.solver) or not jax.tree.leaves(solver_state):
            return solver_state
        stop = self._stop(s, s_next, left, window)
        new = lambda: jax.tree.map(jnp.asarray, self.solver.init(self.terms, s, stop, y, window))
        return jax.lax.cond(jumped, new, lambda: solver_state)

    def _control(self, place: Place, s1: Any, y1: Any, error: Any, window: Window) -> Any:
        if not self.adaptive:
            end = -self.setting.options["t0"]
            return jnp.asarray(True), s1, end, jnp.asarray(False), None, diffrax.RESULTS.successful
        error = jax.tree.map(lambda x: jnp.where(jnp.isnan(x), jnp.inf, x), error)
        order = self.solver.error_order(self.terms)
        return self.controller.adapt_step_size(
            place.s, s1, place.y, y1, window, error, order, place.controller_state
        )

    def _stop(self, s: Any, s_next: Any, left: Any, window: Window) -> Any:
        """The end of a step: at the next saved time, and over so many forward steps, at the latest.

        The step is chosen for the adjoint state alone. That it spans two forward steps at most is what
        keeps the quadrature right where the adjoint state is smooth and the field is not.
        """
        i = window.step_before(-s) - (1 if self.adaptive else 0)
        saved = jnp.where(left > 0, -self.ts[left - 1], jnp.inf)
        stop = jnp.minimum(saved, -window.t0[jnp.maximum(i, 0)])
        return jnp.where(s_next - s > 0.99 * (stop - s), stop, s_next)

    def _jumps(self, s: Any, y: Any, left: Any) -> Any:
        """With the cotangents of all that is saved at the time `-s`."""

        def body(carry: Any) -> Any:
            y, left = carry
            return jax.tree.map(lambda y, ct: y + ct[left - 1], y, self.cts), left - 1

        y, new_left = _diffrax.while_loop(
            lambda carry: (carry[1] > 0) & (-self.ts[carry[1] - 1] <= s), body, (y, left)
        )
        return y, new_left, new_left != left

    def _put(self, nodes: Nodes, keep: Any, window: Window, s0: Any, s1: Any, dense: Any) -> Nodes:
        """Evaluate the forward and the adjoint solution at the nodes of a step."""
        s = s0 + (s1 - s0) * self.points
        adjoint = jax.vmap(self.solver.interpolation_cls(t0=s0, t1=s1, **dense).evaluate)(s)
        adjoint = jax.tree.map(lambda x, ct: x.astype(ct.dtype), adjoint, self.cts)
        return nodes.put(keep, -s, (s1 - s0) * self.weights, jax.vmap(window.evaluate)(-s), adjoint)


def _sum(trees: Any) -> Any:
    first, *rest = trees
    for tree in rest:
        first = jax.tree.map(jnp.add, first, tree)
    return first


def _flat(tree: Any) -> Any:
    """Steps and nodes on one axis."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tree)
