"""A Gaussian with names: its mean and covariance are what samplers and fitters have to find."""

import jax
import jax.numpy as jnp
import numpy as np

import flatlayers as fl


MEAN = fl.ComponentVector.of({"rates": {"growth": 1.0, "death": -2.0}, "net": [0.5]}, dtype=float)
COVARIANCE = np.array([[1.0, 0.6, 0.0], [0.6, 2.0, -0.3], [0.0, -0.3, 0.5]])
PRECISION = np.linalg.inv(COVARIANCE)
START = MEAN + 1.0


def log_density(v):
    assert isinstance(v, fl.ComponentVector)
    assert v.layout == MEAN.layout
    deviation = (v - MEAN).data
    # Each name is used, so that a position that has lost its names does not pass.
    assert v.rates.growth.shape == v.rates.death.shape == ()
    assert v.net.shape == (1,)
    return -0.5 * deviation @ (PRECISION @ deviation)


def energy(v):
    return -log_density(v)


def take(step, state, key, steps, keep=lambda state: state.position):
    """Step `steps` times; return the last state and what was kept of each."""

    def one(state, key):
        state, _ = step(key, state)
        return state, keep(state)

    return jax.jit(lambda state, keys: jax.lax.scan(one, state, keys))(state, jax.random.split(key, steps))


def assert_draws(chain, mean=0.15, covariance=0.35):
    """Hold the draws against the mean and the covariance, in units of the deviations."""
    assert isinstance(chain, fl.ComponentVector)
    assert chain.layout == MEAN.layout
    deviation = np.sqrt(np.diag(COVARIANCE))
    numbers = np.asarray(chain).reshape(-1, len(deviation))
    np.testing.assert_allclose((numbers.mean(axis=0) - np.asarray(MEAN)) / deviation, 0.0, atol=mean)
    found = np.cov(numbers.T) / np.outer(deviation, deviation)
    np.testing.assert_allclose(found, COVARIANCE / np.outer(deviation, deviation), atol=covariance)


def line(key, n=20):
    """A least-squares problem with names, `A v = b`, and its solution by NumPy."""
    A = jax.random.normal(key, (n, 3), float)
    b = A @ MEAN.data + 0.1 * jnp.sin(jnp.arange(float(n)))
    return A, b, np.linalg.lstsq(np.asarray(A), np.asarray(b))[0]
