"""What several of the sections raise their errors with."""

import jax
import jax.numpy as jnp

import flatlayers as fl


KEY = jax.random.key(0)
ONES = jnp.ones(2)
VECTOR = fl.ComponentVector.of({"a": jnp.ones(2), "b": jnp.ones(2)})
STACKED = fl.ComponentVector(jnp.ones((3, 4)), VECTOR.layout)
DENSE = fl.Dense(2, 2)
PS, ST = fl.setup(KEY, DENSE, jnp.float64)


def ones(layer):
    """Return parameters that are all one, which compile nothing, and the state."""
    ps = fl.ComponentVector(jnp.ones(layer.layout.length), layer.layout)
    return ps, fl.initial_states(KEY, layer, float)


def called(layer, x):
    """Call a layer with parameters of one."""
    return layer(x, *ones(layer))


def squares(ps, st, batch):
    return (ps.data**2).sum(), st
