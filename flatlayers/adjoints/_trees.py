"""Arithmetic on pytrees of arrays, leaf by leaf."""

import jax
import jax.numpy as jnp

from ..dtypes import at_least_float32
from ..types import Array, ArrayLike, Cotangent, PyTree
from ._diffrax import set_at


def add(a: PyTree, b: PyTree) -> PyTree:
    return jax.tree.map(jnp.add, a, b)


def zeros(tree: PyTree) -> PyTree:
    return jax.tree.map(jnp.zeros_like, tree)


def zero_if_none(like: Array, x: Cotangent) -> Array:
    return jnp.zeros_like(like) if x is None else x


def wide_zeros(tree: PyTree) -> PyTree:
    """Return zeros to add up many arrays like those of `tree` in: half precisions in float32.

    A sum in bfloat16, which has eight bits, loses what is below a 256th of it: after some hundred steps all.
    """
    return jax.tree.map(lambda x: jnp.zeros_like(x, at_least_float32(x.dtype)), tree)


def add_to(total: PyTree, x: PyTree) -> PyTree:
    """Return `total + x` in the dtypes of `total`."""
    return jax.tree.map(lambda total, x: total + x.astype(total.dtype), total, x)


def cast_like(tree: PyTree, like: PyTree) -> PyTree:
    """Return `tree` in the dtypes of `like`."""
    return jax.tree.map(lambda x, like: x.astype(like.dtype), tree, like)


def rows_of(number: int, tree: PyTree) -> PyTree:
    """Return buffers of zeros for so many trees."""
    return jax.tree.map(lambda x: jnp.zeros((number, *x.shape), x.dtype), tree)


def set_row(buffers: PyTree, i: ArrayLike, values: PyTree) -> PyTree:
    """Return `buffers` with `values` at row `i`: arrays, or inside of a loop what stands for them."""
    leaves, structure = jax.tree.flatten(values)
    rows = structure.flatten_up_to(buffers)
    return structure.unflatten([set_at(row, x, i) for row, x in zip(rows, leaves, strict=True)])
