"""A few numbers in place of a large vector, which an error in any part of it shows in."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ..types import DType, PyTree


# A prime: neighbours in an array come into different sums, along each of its axes.
SUMS = 13


class Sketch(eqx.Module):
    """Sums of every `SUMS`-th number of a tree, each with a sign drawn once; of few numbers, all of them.

    Linear, and the expected square of its size is that of the tree.
    """

    signs: list[jax.Array]
    dtype: DType = eqx.field(static=True)

    @classmethod
    def of(cls, tree: PyTree, dtype: DType) -> "Sketch":
        draw = np.random.default_rng(0)
        leaves = _real(tree)
        return cls([jnp.asarray(draw.choice([-1, 1], leaf.size), jnp.int8) for leaf in leaves], dtype)

    def zeros(self) -> jax.Array:
        return jnp.zeros(min(SUMS, sum(sign.size for sign in self.signs)), self.dtype)

    def __call__(self, tree: PyTree) -> jax.Array:
        parts = [x.ravel() * sign.astype(x.dtype) for x, sign in zip(_real(tree), self.signs, strict=True)]
        total = self.zeros()
        flat = jnp.concatenate([part.astype(self.dtype) for part in parts])
        rows = -(-flat.size // total.size)
        return jnp.pad(flat, (0, rows * total.size - flat.size)).reshape(rows, total.size).sum(0)


def _real(tree: PyTree) -> list[jax.Array]:
    """Return the leaves, of complex numbers both parts."""
    leaves = jax.tree.leaves(tree)
    return [part for x in leaves for part in ([x.real, x.imag] if jnp.iscomplexobj(x) else [x])]
