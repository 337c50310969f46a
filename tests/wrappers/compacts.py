"""Layers by `fl.compact` from a function and fields, and a call of them."""

import jax
import jax.numpy as jnp

import flatlayers as fl


ONES = fl.initializers.ones


def compact(function=lambda m, x: x, **fields):
    return fl.compact(**fields)(function)


def called(layer, x=None, dtype=float):
    ps, st = fl.setup(jax.random.key(0), layer, dtype)
    return layer(jnp.zeros(2) if x is None else x, ps, st)
