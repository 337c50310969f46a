"""All that touches names of diffrax (and of Equinox's loops) that are not public, in one place.

Tested with diffrax 0.7.2; the names used here are stable within 0.7. `check_version` says so when an
adjoint is made with another version, and nothing here is needed without one.
"""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, Self, TypeAlias, TypeVar

import diffrax
import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp

from ..types import Args, Array, ArrayLike, PyTree, Y
from ._traced import TracedFunction


if TYPE_CHECKING:
    from diffrax._integrate import SaveState, State as State, loop as _loop
    from diffrax._root_finder import use_stepsize_tol
    from diffrax._saveat import save_y
    from equinox.internal._loop.common import _Buffer as Buffer, _select_if_vmap as select_if_vmap
else:
    try:
        from diffrax._integrate import SaveState, State, loop as _loop
        from diffrax._root_finder import use_stepsize_tol
        from diffrax._saveat import save_y
    except ImportError:  # Another version, which `check_version` refuses before any of these is used.
        SaveState = State = _loop = use_stepsize_tol = save_y = None
    try:
        from equinox.internal._loop.common import _Buffer as Buffer, _select_if_vmap as select_if_vmap
    except ImportError:  # Another version: `set_at` then does without.
        Buffer = select_if_vmap = None

TESTED = ("0.7.2", "0.8")

Carry = TypeVar("Carry")
# Of a solver, as its `step` takes and gives it.
SolverState: TypeAlias = PyTree
# What `interpolation_cls` of a solver makes the solution inside a step from.
DenseInfo: TypeAlias = PyTree


def check_version(version: str = diffrax.__version__) -> None:
    """Raise `ImportError` unless diffrax is at least the first and below the second of `TESTED`."""
    low, high = TESTED
    if not is_tested(version):
        raise ImportError(
            f"expected diffrax >= {low} and < {high}, which flatlayers' adjoints are tested with, found "
            f"{version}; install one of these, or use diffrax's own diffrax.RecursiveCheckpointAdjoint()"
        )


def is_tested(version: str = diffrax.__version__) -> bool:
    """Tell whether this is a version of diffrax that the adjoints are tested with."""
    low, high = TESTED
    return _numbers(low) <= _numbers(version) < _numbers(high)


def _numbers(version: str) -> tuple[int, ...]:
    parts = version.split(".")[:3]
    return tuple(int("".join(c for c in part if c.isdigit()) or 0) for part in parts)


def while_loop(
    cond: Callable[[Carry], Array],
    body: Callable[[Carry], Carry],
    init: Carry,
    buffers: Callable[[Carry], PyTree] | None = None,
) -> Carry:
    """Run `lax.while_loop`, writing the arrays in `buffers(carry)` in place, under `vmap` as well."""
    return eqxi.while_loop(cond, body, init, buffers=buffers, kind="lax")


def set_at(buffer: PyTree, x: Array, *place: ArrayLike) -> PyTree:
    """Return an array, or inside of a loop what stands for a buffer, with `x` at a place inside of it.

    Equinox's own `buffer.at[place].set(x)` is a scatter, whose check of bounds is compiled for each write.
    """
    if Buffer is None:
        return buffer.at[place].set(x)
    if isinstance(buffer, Buffer):
        return buffer._op(True, place, x, _update, {}, buffer._makes_false_steps)
    return _update(None, buffer, x, place)


def get_at(buffer: PyTree, *place: ArrayLike) -> Array:
    """Return what is at a place of an array, or inside of a loop of what stands for one."""
    array = buffer[...]
    shape = array.shape[len(place) :]
    sizes = (1,) * len(place) + shape
    return jax.lax.dynamic_slice(array, _start(array, place), sizes, allow_negative_indices=False).reshape(
        shape
    )


def _update(pred, array, x, place, *, kwargs=None, makes_false_steps=False):
    del kwargs
    shape, start = array.shape[len(place) :], _start(array, place)
    x = jnp.broadcast_to(x, shape).reshape((1,) * len(place) + shape)
    if pred is not None:  # under `vmap` a sample may be done, and writes what is there
        there = jax.lax.dynamic_slice(array, start, x.shape, allow_negative_indices=False)
        x = select_if_vmap(pred, x, there, makes_false_steps)
    return jax.lax.dynamic_update_slice(array, x, start, allow_negative_indices=False)


def _start(array: Array, place: tuple[ArrayLike, ...]) -> list[Array]:
    dtype = jnp.result_type(*place)
    return [jnp.asarray(i, dtype) for i in (*place, *(0 for _ in array.shape[len(place) :]))]


# The state of diffrax's loop


class SavedValues(eqx.Module):
    """The outcome of one `SubSaveAt`: times, values, and how many of them are of its `ts`."""

    times: Array
    values: PyTree
    ts_count: Array


class LoopState(eqx.Module):
    """The fields of diffrax's private `State` that the adjoints read, under names of their own.

    Before an attempt, `t0` and `t1` are the ends of the step that is to be tried, and `accepted_steps` is
    its number. Of the cotangents of a final state, the fields are cotangents, and `None` where there is none.
    """

    t0: Array
    t1: Array
    y: Y
    solver_state: SolverState
    made_jump: Array
    accepted_steps: Array
    dense_infos: PyTree
    saved: list[SavedValues]

    @classmethod
    def of(cls, state: PyTree) -> Self:
        saved = [SavedValues(save.ts, save.ys, save.saveat_ts_index) for save in _save_states(state)]
        times, y = (state.tprev, state.tnext), (state.y, state.solver_state)
        return cls(*times, *y, state.made_jump, state.num_accepted_steps, state.dense_infos, saved)


def replace_state(state: State, **values: PyTree) -> State:
    """Return `state` with other values for `t0`, `y` or `solver_state`."""
    theirs = {"t0": "tprev"}
    return dataclasses.replace(state, **{theirs.get(name, name): value for name, value in values.items()})


def map_times(f: Callable[[PyTree], PyTree], state: State) -> State:
    """Return `state` with `f` applied to the times of the next step and to the controller's state."""
    names = ("tprev", "tnext", "controller_state")
    return dataclasses.replace(state, **{name: f(getattr(state, name)) for name in names})


def _save_states(state: PyTree) -> list[PyTree]:
    states = jax.tree.leaves(state.save_state, is_leaf=lambda x: isinstance(x, SaveState))
    return [state for state in states if isinstance(state, SaveState)]


def only_outputs(final: State, saveat: diffrax.SaveAt, message: str) -> State:
    """Return `final`, with an error for a cotangent of anything but what was saved."""

    def outputs(state: PyTree) -> list[PyTree]:
        solver_state = [state.solver_state] if saveat.solver_state else []
        return [*(save.ys for save in _save_states(state)), state.dense_infos, *solver_state]

    blocked = eqxi.nondifferentiable_backward(final, msg=message, symbolic=False)
    return eqx.tree_at(outputs, blocked, outputs(final), is_leaf=lambda x: x is None)


# The loop


class LoopOptions(eqx.Module):
    """The arguments of diffrax's loop that both passes of an adjoint leave as they are."""

    t0: Array
    t1: Array
    dt0: Array | None
    stepsize_controller: diffrax.AbstractStepSizeController
    max_steps: int
    progress_meter: diffrax.AbstractProgressMeter


class Recorder(Protocol):
    """Records a solve. It is carried through diffrax's loop, and so has to be a pytree."""

    def write(self, state: LoopState) -> Self:
        """Record the start of an attempt; one after a rejected attempt replaces it."""
        ...

    def buffers(self) -> PyTree:
        """Return the arrays that `write` writes into one place of, so that the loop need not copy them."""
        ...


def recorded_attempt(
    body: Callable[[State], State], state: State, recorder: Recorder | None
) -> tuple[State, Recorder | None]:
    """Run the body of diffrax's loop, which is one attempt of a step, and record its start."""
    return body(state), recorder and recorder.write(LoopState.of(state))


def run(
    solver: PyTree,
    saveat: diffrax.SaveAt,
    state: State,
    options: LoopOptions,
    recorder: Recorder | None = None,
    attempt: Callable[..., PyTree] = recorded_attempt,
) -> tuple[State, PyTree, PyTree]:
    """Run diffrax's own loop from `state`; return its final state, the statistics and the recorder.

    The recorder is carried beside diffrax's state, which knows nothing of it, and is updated by `attempt`.
    """
    recorded = []

    def outer(cond, body, init, *, max_steps, buffers):
        final, last = eqxi.while_loop(
            lambda carry: cond(carry[0]),
            lambda carry: attempt(body, *carry),
            (init, recorder),
            max_steps=max_steps,
            buffers=lambda carry: [*buffers(carry[0]), *(carry[1].buffers() if carry[1] else ())],
            kind="lax",
        )
        recorded.append(last)
        return final

    def inner(cond, body, init, *, max_steps, buffers, checkpoints):
        del checkpoints
        return eqxi.while_loop(cond, body, init, max_steps=max_steps, buffers=buffers, kind="lax")

    final, statistics = _loop(
        solver=solver,
        stepsize_controller=options.stepsize_controller,
        event=None,
        saveat=saveat,
        t0=options.t0,
        t1=options.t1,
        dt0=options.dt0,
        max_steps=options.max_steps,
        terms=None,
        args=None,
        init_state=state,
        inner_while_loop=inner,
        outer_while_loop=outer,
        progress_meter=options.progress_meter,
    )
    return final, statistics, recorded[0]


# Solvers and functions that close over nothing


class TracedSolver(eqx.Module):
    """A solver whose step has been traced: what it closed over is in the leaves of `trace`."""

    trace: TracedFunction
    order: PyTree
    interpolation_cls: Callable[..., diffrax.AbstractPath] = eqx.field(static=True)

    @classmethod
    def of(cls, solver: diffrax.AbstractSolver, terms: PyTree, args: Args, state: State) -> Self:
        def step(t0, t1, y0, solver_state, made_jump):
            return solver.step(terms, t0, t1, y0, args, solver_state, made_jump)

        example = (state.tprev, state.tnext, state.y, state.solver_state, jnp.asarray(False))
        trace = TracedFunction.of(step, *example)
        return cls(trace, solver.error_order(terms), solver.interpolation_cls)

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        del terms, args
        return self.trace(t0, t1, y0, *jax.tree.map(jnp.asarray, (solver_state, made_jump)))

    def error_order(self, terms: PyTree) -> PyTree:
        del terms
        return self.order


def trace_saveat(saveat: diffrax.SaveAt, args: Args, state: State) -> diffrax.SaveAt:
    """Return `saveat` with functions that need no `args` and whose leaves hold what they closed over."""

    def trace(sub: diffrax.SubSaveAt) -> diffrax.SubSaveAt:
        if saves_y(sub):
            return sub
        fn = TracedFunction.of(lambda t, y, _: sub.fn(t, y, args), state.tprev, state.y, None)
        return eqx.tree_at(lambda s: s.fn, sub, fn)

    return eqx.tree_at(sub_saveats, saveat, [trace(sub) for sub in sub_saveats(saveat)])


def sub_saveats(saveat: diffrax.SaveAt) -> list[diffrax.SubSaveAt]:
    """Return all of the `SubSaveAt` in `saveat`, in the order of `LoopState.saved`."""
    subs = jax.tree.leaves(saveat.subs, is_leaf=lambda x: isinstance(x, diffrax.SubSaveAt))
    return [sub for sub in subs if isinstance(sub, diffrax.SubSaveAt)]


def saves_y(sub: diffrax.SubSaveAt) -> bool:
    """Tell whether the state itself is saved, as it is without `SaveAt(fn=...)`."""
    return sub.fn is save_y


# Solvers as the adjoints need them


def with_tolerances(solver: diffrax.AbstractSolver, controller: PyTree) -> diffrax.AbstractSolver:
    """Return `solver` with the tolerances of the controller where an implicit one leaves them open."""
    finder = getattr(solver, "root_finder", None)
    names = [name for name in ("rtol", "atol", "norm") if getattr(finder, name, None) is use_stepsize_tol]
    if not names:
        return solver
    values = [getattr(controller, name) for name in names]
    return eqx.tree_at(lambda s: [getattr(s.root_finder, name) for name in names], solver, values)


def has_forward_mode(solver: diffrax.AbstractSolver) -> bool:
    """Tell whether `solver` has no loop over stages, or plain ones."""
    parts = filter(_has_stages, jax.tree.leaves(solver, is_leaf=_has_stages))
    return all(part.scan_kind in ("lax", "bounded") for part in parts)


def sees_jumps(solver: diffrax.AbstractSolver) -> bool:
    """Tell whether a step after a jump of `y` needs no more than `made_jump`.

    Other solvers carry what `y` was before it.
    """
    return _has_stages(solver) and type(solver).step.__module__.startswith("diffrax.")


def _has_stages(x: object) -> bool:
    return isinstance(x, diffrax.AbstractRungeKutta | diffrax.AbstractSRK)
