"""Samplers and variational inference of blackjax: a `ComponentVector` is the position."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flatlayers as fl

from .gaussian import COVARIANCE, MEAN, PRECISION, START, assert_draws, log_density, take


blackjax = pytest.importorskip("blackjax", reason="blackjax is an optional package")


def sample(algorithm, key, steps, start=START):
    _, chain = take(algorithm.step, algorithm.init(start), key, steps)
    assert chain.shape == (steps, 3)
    return fl.ComponentVector(chain.data[steps // 10 :], chain.layout)


def test_hmc(key):
    algorithm = blackjax.hmc(
        log_density, step_size=0.5, inverse_mass_matrix=jnp.ones(3), num_integration_steps=6
    )
    assert_draws(sample(algorithm, key, 3000))


def test_nuts(key):
    algorithm = blackjax.nuts(log_density, step_size=0.6, inverse_mass_matrix=jnp.diag(COVARIANCE))
    chain = sample(algorithm, key, 1500)
    assert_draws(chain)
    assert chain.rates.growth.shape == (1350,)


def test_mala(key):
    assert_draws(sample(blackjax.mala(log_density, step_size=0.15), key, 30000))


def test_mclmc(key):
    algorithm = blackjax.mclmc(log_density, L=1.5, step_size=0.5)
    state = algorithm.init(START, key)
    _, chain = take(algorithm.step, state, jax.random.key(1), 20000)
    assert_draws(chain)


def test_random_walk(key):
    walk = blackjax.additive_step_random_walk.normal_random_walk(log_density, 0.8 * jnp.ones(3))
    assert_draws(sample(walk, key, 30000))


def test_elliptical_slice(key):
    # The prior has the precision 1 in all directions; the likelihood makes up for the rest.
    def log_likelihood(v):
        return log_density(v) + 0.5 * jnp.sum((v - MEAN).data ** 2)

    assert np.linalg.eigvalsh(PRECISION).min() > 0.4
    algorithm = blackjax.elliptical_slice(log_likelihood, mean=MEAN.data, cov=jnp.eye(3))
    assert_draws(sample(algorithm, key, 20000))


@pytest.mark.slow
def test_window_adaptation(key):
    warmup = blackjax.window_adaptation(blackjax.nuts, log_density, is_mass_matrix_diagonal=False)
    (state, found), _ = warmup.run(key, START, num_steps=600)
    assert state.position.layout == MEAN.layout
    np.testing.assert_allclose(found["inverse_mass_matrix"], COVARIANCE, atol=0.6)
    algorithm = blackjax.nuts(log_density, **found)
    _, chain = take(algorithm.step, state, jax.random.key(1), 1500)
    assert_draws(chain)


def test_sgld(key):
    # Without noise of mini-batches a small step has the density itself.
    algorithm = blackjax.sgld(jax.grad(lambda position, _: log_density(position)))

    def step(position, key):
        position = algorithm.step(key, position, None, 0.05)
        return position, position

    keys = jax.random.split(key, 40000)
    _, chain = jax.jit(lambda start: jax.lax.scan(step, algorithm.init(start), keys))(START)
    assert_draws(chain)


@pytest.mark.long
def test_svgd(key):
    start, _ = fl.setup(jax.random.split(key, 30), {"x": fl.Dense(2, 1)}, float)
    particles = fl.ComponentVector(start.data, MEAN.layout)
    algorithm = blackjax.svgd(jax.grad(log_density), optax.adam(0.1))

    @jax.jit
    def run(state):
        return jax.lax.scan(lambda state, _: (algorithm.step(state), None), state, None, length=500)[0]

    found = run(algorithm.init(particles)).particles
    assert found.layout == MEAN.layout
    np.testing.assert_allclose(found.data.mean(axis=0), MEAN.data, atol=0.1)


def test_meanfield_vi(key):
    algorithm = blackjax.meanfield_vi(log_density, optax.adam(0.05), num_samples=20)
    _, (mean, log_deviation) = take(
        algorithm.step, algorithm.init(START), key, 2000, keep=lambda state: (state.mu, state.rho)
    )
    assert mean.layout == log_deviation.layout == MEAN.layout
    np.testing.assert_allclose(mean.data[1000:].mean(axis=0), MEAN.data, atol=0.1)
    # The best independent Gaussian has the variances of the conditional densities.
    np.testing.assert_allclose(
        jnp.exp(log_deviation.data[1000:].mean(axis=0)), np.diag(PRECISION) ** -0.5, rtol=0.1
    )


@pytest.mark.slow
def test_pathfinder(key):
    algorithm = blackjax.pathfinder(log_density)
    state, _ = jax.jit(lambda start: blackjax.vi.pathfinder.approximate(key, log_density, start))(START)
    assert state.position.layout == MEAN.layout
    draws, _ = algorithm.sample(jax.random.key(1), state, 4000)
    assert_draws(draws)
