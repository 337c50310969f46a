"""Evolution strategies: evosax takes a vector as the solution and gives populations with names."""

import jax
import numpy as np
import optax
import pytest

import flatlayers as fl

from .gaussian import MEAN, START, energy


algorithms = pytest.importorskip("evosax.algorithms", reason="evosax is an optional package")


def evolve(strategy, key, params, first, generations=150):
    def step(state, key):
        ask, tell = jax.random.split(key)
        population, state = strategy.ask(ask, state, params)
        assert population.layout == MEAN.layout
        state, _ = strategy.tell(tell, population, jax.vmap(energy)(population), state, params)
        return state, None

    keys = jax.random.split(key, generations)
    state, _ = jax.jit(lambda state: jax.lax.scan(step, state, keys))(first)
    return state


@pytest.mark.long
@pytest.mark.parametrize("name", [pytest.param("CMA_ES", marks=pytest.mark.slow), "SNES", "Open_ES"])
def test_strategies_with_a_mean(key, name):
    options = {"optimizer": optax.adam(0.05)} if name == "Open_ES" else {}
    strategy = getattr(algorithms, name)(population_size=20, solution=START, **options)
    params = strategy.default_params
    mean = strategy.get_mean(evolve(strategy, key, params, strategy.init(key, START, params)))
    assert isinstance(mean, fl.ComponentVector)
    np.testing.assert_allclose(mean, MEAN, atol=0.1)


@pytest.mark.long
def test_differential_evolution(key):
    strategy = algorithms.DifferentialEvolution(population_size=24, solution=START)
    params = strategy.default_params
    spread = 3 * jax.random.normal(key, (24, 3), float)
    population = fl.ComponentVector(START.data + spread, START.layout)
    first = strategy.init(key, population, jax.vmap(energy)(population), params)
    best = strategy.get_best_solution(evolve(strategy, key, params, first))
    assert isinstance(best, fl.ComponentVector)
    np.testing.assert_allclose(best, MEAN, atol=0.1)
