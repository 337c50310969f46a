"""A diffrax solve whose backward pass walks back over the accepted steps, one vjp per step.

The forward pass is diffrax's own loop. With each attempt it writes the times and the state at which the
attempt starts, and of the last ones all that their vjps need; a rejected one is written over by the next.
The backward pass takes that, or makes a step again from its start, and pulls back the cotangents of its
end and of what was saved inside it.
"""

import diffrax
import equinox as eqx
import jax

from ..types import Array, PyTree, Y
from . import _diffrax, _modes
from ._diffrax import DenseInfo, LoopOptions, LoopState, SavedValues, SolverState, State, TracedSolver
from ._explicit import ExplicitMethod, TracedStages
from ._kept import KeepingSolver, KeptSteps
from ._outputs import BackwardCotangents, FinishedSolve, Position, SavedOutput
from ._plan import Allowance, Plan
from ._solver import ExplicitSolver
from ._steps import ExplicitSteps, Pull, RemadeSteps, StepRecord, TracedSteps
from ._trees import add_to, cast_like, wide_zeros, zero_if_none, zeros
from ._two_modes import TwoModes


NAME = "AdaptiveCheckpointAdjoint"


def stages_in(solver: str) -> str:
    """Return the way out for a solver whose loop over stages has reverse mode only."""
    return f"solver=diffrax.{solver}(scan_kind='bounded'), "


class DiscreteProblem(eqx.Module):
    """The part of a solve that is differentiated."""

    y0: Y
    solver_state: SolverState
    solver: TracedSolver | TracedStages
    saveat: diffrax.SaveAt

    @property
    def carries(self) -> bool:
        """Tell whether a step depends on the solver's state."""
        return isinstance(self.solver, TracedSolver)


class DiscreteConstants(eqx.Module):
    """The part that is not.

    `reverse_only`: the name of a solver whose steps have no forward mode, for which there is no second
    derivative.
    """

    # Without `y` and the solver's state, which are in the problem.
    state: State
    options: LoopOptions
    every: int = eqx.field(static=True)
    keep: Allowance = eqx.field(static=True)
    reverse_only: str | None = eqx.field(static=True)

    @classmethod
    def of(
        cls, state: State, options: LoopOptions, every: int, keep: Allowance, reverse_only: str | None
    ) -> "DiscreteConstants":
        state = _diffrax.replace_state(state, y=None, solver_state=None)
        return cls(state, options, every, keep, reverse_only)

    def plan(self, problem: DiscreteProblem, method: ExplicitMethod) -> Plan | None:
        """Return how residuals are kept, `None` if none are."""
        if self.every > 1:
            return None
        return Plan.of(method, problem.saveat, self.options.max_steps, self.keep)

    def initial_state(self, problem: DiscreteProblem) -> State:
        return _diffrax.replace_state(self.state, y=problem.y0, solver_state=problem.solver_state)


class Residuals(eqx.Module):
    """The numbers of the forward pass that the backward pass starts from."""

    record: StepRecord
    steps: Array
    y1: Y
    saved: list[SavedValues]


def _solve(problem: DiscreteProblem, constants: DiscreteConstants) -> tuple[State, PyTree]:
    """Solve; return the final state and the statistics."""
    state = constants.initial_state(problem)
    solver = problem.solver
    if isinstance(solver, TracedStages):
        perturbed = jax.tree.map(lambda _: False, solver)
        solver = ExplicitSolver(ExplicitMethod(solver, perturbed, LoopState.of(state).t0, problem.y0))
    final, statistics, _ = _diffrax.run(solver, problem.saveat, state, constants.options)
    return final, statistics


def _solve_fwd(perturbed: DiscreteProblem, problem: DiscreteProblem, constants: DiscreteConstants) -> PyTree:
    state, options = constants.initial_state(problem), constants.options
    if constants.reverse_only is not None:
        # All of the solve depends on its start, so a tangent of the problem cannot go around this.
        t0 = differentiated_once(LoopState.of(state).t0, problem, constants.reverse_only)
        state = _diffrax.replace_state(state, t0=t0)
    start = LoopState.of(state)
    solver = _solver_of(problem, perturbed, constants, start.t0)
    every, ring, attempt = constants.every, None, _diffrax.recorded_attempt
    if isinstance(solver, KeepingSolver):
        every, ring, attempt = solver.plan.block, solver.empty_ring(start.y), solver.attempt
    record = StepRecord.empty(start, options.max_steps, every, problem.carries, ring)
    final, statistics, record = _diffrax.run(solver, problem.saveat, state, options, record, attempt)
    end = LoopState.of(final)
    # Of the values only their number is needed, and buffers like them are in the initial state.
    saved = [SavedValues(saved.times, None, saved.ts_count) for saved in end.saved]
    out = (final, statistics), Residuals(record, end.accepted_steps, end.y, saved)
    return _modes.reversed_once(out, NAME)


def differentiated_once(t0: Array, problem: PyTree, solver: str) -> Array:
    """Return `t0`, with an error for a second derivative of a solve that has reverse mode only."""
    cause = f" with {solver}, whose steps have reverse mode only"
    instead = f"{stages_in(solver)}an explicit Runge-Kutta method"
    return _modes.differentiated_once(t0, problem, NAME, cause, instead)


def _solver_of(
    problem: DiscreteProblem, perturbed: DiscreteProblem, constants: DiscreteConstants, t0: Array
) -> TracedSolver | ExplicitSolver:
    if isinstance(problem.solver, TracedSolver):
        return problem.solver
    method = ExplicitMethod(problem.solver, perturbed.solver, t0, problem.y0)
    plan = constants.plan(problem, method)
    return ExplicitSolver(method) if plan is None else KeepingSolver(method, plan)


def _solve_bwd(
    residuals: Residuals,
    cotangents: tuple[State, PyTree],
    perturbed: DiscreteProblem,
    problem: DiscreteProblem,
    constants: DiscreteConstants,
) -> DiscreteProblem:
    walk = BackwardWalk(problem, constants, perturbed, residuals, LoopState.of(cotangents[0]))
    ct = walk.all_steps()
    out = DiscreteProblem(
        ct.y,
        ct.solver_state if problem.carries else jax.tree.map(lambda _: None, problem.solver_state),
        walk.steps.cotangents(ct.params),
        cast_like(ct.saveat, walk.saveat[0]),
    )
    return _modes.reversed_once(out, NAME)


solve_by_steps = TwoModes(_solve, _solve_fwd, _solve_bwd, NAME)


class BackwardWalk:
    """The walk back over the accepted steps, from the cotangents `final` of the final state.

    Invariant: with `i` steps left, the cotangents are those of the start of step `i`, for all that was saved
    after it; what was saved at this very time belongs to the step that ends there.
    """

    def __init__(
        self,
        problem: DiscreteProblem,
        constants: DiscreteConstants,
        perturbed: DiscreteProblem,
        residuals: Residuals,
        final: LoopState,
    ):
        self.problem, self.constants, self.residuals, self.final = problem, constants, residuals, final
        # Both are read only: the numbers that change on the way are in the carry of the loop.
        self.saveat = eqx.partition(problem.saveat, perturbed.saveat)
        self.outputs = self._outputs()
        self.steps = self._steps(perturbed)

    def _steps(self, perturbed: DiscreteProblem) -> RemadeSteps | KeptSteps:
        problem, record, number = self.problem, self.residuals.record, self.residuals.steps
        needs_dense = self._is_dense or any(output.interpolates for output in self.outputs)
        if isinstance(problem.solver, TracedSolver):
            traced = TracedSteps(problem.solver, perturbed.solver, record)
            return RemadeSteps(traced, record, number, needs_dense)
        method = ExplicitMethod(problem.solver, perturbed.solver, record.t0[0], problem.y0)
        plan, steps = self.constants.plan(problem, method), ExplicitSteps(method, record)
        if plan is None or record.ring is None:
            return RemadeSteps(steps, record, number, needs_dense)
        return KeptSteps(steps, record.ring, plan, number)

    @property
    def _is_dense(self) -> bool:
        """Tell whether the dense output has cotangents."""
        return jax.tree.leaves(self.final.dense_infos) != []

    def _outputs(self) -> list[SavedOutput]:
        """Return what was saved, as far as it has cotangents."""
        problem, options, residuals = self.problem, self.constants.options, self.residuals
        interpolation, (steps, record) = problem.solver.interpolation_cls, (residuals.steps, residuals.record)
        solve = FinishedSolve(options.t0, options.t1, problem.y0, steps, record, interpolation)
        like = LoopState.of(self.constants.state).saved
        outputs = [
            SavedOutput(
                solve,
                self.saveat,
                k,
                SavedValues(saved.times, like[k].values, saved.ts_count),
                self.final.saved[k].values,
            )
            for k, saved in enumerate(residuals.saved)
        ]
        return [output for output in outputs if output.has_cotangents]

    def all_steps(self) -> BackwardCotangents:
        """Return the cotangents of the start of the solve."""
        _, ct, unread = self.steps.walk(self._end(), self._step_back)
        for output, left in zip(self.outputs, unread, strict=True):
            ct = output.at_start(ct, left)
        return ct

    def _end(self) -> Position:
        y1, solver_state = self.residuals.y1, None
        if self.problem.carries:
            inexact = eqx.filter(self.problem.solver_state, eqx.is_inexact_array)
            solver_state = jax.tree.map(zero_if_none, inexact, self.final.solver_state)
        # That of `y` is not added up but handed on from step to step, and has the dtype of the solve.
        saveat = wide_zeros(self.saveat[0])
        ct = BackwardCotangents(zeros(y1), solver_state, self.steps.zero_params(), saveat)
        unread = []
        for output in self.outputs:
            ct, left = output.at_end(ct, y1)
            unread.append(left)
        return self.residuals.steps, ct, unread

    def _step_back(
        self, i: Array, y1: Y, dense: DenseInfo, pull: Pull, position: Position
    ) -> tuple[Position, PyTree]:
        """Pull the cotangents of the end of step `i`, and of what was saved in it, back to its start.

        Return also what `pull` gives besides.
        """
        _, ct, unread = position
        # All that was interpolated is a function of the dense output: their cotangents are added up on it,
        # so that one vjp of the step does for any number of saved values.
        ct_dense = zeros(dense)
        if self._is_dense:
            ct_dense = jax.tree.map(lambda ct: ct[i], self.final.dense_infos)
            ct_dense = jax.tree.map(zero_if_none, dense, ct_dense)
        still_unread = []
        # Diffrax saves the times inside a step before its end; backwards, the end comes first.
        for output, left in zip(self.outputs, unread, strict=True):
            ct, left = output.at_step(i, ct, left, y1)
            ct, ct_dense, left = output.inside(i, ct, ct_dense, left, dense)
            still_unread.append(left)
        (ct_y, ct_solver_state), ct_params, besides = pull(ct.y, ct_dense, ct.solver_state)
        params = add_to(ct.params, ct_params)
        ct = BackwardCotangents(ct_y, ct_solver_state, params, ct.saveat)
        return (i, ct, still_unread), besides
