import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flatlayers as fl
from tests.helpers import assert_close


KERNELS = {
    "epanechnikov": lambda t: (abs(t) <= 1) * 0.75 * (1 - t**2),
    "uniform": lambda t: (abs(t) <= 1) * 0.5,
    "triangular": lambda t: (abs(t) <= 1) * (1 - abs(t)),
    "quartic": lambda t: (abs(t) <= 1) * 15 * (1 - t**2) ** 2 / 16,
    "triweight": lambda t: (abs(t) <= 1) * 35 * (1 - t**2) ** 3 / 32,
    "tricube": lambda t: (abs(t) <= 1) * 70 * (1 - abs(t) ** 3) ** 3 / 81,
    "gaussian": lambda t: np.exp(-0.5 * t**2) / np.sqrt(2 * np.pi),
    "cosine": lambda t: (abs(t) <= 1) * np.pi * np.cos(np.pi * t / 2) / 4,
    "logistic": lambda t: 1 / (np.exp(t) + 2 + np.exp(-t)),
    "sigmoid": lambda t: 2 / (np.pi * (np.exp(t) + np.exp(-t))),
    "silverman": lambda t: np.sin(abs(t) / np.sqrt(2) + np.pi / 4) * 0.5 * np.exp(-abs(t) / np.sqrt(2)),
}
RNG = np.random.default_rng(0)
TS = np.sort(RNG.uniform(0, 2, 25))
YS = np.sin(TS)[:, None] + 0.1 * RNG.normal(size=(25, 3))


def by_a_loop(ts, ys, kernel, h):
    """The weighted least-squares polynomials, one time after the other."""
    values, derivatives = [], []
    for t in ts:
        weights = kernel((ts - t) / h)
        for order, take, out in ((1, 0, values), (2, 1, derivatives)):
            powers = np.stack([(ts - t) ** k for k in range(order + 1)], axis=1)
            gram = powers.T @ np.diag(weights) @ powers
            out.append((np.linalg.inv(gram) @ powers.T @ np.diag(weights) @ ys)[take])
    return np.stack(values), np.stack(derivatives)


@pytest.mark.parametrize("kernel", KERNELS)
def test_against_a_loop(kernel):
    found = fl.collocate(TS, jnp.asarray(YS), kernel=kernel, bandwidth=0.7)
    assert_close(found, by_a_loop(TS, YS, KERNELS[kernel], 0.7), rtol=1e-7, atol=1e-9)
    mass = np.trapezoid(KERNELS[kernel](np.linspace(-20, 20, 40001)), dx=1e-3)
    np.testing.assert_allclose(mass, 1.0, atol=2e-3)


@pytest.mark.slow
def test_the_default_bandwidth():
    n = 200
    ts = np.linspace(0, 1, n)
    h = n ** (-2 / 7) * np.log(n) ** (-1 / 16)
    found = jax.jit(fl.collocate)(ts, jnp.cos(ts))
    assert_close(found, by_a_loop(ts, np.cos(ts), KERNELS["epanechnikov"], h), rtol=1e-7)
    coarse = np.arange(0, 100, 5.0)
    assert_close(fl.collocate(coarse, coarse**2)[1], 2 * coarse, atol=1e-9)


def test_polynomials_and_a_sine():
    assert_close(fl.collocate(TS, jnp.asarray(3 - 2 * TS))[0], 3 - 2 * TS)
    assert_close(fl.collocate(TS, jnp.asarray(TS**2 - TS))[1], 2 * TS - 1, rtol=1e-8, atol=1e-8)
    ts = jnp.linspace(0.0, 2 * np.pi, 101)
    values, derivatives = fl.collocate(ts, jnp.sin(ts), bandwidth=0.2)
    np.testing.assert_allclose(values, np.sin(ts), atol=0.01)
    np.testing.assert_allclose(derivatives, np.cos(ts), atol=0.02)


@pytest.mark.slow
def test_shapes_dtypes_and_vmap():
    ys = jnp.asarray(YS, jnp.float32)
    values, derivatives = fl.collocate(TS, ys[:, :, None])
    assert values.shape == derivatives.shape == (25, 3, 1)
    assert values.dtype == derivatives.dtype == jnp.float32
    each = jax.vmap(lambda ys: fl.collocate(TS, ys, bandwidth=0.7), 1, 1)(jnp.asarray(YS))
    assert_close(each, fl.collocate(TS, YS, bandwidth=0.7))


def test_wrong_arguments():
    with pytest.raises(ValueError, match="a kernel out of epanechnikov, .*silverman, found 'box'"):
        fl.collocate(TS, YS, kernel="box")
    for ts, ys in ((TS[:5], YS), (YS, YS), (TS[:2], YS[:2])):
        with pytest.raises(ValueError, match=r"ts of shape \(times,\) and ys of shape .* found"):
            fl.collocate(ts, ys)
    with pytest.raises(ValueError, match="three times under the kernel.*larger bandwidth"):
        fl.collocate(TS, YS, bandwidth=0.01)
    with pytest.raises(Exception, match="larger bandwidth"):
        jax.jit(lambda h: fl.collocate(TS, YS, bandwidth=h))(0.01)
