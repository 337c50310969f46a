"""The backward solve of `GaussAdjoint`: the adjoint state alone, and the nodes of the parameter integral."""

from typing import Any, get_origin

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp

from . import _diffrax
from ._division import Division, Rest, is_piecewise
from ._quadrature import Nodes, Path, Quadrature
from ._trajectory import Trajectory, Window


# How many times as many parts of steps as steps there may be.
TRIALS = 64


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
        number = setting.back.nodes
        self.quadrature = Quadrature(self._value, moving, number, ts.dtype)
        self.division = self._division(2 * number + 1)

    def _division(self, number: int) -> Division | None:
        """Where the field is piecewise in time, and the step size and all else has a tolerance."""
        piecewise = any(is_piecewise(field.jaxpr) for field in self.fields)
        if not (piecewise and self.adaptive and jax.tree.leaves(self.moving)):
            return None
        tolerance = jnp.asarray(self.controller.rtol + self.controller.atol)
        y_dtype = jnp.result_type(*jax.tree.leaves(self.cts))
        return Division(self._value, self.moving, number, tolerance, self.ts.dtype, y_dtype)

    # The adjoint equation, in s = -t: dl/ds = (df/dy)^T l

    def _terms(self) -> Any:
        if get_origin(self.solver.term_structure) is diffrax.MultiTerm:
            return diffrax.MultiTerm(*(diffrax.ODETerm(self._adjoint([field])) for field in self.fields))
        return diffrax.ODETerm(self._adjoint(self.fields))

    def _value(self, t: Any, y: Any, moving: Any, fields: list[Any] | None = None) -> Any:
        params = eqx.combine(moving, self.fixed)
        return _sum(field(t, y, params) for field in fields or self.fields)

    def _adjoint(self, fields: list[Any]) -> Any:
        def field(s: Any, adjoint: Any, window: Window) -> Any:
            y = window.evaluate(-s)
            _, pull = jax.vjp(lambda y: self._value(-s, y, self.moving, fields), y)
            return pull(adjoint)[0]

        return field

    # The solve: segments of the trajectory, in them blocks of steps, in them steps

    def solve(self, steps: Any) -> Any:
        left = jnp.sum(jnp.isfinite(self.ts))
        t = jnp.where(left > 0, self.ts[left - 1], self.setting.options["t0"])
        size = self.trajectory.segment
        last = (steps - 1) // size
        k = jnp.maximum(jnp.sum(self.trajectory.t0 < t) - 1, 0) // size
        window = self._window(k, k != last)
        place = self._start(t, left, window)
        rest = None if self.division is None else self._nothing_left(self.division, place, window)
        total = jax.tree.map(jnp.zeros_like, self.moving)

        def segment(carry: Any) -> Any:
            k, window, *carry = carry
            return k - 1, self._window(k - 1, k > 0), *self._blocks(window, *carry)

        carry = (jnp.where(steps > 0, k, -1), window, place, rest, total)
        _, _, place, _, total = _diffrax.while_loop(
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

    def _blocks(self, window: Window, place: Place, rest: Rest | None, total: Any) -> Any:
        def inside(place: Place) -> Any:
            return (place.s < -window.t0[0]) & self._is_going(place)

        def goes_on(place: Place, rest: Rest | None) -> Any:
            return inside(place) if rest is None else inside(place) | self._is_left(place, rest)

        def step(carry: Any) -> Any:
            place, rest, nodes = carry
            if self.division is None:
                place, keep, s0, s1, dense = self._attempt(window, place)
                nodes = self.quadrature.put(nodes, keep, window, self._path(s0, s1, dense), s0, s1)
                return place, None, nodes
            place, rest = self._whole_step(window, inside, place, rest)
            return self._parts(self.division, window, place, rest, nodes)

        def block(carry: Any) -> Any:
            place, rest, total = carry
            nodes = Nodes.empty(-place.s, window.evaluate(-place.s), self.quadrature.points.size)
            place, rest, nodes = _diffrax.while_loop(
                lambda carry: goes_on(*carry[:2]) & ~carry[2].is_full,
                step,
                (place, rest, nodes),
                buffers=lambda carry: carry[2].buffers(),
            )
            return place, rest, jax.tree.map(jnp.add, total, self.quadrature.gradient(nodes))

        return _diffrax.while_loop(lambda carry: goes_on(*carry[:2]), block, (place, rest, total))

    def _attempt(self, window: Window, place: Place) -> tuple[Place, Any, Any, Any, Any]:
        """The next place, and of the step: whether it is kept, its ends and its dense output."""
        s0, s1 = place.s, self._stop(place.s, place.next, place.left, window)
        y1, error, dense, solver_state, result = self.solver.step(
            self.terms, s0, s1, place.y, window, place.solver_state, place.jump
        )
        keep, s, s_next, jump, controller_state, control_result = self._control(place, s1, y1, error, window)
        results = diffrax.RESULTS
        result = results.where(keep, result, results.successful)
        result = results.where(diffrax.is_okay(result), control_result, result)
        old, new = (place.y, place.solver_state), (y1, solver_state)
        y, solver_state = jax.tree.map(lambda a, b: jnp.where(keep, a, b), new, old)
        y, left, jumped = self._jumps(s, y, place.left)
        solver_state = self._after(jumped, s, s_next, y, left, window, solver_state)
        jump = jnp.where(keep, jump | jumped, place.jump)
        attempts = jnp.where(jumped, 0, place.attempts + 1)  # max_steps is for each saved time, as a solve
        rest = (y, solver_state, controller_state, jump, left, attempts, result)
        return Place(s, s_next, *jax.tree.map(jnp.asarray, rest)), keep, s0, s1, dense

    # Where steps are divided for the quadrature

    def _nothing_left(self, division: Division, place: Place, window: Window) -> Rest:
        shapes = jax.eval_shape(lambda: self._attempt(window, place)[4])
        dense = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        return division.empty(place.s, dense)

    def _is_left(self, place: Place, rest: Rest) -> Any:
        return rest.is_left & diffrax.is_okay(place.result)

    def _whole_step(self, window: Window, inside: Any, place: Place, rest: Rest) -> tuple[Place, Rest]:
        """Attempt a step until there is one, unless there is some left of the last."""

        def attempt(carry: Any) -> Any:
            place, rest = carry
            place, *step = self._attempt(window, place)
            return place, rest.of_step(*step)

        return _diffrax.while_loop(lambda carry: inside(carry[0]) & ~carry[1].is_left, attempt, (place, rest))

    def _parts(
        self, division: Division, window: Window, place: Place, rest: Rest, nodes: Nodes
    ) -> tuple[Place, Rest, Nodes]:
        """Put the parts of a step among the nodes, as many as there is room for."""
        most = TRIALS * self.setting.options["max_steps"]

        def attempt(carry: Any) -> Any:
            rest, nodes = carry
            path = self._path(rest.start, rest.end, rest.dense)
            kept, new = division.attempt(rest, window, path)
            return new, self.quadrature.put(nodes, kept, window, path, rest.s, rest.stop)

        rest, nodes = _diffrax.while_loop(
            lambda carry: self._is_left(place, carry[0]) & (carry[0].trials < most) & ~carry[1].is_full,
            attempt,
            (rest, nodes),
            buffers=lambda carry: carry[1].buffers(),
        )
        results = diffrax.RESULTS
        result = results.where(rest.trials < most, place.result, results.max_steps_reached)
        return eqx.tree_at(lambda place: place.result, place, result), rest, nodes

    def _after(
        self, jumped: Any, s: Any, s_next: Any, y: Any, left: Any, window: Window, solver_state: Any
    ) -> Any:
        """The solver's state: made anew after a jump where it holds the adjoint state before it."""
        if _diffrax.sees_jumps(self.solver) or not jax.tree.leaves(solver_state):
            return solver_state
        stop = self._stop(s, s_next, left, window)

        def anew() -> Any:
            return jax.tree.map(jnp.asarray, self.solver.init(self.terms, s, stop, y, window))

        return jax.lax.cond(jumped, anew, lambda: solver_state)

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

    def _path(self, s0: Any, s1: Any, dense: Any) -> Path:
        return self.solver.interpolation_cls(t0=s0, t1=s1, **dense).evaluate


def _sum(trees: Any) -> Any:
    first, *rest = trees
    for tree in rest:
        first = jax.tree.map(jnp.add, first, tree)
    return first
