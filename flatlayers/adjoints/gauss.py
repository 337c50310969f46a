"""`GaussAdjoint`: the gradient of a solve from its adjoint equation and Gauss-Legendre quadrature."""

from dataclasses import KW_ONLY
from functools import partial

import diffrax
import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp

from ..types import Args, Array, Cotangent, PyTree, Time, Y
from . import _diffrax, _modes
from ._backward import Backward, BackwardOptions, SolvedForward, VectorField
from ._diffrax import LoopOptions, LoopState, TracedSolver
from ._guards import Guard, stop_gradient
from ._traced import TracedFunction
from ._trajectory import SampledSolver, Trajectory


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

    def loop(
        self,
        *,
        args: Args,
        terms: diffrax.AbstractTerm,
        solver: diffrax.AbstractSolver,
        stepsize_controller: diffrax.AbstractStepSizeController,
        event: diffrax.Event | None,
        saveat: diffrax.SaveAt,
        t0: Time,
        t1: Time,
        dt0: Time | None,
        max_steps: int | None,
        throw: bool,
        init_state: _diffrax.State,
        passed_solver_state: bool,
        passed_controller_state: bool,
        progress_meter: diffrax.AbstractProgressMeter,
    ) -> tuple[_diffrax.State, PyTree]:
        """Run the solve. Called by `diffrax.diffeqsolve`."""
        del passed_solver_state, passed_controller_state
        max_steps = _GUARD.check_options(event, max_steps)
        parts = _single_terms(terms, solver)
        _check_saveat(saveat)
        options = _GUARD.loop_options(t0, t1, dt0, stepsize_controller, max_steps, progress_meter)
        saveat, solver = _GUARD.saveat(saveat), _GUARD.solver(solver)
        start = LoopState.of(init_state)
        traced = TracedSolver.of(solver, terms, args, init_state)
        sampled = SampledSolver.of(traced, solver.order(terms))
        solver_state = sampled.initial_state(jax.tree.map(jnp.asarray, start.solver_state), start.y)
        params, fields = _fields_of_params(parts, args, start)
        back = self._backward_options(parts, solver, options.stepsize_controller, throw)
        state = _diffrax.replace_state(init_state, y=None, solver_state=solver_state)
        sampled, saveat, state, options = stop_gradient((sampled, saveat, state, options))
        constants = GaussConstants(sampled, saveat, state, options, fields, back)
        problem = _modes.reverse_only((start.y, params), _NAME)
        final, statistics = solve_by_adjoint_equation(problem, constants)
        final = _diffrax.replace_state(final, solver_state=LoopState.of(final).solver_state[0])
        return _diffrax.only_outputs(final, diffrax.SaveAt(t1=True), _GUARD.only_saved_values), statistics

    def _backward_options(
        self,
        parts: list[PyTree],
        solver: diffrax.AbstractSolver,
        controller: diffrax.AbstractStepSizeController,
        throw: bool,
    ) -> BackwardOptions:
        controller = controller.wrap(-1)
        if self.stepsize_controller is not None:
            controller = _GUARD.controller(self.stepsize_controller.wrap(-parts[0].direction))
        if self.solver is not None:
            solver = _diffrax.with_tolerances(_GUARD.solver(self.solver), controller)
        order = self.order or solver.order(diffrax.ODETerm(lambda t, y, args: y)) or 5
        return BackwardOptions(solver, controller, (order + 1) // 2, throw)


_NAME = "GaussAdjoint"
_GUARD = Guard(_NAME)
_OTHERS = "diffrax.RecursiveCheckpointAdjoint() or fl.AdaptiveCheckpointAdjoint()"


def _check_saveat(saveat: diffrax.SaveAt) -> None:
    """Raise `ValueError` for options of `saveat` that are not supported."""
    options = {"dense": saveat.dense}
    if isinstance(saveat.subs, diffrax.SubSaveAt):
        options |= {"steps": saveat.subs.steps, "fn": not _diffrax.saves_y(saveat.subs)}
    else:
        options["subs"] = True
    found = ", ".join(name for name, used in options.items() if used)
    if found:
        raise ValueError(
            f"expected SaveAt(t0=..., t1=..., ts=...) with {_NAME}, found {found}. Use {_OTHERS} instead."
        )


def _single_terms(terms: PyTree, solver: diffrax.AbstractSolver) -> list[PyTree]:
    """Return the terms that `terms` is made of. **Raises:** `TypeError` unless all are of an ODE."""
    parts = list(terms.terms) if isinstance(terms, diffrax.MultiTerm) else [terms]
    for term in parts:
        inside = getattr(term, "term", term)
        if not isinstance(inside, diffrax.ODETerm):
            raise TypeError(
                f"expected a diffrax.ODETerm with {_NAME} (a control term gives one by `to_ode()`), found "
                f"{type(inside).__name__} for {type(solver).__name__}. Use {_OTHERS} instead."
            )
    return parts


def _fields_of_params(
    parts: list[PyTree], args: Args, start: LoopState
) -> tuple[list[Array], list[VectorField]]:
    """Return the parameters as a flat list of arrays, and the terms as functions of them."""
    # Flat, so that the many times that the fields are traced do not walk over the user's own pytrees.
    moving, rest = eqx.partition((parts, args), eqx.is_inexact_array)
    params, structure = jax.tree.flatten(moving)

    def field(i: int, t: Time, y: Y, params: list[Array]) -> Y:
        parts, args = eqx.combine(jax.tree.unflatten(structure, params), rest)
        return parts[i].prod(parts[i].vf(t, y, args), parts[i].contr(jnp.zeros_like(t), jnp.ones_like(t)))

    inputs = (jnp.asarray(start.t0), start.y, params)
    fields = [TracedFunction.of(partial(field, i), *inputs) for i in range(len(parts))]
    message = (
        f"{_NAME} gives no gradient with respect to a value that the vector field closes over: pass it in "
        f"`args`. Or use {_OTHERS}."
    )
    return params, eqxi.nondifferentiable(fields, msg=message)


class GaussConstants(eqx.Module):
    """All of a solve but `y0` and the parameters."""

    solver: SampledSolver
    saveat: diffrax.SaveAt
    # Without `y`.
    state: _diffrax.State
    options: LoopOptions
    fields: list[VectorField]
    back: BackwardOptions


def differentiated_once(t0: Array, problem: PyTree) -> Array:
    """Return `t0`, with an error for a second derivative by the `problem`."""
    return _modes.differentiated_once(t0, problem, _NAME, "", "adjoint=fl.AdaptiveCheckpointAdjoint()")


@eqx.filter_custom_vjp
def solve_by_adjoint_equation(
    problem: tuple[Y, list[Array]], constants: GaussConstants
) -> tuple[_diffrax.State, PyTree]:
    """Solve from `y0` of `problem = (y0, parameters)`; return the final state and the statistics."""
    state = _diffrax.replace_state(constants.state, y=problem[0])
    final, statistics, _ = _diffrax.run(constants.solver, constants.saveat, state, constants.options)
    return final, statistics


@solve_by_adjoint_equation.def_fwd
def _solve_fwd(
    perturbed: PyTree, problem: tuple[Y, list[Array]], constants: GaussConstants
) -> tuple[tuple[_diffrax.State, PyTree], tuple[Trajectory, Array, Array]]:
    del perturbed
    t0 = differentiated_once(LoopState.of(constants.state).t0, problem)
    state = _diffrax.replace_state(constants.state, y=problem[0], t0=t0)
    trajectory = Trajectory.empty(LoopState.of(state), constants.options.max_steps)
    final, statistics, trajectory = _diffrax.run(
        constants.solver, constants.saveat, state, constants.options, trajectory
    )
    end = LoopState.of(final)
    return (final, statistics), (trajectory.finished(end), end.accepted_steps, end.saved[0].times)


@solve_by_adjoint_equation.def_bwd
def _solve_bwd(
    residuals: tuple[Trajectory, Array, Array],
    cotangents: tuple[_diffrax.State, PyTree],
    perturbed: tuple[PyTree, list[bool]],
    problem: tuple[Y, list[Array]],
    constants: GaussConstants,
) -> tuple[Cotangent, list[Array | None]]:
    trajectory, steps, ts = residuals
    y0, params = problem
    moving, fixed = eqx.partition(params, perturbed[1])
    if not jax.tree.leaves(y0):
        return y0, jax.tree.map(jnp.zeros_like, moving)
    options = constants.options
    forward = SolvedForward(constants.solver, trajectory, options.t0, ts, steps, options.max_steps)
    of_saved = LoopState.of(cotangents[0]).saved[0].values
    of_saved = jax.tree.map(
        lambda y, ct: jnp.zeros((ts.size, *y.shape), y.dtype) if ct is None else ct, y0, of_saved
    )
    return Backward(forward, constants.back, constants.fields, of_saved, moving, fixed).solve()
