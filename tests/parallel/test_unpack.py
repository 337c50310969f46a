"""A vector that its user cuts along its last axis: gathered once, then split."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec as P

import flatlayers as fl
from tests.parallel.programs import collectives, compiled, mesh_of, placed


DEVICES = 8
MODEL = fl.Chain(*(fl.Dense(8, 8, jnp.tanh) for _ in range(8)), name="net")  # 576 numbers in 16 leaves


def problem(key):
    ps, st = fl.setup(key, MODEL, jnp.float64)
    x = np.random.default_rng(0).normal(size=(16, 8))
    return ps, jnp.asarray(x), st


def loss(ps, x, st):
    y, st = MODEL(x, ps, st)
    return jnp.mean(y**2), st


@pytest.mark.parametrize("data", [P(), P("data")], ids=["one batch", "batch cut too"])
def test_a_gradient_gathers_once(key, data):
    ps, x, st = problem(key)
    mesh = mesh_of(DEVICES)
    args = placed(ps, mesh, "data"), placed(x, mesh, *data), st
    found = collectives(compiled(jax.value_and_grad(loss, has_aux=True), *args))
    assert found.get("all-gather", 0) == 1
    assert set(found) <= {"all-gather", "all-reduce", "reduce-scatter"}


def test_a_step_of_an_optimiser_gathers_once(key):
    ps, x, st = problem(key)
    mesh, optimizer = mesh_of(DEVICES), optax.sgd(1e-3, momentum=0.9)
    ps = placed(ps, mesh, "data")
    opt_state = optimizer.init(ps)

    def step(ps, opt_state, x, st):
        (_, st), gradient = jax.value_and_grad(loss, has_aux=True)(ps, x, st)
        updates, opt_state = optimizer.update(gradient, opt_state)
        return optax.apply_updates(ps, updates), opt_state

    found = collectives(compiled(step, ps, opt_state, placed(x, mesh, "data"), st))
    assert found.get("all-gather", 0) == 1
    assert "collective-permute" not in found


@pytest.mark.long
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_it_is_the_same_on_one_device(key, kind):
    ps, x, st = problem(key)
    function = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (one, _), of_one = function(ps, x, st)
    mesh = mesh_of(DEVICES, kind)
    (several, _), of_several = function(placed(ps, mesh, "data"), placed(x, mesh), st)
    np.testing.assert_allclose(several, one, rtol=1e-12)
    np.testing.assert_allclose(of_several.data, of_one.data, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_its_leaves_are_whole(key, kind):
    ps, *_ = problem(key)
    cut = placed(ps, mesh_of(DEVICES, kind), "data")
    for record in (cut.unpack(), jax.jit(lambda v: v.unpack())(cut)):
        for a, b in zip(jax.tree.leaves(record), jax.tree.leaves(ps.unpack()), strict=True):
            assert a.sharding.is_fully_replicated
            np.testing.assert_array_equal(a, b)


def test_members_on_their_devices_send_nothing(key):
    keys = jax.random.split(key, DEVICES)
    ps = fl.ComponentVector(
        jnp.stack([fl.setup(key, MODEL, jnp.float64)[0].data for key in keys]), MODEL.layout
    )
    _, x, st = problem(key)
    gradient = jax.vmap(jax.grad(lambda ps: loss(ps, x, st)[0]))
    assert collectives(compiled(gradient, placed(ps, mesh_of(DEVICES), "data"))) == {}
