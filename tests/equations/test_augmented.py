import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flatlayers as fl
from tests.equations.test_ode import TIGHT
from tests.helpers import assert_close


class Lift(fl.Layer):
    """A nilpotent field, x' = a and a' = 1: from a = 0, x = x0 + t^2 / 2."""

    def forward(self, y, ps, st):
        return jnp.stack([y[..., 1], jnp.ones_like(y[..., 1])], axis=-1), st


def test_the_added_dimensions_start_at_zero(key):
    layer = fl.AugmentedNDE(fl.NeuralODE(Lift(), t1=2.0, saveat=[1.0, 2.0], stepsize_controller=TIGHT), 1)
    ps, st = fl.setup(key, layer, float)
    assert list(layer.children()) == list(st) == ["model"]
    x = jnp.array([[[1.0]], [[5.0]], [[0.0]]])
    ys, new = jax.jit(layer)(x, ps, st)
    assert ys.shape == (2, 3, 1, 2)
    np.testing.assert_allclose(ys[..., 0], [x[..., 0] + 0.5, x[..., 0] + 2.0], rtol=1e-7)
    np.testing.assert_allclose(ys[..., 1], np.broadcast_to([[[1.0]], [[2.0]]], (2, 3, 1)), rtol=1e-7)
    solution, same = jax.jit(layer.solve)(x, ps, st)
    assert_close(solution.ys, ys)
    assert_close(same, new)


def test_pairs_and_what_is_no_array(key):
    second = fl.AugmentedNDE(fl.SecondOrderNeuralODE(fl.Dense(6, 3)), 2)
    ps, st = fl.setup(key, second, float)
    (q, v), _ = jax.eval_shape(second, (jnp.ones((4, 1)), jnp.ones((4, 1))), ps, st)
    assert q.shape == v.shape == (4, 3)
    layer = fl.AugmentedNDE(fl.WrappedFunction(lambda x: x), 2)
    assert_close(
        layer((jnp.ones(1), "control"), {"model": {}}, {"model": {}})[0][0], jnp.array([1.0, 0.0, 0.0])
    )


def test_wrong_arguments(key):
    with pytest.raises(ValueError, match="AugmentedNDE.extra: expected an integer of at least 1, found 0"):
        fl.AugmentedNDE(fl.NeuralODE(fl.Dense(2, 2)), 0)
    layer = fl.AugmentedNDE(fl.NeuralODE(fl.Dense(2, 2)), 1)
    with pytest.raises(ValueError, match=r"\(..., n\), found float64\[\]"):
        layer(jnp.ones(()), *fl.setup(key, layer, float))
    with pytest.raises(ValueError, match=r"\(..., 2\), found shape \(3,\)") as info:
        layer(jnp.ones(2), *fl.setup(key, layer, float))
    assert "in the layer model: Dense(2, 2)" in info.value.__notes__[0]
