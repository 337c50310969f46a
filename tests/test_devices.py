"""Arrays on several devices: cut along their last axis, or other ones on each device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

from flatlayers.devices import gathered, varying_like


def mesh(kind, shape=(4,), names=("data",)):
    devices = np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape)
    return Mesh(devices, names, axis_types=(kind,) * len(names))


def equations(f, *args):
    return [eqn.primitive.name for eqn in jax.make_jaxpr(f)(*args).jaxpr.eqns]


def test_without_devices_nothing_is_done():
    x = jnp.ones((3, 8))
    assert gathered(x) is x
    assert equations(gathered, x) == []
    assert equations(lambda x: varying_like(jnp.zeros(2), x), x) == equations(lambda x: jnp.zeros(2), x)
    assert equations(jax.grad(lambda x: gathered(x).sum()), x) == equations(jax.grad(lambda x: x.sum()), x)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("run", [lambda f, x: f(x), lambda f, x: jax.jit(f)(x)], ids=["eager", "jit"])
@pytest.mark.parametrize("spec", [P("data"), P(), P(None)])
def test_each_device_has_the_whole(kind, run, spec):
    x = jax.device_put(jnp.arange(8.0), NamedSharding(mesh(kind), spec))
    y = run(gathered, x)
    assert y.sharding.is_fully_replicated
    np.testing.assert_array_equal(y, np.arange(8.0))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("run", [lambda f, x: f(x), lambda f, x: jax.jit(f)(x)], ids=["eager", "jit"])
def test_leading_axes_stay_where_they_are(kind, run):
    devices = mesh(kind, (2, 2), ("members", "data"))
    x = jax.device_put(jnp.arange(32.0).reshape(4, 8), NamedSharding(devices, P("members", "data")))
    y = run(gathered, x)
    assert y.sharding.shard_shape(y.shape) == (2, 8)
    np.testing.assert_array_equal(y, np.arange(32.0).reshape(4, 8))
    each = run(jax.vmap(gathered), x)
    assert each.sharding.shard_shape(y.shape) == (2, 8)


def test_a_part_of_a_shard_map_is_left_as_it_is():
    x = jnp.arange(8.0)
    f = jax.shard_map(gathered, mesh=mesh(AxisType.Auto), in_specs=P("data"), out_specs=P("data"))
    np.testing.assert_array_equal(jax.jit(f)(x), x)


def test_zeros_vary_as_what_they_are_added_to():
    def f(x, y):
        start = varying_like((jnp.zeros(()), jnp.zeros((), bool)), (x, y, "text"))
        return jax.lax.scan(lambda c, x: ((c[0] + x, c[1] | (x > 0)), None), start, x)[0][0][None]

    g = jax.shard_map(f, mesh=mesh(AxisType.Auto), in_specs=(P("data"), P()), out_specs=P("data"))
    np.testing.assert_array_equal(jax.jit(g)(jnp.arange(8.0), 1.0), [1, 5, 9, 13])
