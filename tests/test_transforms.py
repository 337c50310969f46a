"""Transforms against their formulas in higher precision, and what they promise in every dtype."""

import decimal
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flatlayers as fl
from flatlayers.transforms import inward

from .helpers import assert_close


BOUNDS = [(0.0, 10.0), (-2.0, 3.0), (0.1, 0.3), (1.0, None), (0.0, None), (None, -1.0), (None, 0.0)]
LARGEST = {np.float32: 80.0, np.float64: 700.0}


def grid(dtype):
    """Free numbers of all sizes that count, in increasing order."""
    sizes = np.concatenate([np.geomspace(1e-6, LARGEST[dtype], 400), np.linspace(0.1, 12, 300)])
    return np.unique(np.concatenate([-sizes, [0.0], sizes]).astype(dtype))


def exact(low, high, x):
    """The formulas in 400 digits."""
    with decimal.localcontext(prec=400):
        x = decimal.Decimal(float(x))
        if high is None:
            return decimal.Decimal(low) + (1 + x.exp()).ln()
        if low is None:
            return decimal.Decimal(high) - (1 + (-x).exp()).ln()
        return decimal.Decimal(low) + (decimal.Decimal(high) - decimal.Decimal(low)) / (1 + (-x).exp())


@pytest.mark.parametrize(("low", "high"), BOUNDS)
@pytest.mark.parametrize("dtype", LARGEST)
def test_values_are_those_of_the_formula_and_inside(low, high, dtype):
    x = grid(dtype)
    interval = fl.transforms.Interval(low, high)
    values = np.asarray(interval.forward(x))
    assert values.dtype == dtype
    assert (np.diff(values) >= -2 * np.finfo(dtype).eps * np.abs(values[1:])).all()
    assert low is None or (values.astype(float) >= low).all()
    assert high is None or (values.astype(float) <= high).all()
    some = slice(None, None, 23)
    expected = np.array([float(exact(low, high, number)) for number in x[some]])
    scale = np.maximum(np.abs([end for end in (low, high) if end is not None]).max(), np.abs(expected))
    assert (np.abs(values[some] - expected) <= 4 * np.finfo(dtype).eps * scale).all()


@pytest.mark.parametrize("dtype", LARGEST)
def test_what_is_close_to_a_bound_of_zero_keeps_its_digits(dtype):
    for low, high, side in ((0.0, 10.0, 1), (0.0, None, 1), (None, 0.0, -1), (-10.0, 0.0, -1)):
        x = (-side * np.linspace(1, LARGEST[dtype], 30)).astype(dtype)
        values = np.asarray(fl.transforms.Interval(low, high).forward(x), float)
        expected = np.array([float(exact(low, high, number)) for number in x])
        np.testing.assert_allclose(values, expected, rtol=8 * np.finfo(dtype).eps)


@pytest.mark.parametrize(("low", "high"), BOUNDS)
@pytest.mark.parametrize("dtype", LARGEST)
def test_gradients_are_those_of_the_formula_and_finite(low, high, dtype):
    x = grid(dtype)
    interval = fl.transforms.Interval(low, high)
    found = np.asarray(jax.vmap(jax.grad(interval.forward))(x))
    assert np.isfinite(found).all()
    assert (found >= 0).all()
    wide = np.clip(x.astype(float), -600, 600)
    sigmoid = 1 / (1 + np.exp(-wide))
    if low is None:
        expected = 1 - sigmoid if dtype is np.float64 else 1 / (1 + np.exp(wide))
    else:
        expected = sigmoid if high is None else (high - low) * sigmoid / (1 + np.exp(wide))
    np.testing.assert_allclose(found, expected, rtol=1e-5 if dtype is np.float32 else 1e-12, atol=1e-15)
    second = np.asarray(jax.vmap(jax.grad(jax.grad(interval.forward)))(x))
    assert np.isfinite(second).all()


@pytest.mark.parametrize(("low", "high"), BOUNDS)
@pytest.mark.parametrize("dtype", LARGEST)
def test_round_trip(low, high, dtype):
    interval = fl.transforms.Interval(low, high)
    inside_low, inside_high = (float(end) for end in inward(low or -50.0, high or 50.0, dtype))
    inside_low = 0.0 if low == 0 else inside_low
    inside_high = 0.0 if high == 0 else inside_high
    shares = np.concatenate([np.geomspace(1e-6, 0.5, 60), 1 - np.geomspace(1e-6, 0.5, 60)])
    values = (inside_low + (inside_high - inside_low) * np.sort(shares)).astype(dtype)
    free = np.asarray(interval.inverse(values))
    assert np.isfinite(free).all()
    assert (np.diff(free) >= 0).all()
    back = np.asarray(interval.forward(free))
    ends = [abs(end) for end in (low, high) if end is not None]
    eps = np.finfo(dtype).eps * np.maximum(1, np.abs(free))
    assert (np.abs(back - values) <= 4 * eps * np.maximum(np.abs(values), max(ends))).all()


@pytest.mark.long
@pytest.mark.parametrize("dtype", LARGEST)
def test_there_and_back_a_distance_loses_what_the_free_number_is_rounded_by(dtype):
    eps = np.finfo(dtype).eps
    for low, high, side in (
        (0.0, 10.0, 1),
        (0.0, None, 1),
        (None, 0.0, -1),
        (-10.0, 0.0, -1),
        (0.0, 1e20, 1),
    ):
        interval = fl.transforms.Interval(low, high)
        values = (side * np.geomspace(1e-30, 4.0, 200)).astype(dtype)
        free = interval.inverse(values)
        lost = np.abs(np.asarray(interval.forward(free), float) - values) / np.abs(values)
        assert (lost <= (np.abs(np.asarray(free, float)) + 3) * eps).all()


def test_half_precisions_stay_inside():
    for dtype in (jnp.float16, jnp.bfloat16):
        x = jnp.linspace(-30, 30, 200).astype(dtype)
        for low, high in ((0.1, 0.3), (0.1, None), (None, 0.3)):
            values = fl.transforms.Interval(low, high).forward(x)
            assert values.dtype == dtype
            wide = np.asarray(values, float)
            assert (wide >= (low or -np.inf)).all()
            assert (wide <= (high or np.inf)).all()


def test_outside_there_is_no_free_number():
    for interval, values in (
        (fl.transforms.Interval(0, 1), [-1.0, 0.0, 1.0, 2.0, np.nan]),
        (fl.transforms.positive, [-1.0, 0.0, np.inf, np.nan]),
        (fl.transforms.Interval(None, 1), [1.0, 2.0, -np.inf, np.nan]),
    ):
        assert not np.isfinite(interval.inverse(np.array(values))).any()


def test_bounds_inward():
    low, high = inward([0.1, 0.3, -np.inf, 0.5], [0.3, 0.3, np.inf, 0.5], np.float32)
    assert low.dtype == high.dtype == np.float32
    assert (low.astype(float) >= [0.1, 0.3, -np.inf, 0.5]).all()
    assert (high.astype(float) <= [0.3, 0.3, np.inf, 0.5]).all()
    assert low[1] > high[1]  # 0.3 is no float32
    assert np.nextafter(low[0], np.float32(0)).astype(float) < 0.1


def test_bijections():
    exp = fl.transforms.exp
    x = np.linspace(-3, 3, 7)
    assert_close(exp.forward(x), np.exp(x))
    assert_close(exp.inverse(np.exp(x)), x)
    assert repr(exp) == "Bijection(exp, log)"
    assert exp == fl.transforms.Bijection(jnp.exp, jnp.log)
    with pytest.raises(TypeError, match="expected a function, found 3"):
        fl.transforms.Bijection(jnp.exp, 3)


def test_values_of_python():
    interval = fl.transforms.Interval(np.float32(0), np.inf)
    assert interval == fl.transforms.positive
    assert hash(interval) == hash(fl.transforms.positive)
    assert pickle.loads(pickle.dumps(interval)) == interval
    assert repr(fl.transforms.Interval(0, 10)) == "Interval(0.0, 10.0)"


def test_bad_bounds():
    for low, high, message in (
        (None, None, "expected a lower or an upper bound, found none"),
        (-np.inf, np.inf, "expected a lower or an upper bound, found none"),
        (1, 1, "low < high"),
        (2, 1, "low < high"),
        (np.nan, 1, "found nan"),
        (np.inf, None, "found inf"),
    ):
        with pytest.raises(ValueError, match=message):
            fl.transforms.Interval(low, high)
    for low in ("0", True, [0.0]):
        with pytest.raises(TypeError, match="a bound that is a number or None"):
            fl.transforms.Interval(low, 1)
    with pytest.raises(ValueError, match="float16 has no two numbers"):
        fl.transforms.Interval(1.0, 1.0001).forward(np.float16(0))
    with pytest.raises(TypeError, match="floating"):
        fl.transforms.Interval(0, 1).forward(1j)
