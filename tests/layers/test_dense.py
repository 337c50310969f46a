import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flatlayers as fl
from tests.helpers import assert_close, assert_same, central_difference


LAYERS = [
    (fl.Dense(3, 2, jnp.tanh), (3,), lambda x, p: np.tanh(x @ np.asarray(p.weight).T + np.asarray(p.bias))),
    (fl.Dense(3, 2, use_bias=False), (3,), lambda x, p: x @ np.asarray(p.weight).T),
    (fl.Diagonal(3, jnp.sin), (3,), lambda x, p: np.sin(np.asarray(p.weight) * x + np.asarray(p.bias))),
    (fl.Diagonal((2, 3), use_bias=False), (2, 3), lambda x, p: np.asarray(p.weight) * x),
]


def bilinear(pair, p, bias=True):
    z = np.einsum("...j,...k,ijk->...i", *pair, np.asarray(p.weight))
    return np.tanh(z + np.asarray(p.bias)) if bias else z


@pytest.mark.parametrize(("layer", "features", "formula"), LAYERS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("lead", [(), (5,), (4, 5)])
def test_formula(key, layer, features, formula, dtype, lead):
    ps, st = fl.setup(key, layer, dtype)
    ps = ps + jax.random.normal(key, ps.shape, dtype)
    x = jax.random.normal(jax.random.key(1), lead + features, dtype)
    y, new = jax.jit(layer)(x, ps, st)
    assert y.dtype == dtype
    assert new == st == {}
    rtol = 1e-5 if dtype == jnp.float32 else 1e-12
    np.testing.assert_allclose(y, formula(np.asarray(x), ps), rtol=rtol, atol=rtol)
    assert y.shape == fl.output_shape(layer, x)
    assert fl.parameter_length(layer) == ps.size


@pytest.mark.parametrize(("layer", "features", "formula"), LAYERS)
def test_gradient(key, layer, features, formula):
    ps, st = fl.setup(key, layer, float)
    x = jax.random.normal(key, (4, *features))
    direction = fl.ComponentVector(jax.random.normal(jax.random.key(2), ps.shape), ps.layout)

    def loss(ps):
        return jnp.sum(layer(x, ps, st)[0] ** 2)

    slope = jax.grad(loss)(ps) @ direction
    np.testing.assert_allclose(slope, central_difference(loss, ps, direction), rtol=1e-7)


def test_batched_equals_vmap(key):
    layer = fl.Dense(3, 2, jnp.tanh)
    ps, st = fl.setup(key, layer, float)
    x = jax.random.normal(key, (5, 3))
    assert_close(layer(x, ps, st)[0], jax.vmap(lambda x: layer(x, ps, st)[0])(x))


def test_a_vector_is_an_input(key):
    v = fl.ComponentVector.of({"position": [1.0, 2.0], "velocity": 3.0})
    layer = fl.Dense(3, 2)
    ps, st = fl.setup(key, layer, float)
    assert_same(layer(v, ps, st)[0], layer(v.data, ps, st)[0])


@pytest.mark.parametrize("layer", [fl.Dense(3, 2), fl.Diagonal(3)])
def test_wrong_number_of_features(key, layer):
    ps, st = fl.setup(key, layer, float)
    for x in (jnp.ones((5, 4)), jnp.ones(()), 1.0):
        with pytest.raises(ValueError, match=r"expected x of shape \(..., 3\), found shape"):
            layer(x, ps, st)


def test_mixed_dtypes_are_an_error_under_strict_promotion(key):
    layer = fl.Dense(3, 2)
    ps, st = fl.setup(key, layer)
    with pytest.raises(Exception, match="promotion"):
        layer(jnp.ones(3), ps, st)
    with jax.numpy_dtype_promotion("standard"):
        assert layer(jnp.ones(3), ps, st)[0].dtype == jnp.float64


def test_a_layer_followed_by_its_inverse_has_no_gradient(key):
    """With a weight tied to its inverse's, the composition is the identity whatever the numbers."""

    class Rotate(fl.Layer):
        sign: float

        def parameters(self):
            return {"angle": fl.Param((), fl.initializers.ones)}

        def forward(self, x, ps, st):
            a = self.sign * ps.angle
            return x + a * jnp.ones(2), st

    layout = fl.Layout({"there": {"angle": ()}, "back": {"angle": ()}}).tie({"back.angle": "there.angle"})
    there, back = Rotate(1.0), Rotate(-1.0)
    ps = fl.ComponentVector(jnp.array([0.7]), layout)

    def through(ps):
        y, _ = there(jnp.arange(2.0), ps.there, {})
        return back(y, ps.back, {})[0]

    assert (jax.grad(lambda ps: through(ps).sum())(ps).data == 0).all()
    assert (jax.jacobian(lambda ps: through(ps.unpack()))(ps).data == 0).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("lead", [(), (5,), (4, 5), (0,)])
@pytest.mark.parametrize("bias", [True, False])
def test_bilinear(key, dtype, lead, bias):
    layer = fl.Bilinear(3, 4, 2, jnp.tanh if bias else None, use_bias=bias)
    ps, st = fl.setup(key, layer, dtype)
    ps = ps + jax.random.normal(key, ps.shape, dtype)
    x = jax.random.normal(jax.random.key(1), (*lead, 3), dtype)
    y = jax.random.normal(jax.random.key(2), (*lead, 4), dtype)
    z, new = jax.jit(layer)((x, y), ps, st)
    assert z.dtype == dtype
    assert new == st == {}
    rtol = 1e-5 if dtype == jnp.float32 else 1e-12
    np.testing.assert_allclose(z, bilinear((np.asarray(x), np.asarray(y)), ps, bias), rtol=rtol, atol=rtol)
    assert z.shape == fl.output_shape(layer, (x, y)) == (*lead, 2)
    assert fl.parameter_length(layer) == ps.size == 24 + 2 * bias


def test_bilinear_gradient_and_vmap(key):
    layer = fl.Bilinear(3, 4, 2, jnp.tanh)
    ps, st = fl.setup(key, layer, float)
    x, y = jax.random.normal(key, (5, 3)), jax.random.normal(key, (5, 4))
    direction = fl.ComponentVector(jax.random.normal(jax.random.key(2), ps.shape), ps.layout)

    def loss(ps):
        return jnp.sum(layer((x, y), ps, st)[0] ** 2)

    slope = jax.grad(loss)(ps) @ direction
    np.testing.assert_allclose(slope, central_difference(loss, ps, direction), rtol=1e-7)
    assert_close(layer((x, y), ps, st)[0], jax.vmap(lambda x, y: layer((x, y), ps, st)[0])(x, y))


def test_bilinear_of_one_input_and_as_a_connection(key):
    layer = fl.Bilinear(3, 3, 2)
    ps, st = fl.setup(key, layer, float)
    x = jax.random.normal(key, (5, 3))
    assert_same(layer(x, ps, st)[0], layer((x, x), ps, st)[0])
    model = fl.SkipConnection(fl.Dense(3, 3), layer)
    ps, st = fl.setup(key, model, float)
    h = np.asarray(x @ ps.layer.weight.T)
    expected = bilinear((h, np.asarray(x)), ps.connection, bias=False)
    np.testing.assert_allclose(model(x, ps, st)[0], expected, rtol=1e-12)


def test_bilinear_weights_are_drawn_for_their_fans(key):
    layer = fl.Bilinear(20, 30, 10)
    bound = np.sqrt(6 / (20 * 30 + 10))
    weight = fl.initial_parameters(key, layer, float).weight
    assert 0.99 * bound < np.abs(weight).max() <= bound


@pytest.mark.parametrize(
    ("x", "message"),
    [
        ((np.ones((5, 2)), np.ones((5, 4))), r"shape \(..., 3\), found shape \(5, 2\)"),
        ((np.ones((5, 3)), np.ones((5, 3))), r"shape \(..., 4\), found shape \(5, 3\)"),
        ((np.ones((5, 3)), np.ones((6, 4))), r"same leading axes, found shapes \(5, 3\) and \(6, 4\)"),
        ((np.ones(3),) * 3, "tuple of 2 inputs, one for each factor, found 3"),
        (np.ones((5, 3)), r"shape \(..., 4\), found shape \(5, 3\)"),
    ],
)
def test_bilinear_of_wrong_input(key, x, message):
    layer = fl.Bilinear(3, 4, 2)
    ps, st = fl.setup(key, layer, float)
    with pytest.raises(ValueError, match=message):
        layer(x, ps, st)
