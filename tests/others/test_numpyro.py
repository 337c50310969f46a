"""The samplers of numpyro: a vector is the position, or one site of a model."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flatlayers as fl

from .gaussian import COVARIANCE, MEAN, START, assert_draws, energy


numpyro = pytest.importorskip("numpyro", reason="numpyro is an optional package")
dist = pytest.importorskip("numpyro.distributions", reason="numpyro is an optional package")
infer = pytest.importorskip("numpyro.infer", reason="numpyro is an optional package")


def run(kernel, key, draws, **options):
    mcmc = infer.MCMC(kernel, num_warmup=300, num_samples=draws, progress_bar=False)
    mcmc.run(key, **options)
    return mcmc.get_samples()


@pytest.mark.long
def test_nuts_of_a_vector(key):
    chain = run(infer.NUTS(potential_fn=energy), key, 1500, init_params=START)
    assert chain.shape == (1500, 3)
    assert_draws(chain)


@pytest.mark.slow
def test_chains_start_where_the_vectors_of_a_leading_axis_are(key):
    kernel = infer.NUTS(potential_fn=energy, dense_mass=True)
    starts = fl.ComponentVector(START.data + jnp.arange(2.0)[:, None], START.layout)
    mcmc = infer.MCMC(
        kernel,
        num_warmup=300,
        num_samples=800,
        num_chains=2,
        chain_method="vectorized",
        progress_bar=False,
    )
    mcmc.run(key, init_params=starts)
    chains = mcmc.get_samples(group_by_chain=True)
    assert chains.shape == (2, 800, 3)
    assert_draws(chains)


@pytest.mark.slow
def test_a_vector_as_one_site(key):
    def model():
        data = numpyro.sample("ps", dist.MultivariateNormal(MEAN.data, jnp.asarray(COVARIANCE)))
        ps = fl.ComponentVector(data, MEAN.layout)
        numpyro.deterministic("sum", ps.rates.growth + ps.rates.death)

    draws = run(infer.NUTS(model), key, 1500)
    chain = fl.ComponentVector(draws["ps"], MEAN.layout)
    assert_draws(chain)
    np.testing.assert_allclose(draws["sum"], chain.rates.growth + chain.rates.death)


def test_svi_of_a_vector(key):
    # With a delta as guide the loss is the energy and a constant, so that the optimum is the mean.
    def model():
        data = numpyro.sample("ps", dist.ImproperUniform(dist.constraints.real, (), (3,)))
        numpyro.factor("density", -energy(fl.ComponentVector(data, MEAN.layout)))

    def guide():
        numpyro.sample("ps", dist.Delta(numpyro.param("at", START).data, event_dim=1))

    svi = infer.SVI(model, guide, optax.adam(0.05), infer.Trace_ELBO())
    found = svi.run(key, 1500, progress_bar=False).params["at"]
    assert found.layout == MEAN.layout
    np.testing.assert_allclose(found, MEAN, atol=1e-3)
    assert jax.tree.structure(found) == jax.tree.structure(START)
