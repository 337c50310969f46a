import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.polynomial import chebyshev, legendre, polynomial

import flatlayers as fl
from tests.helpers import assert_close, assert_same, central_difference


def fourier(x, n):
    waves = [np.ones_like(x)]
    for k in range(1, n):
        waves += [np.sin(k * x), np.cos(k * x)]
    return np.stack(waves[:n], axis=-1)


# What a basis of n functions gives at x.
BASES = {
    fl.Polynomial: lambda x, n: polynomial.polyvander(x, n - 1).reshape(*x.shape, n),
    fl.Chebyshev: lambda x, n: chebyshev.chebvander(x, n - 1).reshape(*x.shape, n),
    fl.Legendre: lambda x, n: legendre.legvander(x, n - 1).reshape(*x.shape, n),
    fl.Fourier: fourier,
    fl.Cosine: lambda x, n: np.cos(x[..., None] * np.arange(n)),
    fl.Sine: lambda x, n: np.sin(x[..., None] * np.arange(1, n + 1)),
}


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize(("lead", "n"), [((), 5), ((7,), 6), ((2, 3), 1), ((3,), 2)])
def test_formula(key, basis, dtype, lead, n):
    layer = basis(n)
    x = jax.random.uniform(key, lead, dtype, -1.5, 1.5)
    y, st = jax.jit(layer)(x, {}, {})
    assert y.dtype == dtype
    rtol = 1e-5 if dtype == jnp.float32 else 1e-12
    np.testing.assert_allclose(y, BASES[basis](np.asarray(x, float), n), rtol=rtol, atol=rtol)
    assert y.shape == fl.output_shape(layer, x) == (*lead, n)
    assert (st, fl.parameter_length(layer), fl.state_length(layer)) == ({}, 0, 0)
    assert eval(repr(layer), vars(fl)) == layer


@pytest.mark.parametrize("basis", BASES)
def test_gradient_and_vmap(basis):
    layer = basis(6)
    # The ends of the interval and zero too.
    x, direction = jnp.array([-1.0, -0.3, 0.0, 0.7, 1.0]), jnp.array([0.3, -1.0, 2.0, 0.5, 1.5])

    def loss(x):
        return jnp.sum(jnp.sin(layer(x, {}, {})[0]))

    slope = jnp.sum(jax.grad(loss)(x) * direction)
    np.testing.assert_allclose(slope, central_difference(loss, x, direction), rtol=1e-7)
    assert_same(jax.vmap(lambda x: layer(x, {}, {})[0])(x), layer(x, {}, {})[0])


@pytest.mark.parametrize("basis", BASES)
def test_integers_and_python_numbers(basis):
    expected = BASES[basis](np.array([2.0]), 4)[0]
    assert_close(basis(4)(2, {}, {})[0], jnp.asarray(expected))
    assert_close(basis(4)(2.0, {}, {})[0], jnp.asarray(expected))


def test_orthogonal_on_the_interval():
    x, weight = legendre.leggauss(20)
    values = np.asarray(fl.Legendre(6)(x, {}, {})[0])
    np.testing.assert_allclose(values.T * weight @ values, np.diag(2 / (2 * np.arange(6) + 1)), atol=1e-13)
    x, weight = chebyshev.chebgauss(20)
    values = np.asarray(fl.Chebyshev(6)(x, {}, {})[0])
    norms = np.diag([np.pi] + [np.pi / 2] * 5)
    np.testing.assert_allclose(values.T * weight @ values, norms, atol=1e-13)


@pytest.mark.parametrize("basis", BASES)
def test_a_basis_has_a_function(basis):
    with pytest.raises(ValueError, match="n: expected an integer of at least 1, found 0"):
        basis(0)


# TensorProductLayer


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("lead", [(), (5,), (2, 3), (0,)])
@pytest.mark.parametrize(
    "bases",
    [(fl.Chebyshev(3),), (fl.Fourier(3), fl.Legendre(2)), (fl.Sine(2), fl.Cosine(3), fl.Polynomial(4))],
)
def test_tensor_product(key, dtype, lead, bases):
    layer = fl.TensorProductLayer(bases, 2)
    ps, st = fl.setup(key, layer, dtype)
    x = jax.random.uniform(jax.random.key(1), (*lead, len(bases)), dtype, -1, 1)
    y, new = jax.jit(layer)(x, ps, st)
    assert y.dtype == dtype
    assert new == st == {}
    expected = np.zeros((*lead, 2))
    for place in np.ndindex(lead):
        values = [
            BASES[type(basis)](np.asarray(number, float), basis.n)
            for basis, number in zip(bases, x[place], strict=True)
        ]
        expected[place] = np.asarray(ps.weight) @ functools.reduce(np.kron, values)
    rtol = 1e-5 if dtype == jnp.float32 else 1e-12
    np.testing.assert_allclose(y, expected, rtol=rtol, atol=rtol)
    assert y.shape == fl.output_shape(layer, x)
    assert fl.parameter_length(layer) == ps.size == 2 * np.prod([basis.n for basis in bases])
    assert eval(repr(layer), vars(fl)) == layer


def test_tensor_product_gradient_and_vmap(key):
    layer = fl.TensorProductLayer([fl.Fourier(3), fl.Legendre(4)], 2)
    ps, st = fl.setup(key, layer, float)
    x = jax.random.uniform(key, (5, 2))
    direction = fl.ComponentVector(jax.random.normal(jax.random.key(2), ps.shape), ps.layout)

    def loss(ps):
        return jnp.sum(layer(x, ps, st)[0] ** 2)

    slope = jax.grad(loss)(ps) @ direction
    np.testing.assert_allclose(slope, central_difference(loss, ps, direction), rtol=1e-7)
    assert_close(layer(x, ps, st)[0], jax.vmap(lambda x: layer(x, ps, st)[0])(x))


def test_tensor_product_of_what_does_not_fit(key):
    layer = fl.TensorProductLayer((fl.Fourier(3), fl.Legendre(4)), 2)
    ps, st = fl.setup(key, layer, float)
    for x in (jnp.ones((5, 3)), 1.0):
        with pytest.raises(ValueError, match=r"expected x of shape \(..., 2\), found shape"):
            layer(x, ps, st)
    for bases in ((), fl.Fourier(3), (fl.Fourier(3), fl.Dense(2, 2)), (jnp.sin,)):
        with pytest.raises(TypeError, match="expected a tuple of bases such as"):
            fl.TensorProductLayer(bases, 2)
