"""The minimisers of JAXopt, which is no longer maintained: tested where it is installed."""

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

import flatlayers as fl

from .gaussian import MEAN, PRECISION, START, energy, line


jaxopt = pytest.importorskip("jaxopt", reason="JAXopt is an optional package, and not maintained")

LOWER = fl.ComponentVector(jnp.array([-5.0, -1.5, -5.0]), MEAN.layout)
UPPER = fl.ComponentVector(jnp.array([5.0, 5.0, 0.2]), MEAN.layout)


def constrained_minimum():
    """Return the minimum in the box, by SciPy."""
    box = list(zip(np.asarray(LOWER), np.asarray(UPPER), strict=True))

    def energy(x):
        difference = x - np.asarray(MEAN)
        return 0.5 * difference @ PRECISION @ difference

    return scipy.optimize.minimize(energy, np.zeros(3), bounds=box, tol=1e-12).x


@pytest.mark.slow
@pytest.mark.parametrize("name", ["LBFGS", "ScipyMinimize"])
def test_minimisers(name):
    found = getattr(jaxopt, name)(fun=energy, tol=1e-8).run(START).params
    assert found.layout == MEAN.layout
    np.testing.assert_allclose(found, MEAN, atol=1e-6)


def test_bounds_are_vectors():
    expected = constrained_minimum()
    assert expected[1] == -1.5
    bounded = jaxopt.ScipyBoundedMinimize(fun=energy, tol=1e-10).run(START, (LOWER, UPPER)).params
    projected = (
        jaxopt.ProjectedGradient(fun=energy, projection=jaxopt.projection.projection_box, tol=1e-8)
        .run(START, hyperparams_proj=(LOWER, UPPER))
        .params
    )
    for found in (bounded, projected):
        assert found.layout == MEAN.layout
        np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.slow
def test_levenberg_marquardt_wants_an_array(key):
    A, b, expected = line(key)

    def residual(data):
        v = fl.ComponentVector(data, MEAN.layout)
        return A @ jnp.concatenate([v.rates.growth[None], v.rates.death[None], v.net]) - b

    found = jaxopt.LevenbergMarquardt(residual_fun=residual, tol=1e-10).run(START.data).params
    np.testing.assert_allclose(found, expected, atol=1e-6)
    with pytest.raises(TypeError, match="tree structure"):
        jaxopt.LevenbergMarquardt(residual_fun=lambda v: residual(v.data)).run(START)
