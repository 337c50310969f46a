"""The residuals of the last steps of a solve, in a ring of buffers."""

from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax

from ..types import Array, ArrayLike
from ._checkpoints import Slots
from ._diffrax import DenseInfo, set_at
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

    def cleared(self, n: Array) -> "Ring":
        """Return the same without what the last attempt after `n` steps has left, which may not be finite."""
        rows = self.residuals
        for slot in (remainder(n, self.size), remainder(n + 1, self.size)):
            rows = [set_at(row, jnp.zeros(row.shape[1:], row.dtype), slot) for row in rows]
        return self.replace(rows)

    def calls(self, first: ArrayLike, number: int) -> list[Array]:
        """Return the residuals of `number` steps from `first` on, all stages of all steps in a row."""
        if number == self.size:
            return [merged(row[...]) for row in self.residuals]
        slot = remainder(jnp.asarray(first), self.size)
        return [merged(lax.dynamic_slice_in_dim(row[...], slot, number)) for row in self.residuals]

    def buffers(self) -> list[Array]:
        return [*self.residuals, *self.dense.buffers]


def merged(rows: Array) -> Array:
    """Return an array whose first two axes are one."""
    return rows.reshape(-1, *rows.shape[2:])
