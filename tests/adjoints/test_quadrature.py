"""The Gauss-Legendre rule on the intervals of a backward solve, against integrals of polynomials."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from flatlayers.adjoints._quadrature import ROWS, Nodes, Quadrature
from tests.helpers import assert_close


class Path:
    """A solution that is known."""

    def __init__(self, evaluate):
        self.evaluate = evaluate


def integral(value, moving, number, intervals, y, adjoint):
    """The integral of `adjoint(-t)` times the derivative of `value`, over `(t0, t1, accepted)`."""
    rule = Quadrature(value, moving, number, jnp.float64)
    nodes = Nodes.empty(jnp.array(0.0), y(jnp.array(0.0)), number)
    for t0, t1, accepted in intervals:
        nodes = rule.put(
            nodes, jnp.array(accepted), Path(y), adjoint, -jnp.asarray(t1, float), -jnp.asarray(t0, float)
        )
    return rule.gradient(nodes)


def powers(t, y, moving):
    (coefficients,) = moving
    return y * (coefficients @ t ** np.arange(float(coefficients.size)))


@pytest.mark.parametrize("number", [1, 2, 3, 4, 7])
def test_the_rule_is_exact_up_to_its_degree(number):
    """With `n` nodes it is exact to degree `2 n - 1`, and misses what is known of the next power."""
    a, b, n = 0.2, 1.7, number
    k = np.arange(2 * n + 1)
    (found,) = integral(powers, [jnp.ones(k.size)], n, [(a, b, True)], jnp.ones_like, jnp.ones_like)
    missed = np.asarray((b ** (k + 1) - a ** (k + 1)) / (k + 1) - found)
    np.testing.assert_allclose(missed[:-1], 0, atol=1e-13 * b ** (2 * n))
    error = (b - a) ** (2 * n + 1) * math.factorial(n) ** 4 / ((2 * n + 1) * math.factorial(2 * n) ** 2)
    np.testing.assert_allclose(missed[-1], error, rtol=1e-6, atol=1e-13 * b ** (2 * n))


def test_state_and_adjoint_state_are_those_of_the_node():
    """`y = (t, {t^2})` and the adjoint state `(s, {1 + s^2})` with `s = -t`, for a field `p y + q t`."""

    def field(t, y, moving):
        p, nothing, q = moving
        assert nothing is None
        return p * y[0] + q * t, {"u": p * y[1]["u"]}

    moving = [jnp.array(0.7), None, jnp.array(0.3)]
    found = integral(
        field,
        moving,
        3,
        [(0.0, 2.0, True)],
        lambda t: (t, {"u": t**2}),
        lambda s: (s, {"u": 1 + s**2}),
    )
    # int (-t t + (1 + t^2) t^2) dt and int -t t dt, from 0 to 2
    assert found[1] is None
    assert_close((found[0], found[2]), (2.0**5 / 5, -(2.0**3) / 3))


def test_intervals_add_up_and_a_rejected_one_is_replaced():
    intervals = [(0.5, 2.0, False), (1.0, 2.0, True), (0.0, 1.0, False), (0.3, 1.0, True), (0.0, 0.3, False)]
    (found,) = integral(powers, [jnp.ones(4)], 2, intervals, jnp.ones_like, jnp.ones_like)
    k = np.arange(1, 5)
    assert_close(found, (2.0**k - 0.3**k) / k)


@pytest.mark.parametrize("shape", [(), (3,), (40, 3), (5, 30, 3), (1000, 2)])
@pytest.mark.parametrize("number", [1, 3, 5])
def test_a_block_has_so_many_rows_at_most(shape, number):
    y = jnp.ones(shape)
    rule, nodes, intervals = Quadrature(lambda t, y, moving: y, [], number, jnp.float64), None, 0
    nodes = Nodes.empty(jnp.array(0.0), y, number)
    while not nodes.is_full:
        nodes = rule.put(
            nodes, jnp.array(True), Path(lambda t: y), lambda s: y, jnp.array(0.0), jnp.array(1.0)
        )
        intervals += 1
    rows = math.prod(shape[:-1]) * number
    assert 2 <= intervals <= 16
    assert intervals * rows <= ROWS or intervals == 2
    assert (intervals + 1) * rows > ROWS or intervals == 16
