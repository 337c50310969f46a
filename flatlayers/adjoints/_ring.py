"""The residuals of the last steps of a solve, in a ring of buffers."""

from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax

from ..types import Array, ArrayLike
from ._checkpoints import Slots
from ._diffrax import DenseInfo
from ._places import remainder


class Ring(eqx.Module):
    """Residuals of the last steps: slot `i % size` is of step `i`, with a row for each stage.

    Each attempt writes. Of a solver whose last stage is the next step's first one it also writes the first
    row of the next slot. So after `n` accepted steps slots `n` and `n + 1` may be of one that was rejected.
    """

    residuals: list[Array]
    dense: Slots
    size: int = eqx.field(static=True)

    @classmethod
    def empty(
        cls, size: int, count: int, residuals: Sequence[jax.ShapeDtypeStruct], dense: DenseInfo = None
    ) -> "Ring":
        rows = [jnp.zeros((size, count, *x.shape), x.dtype) for x in residuals]
        return cls(rows, Slots.empty(dense, size), size)

    def replace(self, residuals: list[Array]) -> "Ring":
        return Ring(residuals, self.dense, self.size)

    def set_dense(self, i: Array, dense: DenseInfo) -> "Ring":
        return Ring(self.residuals, self.dense.set(remainder(i, self.size), dense), self.size)

    def calls(self, first: ArrayLike, number: int, done: ArrayLike) -> list[Array]:
        """Return the residuals of `number` steps from `first` on, all stages of all steps in a row.

        Rows after `done` steps are zero: a rejected attempt may have left there what is not finite.
        """
        slot = remainder(jnp.asarray(first), self.size)
        rows = [row[...] for row in self.residuals]
        if number < self.size:
            rows = [lax.dynamic_slice_in_dim(row, slot, number) for row in rows]
        is_done = jnp.arange(number) < done
        return [merged(jnp.where(is_done.reshape(-1, *(1,) * (row.ndim - 1)), row, 0)) for row in rows]

    def buffers(self) -> list[Array]:
        return [*self.residuals, *self.dense.buffers]


def merged(rows: Array) -> Array:
    """Return an array whose first two axes are one."""
    return rows.reshape(-1, *rows.shape[2:])
