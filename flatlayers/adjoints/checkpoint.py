"""Adjoints for diffrax: how the gradient of a solve is computed. With or without flatlayers' layers."""

from dataclasses import KW_ONLY
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp

from . import _diffrax, _modes
from ._discrete import NAME, Problem, Setting, solve
from ._explicit import Stages
from .gauss import GaussAdjoint as GaussAdjoint


class AdaptiveCheckpointAdjoint(diffrax.AbstractAdjoint):
    """The exact gradient of the numerical solution, by one walk back over the accepted steps.

    The forward solve keeps the times and the state at the start of each accepted step; the backward pass
    redoes a step from there and takes its vjp (Zhuang et al., 2020). As in diffrax's default,
    `RecursiveCheckpointAdjoint`, the sizes of the steps count as constants, and the gradients are equal
    to rounding. What is saved inside a step costs no second pass through it, rejected steps cost nothing.

    For any `diffrax.diffeqsolve`: all its solvers, all of `SaveAt`, SDEs, `vmap`.
    Gradients are with respect to `y0`, `args` and what the terms and `SaveAt(fn=...)` hold or close over.
    For a Hessian take `fl.hessian` or `jax.jacfwd(jax.jacrev(...))`, with an explicit Runge-Kutta method.

    Memory: one state an accepted step (with what the solver carries, if it is not an explicit
    Runge-Kutta method) in a buffer for up to 128 steps. In a longer solve states are left out and
    computed again, so that `max_steps` costs about `2 sqrt(max_steps)` states: 128 at the default 4096.

    **Arguments:**

    - `every`: keep the state of each `every`-th step only. This divides the memory by `every` up to 128
      steps, and by about its root above, and makes each step once more.

    **Raises:** `ValueError` for events, for `max_steps=None` and for `every` below 1. `TypeError` for forward
    mode and for reverse mode over reverse mode: for these use `diffrax.ForwardMode` or
    `diffrax.DirectAdjoint`. `RuntimeError` for a gradient with respect to times, to step sizes and their
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

    def __check_init__(self) -> None:
        _diffrax.check_version()
        if not isinstance(self.every, int) or self.every < 1:
            raise ValueError(f"expected `every` to be an integer of at least 1, found {self.every!r}")

    def loop(self, *, args: Any, terms: Any, solver: Any, saveat: Any, event: Any, **options: Any) -> Any:
        """Called by `diffrax.diffeqsolve`."""
        _check(event, options["max_steps"])
        state, saveat, options, passed = _constant_times(saveat, options)
        carries = passed or saveat.solver_state or not _restarts(solver)
        if not carries:  # the vjp of a step is not that of `solver.step`
            solver = _diffrax.with_forward_mode(solver)
        once = None if _diffrax.has_forward_mode(solver) else type(solver).__name__
        problem = Problem(
            state.y,
            jax.tree.map(jnp.asarray, state.solver_state),
            _diffrax.freeze_solver(solver, terms, args, state),
            None if carries else Stages.of(solver, terms, args, state.tprev, state.y),
            _diffrax.freeze_saveat(saveat, args, state),
        )
        setting = Setting.of(state, options, self.every, carries, once)
        final, statistics = solve(_modes.reverse_only(problem, NAME), setting)
        message = f"Only saved values have a gradient with {NAME}. {_INSTEAD}"
        return _diffrax.only_outputs(final, saveat, message), statistics


_INSTEAD = "Use diffrax.RecursiveCheckpointAdjoint() instead."


def _check(event: Any, max_steps: int | None) -> None:
    if event is not None:
        raise ValueError(f"{NAME} does not support events. {_INSTEAD}")
    if max_steps is None:
        raise ValueError(
            f"expected max_steps to be an integer with {NAME}, which keeps the times of the steps, found "
            "None. Give a bound, or use diffrax.RecursiveCheckpointAdjoint(checkpoints=...)."
        )


def _restarts(solver: Any) -> bool:
    """Whether a step is a function of its times and `y` alone.

    It is if the solver's state is at most the vector field at the start, exactly. An implicit solver's
    is a solution up to its tolerance.
    """
    return isinstance(solver, diffrax.AbstractERK) and type(solver).step is diffrax.AbstractERK.step


def _constant_times(saveat: diffrax.SaveAt, options: dict[str, Any]) -> tuple[Any, Any, Any, bool]:
    """The initial state, `saveat` and the rest of the options, with an error where times have a tangent."""
    names = ("init_state", "passed_solver_state", "passed_controller_state", "throw")
    state, passed, *_ = (options.pop(name) for name in names)
    for name in ("t0", "t1", "dt0"):
        options[name] = _constant(options[name], name)
    controller = options["stepsize_controller"]
    options["stepsize_controller"] = _diffrax.constant_controller(controller, _constant)
    times = [sub.ts for sub in _diffrax.sub_saveats(saveat)]
    saveat = eqx.tree_at(
        lambda saveat: [sub.ts for sub in _diffrax.sub_saveats(saveat)],
        saveat,
        [_constant(ts, "SaveAt(ts=...)") for ts in times],
        is_leaf=lambda x: x is None,
    )
    moving = (state.tprev, state.tnext, state.controller_state)
    state = eqx.tree_at(
        lambda state: (state.tprev, state.tnext, state.controller_state),
        state,
        _diffrax.stop_gradient(moving),
        is_leaf=lambda x: x is None,
    )
    return state, saveat, options, passed


def _constant(tree: Any, name: str) -> Any:
    message = f"{NAME} gives no gradient with respect to {name}. {_INSTEAD} {_diffrax.OR_NONE}"
    return _diffrax.nondifferentiable(tree, msg=message)
