"""All that touches names of diffrax (and of Equinox's loops) that are not public, in one place.

Tested with diffrax 0.7.2; the names used here are stable within 0.7. `check_version` says so when an
adjoint is made with another version, and nothing here is needed without one.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import diffrax
import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
import optimistix


if TYPE_CHECKING:
    from diffrax._integrate import SaveState, State, loop as _loop
    from diffrax._root_finder import use_stepsize_tol
    from diffrax._saveat import save_y
else:
    try:
        from diffrax._integrate import SaveState, State, loop as _loop
        from diffrax._root_finder import use_stepsize_tol
        from diffrax._saveat import save_y
    except ImportError:  # Another version, which `check_version` refuses before any of these is used.
        SaveState = State = _loop = use_stepsize_tol = save_y = None

TESTED = ("0.7.2", "0.8")

OR_NONE = "Or take it for a constant by jax.lax.stop_gradient."

nondifferentiable = eqxi.nondifferentiable


def check_version(version: str = diffrax.__version__) -> None:
    """Raise `ImportError` unless diffrax is at least the first and below the second of `TESTED`."""
    low, high = TESTED
    if not is_tested(version):
        raise ImportError(
            f"expected diffrax >= {low} and < {high}, which flatlayers' adjoints are tested with, found "
            f"{version}; install one of these, or use diffrax's own diffrax.RecursiveCheckpointAdjoint()"
        )


def is_tested(version: str = diffrax.__version__) -> bool:
    """Whether this is a version of diffrax that the adjoints are tested with."""
    low, high = TESTED
    return _numbers(low) <= _numbers(version) < _numbers(high)


def _numbers(version: str) -> tuple[int, ...]:
    parts = version.split(".")[:3]
    return tuple(int("".join(c for c in part if c.isdigit()) or 0) for part in parts)


def while_loop(cond: Callable[[Any], Any], body: Callable[[Any], Any], init: Any, buffers: Any = None) -> Any:
    """`lax.while_loop` whose `buffers(carry)` are written in place, under `vmap` as well."""
    return eqxi.while_loop(cond, body, init, buffers=buffers, kind="lax")


class FrozenSolver(eqx.Module):
    """A solver whose step has been traced: what it closed over is in the leaves of `trace`."""

    trace: Callable[..., Any]
    order: Any
    interpolation_cls: Callable[..., Any] = eqx.field(static=True)

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        del terms, args
        return self.trace(t0, t1, y0, *jax.tree.map(jnp.asarray, (solver_state, made_jump)))

    def error_order(self, terms: Any) -> Any:
        del terms
        return self.order


def stop_gradient(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.lax.stop_gradient(x) if eqx.is_inexact_array(x) else x, tree)


def constant_controller(controller: Any, refuse: Callable[[Any, str], Any]) -> Any:
    """`controller` after `refuse(arrays, name)` of all arrays whose gradient diffrax's own adjoint has.

    It stops that of all of a `PIDController` but the bounds on the step, which it applies afterwards.
    """

    def is_pid(x: Any) -> bool:
        return type(x) is diffrax.PIDController

    def constant(x: Any) -> Any:
        if not is_pid(x):
            return refuse(x, type(controller).__name__)
        bounds = [refuse(getattr(x, name), f"PIDController({name}=...)") for name in ("dtmin", "dtmax")]
        return eqx.tree_at(
            lambda pid: [pid.dtmin, pid.dtmax], stop_gradient(x), bounds, is_leaf=lambda x: x is None
        )

    return jax.tree.map(constant, controller, is_leaf=is_pid)


def constant_solver(solver: Any, refuse: Callable[[Any, str], Any]) -> Any:
    """`solver` after `refuse(arrays, name)` of all its arrays but the tolerances of a root finder."""

    def is_finder(x: Any) -> bool:
        return isinstance(x, optimistix.AbstractRootFinder)

    def constant(x: Any) -> Any:
        return stop_gradient(x) if is_finder(x) else refuse(x, type(solver).__name__)

    return jax.tree.map(constant, solver, is_leaf=is_finder)


def with_tolerances(solver: Any, controller: Any) -> Any:
    """`solver`, with the tolerances of the controller where an implicit one leaves them open."""
    finder = getattr(solver, "root_finder", None)
    names = [name for name in ("rtol", "atol", "norm") if getattr(finder, name, None) is use_stepsize_tol]
    if not names:
        return solver
    values = [getattr(controller, name) for name in names]
    return eqx.tree_at(lambda s: [getattr(s.root_finder, name) for name in names], solver, values)


def with_forward_mode(solver: Any) -> Any:
    """`solver`, with plain loops over its stages, which have forward mode and no reverse mode."""
    return jax.tree.map(_plain_stages, solver, is_leaf=_has_stages)


def has_forward_mode(solver: Any) -> bool:
    """Whether `solver` has no loop over stages, or plain ones."""
    parts = filter(_has_stages, jax.tree.leaves(solver, is_leaf=_has_stages))
    return all(part.scan_kind == "lax" for part in parts)


def sees_jumps(solver: Any) -> bool:
    """Whether a step after a jump of `y` needs no more than `made_jump`. Other solvers carry what `y` was."""
    return _has_stages(solver) and type(solver).step.__module__.startswith("diffrax.")


def _has_stages(x: Any) -> bool:
    return isinstance(x, diffrax.AbstractRungeKutta | diffrax.AbstractSRK)


def _plain_stages(x: Any) -> Any:
    if not _has_stages(x) or x.scan_kind is not None:
        return x
    return eqx.tree_at(lambda s: s.scan_kind, x, "lax", is_leaf=lambda x: x is None)


def freeze_solver(solver: Any, terms: Any, args: Any, state: State) -> FrozenSolver:
    def step(t0, t1, y0, solver_state, made_jump):
        return solver.step(terms, t0, t1, y0, args, solver_state, made_jump)

    example = (state.tprev, state.tnext, state.y, state.solver_state, jnp.asarray(False))
    trace = eqx.filter_closure_convert(step, *example)
    return FrozenSolver(trace, solver.error_order(terms), solver.interpolation_cls)


def freeze_saveat(saveat: diffrax.SaveAt, args: Any, state: State) -> diffrax.SaveAt:
    """`saveat` with functions that need no `args` and whose leaves hold what they closed over."""

    def freeze(sub: diffrax.SubSaveAt) -> diffrax.SubSaveAt:
        if sub.fn is save_y:
            return sub
        fn = eqx.filter_closure_convert(lambda t, y, _: sub.fn(t, y, args), state.tprev, state.y, None)
        return eqx.tree_at(lambda s: s.fn, sub, fn)

    return eqx.tree_at(sub_saveats, saveat, [freeze(sub) for sub in sub_saveats(saveat)])


def run(
    solver: Any, saveat: diffrax.SaveAt, state: State, options: dict[str, Any], record: Any = None
) -> tuple[State, Any, Any]:
    """Diffrax's own loop from `state`, and what `record.write(state)` made of the state at each attempt."""
    records = []

    def outer(cond, body, init, *, max_steps, buffers):
        if record is None:
            return eqxi.while_loop(cond, body, init, max_steps=max_steps, buffers=buffers, kind="lax")
        final, kept = eqxi.while_loop(
            lambda carry: cond(carry[0]),
            lambda carry: (body(carry[0]), carry[1].write(carry[0])),
            (init, record),
            max_steps=max_steps,
            buffers=lambda carry: [*buffers(carry[0]), *carry[1].buffers()],
            kind="lax",
        )
        records.append(kept)
        return final

    def inner(cond, body, init, *, max_steps, buffers, checkpoints):
        del checkpoints
        return eqxi.while_loop(cond, body, init, max_steps=max_steps, buffers=buffers, kind="lax")

    final, statistics = _loop(
        solver=solver,
        terms=None,
        args=None,
        saveat=saveat,
        init_state=state,
        event=None,
        inner_while_loop=inner,
        outer_while_loop=outer,
        **options,
    )
    return final, statistics, (records or [None])[0]


def sub_saveats(saveat: diffrax.SaveAt) -> list[diffrax.SubSaveAt]:
    subs = jax.tree.leaves(saveat.subs, is_leaf=lambda x: isinstance(x, diffrax.SubSaveAt))
    return [sub for sub in subs if isinstance(sub, diffrax.SubSaveAt)]


def save_states(state: State) -> Sequence[SaveState]:
    states = jax.tree.leaves(state.save_state, is_leaf=lambda x: isinstance(x, SaveState))
    return [state for state in states if isinstance(state, SaveState)]


def only_outputs(final: State, saveat: diffrax.SaveAt, message: str) -> State:
    """`final`, with an error for a cotangent of anything but what was saved."""

    def outputs(state: State) -> list[Any]:
        solver_state = [state.solver_state] if saveat.solver_state else []
        return [*(save.ys for save in save_states(state)), state.dense_infos, *solver_state]

    blocked = eqxi.nondifferentiable_backward(final, msg=message, symbolic=False)
    return eqx.tree_at(outputs, blocked, outputs(final), is_leaf=lambda x: x is None)
