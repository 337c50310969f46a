"""`GaussAdjoint`: the adjoint equation solved back in time, its parameter integral by Gauss-Legendre nodes."""

import math
from dataclasses import KW_ONLY
from typing import Any, get_origin

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from . import _diffrax
from ._trajectory import Sampled, Trajectory, Window, set_at


# How many rows of states go through one vjp: enough for fast matrix products, more only takes memory.
ROWS = 320


class GaussAdjoint(diffrax.AbstractAdjoint):
    """The gradient from the adjoint equation, with the parameters' part by Gauss-Legendre nodes.

    After `dy/dt = f(t, y, p)`, the equation `dl/dt = -(df/dy)^T l` is solved back in time over the dense
    output of the forward solve, with a jump of `l` at each saved time, and `dL/dp = int l^T df/dp dt` is
    taken by the Gauss-Legendre rule on each of its steps. The nodes of several steps go through one vjp:
    large matrix products, where other adjoints add up the gradient stage by stage.

    The gradient is that of the true solution up to the tolerance, which is relative to the largest
    cotangent: a loss times a constant has the gradient times that constant. (The gradient of the numerical
    solution, exact to rounding, is that of `diffrax.RecursiveCheckpointAdjoint` and of
    `AdaptiveCheckpointAdjoint`.)

    For any `diffrax.diffeqsolve` of ODE terms by any solver, with `SaveAt(t0=, t1=, ts=)`, under `jit`
    and `vmap`. Gradients are with respect to `y0`, `args` and the arrays that the terms hold as a pytree.

    Memory: about `order + 1` states for each of up to 64 steps. In a longer solve earlier steps are solved
    again, one segment at a time, so that `max_steps` costs about `(order + 2) sqrt(max_steps)` states.

    **Arguments:**

    - `order`: a step has `(order + 1) // 2` nodes; `None` is the order of the solver.
    - `solver`: for the adjoint equation; `None` is the solver of the forward solve.
    - `stepsize_controller`: for the adjoint equation; `None` is that of the forward solve. A backward step
        spans at most two forward ones, and is a forward one if this controller is not an adaptive one.

    **Raises:** `ValueError` for events, for `max_steps=None`, for other options of `SaveAt` and for
    `order` below 1; `TypeError` for terms that are not ODE terms, such as of an SDE. An error for a gradient
    with respect to what a vector field closes over, to times or to step sizes, and for forward mode.
    `ImportError` for a version of diffrax that this is not tested with.

    Reference: Norcliffe and Deisenroth, "Faster Training of Neural ODEs Using Gauss-Legendre Quadrature",
    TMLR 2023; `GaussAdjoint` of SciMLSensitivity.jl.

    >>> import diffrax
    >>> import jax
    >>> import flatlayers as fl
    >>> term = diffrax.ODETerm(lambda t, y, rate: -rate * y)
    >>> pid = diffrax.PIDController(rtol=1e-5, atol=1e-7)
    >>> def end(rate):
    ...     return diffrax.diffeqsolve(
    ...         term, diffrax.Tsit5(), 0, 1, None, 1.0, rate, stepsize_controller=pid, adjoint=fl.GaussAdjoint()
    ...     ).ys[0]
    >>> print(f"{jax.grad(end)(1.0):.4f}")
    -0.3679
    """

    _: KW_ONLY
    order: int | None = eqx.field(default=None, static=True)
    solver: diffrax.AbstractSolver | None = None
    stepsize_controller: diffrax.AbstractStepSizeController | None = None

    def __check_init__(self) -> None:
        _diffrax.check_version()
        if self.order is not None and (not isinstance(self.order, int) or self.order < 1):
            raise ValueError(f"expected `order` to be None or an integer of at least 1, found {self.order!r}")

    def loop(self, *, args: Any, terms: Any, solver: Any, saveat: Any, event: Any, **options: Any) -> Any:
        """Called by `diffrax.diffeqsolve`."""
        parts = _check(terms, solver, saveat, event, options["max_steps"])
        state, throw = options.pop("init_state"), options.pop("throw")
        del options["passed_solver_state"], options["passed_controller_state"]
        for name in ("t0", "t1", "dt0"):
            options[name] = _constant(options[name], f"`{name}`")
        saveat = eqx.tree_at(lambda s: s.subs, saveat, _constant(saveat.subs, "SaveAt(ts=...)"))
        forward = Sampled.of(_diffrax.freeze_solver(solver, terms, args, state), solver.order(terms))
        inner = jax.tree.map(jnp.asarray, state.solver_state)
        state = _with_solver_state(state, (inner, forward.empty(state.y)))
        params, fields = _fields(parts, args, state)
        back = self._back(parts, solver, options["stepsize_controller"])
        rest = eqx.tree_at(lambda s: s.y, state, None)
        setting = Setting(*_stop_gradient((forward, saveat, rest, options)), fields, back, throw)
        final, statistics = solve((state.y, params), setting)
        final = _with_solver_state(final, final.solver_state[0])
        message = f"Only saved values have a gradient with {_NAME}. {_INSTEAD}"
        return _diffrax.only_outputs(final, diffrax.SaveAt(t1=True), message), statistics

    def _back(self, parts: list[Any], solver: Any, controller: Any) -> "Back":
        """How the backward solve is made, in the time `-t`."""
        controller = controller.wrap(-1)
        if self.stepsize_controller is not None:
            controller = self.stepsize_controller.wrap(-parts[0].direction)
        if self.solver is not None:
            solver = _diffrax.with_tolerances(self.solver, controller)
        order = self.order or solver.order(diffrax.ODETerm(lambda t, y, args: y)) or 5
        return Back(solver, controller, (order + 1) // 2)


_NAME = "GaussAdjoint"
_INSTEAD = "Use diffrax.RecursiveCheckpointAdjoint() or AdaptiveCheckpointAdjoint() instead."


def _check(terms: Any, solver: Any, saveat: Any, event: Any, max_steps: int | None) -> list[Any]:
    """Raise for what is not supported; the single ODE terms."""
    if event is not None:
        raise ValueError(f"{_NAME} does not support events. {_INSTEAD}")
    if max_steps is None:
        raise ValueError(
            f"expected max_steps to be an integer with {_NAME}, which keeps the times of the steps, found "
            "None. Give a bound, or use diffrax.RecursiveCheckpointAdjoint(checkpoints=...)."
        )
    options = {"dense": saveat.dense}
    if isinstance(saveat.subs, diffrax.SubSaveAt):
        options |= {"steps": saveat.subs.steps, "fn": saveat.subs.fn is not _diffrax.save_y}
    else:
        options["subs"] = True
    found = ", ".join(name for name, used in options.items() if used)
    if found:
        raise ValueError(f"expected SaveAt(t0=..., t1=..., ts=...) with {_NAME}, found {found}. {_INSTEAD}")
    parts = list(terms.terms) if isinstance(terms, diffrax.MultiTerm) else [terms]
    for term in parts:
        inside = getattr(term, "term", term)
        if not isinstance(inside, diffrax.ODETerm):
            raise TypeError(
                f"expected a diffrax.ODETerm (a control with a derivative gives one by `to_ode()`) with {_NAME}, "
                f"found {type(inside).__name__} for {type(solver).__name__}. {_INSTEAD}"
            )
    return parts


def _fields(parts: list[Any], args: Any, state: Any) -> tuple[Any, list[Any]]:
    """The parameters, and the terms as functions `f(t, y, parameters)`."""
    params, rest = eqx.partition((parts, args), eqx.is_inexact_array)

    def field(i: int, t: Any, y: Any, params: Any) -> Any:
        parts, args = eqx.combine(params, rest)
        return parts[i].prod(parts[i].vf(t, y, args), parts[i].contr(jnp.zeros_like(t), jnp.ones_like(t)))

    inputs = (jnp.asarray(state.tprev), state.y, params)
    fields = [
        eqx.filter_closure_convert(lambda *inputs, i=i: field(i, *inputs), *inputs) for i in range(len(parts))
    ]
    message = (
        f"{_NAME} gives no gradient with respect to a value that the vector field closes over: pass it "
        "in `args`. Or use diffrax.RecursiveCheckpointAdjoint() or AdaptiveCheckpointAdjoint()."
    )
    return params, _diffrax.nondifferentiable(fields, msg=message)


def _with_solver_state(state: Any, solver_state: Any) -> Any:
    return eqx.tree_at(lambda s: s.solver_state, state, solver_state, is_leaf=lambda x: x is None)


def _constant(tree: Any, name: str) -> Any:
    message = f"{_NAME} gives no gradient with respect to {name}. {_INSTEAD}"
    return _diffrax.nondifferentiable(tree, msg=message)


def _stop_gradient(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.lax.stop_gradient(x) if eqx.is_inexact_array(x) else x, tree)


class Back(eqx.Module):
    """How the backward solve is made."""

    solver: diffrax.AbstractSolver
    controller: diffrax.AbstractStepSizeController
    nodes: int = eqx.field(static=True)


class Setting(eqx.Module):
    """All but `y0` and the parameters."""

    solver: Sampled
    saveat: diffrax.SaveAt
    state: Any
    options: dict[str, Any]
    fields: list[Any]
    back: Back
    throw: bool = eqx.field(static=True)

    def run(self, y0: Any, record: Any = None) -> Any:
        state = eqx.tree_at(lambda s: s.y, self.state, y0, is_leaf=lambda x: x is None)
        return _diffrax.run(self.solver, self.saveat, state, self.options, record)


@eqx.filter_custom_vjp
def solve(problem: Any, setting: Setting) -> Any:
    """The forward solve of `problem = (y0, parameters)`."""
    final, statistics, _ = setting.run(problem[0])
    return final, statistics


@solve.def_fwd
def _solve_fwd(perturbed: Any, problem: Any, setting: Setting) -> Any:
    del perturbed
    y0, _ = problem
    state = eqx.tree_at(lambda s: s.y, setting.state, y0, is_leaf=lambda x: x is None)
    final, statistics, record = setting.run(y0, Trajectory.empty(state, setting.options["max_steps"]))
    (saved,) = _diffrax.save_states(final)
    return (final, statistics), (record.finished(final), final.num_accepted_steps, saved.ts)


@solve.def_bwd
def _solve_bwd(residuals: Any, cotangents: Any, perturbed: Any, problem: Any, setting: Setting) -> Any:
    trajectory, steps, ts = residuals
    y0, params = problem
    moving, fixed = eqx.partition(params, perturbed[1])
    final, _ = cotangents
    (saved,) = _diffrax.save_states(final)
    cts = jax.tree.map(
        lambda y, ct: jnp.zeros((ts.size, *y.shape), y.dtype) if ct is None else ct, y0, saved.ys
    )
    backward = Backward(setting, trajectory, ts, cts, moving, fixed)
    return backward.solve(steps)


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

    def __init__(self, setting: Setting, trajectory: Trajectory, ts: Any, cts: Any, moving: Any, fixed: Any):
        self.setting, self.trajectory, self.ts = setting, trajectory, ts
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
        fields = self.setting.fields
        if get_origin(self.solver.term_structure) is diffrax.MultiTerm:
            return diffrax.MultiTerm(*(diffrax.ODETerm(self._adjoint([field])) for field in fields))
        return diffrax.ODETerm(self._adjoint(fields))

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
        weight = jnp.where(used, nodes.weight, jnp.zeros_like(nodes.weight))
        flat = lambda x: x.reshape(-1, *x.shape[2:])
        weigh = lambda x: flat(x * weight.reshape(*weight.shape, *[1] * (x.ndim - 2)).astype(x.dtype))

        def values(moving: Any) -> Any:
            params = eqx.combine(moving, self.fixed)
            at = lambda t, y: _sum(field(t, y, params) for field in self.setting.fields)
            return jax.vmap(at)(flat(nodes.t), jax.tree.map(flat, nodes.y))

        _, pull = jax.vjp(values, self.moving)
        return pull(jax.tree.map(weigh, nodes.adjoint))[0]

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

        going = lambda carry: (carry[0] >= 0) & self._is_going(carry[2])
        carry = (jnp.where(steps > 0, k, -1), window, place, total)
        _, _, place, total = _diffrax.while_loop(going, segment, carry)
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
        s, end, dt0 = -t, -self.setting.options["t0"], self.setting.options["dt0"]
        error_order = self.solver.error_order(self.terms)
        s_next, controller_state = end, None
        if self.adaptive:
            s_next, controller_state = self.controller.init(
                self.terms, s, end, y, dt0, window, self.solver.func, error_order
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
        inside = lambda place: (place.s < -window.t0[0]) & self._is_going(place)

        def block(carry: Any) -> Any:
            place, total = carry
            nodes = Nodes.empty(-place.s, window.evaluate(-place.s), self.points.size)
            going = lambda carry: inside(carry[0]) & ~carry[1].is_full
            place, nodes = _diffrax.while_loop(
                going,
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
        where = lambda a, b: jnp.where(keep, a, b)
        results = diffrax.RESULTS
        result = results.where(keep, result, results.successful)
        result = results.where(diffrax.is_okay(result), control_result, result)
        nodes = self._put(nodes, keep, window, s0, s1, dense)
        y, solver_state = jax.tree.map(where, (y1, solver_state), (place.y, place.solver_state))
        y, left, jumped = self._jumps(s, y, place.left)
        jump = where(jump | jumped, place.jump)
        attempts = jnp.where(jumped, 0, place.attempts + 1)  # max_steps is for each saved time, as a solve
        rest = (y, solver_state, controller_state, jump, left, attempts, result)
        return Place(s, s_next, *jax.tree.map(jnp.asarray, rest)), nodes

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
        going = lambda carry: (carry[1] > 0) & (-self.ts[carry[1] - 1] <= s)

        def body(carry: Any) -> Any:
            y, left = carry
            return jax.tree.map(lambda y, ct: y + ct[left - 1], y, self.cts), left - 1

        y, new_left = _diffrax.while_loop(going, body, (y, left))
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
