"""Precision and times."""

import jax
import jax.numpy as jnp

import flatlayers as fl

from .values import DENSE, KEY, VECTOR


def times_that_float32_does_not_tell_apart():
    with jax.enable_x64(False):
        layer = fl.NeuralODE(DENSE, t0=1e9, t1=1e9 + 1, saveat=[1e9, 1e9 + 1])
        ps, st = fl.setup(KEY, layer)
        return layer(jnp.ones(2), ps, st)


def float64_without_x64():
    with jax.enable_x64(False):
        return fl.f64(VECTOR)
