import jax
import jax.numpy as jnp

import flatlayers as fl
from flatlayers import activations


def test_they_are_those_of_jax():
    names = {name for name in vars(activations) if not name.startswith("_")} - {"PyTree", "identity"}
    assert {"celu", "tanh", "sin"} < names
    for name in names:
        theirs = getattr(jax.nn, name, None) or getattr(jnp, name, None)
        assert getattr(activations, name) is theirs


def test_identity():
    x = jnp.arange(3.0)
    assert activations.identity(x) is x
    assert fl.Dense(3, 2, activations.identity) != fl.Dense(3, 2)
