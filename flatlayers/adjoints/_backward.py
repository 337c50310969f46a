"""The backward solve of `GaussAdjoint`: the adjoint state alone, and the nodes of the parameter integral.

All of it is in the time `s = -t`, in which the solve goes forward, since solvers and controllers do.
"""

from collections.abc import Callable
from typing import TypeAlias, get_origin

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp

from ..checks import checked_by, raising
from ..types import Array, Cotangent, PyTree, Time, Y
from . import _diffrax
from ._diffrax import DenseInfo, SolverState
from ._division import Division, UndividedStep, is_piecewise
from ._quadrature import AdjointPath, Moving, Nodes, Quadrature
from ._trajectory import SampledSolver, SegmentPath, Trajectory
from ._trees import add_to, wide_zeros


# How many times as many parts of steps as steps there may be.
TRIALS = 64

# A traced function `f(t, y, params)`, where the parameters are a list of arrays.
VectorField: TypeAlias = PyTree


class BackwardOptions(eqx.Module):
    """The options of the backward solve."""

    solver: diffrax.AbstractSolver
    controller: diffrax.AbstractStepSizeController
    nodes: int = eqx.field(static=True)
    throw: bool = eqx.field(static=True)


class SolvedForward(eqx.Module):
    """The forward solve, from `t0` on; `ts` are the times that were saved, infinite after the last."""

    solver: SampledSolver
    trajectory: Trajectory
    t0: Array
    ts: Array
    steps: Array
    max_steps: int = eqx.field(static=True)


class BackwardState(eqx.Module):
    """A state of the backward solve: the adjoint state `y` at `s`, from where a step is tried to `s_next`.

    `unread`: how many of the saved times are not after `-s`, with their cotangents not yet in `y`.
    """

    s: Array
    s_next: Array
    y: Cotangent
    solver_state: SolverState
    controller_state: PyTree
    made_jump: Array
    unread: Array
    attempts: Array
    result: diffrax.RESULTS


class Attempt(eqx.Module):
    """An attempted step from `s0` to `s1`, with its dense output."""

    accepted: Array
    s0: Array
    s1: Array
    dense: DenseInfo


class Backward:
    """The backward solve.

    **Arguments:**

    - `forward`, `options`: the forward solve, and how to go back.
    - `fields`: vector fields whose sum is that of the equation.
    - `cotangents`: of the saved values.
    - `moving`, `fixed`: the parameters with a gradient and the others, each with `None` for the other.
    """

    def __init__(
        self,
        forward: SolvedForward,
        options: BackwardOptions,
        fields: list[VectorField],
        cotangents: Cotangent,
        moving: Moving,
        fixed: Moving,
    ):
        self.forward, self.options, self.fields = forward, options, fields
        self.moving, self.fixed, self.ts = moving, fixed, forward.ts
        # Tolerances are then relative to the largest cotangent, and the gradient is linear in them.
        self.scale = _largest(cotangents)
        self.cotangents = jax.tree.map(lambda ct: ct / self.scale.astype(ct.dtype), cotangents)
        self.solver: PyTree = options.solver
        self.controller: PyTree = options.controller
        self.adaptive = isinstance(self.controller, diffrax.AbstractAdaptiveStepSizeController)
        self.s_end = -forward.t0
        self.terms = self._terms()
        self.quadrature = Quadrature(self._value, moving, options.nodes, self.ts.dtype)
        self.division = self._division(2 * options.nodes + 1)

    def _division(self, number: int) -> Division | None:
        """Divide where the field is piecewise in time, and the step size and all else has a tolerance."""
        piecewise = any(is_piecewise(field.jaxpr) for field in self.fields)
        if not (piecewise and self.adaptive and jax.tree.leaves(self.moving)):
            return None
        tolerance = jnp.asarray(self.controller.rtol + self.controller.atol)
        y_dtype = jnp.result_type(*jax.tree.leaves(self.cotangents))
        return Division(self._value, self.moving, number, tolerance, self.ts.dtype, y_dtype)

    # The adjoint equation, in s = -t: dl/ds = (df/dy)^T l

    def _terms(self) -> PyTree:
        if get_origin(self.solver.term_structure) is diffrax.MultiTerm:
            return diffrax.MultiTerm(*(diffrax.ODETerm(self._adjoint([field])) for field in self.fields))
        return diffrax.ODETerm(self._adjoint(self.fields))

    def _value(self, t: Time, y: Y, moving: Moving, fields: list[VectorField] | None = None) -> Y:
        params = [b if a is None else a for a, b in zip(moving, self.fixed, strict=True)]
        return _sum([field(t, y, params) for field in fields or self.fields])

    def _adjoint(self, fields: list[VectorField]) -> PyTree:
        def field(s: Array, adjoint: Cotangent, solution: SegmentPath) -> Cotangent:
            y = solution.evaluate(-s)
            _, pull = jax.vjp(lambda y: self._value(-s, y, self.moving, fields), y)
            return pull(adjoint)[0]

        return field

    # The solve: segments of the trajectory, in them blocks of steps, in them steps

    def solve(self) -> tuple[Cotangent, Moving]:
        """Return the cotangents of the forward solve's start and of the parameters."""
        forward, trajectory = self.forward, self.forward.trajectory
        # Before the last saved time, seen backwards, the adjoint state is zero: the solve starts there.
        unread = jnp.sum(jnp.isfinite(self.ts))
        t = jnp.where(unread > 0, self.ts[unread - 1], forward.t0)
        size = trajectory.segment
        last = (forward.steps - 1) // size
        k = jnp.maximum(jnp.sum(trajectory.t0 < t) - 1, 0) // size
        solution = self._solution(k, k != last)
        state = self._start(t, unread, solution)
        rest = None if self.division is None else self._nothing_left(self.division, state, solution)

        def segment(carry: PyTree) -> PyTree:
            k, solution, *carry = carry
            return k - 1, self._solution(k - 1, k > 0), *self._blocks(solution, *carry)

        # A forward solve of no steps has no segment; then only the cotangents at the start count.
        carry = (jnp.where(forward.steps > 0, k, -1), solution, state, rest, wide_zeros(self.moving))
        _, _, state, rest, total = _diffrax.while_loop(
            lambda carry: (carry[0] >= 0) & self._is_going(carry[2]), segment, carry
        )
        return self._finish(state, rest, total)

    def _solution(self, k: Array, recompute: Array) -> SegmentPath:
        solver = self.forward.solver
        trajectory = self.forward.trajectory.with_segment(k, solver, recompute)
        return trajectory.path(jnp.maximum(k, 0), solver.points)

    def _is_going(self, state: BackwardState) -> Array:
        in_time = state.attempts < self.forward.max_steps
        return jnp.isfinite(self.scale) & in_time & diffrax.is_okay(state.result)

    def _start(self, t: Array, unread: Array, solution: SegmentPath) -> BackwardState:
        zero = jax.tree.map(lambda ct: jnp.zeros(ct.shape[1:], ct.dtype), self.cotangents)
        y, unread, _ = self._jumps(-t, zero, unread)
        s, s_next, controller_state = -t, self.s_end, None
        if self.adaptive:
            # The first step is as long as that of the forward solve there.
            order, first = self.solver.error_order(self.terms), solution.length(t)
            s_next, controller_state = self.controller.init(
                self.terms, s, self.s_end, y, first, solution, self.solver.func, order
            )
        stop = self._stop(s, s_next, unread, solution)
        solver_state = self.solver.init(self.terms, s, stop, y, solution)
        solver_state, controller_state = jax.tree.map(jnp.asarray, (solver_state, controller_state))
        no = jnp.asarray(False)
        # Chosen by an array: a loop's carry has no result that is known when it is traced.
        result = diffrax.RESULTS.where(no, diffrax.RESULTS.successful, diffrax.RESULTS.successful)
        return BackwardState(s, s_next, y, solver_state, controller_state, no, unread, jnp.asarray(0), result)

    def _finish(
        self, state: BackwardState, rest: UndividedStep | None, total: Cotangent
    ) -> tuple[Cotangent, Moving]:
        """Undo the scale. A solve that failed raises, or without `throw` makes all of the gradient NaN."""
        results = diffrax.RESULTS
        before_end = (state.s < self.s_end) & jnp.isfinite(self.scale)
        stopped = before_end & diffrax.is_okay(state.result)
        result = results.where(stopped, results.max_steps_reached, state.result)
        if self.division is not None and rest is not None:
            inexact = jnp.isfinite(self.scale) & ~self.division.has_converged(rest) & diffrax.is_okay(result)
            result = results.where(inexact, results.dt_min_reached, result)
        failed = ~diffrax.is_okay(result)
        scale = jnp.where(failed, jnp.full_like(self.scale, jnp.nan), self.scale)
        found = jax.tree.map(lambda x: x * scale.astype(x.dtype), (state.y, total))
        if self.options.throw:
            found = checked_by(raising, found, result, failed)
        y, total = found
        return y, jax.tree.map(lambda x, like: x.astype(like.dtype), total, self.moving)

    def _blocks(
        self, solution: SegmentPath, state: BackwardState, rest: UndividedStep | None, total: Cotangent
    ) -> tuple[BackwardState, UndividedStep | None, Cotangent]:
        """Solve back over a segment. Whenever there are enough nodes, their integrals go to `total`."""

        def inside(state: BackwardState) -> Array:
            return (state.s < -solution.t0[0]) & self._is_going(state)

        def goes_on(state: BackwardState, rest: UndividedStep | None) -> Array:
            return inside(state) if rest is None else inside(state) | self._is_left(state, rest)

        # A step that is divided may have more parts than there is room for nodes: `rest` goes on in the next
        # block, and the solve only after it.
        def step(carry: PyTree) -> PyTree:
            state, rest, nodes = carry
            if self.division is None:
                state, new = self._attempt(solution, state)
                path = self._path(new.s0, new.s1, new.dense)
                return state, None, self.quadrature.put(nodes, new.accepted, solution, path, new.s0, new.s1)
            state, rest = self._whole_step(solution, inside, state, rest)
            return self._parts(self.division, solution, state, rest, nodes)

        def block(carry: PyTree) -> PyTree:
            state, rest, total = carry
            # Filled with a time and a state of the solve: nodes that are not used go through the vjp as well,
            # with weights of zero, and have to be finite.
            nodes = Nodes.empty(-state.s, solution.evaluate(-state.s), self.quadrature.points.size)
            state, rest, nodes = _diffrax.while_loop(
                lambda carry: goes_on(*carry[:2]) & ~carry[2].is_full,
                step,
                (state, rest, nodes),
                buffers=lambda carry: carry[2].buffers(),
            )
            return state, rest, add_to(total, self.quadrature.gradient(nodes))

        return _diffrax.while_loop(lambda carry: goes_on(*carry[:2]), block, (state, rest, total))

    def _attempt(self, solution: SegmentPath, state: BackwardState) -> tuple[BackwardState, Attempt]:
        """Try a step. Its end is that of the new state if it is accepted."""
        s0, s1 = state.s, self._stop(state.s, state.s_next, state.unread, solution)
        y1, error, dense, solver_state, result = self.solver.step(
            self.terms, s0, s1, state.y, solution, state.solver_state, state.made_jump
        )
        accepted, s, s_next, made_jump, controller_state, control_result = self._control(
            state, s1, y1, error, solution
        )
        results = diffrax.RESULTS
        result = results.where(accepted, result, results.successful)
        result = results.where(diffrax.is_okay(result), control_result, result)
        # As diffrax does: the controller has dealt with its own state and the times.
        old, new = (state.y, state.solver_state), (y1, solver_state)
        y, solver_state = jax.tree.map(lambda a, b: jnp.where(accepted, a, b), new, old)
        y, unread, jumped = self._jumps(s, y, state.unread)
        solver_state = self._after_jump(jumped, s, s_next, y, unread, solution, solver_state)
        made_jump = jnp.where(accepted, made_jump | jumped, state.made_jump)
        # `max_steps` is for each saved time, as it is for a solve.
        attempts = jnp.where(jumped, 0, state.attempts + 1)
        rest = (y, solver_state, controller_state, made_jump, unread, attempts, result)
        state = BackwardState(s, s_next, *jax.tree.map(jnp.asarray, rest))
        return state, Attempt(accepted, s0, s1, dense)

    # Steps divided for the quadrature

    def _nothing_left(self, division: Division, state: BackwardState, solution: SegmentPath) -> UndividedStep:
        # A loop's carry has its shapes before there is a step.
        shapes = jax.eval_shape(lambda: self._attempt(solution, state)[1].dense)
        dense = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        return division.empty(state.s, dense)

    def _is_left(self, state: BackwardState, rest: UndividedStep) -> Array:
        return rest.is_left & diffrax.is_okay(state.result)

    def _whole_step(
        self,
        solution: SegmentPath,
        inside: Callable[[BackwardState], Array],
        state: BackwardState,
        rest: UndividedStep,
    ) -> tuple[BackwardState, UndividedStep]:
        """Attempt a step until one is accepted, unless there is some left of the last."""

        def attempt(carry: tuple[BackwardState, UndividedStep]) -> tuple[BackwardState, UndividedStep]:
            state, rest = carry
            state, new = self._attempt(solution, state)
            return state, rest.of_step(new.accepted, new.s0, new.s1, new.dense)

        return _diffrax.while_loop(lambda carry: inside(carry[0]) & ~carry[1].is_left, attempt, (state, rest))

    def _parts(
        self,
        division: Division,
        solution: SegmentPath,
        state: BackwardState,
        rest: UndividedStep,
        nodes: Nodes,
    ) -> tuple[BackwardState, UndividedStep, Nodes]:
        """Put the parts of a step among the nodes, as many as there is room for."""
        most = TRIALS * self.forward.max_steps

        def attempt(carry: tuple[UndividedStep, Nodes]) -> tuple[UndividedStep, Nodes]:
            rest, nodes = carry
            path = self._path(rest.start, rest.end, rest.dense)
            accepted, new = division.attempt(rest, solution, path)
            return new, self.quadrature.put(nodes, accepted, solution, path, rest.s, rest.stop)

        rest, nodes = _diffrax.while_loop(
            lambda carry: self._is_left(state, carry[0]) & (carry[0].trials < most) & ~carry[1].is_full,
            attempt,
            (rest, nodes),
            buffers=lambda carry: carry[1].buffers(),
        )
        results = diffrax.RESULTS
        result = results.where(rest.trials < most, state.result, results.max_steps_reached)
        return eqx.tree_at(lambda state: state.result, state, result), rest, nodes

    # Parts of a step

    def _after_jump(
        self,
        jumped: Array,
        s: Array,
        s_next: Array,
        y: Cotangent,
        unread: Array,
        solution: SegmentPath,
        solver_state: SolverState,
    ) -> SolverState:
        """Make the solver's state anew after a jump, where it holds the adjoint state before it."""
        if _diffrax.sees_jumps(self.solver) or not jax.tree.leaves(solver_state):
            return solver_state
        stop = self._stop(s, s_next, unread, solution)

        # Under `vmap` both branches run; jumps are as rare as saved times, where there is no other way.
        def anew() -> SolverState:
            return jax.tree.map(jnp.asarray, self.solver.init(self.terms, s, stop, y, solution))

        return jax.lax.cond(jumped, anew, lambda: solver_state)

    def _control(
        self, state: BackwardState, s1: Array, y1: Cotangent, error: Cotangent, solution: SegmentPath
    ) -> PyTree:
        """Return what a controller's `adapt_step_size` does."""
        if not self.adaptive:
            return jnp.asarray(True), s1, self.s_end, jnp.asarray(False), None, diffrax.RESULTS.successful
        # An error that is no number rejects the step.
        error = jax.tree.map(lambda x: jnp.where(jnp.isnan(x), jnp.inf, x), error)
        order = self.solver.error_order(self.terms)
        return self.controller.adapt_step_size(
            state.s, s1, state.y, y1, solution, error, order, state.controller_state
        )

    def _stop(self, s: Array, s_next: Array, unread: Array, solution: SegmentPath) -> Array:
        """Return the end of a step: at the next saved time, and over so many forward steps, at the latest.

        The step is chosen for the adjoint state alone. That it spans two forward steps at most is what
        keeps the quadrature right where the adjoint state is smooth and the field is not.
        """
        i = solution.step_before(-s) - (1 if self.adaptive else 0)
        saved = jnp.where(unread > 0, -self.ts[unread - 1], jnp.inf)
        stop = jnp.minimum(saved, -solution.t0[jnp.maximum(i, 0)])
        # A step that would leave a hundredth of itself takes that with it.
        return jnp.where(s_next - s > 0.99 * (stop - s), stop, s_next)

    def _jumps(self, s: Array, y: Cotangent, unread: Array) -> tuple[Cotangent, Array, Array]:
        """Add the cotangents of all that is saved at the time `-s`; tell whether there were some."""

        def body(carry: tuple[Cotangent, Array]) -> tuple[Cotangent, Array]:
            y, unread = carry
            return jax.tree.map(lambda y, ct: y + ct[unread - 1], y, self.cotangents), unread - 1

        y, left = _diffrax.while_loop(
            lambda carry: (carry[1] > 0) & (-self.ts[carry[1] - 1] <= s), body, (y, unread)
        )
        return y, left, left != unread

    def _path(self, s0: Array, s1: Array, dense: DenseInfo) -> AdjointPath:
        return self.solver.interpolation_cls(t0=s0, t1=s1, **dense).evaluate


def _largest(cotangents: Cotangent) -> Array:
    """Return the largest absolute value of a number, or 1 if all are zero."""
    largest = [jnp.max(jnp.abs(ct), initial=0) for ct in jax.tree.leaves(cotangents)]
    scale = jnp.max(jnp.stack([x.astype(largest[0].dtype) for x in largest]))
    return jnp.where(scale == 0, jnp.ones_like(scale), scale)


def _sum(trees: list[PyTree]) -> PyTree:
    first, *rest = trees
    for tree in rest:
        first = jax.tree.map(jnp.add, first, tree)
    return first
