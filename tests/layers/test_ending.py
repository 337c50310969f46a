import dataclasses

import jax
import jax.numpy as jnp
import pytest

import flatlayers as fl
from flatlayers.layers.ending import activated, ended, plus_bias, weight_and_bias
from tests.helpers import assert_same


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("activation", [None, jnp.tanh])
def test_a_bias_and_an_activation_that_may_be_there(use_bias, activation):
    layer = fl.Dense(3, 2, activation, use_bias=use_bias, init_bias=fl.initializers.ones)
    weight = fl.Param((2, 3), fl.initializers.zeros)
    declared = weight_and_bias(layer, weight, (2,))
    expected = {"weight": weight, "bias": fl.Param((2,), fl.initializers.ones)}
    assert declared == (expected if use_bias else {"weight": weight})
    y, ps = jax.random.normal(jax.random.key(0), (5, 2)), fl.Record(bias=jnp.arange(2.0))
    shifted = y + jnp.arange(2.0)[None] if use_bias else y
    assert_same(plus_bias(layer, y, ps), shifted)
    assert_same(ended(layer, y, ps), jnp.tanh(shifted) if activation else shifted)
    assert_same(activated(dataclasses.replace(layer).activation, y), jnp.tanh(y) if activation else y)
