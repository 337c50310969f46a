"""The states of the models inside a layer that solves."""

import functools

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flatlayers as fl
from tests.equations.test_ode import MODEL, TIGHT


class Noisy(fl.Layer):
    """A field that counts its evaluations and draws a number."""

    def states(self, key):
        return {"count": 0, "key": key}

    def forward(self, y, ps, st):
        key, now = jax.random.split(st.key)
        return -y * jax.random.uniform(now, y.shape, y.dtype), st.replace(count=st.count + 1, key=key)


@pytest.mark.parametrize("adjoint", [None, pytest.param(diffrax.BacksolveAdjoint(), marks=pytest.mark.slow)])
def test_the_state_is_frozen_during_the_solve(key, adjoint):
    node = fl.NeuralODE(Noisy(), adjoint=adjoint, stepsize_controller=TIGHT)
    ps, st = fl.setup(key, node, float)

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def total(y0, st):
        y, new = node(y0, ps, st)
        return y.sum(), (y, new)

    (_, (y, new)), gradient = total(jnp.ones(3), st)
    _, draw = jax.random.split(st.model.key)
    expected = np.exp(-jax.random.uniform(draw, (3,), float))
    np.testing.assert_allclose(y, expected, rtol=1e-8)
    np.testing.assert_allclose(gradient, expected, rtol=1e-7)
    assert new.model.count == 1
    assert jax.tree.structure(new) == jax.tree.structure(st)
    assert not np.array_equal(total(jnp.ones(3), new)[0][1][0], y)


def test_the_states_of_a_layer(key):
    assert list(fl.initial_states(key, fl.NeuralODE(MODEL))) == ["stats"]
    assert fl.state_length(fl.NeuralODE(MODEL)) == 5
    assert list(fl.initial_states(key, fl.NeuralODE(Noisy()))) == ["stats", "model"]


def test_no_evaluation_is_spent_on_a_layer_without_state(key):
    calls = []

    class Watch(fl.Wrapper):
        layer: fl.Layer

        def forward(self, x, ps, st):
            calls.append(x)
            return self.layer(x, ps, st)

    def count(model):
        calls.clear()
        node = fl.NeuralODE(Watch(model))
        jax.make_jaxpr(node)(jnp.ones(2), *fl.setup(key, node, float))
        return len(calls)

    assert count(Noisy()) == count(MODEL) + 1
