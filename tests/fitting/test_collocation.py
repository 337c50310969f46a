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


@pytest.mark.long
def test_polynomials_and_a_sine():
    assert_close(fl.collocate(TS, jnp.asarray(3 - 2 * TS))[0], 3 - 2 * TS)
    assert_close(fl.collocate(TS, jnp.asarray(TS**2 - TS))[1], 2 * TS - 1, rtol=1e-8, atol=1e-8)
    ts = jnp.linspace(0.0, 2 * np.pi, 101)
    values, derivatives = fl.collocate(ts, jnp.sin(ts), bandwidth=0.2)
    np.testing.assert_allclose(values, np.sin(ts), atol=0.01)
    np.testing.assert_allclose(derivatives, np.cos(ts), atol=0.02)


@pytest.mark.parametrize(
    ("scale", "offset"), [(1e-12, 0.0), (1e-9, 0.0), (30.0, 2.46e6), (1e12, 0.0), (1e3, 1e10)]
)
def test_any_unit_and_origin_of_time(scale, offset):
    """The derivative of a parabola is exact, in float32 too; a width beyond all times is a global fit."""
    ts = np.linspace(0, 2, 21)
    for ys in (np.float32(ts**2), ts**2):
        found = scale * fl.collocate(scale * ts + offset, ys)[1]
        np.testing.assert_allclose(found, 2 * ts, atol=2e-4)
    fit = np.polynomial.Polynomial.fit(TS, YS[:, 0], 1)
    found, _ = fl.collocate(scale * TS, YS[:, 0], bandwidth=1e7 * scale)
    np.testing.assert_allclose(found, fit(TS), rtol=1e-6)


def test_half_precisions():
    for dtype, atol in ((jnp.bfloat16, 0.03), (jnp.float16, 0.003)):
        found = fl.collocate(TS, jnp.asarray(3 - 2 * TS, dtype), bandwidth=2.0)
        assert found[0].dtype == found[1].dtype == dtype
        np.testing.assert_allclose(found[0].astype(float), 3 - 2 * TS, atol=atol)


@pytest.mark.slow
def test_shapes_dtypes_and_vmap():
    ys = jnp.asarray(YS, jnp.float32)
    values, derivatives = fl.collocate(TS, ys[:, :, None])
    assert values.shape == derivatives.shape == (25, 3, 1)
    assert values.dtype == derivatives.dtype == jnp.float32
    each = jax.vmap(lambda ys: fl.collocate(TS, ys, bandwidth=0.7), 1, 1)(jnp.asarray(YS))
    assert_close(each, fl.collocate(TS, YS, bandwidth=0.7))


@pytest.mark.long
def test_wrong_arguments():
    with pytest.raises(ValueError, match="kernel: expected 'epanechnikov', .* or 'silverman', found 'box'"):
        fl.collocate(TS, YS, kernel="box")
    for ts, ys in ((TS[:5], YS), (YS, YS), (TS[:2], YS[:2])):
        with pytest.raises(ValueError, match=r"ts of shape \(times,\) and ys of shape .* found"):
            fl.collocate(ts, ys)
    with pytest.raises(ValueError, match="three distinct times under the kernel.*larger bandwidth"):
        fl.collocate(TS, YS, bandwidth=0.01)
    with pytest.raises(ValueError, match="three distinct times"):
        fl.collocate(np.repeat([0.0, 1.0, 9.0], 5), np.ones(15), bandwidth=2.0)
    for bad in (np.nan, 0.0, -0.7, np.inf):
        with pytest.raises(ValueError, match=f"bandwidth: expected a finite number above 0, found {bad}"):
            fl.collocate(TS, YS, bandwidth=bad)
        with pytest.raises(Exception, match="bandwidth: a finite number above 0"):
            jax.jit(lambda h: fl.collocate(TS, YS, bandwidth=h))(bad)
    with pytest.raises(TypeError, match="bandwidth: .* found True"):
        fl.collocate(TS, YS, bandwidth=True)
    with pytest.raises(ValueError, match="finite times"):
        fl.collocate(np.where(TS > 1, np.nan, TS), YS)
    with pytest.raises(TypeError, match=r"real ys, found complex128\[25,3\]"):
        fl.collocate(TS, YS + 1j)
    with pytest.raises(Exception, match="larger bandwidth"):
        jax.jit(lambda h: fl.collocate(TS, YS, bandwidth=h))(0.01)
