"""`AdaptiveCheckpointAdjoint`: the gradient of the numerical solution, step by step."""

import dataclasses
from dataclasses import KW_ONLY
from typing import TypeGuard

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp

from ..types import Args, PyTree, Time
from . import _diffrax, _modes
from ._diffrax import LoopState, TracedSolver
from ._discrete import NAME, DiscreteConstants, DiscreteProblem, solve_by_steps, stages_in
from ._explicit import TracedStages
from ._guards import Guard, stop_gradient
from ._plan import BUDGET, Allowance


class AdaptiveCheckpointAdjoint(diffrax.AbstractAdjoint):
    """The exact gradient of the numerical solution, by one walk back over the accepted steps.

    The forward solve keeps the times and the state at the start of each accepted step; the backward pass
    redoes a step from there and takes its vjp (Zhuang et al., 2020). With an explicit Runge-Kutta method it
    also keeps what the vjps of the last steps need, as far as memory is allowed, and does not redo these.
    As in diffrax's default, `RecursiveCheckpointAdjoint`, the sizes of the steps count as constants, and the
    gradients are equal to rounding. Values that are saved inside a step cost no second pass through it,
    rejected steps nothing.

    For any `diffrax.diffeqsolve`: all its solvers, all of `SaveAt`, SDEs, `vmap`.
    Gradients are with respect to `y0`, `args` and what the terms and `SaveAt(fn=...)` hold or close over.
    Both modes: reverse mode is this one, forward mode (`jax.jvp`, `jax.jacfwd`, a least squares solver) a
    solve with tangents, as by `diffrax.ForwardMode`, beside the solve itself. For a Hessian take `fl.hessian`
    or `jax.jacfwd(jax.jacrev(...))`. All of this with an explicit Runge-Kutta method, and with other methods
    that have stages by `scan_kind="bounded"`, as in `diffrax.Kvaerno5(scan_kind="bounded")`.

    Memory: what `keep` allows, and one state per accepted step (with what the solver carries, if it is not an
    explicit Runge-Kutta method) in a buffer for up to 128 steps. In a longer solve states are left out and
    computed again, so that `max_steps` costs about `2 sqrt(max_steps)` states: 128 at the default 4096.

    **Arguments:**

    - `keep`: bytes for what the vjps of the last steps need, 48 of them at most; 0 for none. `"auto"` takes
      up to 16 MiB, and none where fewer than 8 steps fit in. In a solve of more steps those before them are
      made again. The bytes are those of one solve: under `jax.vmap` each sample has as many, but a layer
      with `batching="each"` divides them among its samples.
    - `every`: keep the state of each `every`-th step only. This divides the memory by `every` up to 128
      steps, and by about its root above, and makes each step once more. Above 1 no residuals are kept.

    **Raises:** `ValueError` for events, for `max_steps=None`, for `every` below 1 and for
    `keep` that is neither a number of bytes nor `"auto"`. `TypeError` for forward mode by a solver with
    `scan_kind=None` that is no explicit Runge-Kutta method, and for reverse mode over another mode: for these
    use `diffrax.DirectAdjoint`. `RuntimeError` for a gradient with respect to times, to step sizes and their
    bounds, as `PIDController(dtmax=...)`, and of what is not a saved value: for these use
    `diffrax.RecursiveCheckpointAdjoint`. (The gradient with respect to the tolerances and the coefficients
    of a `PIDController` is zero, as diffrax has it.) `ImportError` for a version of diffrax that this is not
    tested with.

    Reference: Zhuang et al., "Adaptive Checkpoint Adjoint Method for Gradient Estimation in Neural ODE",
    ICML 2020.

    >>> import diffrax
    >>> import jax
    >>> import flatlayers as fl
    >>> term = diffrax.ODETerm(lambda t, y, rate: -rate * y)
    >>> adjoint = fl.AdaptiveCheckpointAdjoint()
    >>> def end(rate):
    ...     return diffrax.diffeqsolve(term, diffrax.Tsit5(), 0, 1, 0.1, 1.0, rate, adjoint=adjoint).ys[0]
    >>> print(f"{jax.grad(end)(1.0):.4f}")
    -0.3679
    """

    _: KW_ONLY
    every: int = eqx.field(default=1, static=True)
    keep: Allowance = eqx.field(default="auto", static=True)

    def __check_init__(self) -> None:
        _diffrax.check_version()
        if not isinstance(self.every, int) or self.every < 1:
            raise ValueError(f"expected `every` to be an integer of at least 1, found {self.every!r}")
        is_bytes = isinstance(self.keep, int) and not isinstance(self.keep, bool) and self.keep >= 0
        if self.keep != "auto" and not is_bytes:
            raise ValueError(f"expected `keep` to be 'auto' or a number of bytes, found {self.keep!r}")

    def shared_by(self, samples: int) -> "AdaptiveCheckpointAdjoint":
        """Return the adjoint for one of some solves side by side, which divide what `keep` allows."""
        if samples <= 1:
            return self
        keep = BUDGET if self.keep == "auto" else self.keep
        return dataclasses.replace(self, keep=keep // samples)

    def has_forward_mode(self, solver: diffrax.AbstractSolver) -> bool:
        """Tell whether a solve by this solver has forward mode, and second derivatives."""
        return _restarts(solver) or _diffrax.has_forward_mode(solver)

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
        del throw, passed_controller_state
        max_steps = _GUARD.check_options(event, max_steps)
        options = _GUARD.loop_options(t0, t1, dt0, stepsize_controller, max_steps, progress_meter)
        saveat = _GUARD.saveat(saveat)
        state = _diffrax.map_times(stop_gradient, init_state)
        start, reverse_only = LoopState.of(state), None
        if passed_solver_state or saveat.solver_state or not _restarts(solver):
            traced = TracedSolver.of(solver, terms, args, state)
            reverse_only = None if _diffrax.has_forward_mode(solver) else type(solver).__name__
        else:
            traced = TracedStages.of(solver, terms, args, start.t0, start.y)
        problem = DiscreteProblem(
            start.y,
            jax.tree.map(jnp.asarray, start.solver_state),
            traced,
            _diffrax.trace_saveat(saveat, args, state),
        )
        constants = DiscreteConstants.of(state, options, self.every, self.keep, reverse_only)
        if reverse_only is not None:
            problem = _modes.reverse_only(problem, f"{NAME} with {reverse_only}", stages_in(reverse_only))
        final, statistics = solve_by_steps(problem, constants)
        return _diffrax.only_outputs(final, saveat, _GUARD.only_saved_values), statistics


_GUARD = Guard(NAME)


def _restarts(solver: diffrax.AbstractSolver) -> TypeGuard[diffrax.AbstractERK]:
    """Tell whether a step is a function of its times and `y` alone.

    It is if the solver's state is at most the vector field at the start, exactly. An implicit solver's
    is a solution up to its tolerance.
    """
    return isinstance(solver, diffrax.AbstractERK) and type(solver).step is diffrax.AbstractERK.step
