"""Layers in `jax.shard_map` with its default, `check_vma=True`, which wants loops to be told what varies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import flatlayers as fl
from tests.parallel.programs import mesh_of
from tests.test_catalogue import INDICES, everything


pytestmark = pytest.mark.long


DEVICES = 2
# Solves by diffrax and optimistix, whose own loops do not take it: with them `check_vma=False`.
CANNOT = (fl.SolverLayer, fl.AugmentedNDE, fl.DeepEquilibriumNetwork, fl.MultiScaleDeepEquilibriumNetwork)


def other_numbers(x):
    """The same inputs for each device, behind a new axis, but multiplied by other numbers."""

    def several(leaf):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.stack([leaf] * DEVICES)
        return jnp.stack([leaf * (1 - i / 8) for i in range(DEVICES)])

    return jax.tree.map(several, x)


def on_devices(f, out_specs):
    """`f(ps, x)` of the part of each device."""

    def local(ps, x):
        return f(ps, jax.tree.map(lambda leaf: leaf[0], x))

    return jax.jit(
        jax.shard_map(local, mesh=mesh_of(DEVICES), in_specs=(P(), P("data")), out_specs=out_specs)
    )


def check(layer, x):
    ps, st = fl.setup(jax.random.key(0), layer, jnp.float64)
    xs = other_numbers(x)
    each = [jax.tree.map(lambda leaf, i=i: leaf[i], xs) for i in range(DEVICES)]

    def outputs(ps, x):
        return jax.tree.map(lambda y: y[None], layer(x, ps, st)[0])

    def total(ps, x):
        return sum(jnp.sum(y**2) for y in jax.tree.leaves(outputs(ps, x)))

    def close(found, expected):
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)

    expected = jax.tree.map(lambda *ys: jnp.concatenate(ys), *(outputs(ps, x) for x in each))
    close(on_devices(outputs, P("data"))(ps, xs), expected)
    # Of a vector that is the same on all devices the gradient is the sum over them.
    expected = jax.tree.map(lambda *parts: sum(parts), *(jax.grad(total)(ps, x) for x in each))
    close(on_devices(jax.grad(total), P())(ps, xs), expected)


@everything
def test_each_device_has_its_part(layer, make_input):
    if isinstance(layer, CANNOT):
        pytest.skip("loops of diffrax and optimistix need check_vma=False; see test_adjoints.py")
    check(layer, make_input(jnp.float64))


def test_indices():
    check(*INDICES)


LOOPS = [
    fl.RNN(3, 4),
    fl.GRU(3, 4, learn_initial_state=True, return_sequence=True),
    fl.LSTM(3, 4, reverse=True),
    fl.Recurrence(fl.FrozenLayer(fl.GRUCell(3, 4), ("bias_ih",))),
    fl.Repeated(fl.Dense(3, 3), 3, shared=True),
]


@pytest.mark.parametrize("layer", LOOPS, ids=lambda layer: str(layer)[:20])
def test_loops(layer):
    x = np.random.default_rng(0).normal(size=(5, 3))
    check(layer, jnp.asarray(x))


@pytest.mark.parametrize("layer", LOOPS, ids=lambda layer: str(layer)[:20])
def test_members_of_an_ensemble_see_the_same_data(layer):
    """What differs is the vector alone."""
    keys, x = jax.random.split(jax.random.key(0), DEVICES), jnp.ones((5, 3))
    st = fl.setup(keys[0], layer, jnp.float64)[1]
    members = [fl.setup(key, layer, jnp.float64)[0].data for key in keys]

    def local(ps, x):
        return layer(x, fl.ComponentVector(ps[0], layer.layout), st)[0][None]

    f = jax.shard_map(local, mesh=mesh_of(DEVICES), in_specs=(P("data"), P()), out_specs=P("data"))
    found = jax.jit(f)(jnp.stack(members), x)
    expected = [layer(x, fl.ComponentVector(ps, layer.layout), st)[0] for ps in members]
    np.testing.assert_allclose(found, jnp.stack(expected), rtol=1e-6)


def test_a_carry_of_the_user_goes_in_as_it_is():
    layer, x = fl.LSTM(3, 4), jnp.ones((6, 5, 3))
    ps, st = fl.setup(jax.random.key(0), layer, jnp.float64)

    def f(ps, x):
        carry = (jnp.full((len(x), 4), 0.5),) * 2  # the same on all devices
        return layer((x, carry), ps, st)[0]

    divided = jax.shard_map(f, mesh=mesh_of(DEVICES), in_specs=(P(), P("data")), out_specs=P("data"))
    np.testing.assert_allclose(jax.jit(divided)(ps, x), f(ps, x), rtol=1e-6)


def test_on_one_device_a_recurrence_has_no_more_equations():
    layer, x = fl.RNN(3, 4), jnp.ones((5, 3))
    ps, st = fl.setup(jax.random.key(0), layer, jnp.float64)
    names = [eqn.primitive.name for eqn in jax.make_jaxpr(lambda ps: layer(x, ps, st)[0])(ps).jaxpr.eqns]
    assert "pvary" not in names
    assert "pcast" not in names
