"""A diffrax solve whose backward pass walks back over the accepted steps, one vjp a step.

The forward pass is diffrax's own loop. With each attempt it writes the times and the state at which the
attempt starts; a rejected one is written over by the next. The backward pass makes a step again from
there, and pulls back the cotangents of its end and of what was saved inside it.
"""

from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp

from . import _diffrax, _modes
from ._checkpoints import Checkpoints, Slots, ceil
from ._explicit import ExplicitSteps, Stages
from ._outputs import Cotangents, Output, add, zero_if_none, zeros
from ._steps import TracedSteps


NAME = "AdaptiveCheckpointAdjoint"


class Problem(eqx.Module):
    """The part of a solve that is differentiated. `stages`: of an explicit method, else `None`."""

    y0: Any
    solver_state: Any
    solver: Any
    stages: Stages | None
    saveat: diffrax.SaveAt


class Setting(eqx.Module):
    """The part that is not.

    `carries`: whether a step depends on the solver's state. `once`: the name of a solver whose steps have
    no forward mode, for which there is no second derivative.
    """

    init: Any
    options: dict[str, Any]
    every: int = eqx.field(static=True)
    carries: bool = eqx.field(static=True)
    once: str | None = eqx.field(static=True)

    @classmethod
    def of(
        cls, state: Any, options: dict[str, Any], every: int, carries: bool, once: str | None
    ) -> "Setting":
        init = eqx.tree_at(_varying, state, (None, None), is_leaf=lambda x: x is None)
        return cls(init, options, every, carries, once)

    def state(self, problem: Problem) -> Any:
        start = (problem.y0, problem.solver_state)
        return eqx.tree_at(_varying, self.init, start, is_leaf=lambda x: x is None)


def _varying(state: Any) -> Any:
    return state.y, state.solver_state


class Record(eqx.Module):
    """The times of each accepted step, and where it starts: `(y, the solver's state if it is carried)`."""

    t0: Any
    t1: Any
    jumps: Any
    starts: Checkpoints

    @classmethod
    def empty(cls, state: Any, setting: Setting) -> "Record":
        steps = setting.options["max_steps"]
        times = jnp.zeros(steps, state.tprev.dtype)
        jumps = jnp.zeros(steps, bool) if setting.carries else None
        start = (state.y, state.solver_state if setting.carries else None)
        return cls(times, times, jumps, Checkpoints.empty(start, steps, setting.every))

    def write(self, state: Any) -> "Record":
        n = state.num_accepted_steps
        t0, t1 = self.t0.at[n].set(state.tprev), self.t1.at[n].set(state.tnext)
        carries = self.jumps is not None
        jumps = self.jumps.at[n].set(jnp.asarray(state.made_jump)) if carries else None
        start = (state.y, state.solver_state if carries else None)
        return Record(t0, t1, jumps, self.starts.write(n, start))

    def buffers(self) -> list[Any]:
        jumps = [] if self.jumps is None else [self.jumps]
        return [self.t0, self.t1, *jumps, *self.starts.slots.buffers]


@eqx.filter_custom_vjp
def solve(problem: Problem, setting: Setting) -> Any:
    state = setting.state(problem)
    final, statistics, _ = _diffrax.run(problem.solver, problem.saveat, state, setting.options)
    return final, statistics


@solve.def_fwd
def _solve_fwd(perturbed: Any, problem: Problem, setting: Setting) -> Any:
    del perturbed
    state = setting.state(problem)
    if setting.once is not None:
        cause = f" with {setting.once}, whose steps have reverse mode only"
        instead = "an explicit Runge-Kutta method"
        t0 = _modes.differentiated_once(state.tprev, problem, NAME, cause, instead)
        state = eqx.tree_at(lambda state: state.tprev, state, t0)
    record = Record.empty(state, setting)
    final, statistics, record = _diffrax.run(problem.solver, problem.saveat, state, setting.options, record)
    saved = [(save.ts, save.saveat_ts_index) for save in _diffrax.save_states(final)]
    out = (final, statistics), (record, final.num_accepted_steps, final.y, saved)
    return _modes.reversed_once(out, NAME)


@solve.def_bwd
def _solve_bwd(residuals: Any, cotangents: Any, perturbed: Any, problem: Problem, setting: Setting) -> Any:
    record, steps, y1, saved = residuals
    final, _ = cotangents
    walk = Walk(problem, setting, perturbed, record, steps)
    outputs = walk.outputs(saved, final)
    ct, places = walk.end(outputs, y1, final.solver_state)
    ct, places = walk.over_steps(outputs, ct, places, final.dense_infos)
    for output, place in zip(outputs, places, strict=True):
        ct = output.at_start(ct, place)
    nothing = jax.tree.map(lambda _: None, (problem.solver_state, problem.solver))
    solver, stages = walk.again.finish(ct.params)
    out = Problem(
        ct.y,
        ct.solver_state if setting.carries else nothing[0],
        solver if stages is None else nothing[1],
        stages,
        ct.saveat,
    )
    return _modes.reversed_once(out, NAME)


class Walk:
    """The walk back over the accepted steps: what does not change on the way."""

    def __init__(self, problem: Problem, setting: Setting, perturbed: Problem, record: Record, steps: Any):
        self.problem, self.setting, self.record, self.steps = problem, setting, record, steps
        if problem.stages is None or perturbed.stages is None:
            self.again = TracedSteps(problem.solver, perturbed.solver, record, problem.solver_state)
        else:
            self.again = ExplicitSteps(problem.stages, perturbed.stages, record, problem.y0)
        self.saveat, self.rest_of_saveat = eqx.partition(problem.saveat, perturbed.saveat)

    def outputs(self, saved: Any, final: Any) -> list[Output]:
        """What has a cotangent of all that was saved."""
        inits, finals = _diffrax.save_states(self.setting.init), _diffrax.save_states(final)
        rows = enumerate(zip(saved, inits, finals, strict=True))
        outputs = [Output(self, k, ts, count, init.ys, ct.ys) for k, ((ts, count), init, ct) in rows]
        return [output for output in outputs if jax.tree.leaves(output.cotangents)]

    def end(self, outputs: list[Output], y1: Any, ct_solver_state: Any) -> tuple[Cotangents, list[Any]]:
        solver_state = None
        if self.setting.carries:
            inexact = eqx.filter(self.problem.solver_state, eqx.is_inexact_array)
            solver_state = jax.tree.map(zero_if_none, inexact, ct_solver_state)
        ct = Cotangents(zeros(y1), solver_state, self.again.zeros(), zeros(self.saveat))
        places = []
        for output in outputs:
            ct, place = output.at_end(ct, y1)
            places.append(place)
        return ct, places

    def over_steps(
        self, outputs: list[Output], ct: Cotangents, places: list[Any], ct_dense_infos: Any
    ) -> tuple[Cotangents, list[Any]]:
        starts = Starts(self)

        def body(carry: Any) -> Any:
            i, ct, places, kept = carry
            i = i - 1
            start, kept = starts.find(i, kept)
            ct_dense = jax.tree.map(lambda ct: ct[i], ct_dense_infos)
            ct, places = self.back(i, start, outputs, ct, places, ct_dense)
            return i, ct, places, kept

        carry = _diffrax.while_loop(
            lambda carry: carry[0] > 0,
            body,
            (self.steps, ct, places, starts.kept),
            lambda carry: starts.buffers(carry[3]),
        )
        return carry[1], carry[2]

    def back(
        self, i: Any, start: Any, outputs: list[Output], ct: Cotangents, places: list[Any], ct_dense: Any
    ) -> tuple[Cotangents, list[Any]]:
        """Pull the cotangents of the end of step `i`, and of what was saved in it, back to its start."""
        is_dense = jax.tree.leaves(ct_dense) != []
        needs_dense = is_dense or any(output.sub.ts is not None for output in outputs)
        y1, dense, pull = self.again.redo(i, start, needs_dense)
        ct_dense = jax.tree.map(zero_if_none, dense, ct_dense) if is_dense else zeros(dense)
        new_places = []
        for output, place in zip(outputs, places, strict=True):
            ct, place = output.at_step(i, ct, place, y1)
            ct, ct_dense, place = output.inside(i, ct, ct_dense, place, dense)
            new_places.append(place)
        (ct_y, ct_solver_state), ct_params = pull(ct.y, ct_dense, ct.solver_state)
        return Cotangents(ct_y, ct_solver_state, add(ct.params, ct_params), ct.saveat), new_places


class Starts:
    """Where the steps start, with what is computed again on the way back kept in the slots that are free.

    A stride's states go into the slots behind its first, which belong to later strides: these are done.
    With `every`, the states between two that were to be kept go into `between`.
    """

    def __init__(self, walk: Walk):
        self.walk, self.checkpoints = walk, walk.record.starts
        self.every = self.checkpoints.every
        slots = self.checkpoints.slots if self.checkpoints.thins else None
        between = Slots.empty(self.checkpoints.slots[0], self.every) if self.every > 1 else None
        self.kept = (slots, between)

    @staticmethod
    def buffers(kept: Any) -> list[Any]:
        return [buffer for slots in kept if slots is not None for buffer in slots.buffers]

    def find(self, i: Any, kept: Any) -> tuple[Any, Any]:
        """The start of step `i`, which is the step before that of the last call."""
        slots, between = kept
        stride, every = self.checkpoints.stride, self.every
        group, first = i // stride, i // stride * stride
        unit = (i - first) // every
        if slots is not None:
            count = jnp.where(self.is_new(i, stride), unit * every, 0)
            slots = self.rerun(slots, group, slots[group], first, count, every)
        start = (self.checkpoints.slots if slots is None else slots)[group + unit]
        if between is not None:
            count = jnp.where(self.is_new(i, every), i % every, 0)
            between = self.rerun(between.set(0, start), 0, start, i - i % every, count, 1)
            start = between[i % every]
        return start, (slots, between)

    def is_new(self, i: Any, stride: Any) -> Any:
        return (i == self.walk.steps - 1) | ((i + 1) % stride == 0)

    def rerun(self, slots: Slots, slot: Any, start: Any, first: Any, count: Any, stride: int) -> Slots:
        """Make `count` steps, and put each `stride`-th state into the next slot after `slot`."""

        def body(carry: Any) -> Any:
            done, start, slots = carry
            start, done = self.walk.again.advance(first + done, start), done + 1
            return done, start, slots.set(slot + ceil(done, stride), start)

        _, _, slots = _diffrax.while_loop(
            lambda carry: carry[0] < count,
            body,
            (jnp.zeros_like(count), start, slots),
            lambda carry: carry[2].buffers,
        )
        return slots
