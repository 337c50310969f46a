import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flatlayers as fl
from tests.helpers import assert_close, assert_same


@pytest.mark.long
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


@pytest.mark.long
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


@pytest.mark.long
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.float32, jnp.float64])
def test_the_function_dropout(key, dtype):
    x = jnp.ones((200, 100), dtype)
    y = jax.jit(lambda key: fl.dropout(key, x, 0.25))(key)
    assert y.dtype == dtype
    assert set(np.unique(y)) == {0.0, np.asarray(1 / 0.75, dtype).item()}
    np.testing.assert_allclose(np.mean(y == 0), 0.25, atol=0.02)
    assert_same(fl.dropout(key, x, 0.25), y)
    assert_same(fl.dropout(key, x, 0.25, training=False), x)
    assert_same(fl.dropout(key, x, 0), x)
    assert_same(fl.dropout(key, x, 1), jnp.zeros_like(x))
    rows = fl.dropout(key, x, 0.5, axis=0)
    assert_same(rows, jnp.broadcast_to(rows[:, :1], x.shape))
    with pytest.raises(ValueError, match="from 0 to 1, found -0.5"):
        fl.dropout(key, x, -0.5)
    with pytest.raises(ValueError, match=r"axes \(2,\), found shape"):
        fl.dropout(key, x, 0.5, axis=2)


def test_small_probabilities_in_half_precision(key):
    dropped = np.mean(fl.dropout(key, jnp.ones(100_000, jnp.bfloat16), 0.001) == 0)
    np.testing.assert_allclose(dropped, 0.001, atol=0.0005)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_alpha_dropout_keeps_mean_and_variance(key, dtype, p):
    layer = fl.AlphaDropout(p)
    ps, st = fl.setup(key, layer, dtype)
    x = jax.random.normal(key, (100, 200), dtype)
    y, new = jax.jit(layer)(x, ps, st)
    assert y.dtype == dtype
    assert y.shape == x.shape == fl.output_shape(layer, x)
    # What is kept is a * x + b, with a as its slope; what is dropped is one number.
    a = np.asarray(jax.grad(lambda x: layer(x, ps, st)[0].sum())(x))
    kept = a != 0
    a, dropped = a[kept][0], np.asarray(y)[~kept][0]
    b = (np.asarray(y) - a * np.asarray(x))[kept]
    assert_close(b, np.full_like(b, b[0]), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(kept.mean(), 1 - p, atol=0.02)
    # The moments of the mixture, for x of mean 0 and variance 1.
    mean = (1 - p) * b[0] + p * dropped
    variance = (1 - p) * (a**2 + b[0] ** 2) + p * dropped**2 - mean**2
    np.testing.assert_allclose([mean, variance], [0, 1], atol=1e-5)
    # SELU at minus infinity is what is dropped, before the scale and the shift.
    np.testing.assert_allclose((dropped - b[0]) / a, jax.nn.selu(-1e3), rtol=1e-4)
    assert not np.array_equal(layer(x, ps, new)[0], y)
    assert jax.tree.structure(new) == jax.tree.structure(st)


def test_alpha_dropout_in_test_mode_and_at_the_ends(key):
    x = jnp.ones((3, 4))
    layer = fl.AlphaDropout(0.5)
    ps, st = fl.setup(key, layer)
    assert_same(layer(x, ps, fl.testmode(st))[0], x)
    assert (fl.parameter_length(layer), fl.state_length(layer)) == (0, 2)
    assert fl.initial_states(key, fl.AlphaDropout(0)) == {}
    assert_same(fl.AlphaDropout(0.0)(x, {}, {})[0], x)
    assert_same(fl.AlphaDropout(1.0)(x, ps, st)[0], jnp.zeros((3, 4)))
    assert repr(layer) == "AlphaDropout(0.5)"
    with pytest.raises(ValueError, match="from 0 to 1, found 2"):
        fl.AlphaDropout(2)


@pytest.mark.long
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_variational_dropout_has_one_mask_until_asked(key, dtype):
    layer = fl.VariationalHiddenDropout(0.25)
    ps, st = fl.setup(key, layer, dtype)
    assert st.mask is None
    assert (st.training, st.update_mask) == (True, True)
    assert fl.state_length(layer) == 4
    call = jax.jit(layer)
    x = jnp.ones((100, 100), dtype)
    y, st = call(x, ps, st)
    assert y.dtype == dtype
    assert set(np.unique(y)) == {0.0, np.asarray(1 / 0.75, dtype).item()}
    np.testing.assert_allclose(np.mean(y == 0), 0.25, atol=0.02)
    assert (st.mask.dtype, st.mask.shape, st.update_mask) == (jnp.bool_, x.shape, False)
    again, same = call(2 * x, ps, st)
    assert_same(again, 2 * y)
    assert same == st
    new, st = call(x, ps, fl.update_state(st, "update_mask", True))
    assert not np.array_equal(new, y)
    assert_same(call(x, ps, st)[0], new)
    # Once it is there, the state keeps its type.
    _, after = jax.lax.scan(lambda st, x: layer(x, ps, st)[::-1], st, jnp.ones((3, 100, 100), dtype))
    assert_same(after, jnp.stack([new] * 3))
    assert_same(jax.grad(lambda x: layer(x, ps, st)[0].sum())(x), new)


def test_variational_dropout_in_test_mode_and_at_the_ends(key):
    x = jnp.ones((50, 6))
    layer = fl.VariationalHiddenDropout(0.5, axis=0)
    ps, st = fl.setup(key, layer)
    y, new = layer(x, ps, fl.testmode(st))
    assert_same(y, x)
    assert new == fl.testmode(st)
    rows, new = layer(x, ps, st)
    assert new.mask.shape == (50, 1)
    assert_same(rows, jnp.broadcast_to(rows[:, :1], x.shape))
    assert_same(layer(jnp.ones((50, 7)), ps, new)[0][:, :6], rows)
    with pytest.raises(
        ValueError, match=r"\(5, 1\) for x of shape \(5, 6\), found \(50, 1\); .*update_state"
    ):
        layer(jnp.ones((5, 6)), ps, new)
    assert not fl.preserves_state_type(layer)
    assert not fl.preserves_state_type(fl.Chain(fl.Dense(2, 2), layer))
    assert fl.initial_states(key, fl.VariationalHiddenDropout(0)) == {}
    assert_same(fl.VariationalHiddenDropout(0)(x, {}, {})[0], x)
    assert_same(fl.VariationalHiddenDropout(1.0)(x, ps, st)[0], jnp.zeros_like(x))
    assert repr(layer) == "VariationalHiddenDropout(0.5, axis=0)"
    with pytest.raises(ValueError, match="from 0 to 1, found 1.5"):
        fl.VariationalHiddenDropout(1.5)
