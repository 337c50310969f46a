"""States after the loss of a batch over several devices: means, keys, metrics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flatlayers as fl
from flatlayers.parallel.gradient import fold_in
from tests.helpers import assert_same

from .gradients import X, value_and_gradient
from .meshes import mesh_of


def states_of(change, st, mesh=None, metrics=None):
    """The states and metrics after a loss that changes them."""
    ps = fl.ComponentVector.of({"w": jnp.ones(3)})

    def loss(ps, st, x):
        new = change(st, x)
        return jnp.mean(x) * jnp.sum(ps.w), new if metrics is None else (new, metrics(x))

    (_, rest), _ = value_and_gradient(mesh or mesh_of(8), loss, ps, st, jnp.arange(16.0))
    for x in jax.tree.leaves(rest):
        data = jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        for shard in data.addressable_shards:  # the same on each device
            np.testing.assert_array_equal(shard.data, np.asarray(data))
    return rest


def test_floating_states_are_means_and_others_those_of_the_first_device():
    st = fl.Record(
        mean=jnp.zeros(2), half=jnp.float32(0.0), count=jnp.int32(0), flag=jnp.array(False), training=True
    )

    def change(st, x):
        i = jax.lax.axis_index("data")
        return st.replace(
            mean=st.mean + x, half=jnp.mean(x).astype(jnp.float32), count=i + 5, flag=i == 0, training=False
        )

    found = states_of(change, st)
    assert_same(
        found,
        fl.Record(
            mean=jnp.array([7.0, 8.0]),
            half=jnp.float32(7.5),
            count=jnp.int32(5),
            flag=jnp.array(True),
            training=False,
        ),
    )
    assert found.training is False


def test_a_state_that_is_handed_on_stays_bit_for_bit():
    """Also where the mean of three equal numbers is another one."""
    st = fl.Record(mean=jnp.linspace(0.1, 0.9, 50), inf=jnp.array(jnp.inf), key=jax.random.key(3))
    assert_same(states_of(lambda st, x: st, st, mesh_of(2)), st)
    assert_same(states_of(lambda st, x: fl.Record(**st.to_dict()), st, mesh_of(8)), st)
    # Seen by a compiled function in between, keys are compared by their numbers.
    again = states_of(lambda st, x: jax.jit(lambda st: st)(st), st)
    assert_same(again.key, st.key)


def test_metrics_are_means():
    new, metrics = states_of(lambda st, x: st, fl.Record(), metrics=lambda x: {"top": jnp.max(x)})
    assert new == fl.Record()
    np.testing.assert_allclose(metrics["top"], np.mean(np.arange(1, 16, 2)))


@pytest.mark.parametrize("shape", [(), (3,), (2, 2)])
def test_each_device_has_keys_of_its_own_and_the_next_ones_come_back(shape):
    """They come back folded with the number of devices, which is none of theirs."""
    keys = jax.random.split(jax.random.key(1), shape) if shape else jax.random.key(1)
    mesh = mesh_of(8)

    def loss(ps, st, x):
        draw, split = jax.random.uniform, jax.random.split
        for _ in shape:
            draw, split = jax.vmap(draw), jax.vmap(split)
        new = split(st.key)[..., 0]
        return ps.w * jnp.sum(draw(st.key)), (st.replace(key=new, seen=jax.random.key_data(st.key)), {})

    st = fl.Record(key=keys, seen=None)
    ps = fl.ComponentVector.of({"w": 1.0})
    (value, (new, _)), _ = value_and_gradient(mesh, loss, ps, st, jnp.ones(8))

    def draw(device):
        return sum(jax.random.uniform(jax.random.fold_in(key, device)) for key in keys.reshape(-1))

    np.testing.assert_allclose(value, np.mean([draw(device) for device in range(8)]), rtol=1e-14)
    expected = jnp.stack([jax.random.fold_in(key, 8) for key in keys.reshape(-1)]).reshape(shape)
    assert_same(new.key, expected)
    assert_same(fold_in(keys, 8), expected)
    assert new.key.is_fully_replicated


def test_a_key_that_was_not_there_before_is_that_of_the_first_device():
    def change(st, x):
        return fl.Record(new=jax.random.fold_in(jax.random.key(0), jax.lax.axis_index("data")))

    found = states_of(change, fl.Record())
    assert_same(found.new, jax.random.fold_in(jax.random.key(0), 0))


def test_dropout_draws_another_mask_on_each_device():
    model = fl.Chain(fl.Dense(3, 3), fl.Dropout(0.5))
    ps, st = fl.setup(jax.random.key(0), model, jnp.float64)
    mesh = mesh_of(8)

    def loss(ps, st, x):
        y, st = model(x, ps, st)
        seen = jax.lax.all_gather(y != 0, "data")  # (device, sample, feature)
        return jnp.mean(y**2), fl.Record(layer_0=st.layer_0, layer_1=st.layer_1, seen=seen.astype(float))

    x = jnp.broadcast_to(jnp.array([1.0, 2.0, 3.0]), (64, 3))
    st = fl.Record(**dict(st.items()), seen=jnp.zeros(()))
    (_, new), _ = value_and_gradient(mesh, loss, ps, st, x)
    masks = np.asarray(new.seen).reshape(8, -1)
    assert len({mask.tobytes() for mask in masks}) == 8
    assert 0.3 < masks.mean() < 0.7
    key, before = new.layer_1.key, st.layer_1.key
    assert key.is_fully_replicated
    assert (jax.random.key_data(key) != jax.random.key_data(before)).any()
    # The next step has others.
    (_, after), _ = value_and_gradient(mesh, loss, ps, new, x)
    assert (after.seen != new.seen).any()


def test_dropout_in_test_mode_does_not_go_on():
    model = fl.Chain(fl.Dense(3, 3), fl.Dropout(0.5))
    ps, st = fl.setup(jax.random.key(0), model, jnp.float64)
    st = fl.testmode(st)

    def loss(ps, st, x):
        y, st = model(x, ps, st)
        return jnp.mean(y**2), st

    x = jnp.asarray(X)
    (value, new), _ = value_and_gradient(mesh_of(8), loss, ps, st, x)
    assert_same(new, st)
    np.testing.assert_allclose(value, loss(ps, st, x)[0], rtol=1e-14)
