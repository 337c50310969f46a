"""Vectors in the training states and filters of Flax and Equinox; what these and optax do not take."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flatlayers as fl

from .gaussian import COVARIANCE, MEAN, START, energy


class Holder(eqx.Module):
    ps: fl.ComponentVector
    name: str


def test_train_state_of_flax():
    train_state = pytest.importorskip("flax.training.train_state", reason="Flax is an optional package")
    state = train_state.TrainState.create(apply_fn=energy, params=START, tx=optax.adam(0.1))

    @jax.jit
    def step(state):
        return state.apply_gradients(grads=jax.grad(state.apply_fn)(state.params))

    state = jax.lax.fori_loop(0, 500, lambda _, state: step(state), state)
    assert int(state.step) == 500
    assert state.params.layout == MEAN.layout
    np.testing.assert_allclose(state.params, MEAN, atol=1e-4)


def test_dictionaries_for_flax_serialization():
    serialization = pytest.importorskip("flax.serialization", reason="Flax is an optional package")
    content = serialization.to_bytes(START.to_dict())
    again = serialization.from_bytes(MEAN.to_dict(), content)
    np.testing.assert_array_equal(fl.ComponentVector.of(again, MEAN.layout), START)


def test_filters_of_equinox():
    holder = Holder(START, "start")

    @eqx.filter_jit
    def value_and_gradient(holder):
        return eqx.filter_value_and_grad(lambda holder: energy(holder.ps))(holder)

    value, gradient = value_and_gradient(holder)
    assert gradient.ps.layout == MEAN.layout
    np.testing.assert_allclose(gradient.ps, np.linalg.solve(COVARIANCE, np.ones(3)), rtol=1e-12)
    np.testing.assert_allclose(value, 0.5 * np.linalg.inv(COVARIANCE).sum(), rtol=1e-12)
    updated = eqx.apply_updates(holder, jax.tree.map(jnp.negative, eqx.filter(gradient, eqx.is_array)))
    np.testing.assert_allclose(updated.ps, (START - gradient.ps).data)
    arrays, rest = eqx.partition(START, eqx.is_inexact_array)
    assert eqx.combine(arrays, rest).layout == MEAN.layout
    many = eqx.filter_vmap(energy)(fl.ComponentVector(jnp.stack([START.data, MEAN.data]), MEAN.layout))
    np.testing.assert_allclose(many, [value, 0.0])


def test_serialisation_of_equinox(tmp_path):
    eqx.tree_serialise_leaves(tmp_path / "ps.eqx", START)
    again = eqx.tree_deserialise_leaves(tmp_path / "ps.eqx", MEAN)
    np.testing.assert_array_equal(again, START)
    assert again.layout == START.layout


# What does not work as it is, and what does instead


def test_masks_of_optax_are_for_leaves_and_per_leaf_shows_them():
    mask = MEAN.layout.mask("net")
    numbers = optax.masked(optax.set_to_zero(), fl.ComponentVector(jnp.asarray(mask), MEAN.layout))
    with pytest.raises(ValueError, match="truth value"):
        numbers.init(START)
    optimizer = fl.per_leaf(optax.masked(optax.set_to_zero(), {"rates": False, "net": True}))
    updates, _ = optimizer.update(START, optimizer.init(START), START)
    np.testing.assert_array_equal(updates, np.where(mask, 0.0, START))


def test_tree_at_is_for_leaves_and_at_sets_by_name():
    with pytest.raises((TypeError, ValueError)):
        eqx.tree_at(lambda v: v.rates.growth, START, jnp.array(5.0))
    changed = START.at["rates.growth"].set(5.0)
    np.testing.assert_array_equal(changed, [5.0, *np.asarray(START)[1:]])
    # The whole vector is a leaf that it does set.
    holder = eqx.tree_at(lambda holder: holder.ps, Holder(START, "start"), changed)
    assert holder.ps.rates.growth == 5.0


def test_labels_for_each_number_are_for_no_optimiser_and_rates_by_name_are():
    rates = START.layout.values({"rates": 0.1, "net": 0.0}, dtype=float)
    optimizer = optax.sgd(rates)
    updates, _ = optimizer.update(jax.grad(energy)(START), optimizer.init(START))
    np.testing.assert_allclose(updates, -rates * np.asarray(jax.grad(energy)(START)))
