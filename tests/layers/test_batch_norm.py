"""Batch norm: its two modes, its running values, and batches that are divided."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flatlayers as fl
from flatlayers.core.data_axis import data_axis
from tests.helpers import assert_close
from tests.layers.norms import inputs, over, started


def test_test_mode_is_an_affine_map(key):
    layer = fl.BatchNorm(3)
    ps, st = started(layer)
    st = st.replace(running_mean=jnp.array([1.0, -2.0, 3.0]), running_var=jnp.array([4.0, 0.5, 9.0]))
    st = fl.testmode(st)

    def f(x):
        y, new = layer(x, ps, st)
        assert new == st
        return y

    x, other = inputs((5, 3)), inputs((5, 3), seed=5)
    assert_close(f(0.3 * x + 0.7 * other), 0.3 * f(x) + 0.7 * f(other))
    slope = ps.scale / jnp.sqrt(st.running_var + 1e-5)
    assert_close(f(jnp.zeros(3)), ps.bias - slope * st.running_mean)
    assert_close(jax.jacobian(f)(x[0]), jnp.diag(slope))
    assert_close(f(x), jax.vmap(f)(x))
    assert_close(f(x[0]), f(x)[0])


@pytest.mark.parametrize("momentum", [0.1, 0.25, 1.0])
def test_running_values_have_a_closed_form(momentum):
    layer = fl.BatchNorm(3, momentum=momentum)
    ps, st = fl.setup(jax.random.key(0), layer, float)
    batches = [inputs((4, 2, 3), seed=seed) for seed in range(5)]
    for x in batches:
        _, st = jax.jit(layer)(x, ps, st)
    weights = [momentum * (1 - momentum) ** (4 - i) for i in range(5)]
    means = [np.mean(x, (0, 1)) for x in batches]
    unbiased = [np.var(x, (0, 1), ddof=1) for x in batches]
    mean = sum(w * m for w, m in zip(weights, means, strict=True))
    var = (1 - momentum) ** 5 + sum(w * v for w, v in zip(weights, unbiased, strict=True))
    np.testing.assert_allclose(st.running_mean, mean, rtol=1e-12)
    np.testing.assert_allclose(st.running_var, var, rtol=1e-12)


def test_no_statistics_no_modes():
    layer = fl.BatchNorm(3, track_stats=False)
    ps, st = fl.setup(jax.random.key(0), layer, float)
    assert st == {}
    assert_close(layer(inputs((5, 3)), ps, st)[0], over(inputs((5, 3)), (0,)))


@pytest.mark.parametrize(("dtype", "width"), [(jnp.float32, 32), (jnp.float64, 64), (jnp.bfloat16, 32)])
@pytest.mark.parametrize("made_with", [jnp.float32, jnp.float64, jnp.bfloat16])
def test_a_state_never_changes_its_dtype(dtype, width, made_with):
    layer = fl.BatchNorm(3, affine=False)
    st = fl.initial_states(jax.random.key(0), layer, dtype)
    assert st.running_mean.dtype == st.running_var.dtype == f"float{width}"
    for state in (st, fl.testmode(st)):
        y, new = layer(inputs((5, 3)).astype(made_with), {}, state)
        assert y.dtype == made_with
        assert new.running_mean.dtype == new.running_var.dtype == f"float{width}"


def test_no_gradient_through_the_running_values():
    layer = fl.BatchNorm(3)
    ps, st = fl.setup(jax.random.key(0), layer, float)
    slope = jax.grad(lambda x: layer(x, ps, st)[1].running_var.sum())(inputs((5, 3)))
    assert (slope == 0).all()


def test_a_large_mean_costs_no_digits():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(64, 3)) + 1e4, jnp.float32)
    layer = fl.BatchNorm(3)
    ps, st = fl.setup(jax.random.key(0), layer)
    np.testing.assert_allclose(layer(x, ps, st)[0], over(np.asarray(x, float), (0,)), atol=2e-3)


def test_one_sample_is_enough_in_test_mode_and_with_space():
    layer = fl.BatchNorm(3)
    ps, st = fl.setup(jax.random.key(0), layer, float)
    assert layer(jnp.ones((1, 3)), ps, fl.testmode(st))[0].shape == (1, 3)
    assert layer(inputs((1, 2, 3)), ps, st)[0].shape == (1, 2, 3)


# A batch over a mapped axis


@pytest.mark.long
@pytest.mark.parametrize("shape", [(6, 3), (6, 4, 3)])
def test_axis_name_takes_the_whole_batch(shape):
    layer, whole = fl.BatchNorm(3, axis_name="devices"), fl.BatchNorm(3)
    ps, st = started(layer)
    x = inputs(shape)
    apart = jax.vmap(
        lambda x: layer(x, ps, st), axis_name="devices", out_axes=(0, None)
    )  # one sample on each device
    y, new = jax.jit(apart)(x)
    expected, state = whole(x, ps, st)
    assert_close(y, expected)
    assert_close(new, state)
    test = fl.testmode(new)
    assert_close(layer(x, ps, test)[0], whole(x, ps, test)[0])
    gradient = jax.grad(lambda x: jnp.sum(apart(x)[0] ** 3))(x)
    assert_close(gradient, jax.grad(lambda x: jnp.sum(whole(x, ps, st)[0] ** 3))(x), rtol=1e-9)


def test_an_axis_that_is_not_there_is_named(key):
    layer = fl.BatchNorm(3, axis_name="devices")
    with pytest.raises(ValueError, match="expected a mapped axis for axis_name='devices'.* found none"):
        layer(jnp.ones((4, 3)), *fl.setup(key, layer, float))


@pytest.mark.long
def test_two_axis_names():
    layer = fl.BatchNorm(3, axis_name=("hosts", "devices"))
    ps, st = started(layer)
    x = inputs((2, 3, 4, 3))
    inner = jax.vmap(lambda x: layer(x, ps, st), axis_name="devices", out_axes=(0, None))
    y, new = jax.vmap(inner, axis_name="hosts", out_axes=(0, None))(x)
    expected, state = fl.BatchNorm(3)(x, ps, st)
    assert_close((y, new), (expected, state))


def test_one_device_of_a_mesh():
    layer = fl.BatchNorm(3, axis_name="devices")
    ps, st = started(layer)
    spec = jax.sharding.PartitionSpec
    mesh = jax.make_mesh((1,), ("devices",), axis_types=(jax.sharding.AxisType.Auto,))
    apart = jax.shard_map(
        lambda x: layer(x, ps, st), mesh=mesh, in_specs=spec("devices"), out_specs=(spec("devices"), spec())
    )
    x = inputs((6, 3))
    assert_close(jax.jit(apart)(x), fl.BatchNorm(3)(x, ps, st))


# A batch that is divided over devices


@pytest.mark.parametrize("axis_name", [None, "model", ("model", "other")])
@pytest.mark.parametrize("track_stats", [True, False])
def test_a_part_of_the_batch_is_not_the_batch(key, axis_name, track_stats):
    layer = fl.BatchNorm(2, axis_name=axis_name, track_stats=track_stats)
    ps, st = fl.setup(key, layer)
    message = "expected axis_name='data', over which the loss has its batch divided, found "
    with data_axis("data"), pytest.raises(ValueError, match=message + re.escape(repr(axis_name))):
        layer(jnp.ones((4, 2)), ps, st)


@pytest.mark.long
def test_what_needs_no_batch_does_with_a_part(key):
    with data_axis("data"):
        layer = fl.InstanceNorm(2, track_stats=True)
        layer(jnp.ones((4, 3, 2)), *fl.setup(key, layer, jnp.float64))
        layer = fl.BatchNorm(2)
        ps, st = fl.setup(key, layer, jnp.float64)
        layer(jnp.ones((4, 2)), ps, fl.testmode(st))
        for axis_name in ("data", ("model", "data")):
            layer = fl.BatchNorm(2, axis_name=axis_name)
            f = jax.vmap(lambda x, layer=layer: layer(x, ps, st)[0], axis_name="data")
            jax.vmap(f, axis_name="model")(jnp.ones((2, 3, 4, 2)))
