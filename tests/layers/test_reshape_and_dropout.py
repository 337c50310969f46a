import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flatlayers as fl
from tests.helpers import assert_same


X = np.arange(60.0).reshape(5, 3, 4)


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (fl.NoOpLayer(), X),
        (fl.ReshapeLayer((4, 3)), X.reshape(5, 4, 3)),
        (fl.ReshapeLayer((-1, 2)), X.reshape(5, 6, 2)),
        (fl.FlattenLayer(), X.reshape(5, 12)),
        (fl.FlattenLayer(2), X),
        (fl.FlattenLayer(keep=0), X.reshape(60)),
        (fl.SelectDim(1, 2), X[:, 2]),
        (fl.SelectDim(-1, -1), X[..., -1]),
    ],
    ids=repr,
)
def test_shapes(layer, expected):
    y, st = jax.jit(layer)(jnp.asarray(X), {}, {})
    assert_same(y, jnp.asarray(expected))
    assert fl.output_shape(layer, jnp.asarray(X)) == expected.shape
    assert (st, fl.parameter_length(layer), fl.state_length(layer)) == ({}, 0, 0)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (fl.ReshapeLayer((5, 3)), r"fit \(5, 3\), found shape \(5, 3, 4\)"),
        (fl.FlattenLayer(4), "at least 4 axes, found shape"),
        (fl.SelectDim(3, 0), "axis 3, found shape"),
        (fl.SelectDim(1, 3), "index 3 along axis 1, found shape"),
    ],
    ids=repr,
)
def test_input_that_does_not_fit(layer, message):
    with pytest.raises(ValueError, match=message):
        layer(jnp.asarray(X), {}, {})


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_dropout_in_training(key, dtype):
    layer = fl.Dropout(0.25)
    ps, st = fl.setup(key, layer, dtype)
    x = jnp.ones((100, 100), dtype)
    y, new = jax.jit(layer)(x, ps, st)
    assert y.dtype == dtype
    assert set(np.unique(y)) == {0.0, np.asarray(1 / 0.75, dtype).item()}
    np.testing.assert_allclose(jnp.mean(y == 0), 0.25, atol=0.02)
    assert_same(layer(x, ps, st)[0], y)
    assert not np.array_equal(layer(x, ps, new)[0], y)
    assert jax.tree.structure(new) == jax.tree.structure(st)
    assert_same(jax.grad(lambda x: layer(x, ps, st)[0].sum())(x), y)


def test_dropout_in_test_mode_and_at_the_ends(key):
    x = jnp.ones((3, 4))
    layer = fl.Dropout(0.5)
    ps, st = fl.setup(key, layer)
    y, new = layer(x, ps, fl.testmode(st))
    assert_same(y, x)
    assert new == fl.testmode(st)
    assert fl.state_length(layer) == 2
    assert fl.initial_states(key, fl.Dropout(0)) == {}
    assert_same(fl.Dropout(0.0)(x, {}, {})[0], x)
    assert_same(fl.Dropout(1.0)(x, ps, st)[0], jnp.zeros((3, 4)))
    assert_same(jax.grad(lambda x: fl.Dropout(1.0)(x, ps, st)[0].sum())(x), jnp.zeros((3, 4)))


def test_the_mask_varies_along_the_given_axes(key):
    x = jnp.ones((50, 6, 7))
    ps, st = fl.setup(key, fl.Dropout(0.5))
    rows = fl.Dropout(0.5, axis=0)(x, ps, st)[0]
    assert_same(rows, jnp.broadcast_to(rows[:, :1, :1], x.shape))
    assert len(np.unique(rows)) == 2
    channels = fl.Dropout(0.5, axis=(0, -1))(x, ps, st)[0]
    assert_same(channels, jnp.broadcast_to(channels[:, :1], x.shape))
    with pytest.raises(ValueError, match=r"axes \(3,\), found shape"):
        fl.Dropout(0.5, axis=3)(x, ps, st)
    with pytest.raises(ValueError, match="from 0 to 1, found 1.5"):
        fl.Dropout(1.5)
