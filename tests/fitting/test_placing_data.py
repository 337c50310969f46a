"""Batches over devices: each has its part, wherever the data come from."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

import flatlayers as fl
from flatlayers.fitting.data import source_of
from flatlayers.fitting.placing import OnMesh
from tests.fitting.placed import LOSSES, MODELS, X, Y, few, train


pytestmark = pytest.mark.usefixtures("_standard")

AUTO = Mesh(np.array(jax.devices()), ("data",), axis_types=(AxisType.Auto,))


def shapes_of(data, key, mesh, **options):
    """The shape of the images that the loss sees on a device, with each device on its own."""
    ps, st = fl.setup(key, MODELS["MLP"], float)
    seen = []

    def loss(ps, st, batch):
        seen.append(batch[0].shape)
        return LOSSES["MLP"](ps, st, batch)

    train(loss, ps, st, data, steps=4, chunk=2, mesh=mesh, per_device=True, **options)
    return set(seen)


def parts_of(data, key, mesh):
    """The shapes of the parts of the images on devices in the program of the global view."""
    ps, st = fl.setup(key, MODELS["MLP"], float)
    seen = []

    def loss(ps, st, batch):
        x = batch[0]
        jax.debug.inspect_array_sharding(x, callback=lambda s: seen.append(s.shard_shape(x.shape)))
        return LOSSES["MLP"](ps, st, batch)

    train(loss, ps, st, data, steps=4, chunk=2, mesh=mesh)
    return set(seen)


def endless(*batch):
    while True:
        yield batch


KINDS = {
    "one": lambda: (X[:32], Y[:32]),
    "list": lambda: [(X[:32], Y[:32]), (X[32:], Y[32:])],
    "iterator": lambda: endless(X[:32], Y[:32]),
    "iterator of JAX's": lambda: endless(jnp.asarray(X[:32]), jnp.asarray(Y[:32])),
    "iterator of parts": lambda: endless(*jax.device_put((X[:32], Y[:32]), NamedSharding(AUTO, P("data")))),
    "parts": lambda: jax.device_put((X[:32], Y[:32]), NamedSharding(AUTO, P("data"))),
    "explicit parts": lambda: jax.device_put(
        (X[:32], Y[:32]), NamedSharding(jax.make_mesh((8,), ("data",)), P("data"))
    ),
    "batches": lambda: fl.batches((X, Y), 32, key=jax.random.key(3)),
    "batches in order": lambda: fl.batches((X, Y), 32, shuffle=False),
}


@pytest.mark.long
@pytest.mark.parametrize("kind", few(KINDS, "one", "list", "iterator of parts", "batches"))
def test_each_device_has_its_part_of_a_batch(key, mesh, kind):
    assert shapes_of(KINDS[kind](), key, mesh) == {(4, 3)}
    assert parts_of(KINDS[kind](), key, mesh) == {(4, 3)}
    ps, st = fl.setup(key, MODELS["MLP"], float)
    # JAX itself does not differentiate through a product of explicit parts.
    expected = train(LOSSES["MLP"], ps, st, KINDS[kind.removeprefix("explicit ")](), steps=10)
    for per_device in (False, True):
        found = train(LOSSES["MLP"], ps, st, KINDS[kind](), steps=10, mesh=mesh, per_device=per_device)
        np.testing.assert_allclose(found.losses, expected.losses, rtol=1e-12)


def test_a_chunk_goes_from_the_host_to_each_device(mesh, monkeypatch):
    placing = OnMesh(AUTO, "data", False, True)
    moved, put = [], jax.device_put

    def noted(x, device=None, **options):
        moved.append((type(x), np.shape(x), device))
        return put(x, device, **options)

    source = source_of(endless(X[:32], Y[:32]), 0, False, placing)
    monkeypatch.setattr(jax, "device_put", noted)
    chunk = source.take(0, 5, 5)
    along = NamedSharding(AUTO, P(None, "data"))
    assert moved == [(np.ndarray, (5, 32, 3), along), (np.ndarray, (5, 32, 1), along)]
    assert all(x.sharding.is_equivalent_to(along, 3) for x in chunk.data)
    # Parts that are on the devices never come to the host.
    parts = put((X[:32], Y[:32]), NamedSharding(AUTO, P("data")))
    source = source_of(endless(*parts), 0, False, placing)
    with jax.transfer_guard("disallow"), jax.transfer_guard_device_to_device("allow"):
        stacked = source.take(0, 5, 5).data
    assert all(x.sharding.is_equivalent_to(along, 3) for x in stacked)
    np.testing.assert_array_equal(stacked[0], np.stack([X[:32]] * 5))


@pytest.mark.long
def test_keys_and_numbers_in_batches(key, mesh):
    def noisy(ps, st, batch):
        keys, scale = batch
        noise = jax.vmap(lambda k: jax.random.normal(k, ()))(keys)
        return jnp.mean((ps.a[0] - scale * noise) ** 2), st

    ps = fl.ComponentVector.of({"a": [1.0]})
    batch = (jax.random.split(key, 16), 2.0)
    for data in (batch, [batch, batch]):
        expected = train(noisy, ps, {}, data, optax.sgd(0.1), steps=5)
        for per_device in (False, True):
            found = train(noisy, ps, {}, data, optax.sgd(0.1), steps=5, mesh=mesh, per_device=per_device)
            np.testing.assert_allclose(found.losses, expected.losses, rtol=1e-12)
