"""A batch, and the value and the gradient of a loss over several devices."""

import jax
import numpy as np

import flatlayers as fl


X = np.random.default_rng(0).normal(size=(48, 3))


def value_and_gradient(mesh, loss, ps, st, batch, jit=True):
    function = fl.sharded_value_and_grad(loss, mesh)
    return (jax.jit(function) if jit else function)(fl.shard(ps, mesh), st, batch)
