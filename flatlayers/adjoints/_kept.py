"""Steps whose residuals are kept in a ring: on the way back they are not made again."""

from collections.abc import Callable

import jax.numpy as jnp

from ..types import Array, ArrayLike, Cotangent, PyTree, Y
from . import _diffrax
from ._checkpoints import Slots
from ._diffrax import LoopState, State, set_at
from ._explicit import ExplicitMethod, Keep, Kept, Step
from ._outputs import Position
from ._places import quotient, remainder, rounded_up
from ._plan import Plan
from ._ring import Ring, merged
from ._solver import ExplicitSolver
from ._steps import ExplicitSteps, Pull, StepBack, StepRecord
from ._trees import add_to, rows_of


class KeepingSolver(ExplicitSolver):
    """An explicit method that puts what its stages leave into a ring.

    The ring goes around diffrax's loop: as a part of the solver's state it would be copied in each step, to
    be kept or not.
    """

    def __init__(self, method: ExplicitMethod, plan: Plan):
        super().__init__(method)
        self.plan = plan
        # While the body of diffrax's loop is traced: the ring, and the number of the attempt.
        self.ring: Ring | None = None
        self.number: Array = jnp.zeros((), int)

    @property
    def is_chained(self) -> bool:
        return self.plan.is_chained

    def empty_ring(self, y0: Y) -> Ring:
        ks = rows_of(self.method.tableau.num_stages, y0)
        dense = {"y0": y0, "y1": y0, "k": ks} if self.plan.is_dense else None
        return Ring.empty(self.plan.size, self.plan.count, self.method.residuals, dense)

    def attempt(
        self, body: Callable[[State], State], state: State, record: StepRecord
    ) -> tuple[State, StepRecord]:
        """Run the body of diffrax's loop once, with the ring of the record."""
        start = LoopState.of(state)
        self.number, self.ring = start.accepted_steps, record.ring
        after = body(state)
        ring, self.ring = self.ring, None
        return after, record.write(start).with_ring(ring)

    def make(self, t0: Array, t1: Array, y0: Y, **start: PyTree) -> Step:
        if self.ring is None:  # diffrax looks at shapes
            return super().make(t0, t1, y0, **start)
        method, n, ring = self.method, self.number, self.ring
        keep, count = self._keep(n, ring.size), method.tableau.num_stages
        step, rows = method.step(t0, t1, y0, count, keep, ring.residuals, **start)
        ring = ring.replace(rows)
        self.ring = ring.set_dense(n, step.dense(y0)) if self.plan.is_dense else ring
        return step

    def _keep(self, n: Array, size: int) -> Keep:
        """Return what keeps the residuals of step `n`, those of its last stage as of the next one's first."""
        last, plan = self.method.tableau.num_stages - 1, self.plan
        here, after = remainder(n, size), remainder(n + 1, size)

        def write(kept: Kept, residuals: list[Array], *place: ArrayLike) -> Kept:
            return [set_at(row, x, *place) for row, x in zip(kept, residuals, strict=True)]

        def keep(kept: Kept, i: Array, residuals: list[Array]) -> Kept:
            if plan.count <= last:  # a step that does not begin with it writes over the last stage's
                return write(kept, residuals, jnp.where(i == last, after, here), jnp.where(i == last, 0, i))
            kept = write(kept, residuals, here, i)
            # The last one to come there is the last stage.
            return write(kept, residuals, after, 0) if plan.is_chained else kept

        return keep


class KeptSteps:
    """The walk back over steps, block by block; those that the ring does not have any more are made again."""

    def __init__(self, steps: ExplicitSteps, ring: Ring, plan: Plan, number: Array):
        self.steps, self.method, self.record = steps, steps.method, steps.record
        self.ring, self.plan, self.number = ring, plan, number
        self.zero_params, self.cotangents = steps.zero_cotangents, steps.cotangents

    def walk(self, position: Position, step_back: StepBack) -> Position:
        """Walk back over all steps."""
        plan, method = self.plan, self.method

        def block(carry: PyTree) -> PyTree:
            position, weights, starts, ring, deltas = carry
            last = position[0]
            first = quotient(last - 1, plan.block) * plan.block
            starts, ring = self._refilled(first, last, starts, ring)
            position, deltas = self._back(position, first, ring, deltas, step_back)
            calls = ring.calls(first, plan.block, last - first), [merged(rows[...]) for rows in deltas]
            return position, add_to(weights, method.weight_gradients(*calls)), starts, ring, deltas

        i, ct, unread = position
        plain, weights, control = ct.params
        # In the loop over steps there are none of weights to be carried along.
        init = (
            (i, ct.replace(params=(plain, None, control)), unread),
            weights,
            self.record.starts.slots,
            self.ring,
        )
        (i, ct, unread), weights, *_ = _diffrax.while_loop(
            lambda carry: carry[0][0] > 0,
            block,
            (*init, method.empty_deltas(plan.block, plan.count)),
            buffers=lambda carry: [*carry[2].buffers, *carry[3].buffers(), *carry[4]],
        )
        plain, _, control = ct.params
        return i, ct.replace(params=(plain, weights, control)), unread

    def _back(
        self, position: Position, first: Array, ring: Ring, deltas: Kept, step_back: StepBack
    ) -> tuple[Position, Kept]:
        """Walk back to step `first`, and keep the cotangents of the products on the way."""

        def body(carry: tuple[Position, Kept]) -> tuple[Position, Kept]:
            position, deltas = carry
            i = position[0] - 1
            dense = ring.dense[remainder(i, ring.size)]
            y1 = None if dense is None else dense["y1"]
            return step_back(i, y1, dense, self._pull(i, ring, deltas), position)

        return _diffrax.while_loop(
            lambda carry: carry[0][0] > first, body, (position, deltas), buffers=lambda carry: carry[1]
        )

    def _pull(self, i: Array, ring: Ring, deltas: Kept) -> Pull:
        def pull(ct_y1: Cotangent, ct_dense: Cotangent, _: None) -> PyTree:
            cotangents = ct_y1, ct_dense if self.plan.is_dense else None
            places = remainder(i, ring.size), remainder(i, self.plan.block)
            y0, (plain, control), kept = self.steps.pull(i, ring.residuals, deltas, places, cotangents)
            return (y0, None), (plain, None, control), kept

        return pull

    def _refilled(self, first: Array, last: Array, starts: Slots, ring: Ring) -> tuple[Slots, Ring]:
        """Make the steps from `first` to before `last` again if the ring has not got all that they left.

        If the starts of some blocks were left out, all those of a stride are computed when its last block is
        walked over. They go into the slots behind the stride's first, which are of steps that are done.
        """
        checkpoints, plan = self.record.starts, self.plan
        stride = checkpoints.stride
        group = quotient(first, stride)
        origin = group * stride
        unit = quotient(first - origin, plan.block)
        # Of step `n - size + 1` and those before it the ring may have less than all.
        there = self.number - plan.size + 1
        begin, after = first, first + plan.block
        if checkpoints.thins:
            enters = (after >= self.number) | (after > there) | (remainder(after, stride) == 0)
            begin = jnp.where(enters, origin, first)
        y0, _ = starts[group + jnp.where(begin == first, unit, 0)]
        begin = jnp.where(first > there, last, begin)

        def body(carry: tuple[Array, Y, Slots, Ring]) -> tuple[Array, Y, Slots, Ring]:
            i, y0, starts, ring = carry
            y1, ring = self.steps.remake(i, y0, ring, is_dense=plan.is_dense)
            i = i + 1
            if checkpoints.thins:
                # The states inside of the block go to its own start, which is not read again.
                slot = group + jnp.minimum(rounded_up(i - origin, plan.block), unit)
                starts = starts.set(slot, (y1, None))
            return i, y1, starts, ring

        _, _, starts, ring = _diffrax.while_loop(
            lambda carry: carry[0] < last,
            body,
            (begin, y0, starts, ring),
            buffers=lambda carry: [*carry[2].buffers, *carry[3].buffers()],
        )
        return starts, ring
