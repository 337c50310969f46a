import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flatlayers as fl

from ..helpers import assert_same


LAYOUT = fl.Layout({"growth": (), "rates": (2,), "net": {"weight": (2,), "bias": ()}})


def test_bounds_by_name():
    lower, upper = fl.bounds(LAYOUT, {"growth": (0, 10), "rates": (None, 1), "*.bias": (-1, None)})
    inf = np.inf
    assert_same(lower.data, np.array([0, -inf, -inf, -inf, -inf, -1.0]))
    assert_same(upper.data, np.array([10, 1, 1, inf, inf, inf]))
    assert lower.layout == upper.layout == LAYOUT
    lower, upper = fl.bounds(LAYOUT, {})
    assert np.isneginf(lower.data).all()
    assert np.isposinf(upper.data).all()


def test_bounds_are_rounded_inward():
    with jax.enable_x64(False):
        lower, upper = fl.bounds(LAYOUT, {"growth": (0.1, 0.3)})
        assert lower.dtype == jnp.float32
        assert float(lower.growth) >= 0.1
        assert float(upper.growth) <= 0.3
    lower, upper = fl.bounds(LAYOUT, {"growth": (0.1, 0.3)}, jnp.bfloat16)
    assert lower.dtype == jnp.bfloat16
    assert float(lower.growth) >= 0.1
    assert float(upper.growth) <= 0.3


def test_projection_keeps_a_step_inside():
    lower, upper = fl.bounds(LAYOUT, {"growth": (0, 10), "rates": (None, 1)})
    ps = fl.ComponentVector(jnp.full(6, 20.0), LAYOUT)
    inside = optax.projections.projection_box(ps, lower, upper)
    assert_same(inside.data, np.array([10.0, 1, 1, 20, 20, 20]))


def test_bad_bounds():
    for numbers, error, message in (
        ({"growth": (1, 0)}, ValueError, r"low <= high for 'growth', found \(1, 0\)"),
        ({"growth": (0, np.nan)}, ValueError, "low <= high for 'growth'"),
        ({"growth": 3}, TypeError, r"a pair \(low, high\) for 'growth', found 3"),
        ({"grow": (0, 1)}, KeyError, "the nearest: growth"),
        (
            {"net": (0, 1), "*.bias": (0, 2)},
            ValueError,
            "one pattern for 'net.bias', found 'net' and",
        ),
    ):
        with pytest.raises(error, match=message):
            fl.bounds(LAYOUT, numbers)
    with pytest.raises(ValueError, match=r"float32 has no number in \(0.3, 0.3\) for 'growth'"):
        fl.bounds(LAYOUT, {"growth": (0.3, 0.3)}, jnp.float32)
