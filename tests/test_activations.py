import jax
import jax.numpy as jnp

import flatlayers as fl
from flatlayers import activations


def test_a_star_import_gives_those_of_jax_and_identity_alone():
    names = {}
    exec("from flatlayers.activations import *", {}, names)
    assert names.pop("identity") is activations.identity
    assert {"celu", "tanh", "sin"} < names.keys()
    for name, function in names.items():
        assert function is (getattr(jax.nn, name, None) or getattr(jnp, name))


def test_identity():
    x = jnp.arange(3.0)
    assert activations.identity(x) is x
    assert fl.Dense(3, 2, activations.identity) != fl.Dense(3, 2)
