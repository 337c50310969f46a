"""The states of a loop, kept for a walk back over it in buffers whose length does not depend on the loop."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp

from ..types import Array, ArrayLike, PyTree
from ._diffrax import get_at, set_at, while_loop
from ._places import quotient, remainder, rounded_up
from ._trees import rows_of


# Solves of up to so many steps keep every state.
PLAIN = 128


def capacity(steps: int, every: int = 1) -> int:
    """Return how many slots `Checkpoints` needs for a loop of up to `steps` steps.

    Up to `PLAIN` steps every state (with `every`, every so many) has its slot. Above it the stride
    doubles whenever the slots are used up; the states left out are computed again, stride by stride, in
    the slots behind. About `2 sqrt(steps / every)` slots are enough for any number of steps.
    """
    last = ceil(steps - 1, every)
    # Of each stride there are two needs: a slot for each of its multiples, and room behind the last of them
    # for all states of the last stride.
    strides = (2**power for power in range(last.bit_length() + 1))
    needed = min(ceil(last, stride) + stride for stride in strides)
    return min(last + 1, max(ceil(PLAIN, every), needed))


def thins(steps: int, every: int = 1) -> bool:
    """Tell whether a loop of up to `steps` steps can use up its slots."""
    return capacity(steps, every) <= ceil(steps - 1, every)


class Slots(eqx.Module):
    """A buffer of states."""

    buffers: list[Array]
    structure: PyTree = eqx.field(static=True)

    @classmethod
    def empty(cls, state: PyTree, slots: int) -> "Slots":
        leaves, structure = jax.tree.flatten(state)
        return cls(rows_of(slots, leaves), structure)

    def __getitem__(self, slot: ArrayLike) -> PyTree:
        return jax.tree.unflatten(self.structure, [get_at(buffer, slot) for buffer in self.buffers])

    def set(self, slot: ArrayLike, state: PyTree) -> "Slots":
        leaves = jax.tree.leaves(state)
        return Slots([set_at(b, x, slot) for b, x in zip(self.buffers, leaves, strict=True)], self.structure)


class Checkpoints(eqx.Module):
    """The states of a loop at the multiples of `stride`: slot `j` holds that of step `j * stride`.

    A write goes to the slot of the next multiple; the last one to come there is the one that belongs there.
    Thus no write has a condition, and a step that is tried again writes over its first attempt.
    """

    slots: Slots
    stride: Array
    every: int = eqx.field(static=True)
    capacity: int = eqx.field(static=True)
    thins: bool = eqx.field(static=True)

    @classmethod
    def empty(cls, state: PyTree, steps: int, every: int = 1) -> "Checkpoints":
        size = capacity(steps, every)
        return cls(Slots.empty(state, size), jnp.array(every), every, size, thins(steps, every))

    def replace(self, slots: Slots, stride: Array | None = None) -> "Checkpoints":
        stride = self.stride if stride is None else stride
        return Checkpoints(slots, stride, self.every, self.capacity, self.thins)

    def write(self, n: Array, state: PyTree) -> "Checkpoints":
        """Keep the state of step `n`: of the step last written, or of the one after it."""
        thinned = self._thinned(n) if self.thins else self
        return thinned.replace(thinned.slots.set(rounded_up(n, thinned.stride), state))

    def _thinned(self, n: Array) -> "Checkpoints":
        """Every second state if the slots are used up; if they are not, the loop makes no step.

        A stride needs one slot for each of its states in the walk back, which come after the last.
        """
        # The slot of the next multiple, and those that its stride needs, have to lie in the buffer.
        full = rounded_up(n, self.stride) + quotient(self.stride, self.every) > self.capacity
        stop = jnp.where(full, (self.capacity + 1) // 2, 0)
        # Slot `j` is written after slot `2 j` is read and never read again, so this is done in place. A loop
        # and not a condition: under `vmap` that would run both branches, and copy the buffer each time.
        _, slots = while_loop(
            lambda carry: carry[0] < stop,
            lambda carry: (carry[0] + 1, carry[1].set(carry[0], carry[1][2 * carry[0]])),
            (jnp.asarray(1), self.slots),
            buffers=lambda carry: carry[1].buffers,
        )
        return self.replace(slots, jnp.where(full, 2 * self.stride, self.stride))


class Refilled(eqx.Module):
    """The slots that states computed again go into; each `None` where there is nothing to compute again."""

    strides: Slots | None
    between: Slots | None

    def buffers(self) -> list[Array]:
        return [
            buffer for slots in (self.strides, self.between) if slots is not None for buffer in slots.buffers
        ]


class CheckpointReader:
    """Reads the states of all steps from the last to the first, computing again those that were left out.

    A stride's states go into the slots behind its first, which belong to later strides: these are done.
    With `every`, the states between two that were to be kept go into slots of their own.

    **Arguments:**

    - `checkpoints`: as the loop left them.
    - `steps`: how many steps it made.
    - `advance`: gives the state of step `i + 1` for `i` and the state of step `i`.
    """

    def __init__(self, checkpoints: Checkpoints, steps: Array, advance: Callable[[Array, PyTree], PyTree]):
        self.checkpoints, self.steps, self.advance = checkpoints, steps, advance

    def start(self) -> Refilled:
        checkpoints, every = self.checkpoints, self.checkpoints.every
        between = Slots.empty(checkpoints.slots[0], every) if every > 1 else None
        return Refilled(checkpoints.slots if checkpoints.thins else None, between)

    def read(self, i: Array, refilled: Refilled) -> tuple[PyTree, Refilled]:
        """Return the state of step `i`, which is the step before that of the last call."""
        strides, between = refilled.strides, refilled.between
        stride, every = self.checkpoints.stride, self.checkpoints.every
        group = quotient(i, stride)
        first = group * stride
        unit = quotient(i - first, every)
        # Where the states are there already this is a loop of no steps, for the same reason as in `_thinned`.
        if strides is not None:
            count = jnp.where(self._enters(i, stride), unit * every, 0)
            # Slot `group` keeps the stride's first state. Those behind it are of strides that are read.
            strides = self._recompute(strides, group, strides[group], first, count, every)
        state = (self.checkpoints.slots if strides is None else strides)[group + unit]
        if between is not None:
            count = jnp.where(self._enters(i, every), remainder(i, every), 0)
            # `state` is that of the last multiple of `every` before step `i`, or of step `i` itself.
            between = self._recompute(between.set(0, state), 0, state, i - remainder(i, every), count, 1)
            state = between[remainder(i, every)]
        return state, Refilled(strides, between)

    def _enters(self, i: Array, stride: ArrayLike) -> Array:
        """Tell whether step `i` is the first to be read of a stride, which is its last."""
        return (i == self.steps - 1) | (remainder(i + 1, stride) == 0)

    def _recompute(
        self, slots: Slots, slot: ArrayLike, state: PyTree, first: Array, count: Array, stride: int
    ) -> Slots:
        """Make `count` steps, and put each `stride`-th state into the next slot after `slot`."""

        # The states before a multiple of the stride go to its slot as well, and are written over.
        def body(carry: tuple[Array, PyTree, Slots]) -> tuple[Array, PyTree, Slots]:
            done, state, slots = carry
            state, done = self.advance(first + done, state), done + 1
            return done, state, slots.set(slot + rounded_up(done, stride), state)

        _, _, slots = while_loop(
            lambda carry: carry[0] < count,
            body,
            (jnp.zeros_like(count), state, slots),
            buffers=lambda carry: carry[2].buffers,
        )
        return slots


def ceil(a: int, b: int) -> int:
    """Return `a / b`, rounded up."""
    return -(-a // b)
