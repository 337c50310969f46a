import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import flatlayers as fl

from .hlo import collectives, optimized
from .meshes import mesh_of, mesh_of_two_axes


def vector(length, *lead, dtype=jnp.float64):
    numbers = np.random.default_rng(length).normal(size=(*lead, length)) * 10
    layout = fl.Layout({"first": (), "rest": (length - 1,)})
    return fl.ComponentVector(jnp.asarray(numbers).astype(dtype), layout)


def assert_equal(a, b):
    assert (a.layout, a.shape, a.dtype) == (b.layout, b.shape, b.dtype)
    np.testing.assert_array_equal(a.data, b.data)


def gathered_in_shard_map(sharded):
    """Of each device, one after another."""
    spec = PartitionSpec(*[None] * (sharded.data.ndim - 1), "data")

    def one(part):
        assert part.data.shape[-1] * part.parts == sharded.data.shape[-1]
        return part.gather().data[None]

    return jax.shard_map(
        one, mesh=sharded.mesh, in_specs=spec, out_specs=PartitionSpec("data"), check_vma=False
    )(sharded)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("lead", [(), (2,), (2, 3)])
@pytest.mark.parametrize("parts", [1, 3, 8])
@pytest.mark.parametrize("length", [1, 7, 8, 147])
def test_shards_are_even_and_gather_to_what_they_were(length, parts, lead, kind):
    ps = vector(length, *lead)
    sharded = fl.shard(ps, mesh_of(parts, kind))
    size = -(-length // parts)
    assert sharded.data.shape == (*lead, size * parts)
    assert {shard.data.shape for shard in sharded.data.addressable_shards} == {(*lead, size)}
    assert not np.asarray(sharded.data)[..., length:].any()
    assert_equal(sharded.gather(), ps)
    assert_equal(jax.jit(lambda v: v.gather())(sharded), ps)
    for one in gathered_in_shard_map(sharded):
        np.testing.assert_array_equal(one, ps.data)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "complex128", "int32", "bool"])
def test_any_dtype(dtype):
    ps = vector(7, dtype=dtype)
    sharded = fl.shard(ps, mesh_of(8))
    assert_equal(sharded.gather(), ps)
    assert_equal(jax.jit(lambda v: v.gather())(sharded), ps)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("axis", ["data", "model"])
def test_a_mesh_of_two_axes(axis, kind):
    ps = vector(9)
    sharded = fl.shard(ps, mesh_of_two_axes(kind), axis)
    parts = {"data": 4, "model": 2}[axis]
    assert sharded.parts == parts
    assert {shard.data.shape for shard in sharded.data.addressable_shards} == {(-(-9 // parts),)}
    assert len(sharded.data.addressable_shards) == 8
    assert_equal(sharded.gather(), ps)
    assert_equal(jax.jit(lambda v: v.gather())(sharded), ps)
    each = jax.shard_map(
        lambda part: part.gather().data[None],
        mesh=sharded.mesh,
        in_specs=PartitionSpec(axis),
        out_specs=PartitionSpec(("data", "model")),
        check_vma=False,
    )(sharded)
    np.testing.assert_array_equal(each, np.broadcast_to(ps.data, (8, 9)))


def test_gathering_beside_another_mapped_axis():
    """A map over `model` alone leaves `data` to the compiler."""
    ps = vector(9)
    sharded = fl.shard(ps, mesh_of_two_axes())
    mapped = jax.shard_map(
        lambda v: v.gather().data[None],
        mesh=sharded.mesh,
        in_specs=PartitionSpec(),
        out_specs=PartitionSpec("model"),
        axis_names={"model"},
        check_vma=False,
    )
    np.testing.assert_array_equal(jax.jit(mapped)(sharded), np.broadcast_to(ps.data, (2, 9)))


def test_a_whole_vector_inside_of_a_map_is_whole():
    ps = vector(9)
    sharded = fl.shard(ps, mesh_of(8))
    whole = jax.shard_map(
        lambda v: v.gather().data,
        mesh=sharded.mesh,
        in_specs=PartitionSpec(),
        out_specs=PartitionSpec(),
        check_vma=False,
    )(sharded)
    np.testing.assert_array_equal(whole, ps.data)


def test_gathering_is_one_all_gather():
    sharded = fl.shard(vector(147), mesh_of(8))
    text = optimized(lambda v: jnp.sum(v.gather().rest ** 2), sharded)
    assert list(collectives(text)) == ["all-gather"]
    assert len(collectives(text)["all-gather"]) == 1


def test_the_gradient_of_gathering_is_sharded():
    ps = vector(147)
    sharded = fl.shard(ps, mesh_of(8))

    def loss(v):
        return jnp.sum(jnp.sin(v.gather().data))

    for gradient in (jax.grad(loss)(sharded), jax.jit(jax.grad(loss))(sharded)):
        assert gradient.data.sharding == sharded.data.sharding
        np.testing.assert_allclose(gradient.gather().data, jnp.cos(ps.data), rtol=1e-15)
        assert not np.asarray(gradient.data)[147:].any()


def test_gathering_under_vmap():
    sharded = fl.shard(vector(7), mesh_of(4))
    doubled = jax.jit(jax.vmap(lambda v, a: a * v.gather().data, (None, 0)))(sharded, jnp.arange(3.0))
    np.testing.assert_array_equal(doubled, jnp.arange(3.0)[:, None] * vector(7).data[None])
    ensemble = fl.shard(vector(7, 3), mesh_of(4))
    sums = jax.jit(jax.vmap(lambda v: jnp.sum(v.gather().data)))(ensemble)
    np.testing.assert_allclose(sums, jnp.sum(vector(7, 3).data, axis=1), rtol=1e-14)


@pytest.mark.parametrize("length", [7, 8])
@pytest.mark.parametrize("parts", [1, 8])
@pytest.mark.parametrize("where", ["default", "replicated", "on the last device"])
def test_the_callers_array_survives_donation(length, parts, where):
    ps, mesh = vector(length), mesh_of(parts)
    if where == "replicated":
        ps = jax.device_put(ps, NamedSharding(mesh, PartitionSpec()))
    elif where == "on the last device":
        ps = jax.device_put(ps, jax.devices()[-1])
    before = np.array(ps.data)
    sharded = fl.shard(ps, mesh)
    doubled = jax.jit(lambda v: jax.tree.map(lambda x: 2 * x, v), donate_argnums=0)(sharded)
    assert sharded.data.is_deleted()
    np.testing.assert_array_equal(ps.data, before)
    np.testing.assert_array_equal(doubled.gather().data, 2 * before)


def test_numpys_numbers_are_taken():
    ps = jax.device_get(vector(7))
    assert isinstance(ps.data, np.ndarray)
    assert_equal(fl.shard(ps, mesh_of(4)).gather(), vector(7))


def test_inside_of_jit():
    ps, mesh = vector(7), mesh_of(4)
    sharded = jax.jit(lambda v: fl.shard(2 * v, mesh))(ps)
    assert sharded.data.sharding.spec == PartitionSpec("data")
    assert_equal(sharded.gather(), 2 * ps)
    types = jax.eval_shape(lambda v: fl.shard(v, mesh), ps)
    assert jax.tree.structure(types) == jax.tree.structure(sharded)


def test_in_the_context_of_a_mesh():
    mesh, ps = mesh_of(4), vector(7)
    with jax.set_mesh(mesh):
        sharded = fl.shard(ps, mesh)
        assert_equal(sharded.gather(), ps)
        assert_equal(jax.jit(lambda v: v.gather())(sharded), ps)
    explicit = mesh_of(4, AxisType.Explicit)
    with jax.set_mesh(explicit), pytest.raises(ValueError, match="shard: expected axes of type Auto in the"):
        fl.shard(ps, explicit)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (
            lambda ps, mesh: fl.shard({"a": 1.0}, mesh),
            TypeError,
            "a ComponentVector, found {a: 1.0}",
        ),
        (lambda ps, mesh: fl.shard(ps.data, mesh), TypeError, r"found float64\[7\]"),
        (lambda ps, mesh: fl.shard(fl.shard(ps, mesh), mesh), TypeError, r"found a ShardedVector; `.gather"),
        (lambda ps, mesh: fl.shard(jax.eval_shape(lambda v: v, ps), mesh), TypeError, "expected a Component"),
        (lambda ps, mesh: fl.shard(ps, jax.devices()), TypeError, "shard: expected a mesh, such as"),
        (
            lambda ps, mesh: fl.shard(ps, mesh, "batch"),
            ValueError,
            "axis of the mesh, data, found 'batch'",
        ),
    ],
)
def test_what_is_refused(call, error, text):
    with pytest.raises(error, match=text):
        call(vector(7), mesh_of(4))


# Optimisers


def shapes_and_specs(state, padded):
    """The moments, which are of the padded length, and all others."""
    leaves = jax.tree.leaves(state)
    moments = [x for x in leaves if x.shape[-1:] == (padded,)]
    return moments, [x for x in leaves if x.shape[-1:] != (padded,)]


OPTIMIZERS = {
    "adam": (optax.adam(1e-3), 2),
    "adamw": (optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)), 2),
    "lion": (optax.lion(1e-3), 1),
    "lbfgs": (optax.lbfgs(), 5),
    "adafactor": (optax.adafactor(1e-3), 1),
    "schedule": (optax.adamw(optax.cosine_decay_schedule(1e-2, 10)), 2),
    "injected": (optax.inject_hyperparams(optax.sgd)(learning_rate=0.1, momentum=0.9), 1),
    "noise": (optax.chain(optax.add_noise(0.1, 0.5, jax.random.key(0)), optax.sgd(0.1)), 0),
    "masked": (optax.chain(optax.masked(optax.trace(0.9), False), optax.sgd(0.1, momentum=0.9)), 1),
    "empty": (optax.sgd(0.1), 0),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_moments_lie_where_the_parameters_are(name):
    optimizer, expected = OPTIMIZERS[name]
    ps = vector(147)
    sharded = fl.shard(ps, mesh_of(8))
    with jax.numpy_dtype_promotion("standard"):
        state = fl.optimizer_state(optimizer, sharded)
        plain = optimizer.init(ps)
    moments, others = shapes_and_specs(state, 152)
    assert len(moments) == expected
    for x in moments:
        assert x.sharding.spec == PartitionSpec(*[None] * (x.ndim - 1), "data")
        assert {shard.data.shape[-1] for shard in x.addressable_shards} == {19}
    assert all(x.is_fully_replicated and len(x.sharding.device_set) == 8 for x in others)
    # The same state as without devices.
    assert len(jax.tree.leaves(state)) == len(jax.tree.leaves(plain))
    for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(plain), strict=True):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        x = np.asarray(x)
        np.testing.assert_array_equal(x[..., : y.shape[-1]] if y.ndim else x, y)


def test_of_a_whole_vector_it_is_the_optimisers_own():
    ps = vector(7)
    state = fl.optimizer_state(optax.adam(0.1), ps)
    assert jax.tree.structure(state) == jax.tree.structure(optax.adam(0.1).init(ps))


def test_a_shard_has_no_leaves():
    sharded = fl.shard(vector(7), mesh_of(4))
    for optimizer in (optax.contrib.muon(0.1), optax.lamb(0.1)):
        with pytest.raises(TypeError, match="per_leaf: a shard has no leaves"):
            fl.optimizer_state(fl.per_leaf(optimizer), sharded)
    state = fl.per_leaf(optax.sgd(0.1)).init(vector(7))
    with pytest.raises(TypeError, match="per_leaf: a shard has no leaves"):
        fl.per_leaf(optax.sgd(0.1)).update(sharded, state, sharded)


@functools.cache
def quadratic_run(name, parts):
    """Ten steps towards one vector, whole for no parts."""
    optimizer = optax.with_extra_args_support(OPTIMIZERS[name][0])
    goal = vector(147)
    ps = fl.ComponentVector(jnp.zeros(147), goal.layout)
    ps = fl.shard(ps, mesh_of(parts)) if parts else ps

    def loss(v):
        return jnp.sum((1 + jnp.arange(147) / 50) * (getattr(v, "gather", lambda: v)().data - goal.data) ** 2)

    @jax.jit
    def step(ps, state):
        value, gradient = jax.value_and_grad(loss)(ps)
        extra = {"value": value, "grad": gradient, "value_fn": loss}
        updates, state = optimizer.update(gradient, state, ps, **extra)
        return optax.apply_updates(ps, updates), state

    with jax.numpy_dtype_promotion("standard"):
        state = fl.optimizer_state(optimizer, ps)
        for _ in range(10):
            ps, state = step(ps, state)
    return (ps.gather() if parts else ps).data, state


@pytest.mark.long
@pytest.mark.parametrize("name", ["adam", "adamw", "lion", "lbfgs", "schedule", "injected"])
def test_ten_steps_are_those_of_one_device(name):
    (whole, _), (sharded, state) = quadratic_run(name, 0), quadratic_run(name, 8)
    np.testing.assert_allclose(sharded, whole, rtol=1e-10, atol=1e-12)
    for x in shapes_and_specs(state, 152)[0]:
        assert x.sharding.spec[-1:] == ("data",)
        assert not np.asarray(x)[..., 147:].any()
