"""What the tests of normalisation share: its definition, inputs and parameters."""

import jax
import numpy as np

import flatlayers as fl


def over(x, axes, epsilon=1e-5):
    """The definition, in NumPy."""
    x = np.asarray(x)
    return (x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + epsilon)


def inputs(shape, dtype=float, seed=1):
    return 3 * jax.random.normal(jax.random.key(seed), shape, dtype) + 2


def started(layer, dtype=float):
    """Parameters that are not ones and zeros."""
    ps, st = fl.setup(jax.random.key(0), layer, dtype)
    return ps + jax.random.normal(jax.random.key(2), ps.shape, dtype), st
