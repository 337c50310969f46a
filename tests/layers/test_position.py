import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flatlayers as fl
from tests.helpers import assert_close, assert_same, central_difference


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("shape", [(), (7,), (2, 7)])
@pytest.mark.parametrize("options", [{}, {"min_freq": 0.01, "max_freq": 3.0, "scale": 1.0}])
def test_sines_and_cosines(key, dtype, shape, options):
    layer = fl.SinusoidalPositionalEmbedding(6, **options)
    x = 10 * jax.random.uniform(key, shape, dtype)
    y, st = jax.jit(layer)(x, {}, {})
    low, high = options.get("min_freq", 1e-4), options.get("max_freq", 1.0)
    angles = np.asarray(x, float)[..., None] * np.array([high, np.sqrt(high * low), low])
    expected = np.concatenate([np.sin(angles), np.cos(angles)], -1) * options.get("scale", np.sqrt(2 / 6))
    assert y.dtype == dtype
    rtol = 1e-5 if dtype == jnp.float32 else 1e-12
    np.testing.assert_allclose(y, expected, rtol=rtol, atol=rtol)
    assert y.shape == fl.output_shape(layer, x)
    assert (st, fl.parameter_length(layer), fl.state_length(layer)) == ({}, 0, 0)
    assert eval(repr(layer), vars(fl)) == layer


def test_sinusoidal_embeddings_are_of_norm_one_and_shift_by_a_rotation(key):
    layer = fl.SinusoidalPositionalEmbedding(8, min_freq=0.1)
    y = layer(jnp.arange(5), {}, {})[0]
    assert y.dtype == jnp.float64
    assert_close(jnp.linalg.norm(y, axis=-1), jnp.ones(5))
    inner = y @ y.T
    for offset in range(5):
        diagonal = jnp.diagonal(inner, offset)
        assert_close(diagonal, jnp.full_like(diagonal, diagonal[0]))
    assert layer(jnp.ones(3, jnp.bfloat16), {}, {})[0].dtype == jnp.bfloat16
    assert fl.SinusoidalPositionalEmbedding(2)(0.0, {}, {})[0].tolist() == [0.0, 1.0]


def rotated(x, positions, base=10_000.0):
    """Each pair of features as a complex number, times the unit number of its angle."""
    half = x.shape[-1] // 2
    theta = base ** (-np.arange(half) / half)
    turn = np.exp(1j * np.asarray(positions, float)[..., None, None] * theta)
    z = (x[..., :half] + 1j * x[..., half:]) * turn
    return np.concatenate([z.real, z.imag], -1)


@pytest.mark.long
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("lead", [(), (3,), (2, 3)])
def test_rotation(key, dtype, lead):
    layer = fl.RotaryPositionalEmbedding(6)
    x = jax.random.normal(key, (*lead, 5, 2, 6), dtype)
    y, st = jax.jit(layer)(x, {}, {})
    rtol = 1e-5 if dtype == jnp.float32 else 1e-12
    assert y.dtype == dtype
    np.testing.assert_allclose(y, rotated(np.asarray(x), np.arange(5)), rtol=rtol, atol=rtol)
    assert y.shape == fl.output_shape(layer, x)
    assert (st, fl.parameter_length(layer), fl.state_length(layer)) == ({}, 0, 0)
    np.testing.assert_allclose(jnp.linalg.norm(y, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=rtol)
    assert_same(y[..., 0, :, :], x[..., 0, :, :])
    positions = jax.random.randint(key, (*lead, 5), 0, 50)
    y, _ = jax.jit(layer)((x, positions), {}, {})
    rtol = 1e-4 if dtype == jnp.float32 else 1e-12
    np.testing.assert_allclose(y, rotated(np.asarray(x), positions), rtol=rtol, atol=rtol)


def test_rotation_depends_on_relative_position_only(key):
    layer = fl.RotaryPositionalEmbedding(8, base=100)
    q, k = jax.random.normal(key, (2, 1, 1, 8))
    turn = jax.jit(lambda x, position: layer((x, position[None]), {}, {})[0])
    for shift in (1.0, 7.0, 30.0):
        here = jnp.vdot(turn(q, jnp.asarray(5.0)), turn(k, jnp.asarray(2.0)))
        there = jnp.vdot(turn(q, jnp.asarray(5.0 + shift)), turn(k, jnp.asarray(2.0 + shift)))
        np.testing.assert_allclose(here, there, rtol=1e-10)
    assert not np.isclose(here, jnp.vdot(turn(q, jnp.asarray(4.0)), turn(k, jnp.asarray(2.0))))


@pytest.mark.long
def test_positions_broadcast_and_default_to_those_from_zero(key):
    layer = fl.RotaryPositionalEmbedding(4, base=50)
    assert eval(repr(layer), vars(fl)) == layer
    x = jax.random.normal(key, (3, 5, 2, 4))
    y = layer(x, {}, {})[0]
    assert_same(y, layer((x, jnp.arange(5)), {}, {})[0])
    np.testing.assert_allclose(y, rotated(np.asarray(x), np.arange(5), 50.0), rtol=1e-12)
    start = jnp.array([[0], [10], [20]])
    expected = rotated(np.asarray(x), np.broadcast_to(start, (3, 5)), 50.0)
    np.testing.assert_allclose(layer((x, start), {}, {})[0], expected, rtol=1e-10)
    assert_close(y, jax.vmap(lambda x: layer(x, {}, {})[0])(x))
    assert layer(x.astype(jnp.bfloat16), {}, {})[0].dtype == jnp.bfloat16


@pytest.mark.long
def test_gradients(key):
    rotary, sines = fl.RotaryPositionalEmbedding(4), fl.SinusoidalPositionalEmbedding(4, min_freq=0.1)
    weight = jax.random.normal(jax.random.key(1), (5, 2, 4))
    for loss, x in (
        (lambda x: jnp.sum(weight * rotary(x, {}, {})[0] ** 2), jax.random.normal(key, (5, 2, 4))),
        (lambda x: jnp.sum(weight * sines(x, {}, {})[0]), jax.random.normal(key, (5, 2))),
    ):
        direction = jax.random.normal(jax.random.key(2), x.shape)
        slope = jnp.vdot(jax.grad(loss)(x), direction)
        np.testing.assert_allclose(slope, central_difference(loss, x, direction), rtol=1e-7)


@pytest.mark.parametrize("make", [fl.SinusoidalPositionalEmbedding, fl.RotaryPositionalEmbedding])
def test_numbers_that_do_not_fit(make):
    for dims in (0, 5):
        with pytest.raises(ValueError, match=f"an even number of features, found {dims}"):
            make(dims)
    with pytest.raises(ValueError, match="(min|max)_freq: expected a finite number above 0, found 0"):
        fl.SinusoidalPositionalEmbedding(4, min_freq=0)
    with pytest.raises(ValueError, match="base: expected a finite number above 0, found -1"):
        fl.RotaryPositionalEmbedding(4, base=-1)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (jnp.ones((5, 2, 6)), r"\(..., 4\), found shape \(5, 2, 6\)"),
        (jnp.ones((5, 4)), r"\(..., tokens, heads, 4\), found shape \(5, 4\)"),
        ((jnp.ones((5, 2, 4)), jnp.arange(4)), r"broadcast to shape \(5,\), found shape \(4,\)"),
        ((jnp.ones((5, 2, 4)), jnp.ones((3, 5))), r"broadcast to shape \(5,\), found shape \(3, 5\)"),
        ((jnp.ones((5, 2, 4)),) * 3, r"a tuple \(x, positions\), found a tuple of 3"),
    ],
)
def test_input_that_does_not_fit(x, message):
    with pytest.raises(ValueError, match=message):
        fl.RotaryPositionalEmbedding(4)(x, {}, {})
