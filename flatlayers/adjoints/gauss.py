"""`GaussAdjoint`: the gradient of a solve from its adjoint equation and Gauss-Legendre quadrature."""

from dataclasses import KW_ONLY
from functools import partial
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp

from . import _diffrax, _modes
from ._backward import Backward
from ._trajectory import Sampled, Trajectory


class GaussAdjoint(diffrax.AbstractAdjoint):
    """The gradient from the adjoint equation, with the parameters' part by Gauss-Legendre nodes.

    After `dy/dt = f(t, y, p)`, the equation `dl/dt = -(df/dy)^T l` is solved back in time over the dense
    output of the forward solve, with a jump of `l` at each saved time, and `dL/dp = int l^T df/dp dt` is
    taken by the Gauss-Legendre rule on each of its steps. The nodes of several steps go through one vjp:
    large matrix products, where other adjoints add up the gradient stage by stage.

    The gradient is that of the true solution, about as accurate as the solution itself, by tolerances that
    are relative to the largest cotangent: a loss times a constant has the gradient times that constant. (The
    gradient of the numerical solution, exact to rounding, is that of `diffrax.RecursiveCheckpointAdjoint`
    and of `AdaptiveCheckpointAdjoint`.)

    Where the field is piecewise in time, as by an interpolant of data, a solver may not see the corners, and
    the integral over a backward step need not be as accurate as the step. There it is controlled: with an
    adaptive controller the step is divided for the integral until two rules agree to the tolerance. The
    solution is not: where the field has corners or jumps that act on it, step to them, by
    `diffrax.ClipStepSizeController(..., step_ts=...)` or `jump_ts`.

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
    `order` below 1; `TypeError` for terms that are not ODE terms, such as of an SDE, for forward mode and
    for second derivatives. `RuntimeError` for a gradient with respect to what a vector field closes over, to
    times, to step sizes and their bounds, and to what a solver holds. (That with respect to the tolerances
    and the coefficients of a `PIDController` is zero, as diffrax has it.) `ImportError` for a version of
    diffrax that this is not tested with.

    Reference: Norcliffe and Deisenroth, "Faster Training of Neural ODEs Using Gauss-Legendre Quadrature",
    TMLR 2023; `GaussAdjoint` of SciMLSensitivity.jl.

    >>> import diffrax
    >>> import jax
    >>> import flatlayers as fl
    >>> term = diffrax.ODETerm(lambda t, y, rate: -rate * y)
    >>> pid = diffrax.PIDController(rtol=1e-5, atol=1e-7)
    >>> options = {"stepsize_controller": pid, "adjoint": fl.GaussAdjoint()}
    >>> def end(rate):
    ...     return diffrax.diffeqsolve(term, diffrax.Tsit5(), 0, 1, None, 1.0, rate, **options).ys[0]
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
        controller = _diffrax.constant_controller(options["stepsize_controller"], _constant)
        options["stepsize_controller"] = controller
        solver = _diffrax.constant_solver(solver, _constant)
        saveat = eqx.tree_at(lambda s: s.subs, saveat, _constant(saveat.subs, "SaveAt(ts=...)"))
        forward = Sampled.of(_diffrax.freeze_solver(solver, terms, args, state), solver.order(terms))
        inner = jax.tree.map(jnp.asarray, state.solver_state)
        state = _with_solver_state(state, (inner, forward.empty(state.y)))
        params, fields = _fields(parts, args, state)
        back = self._back(parts, solver, controller)
        rest = eqx.tree_at(lambda s: s.y, state, None, is_leaf=lambda x: x is None)
        forward, saveat, rest, options = _diffrax.stop_gradient((forward, saveat, rest, options))
        setting = Setting(forward, saveat, rest, options, fields, back, throw)
        problem = _modes.reverse_only((state.y, params), _NAME)
        final, statistics = solve(problem, setting)
        final = _with_solver_state(final, final.solver_state[0])
        message = f"Only saved values have a gradient with {_NAME}. {_INSTEAD}"
        return _diffrax.only_outputs(final, diffrax.SaveAt(t1=True), message), statistics

    def _back(self, parts: list[Any], solver: Any, controller: Any) -> "Back":
        """How the backward solve is made, in the time `-t`."""
        controller = controller.wrap(-1)
        if self.stepsize_controller is not None:
            controller = self.stepsize_controller.wrap(-parts[0].direction)
            controller = _diffrax.constant_controller(controller, _constant)
        if self.solver is not None:
            solver = _diffrax.constant_solver(self.solver, _constant)
            solver = _diffrax.with_tolerances(solver, controller)
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
                f"expected a diffrax.ODETerm with {_NAME} (a control term gives one by `to_ode()`), "
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
    fields = [eqx.filter_closure_convert(partial(field, i), *inputs) for i in range(len(parts))]
    message = (
        f"{_NAME} gives no gradient with respect to a value that the vector field closes over: pass it "
        "in `args`. Or use diffrax.RecursiveCheckpointAdjoint() or AdaptiveCheckpointAdjoint()."
    )
    return params, _diffrax.nondifferentiable(fields, msg=message)


def _with_solver_state(state: Any, solver_state: Any) -> Any:
    return eqx.tree_at(lambda s: s.solver_state, state, solver_state, is_leaf=lambda x: x is None)


def _constant(tree: Any, name: str) -> Any:
    message = (
        f"{_NAME} gives no gradient with respect to {name}. Use diffrax.RecursiveCheckpointAdjoint() "
        f"instead. {_diffrax.OR_NONE}"
    )
    return _diffrax.nondifferentiable(tree, msg=message)


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
    t0 = _modes.differentiated_once(setting.state.tprev, problem, _NAME, "", "AdaptiveCheckpointAdjoint")
    setting = eqx.tree_at(lambda setting: setting.state.tprev, setting, t0)
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
    if not jax.tree.leaves(y0):
        return y0, jax.tree.map(jnp.zeros_like, moving)
    backward = Backward(setting, trajectory, ts, cts, moving, fixed)
    return backward.solve(steps)
