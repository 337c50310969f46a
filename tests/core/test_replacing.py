"""`layer.replace`: the same layer with other fields."""

import jax.numpy as jnp
import pytest

import flatlayers as fl


pytestmark = pytest.mark.long


def test_other_fields_are_checked_and_completed():
    assert fl.Dense(3, 2).replace(use_bias=False) == fl.Dense(3, 2, use_bias=False)
    chain = fl.Chain(fl.Dense(3, 2), jnp.tanh, name="net")
    assert chain.replace(name="other") == fl.Chain(fl.Dense(3, 2), jnp.tanh, name="other")
    assert chain.replace() == chain
    with pytest.raises(ValueError, match=r"Dense\.out_dims: expected an integer of at least 0, found -1"):
        fl.Dense(3, 2).replace(out_dims=-1)
    with pytest.raises(TypeError, match=r"Dense\.replace: no name 'out_dim'; the nearest: out_dims"):
        fl.Dense(3, 2).replace(out_dim=2)


def test_a_longer_solve_takes_the_parameters_and_the_state(key):
    node = fl.NeuralODE(fl.Dense(2, 2, jnp.tanh), saveat=[0.5, 1.0])
    ps, st = fl.setup(key, node, float)
    y0 = jnp.array([0.5, -0.2])
    _, st = node(y0, ps, st)
    longer = node.replace(t1=2.0, saveat=[0.5, 1.0, 2.0], rtol=1e-8, atol=1e-8)
    ys, _ = longer(y0, ps, st)
    assert ys.shape == (3, 2)
    halfway, _ = longer.replace(t0=1.0, saveat=None)(ys[1], ps, st)
    assert jnp.allclose(halfway, ys[2], atol=1e-7)
