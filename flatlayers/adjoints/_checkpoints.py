"""The states of a loop, kept for a second walk over it in a buffer of fixed length."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from ._diffrax import while_loop


PLAIN = 128


def capacity(steps: int, every: int = 1) -> int:
    """How many slots `Checkpoints` needs for a loop of up to `steps` steps.

    Up to `PLAIN` steps every state (with `every`, every so many) has its slot. Above it the stride
    doubles whenever the slots are used up; the states left out are computed again, stride by stride, in
    the slots behind. About `2 sqrt(steps / every)` slots are enough for any number of steps.
    """
    last = ceil(steps - 1, every)
    strides = (2**power for power in range(last.bit_length() + 1))
    needed = min(ceil(last, stride) + stride for stride in strides)
    return min(last + 1, max(ceil(PLAIN, every), needed))


def thins(steps: int, every: int = 1) -> bool:
    """Whether a loop of up to `steps` steps can use up its slots."""
    return capacity(steps, every) <= ceil(steps - 1, every)


class Slots(eqx.Module):
    """A buffer of states."""

    buffers: list[Any]
    structure: Any = eqx.field(static=True)

    @classmethod
    def empty(cls, state: Any, slots: int) -> "Slots":
        leaves, structure = jax.tree.flatten(state)
        return cls([jnp.zeros((slots, *x.shape), x.dtype) for x in leaves], structure)

    def __getitem__(self, slot: Any) -> Any:
        return jax.tree.unflatten(self.structure, [buffer[slot] for buffer in self.buffers])

    def set(self, slot: Any, state: Any) -> "Slots":
        leaves = jax.tree.leaves(state)
        return Slots([b.at[slot].set(x) for b, x in zip(self.buffers, leaves, strict=True)], self.structure)


class Checkpoints(eqx.Module):
    """The states of a loop at the multiples of `stride`: slot `j` holds that of step `j * stride`.

    A write goes to the slot of the next multiple; the last one to come there is the one that is due.
    Thus no write has a condition, and a step that is tried again writes over its first attempt.
    """

    slots: Slots
    stride: jax.Array
    every: int = eqx.field(static=True)
    capacity: int = eqx.field(static=True)
    thins: bool = eqx.field(static=True)

    @classmethod
    def empty(cls, state: Any, steps: int, every: int = 1) -> "Checkpoints":
        size = capacity(steps, every)
        return cls(Slots.empty(state, size), jnp.array(every), every, size, thins(steps, every))

    def replace(self, slots: Slots, stride: Any = None) -> "Checkpoints":
        stride = self.stride if stride is None else stride
        return Checkpoints(slots, stride, self.every, self.capacity, self.thins)

    def write(self, n: Any, state: Any) -> "Checkpoints":
        """Keep the state of step `n`: of the step last written, or of the one after it."""
        kept = self._thinned(n) if self.thins else self
        return kept.replace(kept.slots.set(ceil(n, kept.stride), state))

    def _thinned(self, n: Any) -> "Checkpoints":
        """Every second state if the slots are used up; if they are not, the loop makes no step.

        A stride needs one slot for each of its states in the walk back, which come after the last.
        """
        full = ceil(n, self.stride) + self.stride // self.every > self.capacity
        stop = jnp.where(full, (self.capacity + 1) // 2, 0)
        _, slots = while_loop(
            lambda carry: carry[0] < stop,
            lambda carry: (carry[0] + 1, carry[1].set(carry[0], carry[1][2 * carry[0]])),
            (1, self.slots),
            buffers=lambda carry: carry[1].buffers,
        )
        return self.replace(slots, jnp.where(full, 2 * self.stride, self.stride))


def ceil(a: Any, b: Any) -> Any:
    return -(-a // b)
