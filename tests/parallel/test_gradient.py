import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import flatlayers as fl
from flatlayers.core.data_axis import current_data_axis
from flatlayers.parallel.gradient import batch_specs
from tests.helpers import assert_close, assert_same, compiled_by_default

from .gradients import X, value_and_gradient
from .hlo import collectives, collectives_in_loops
from .meshes import mesh_of, mesh_of_two_axes


Y = np.sin(X[:, :2])
# Of any row some numbers are missing.
MASK = (np.random.default_rng(1).uniform(size=(48, 2)) < 0.7).astype(float)


def mean_loss(model):
    def loss(ps, st, batch):
        x, y, _ = batch
        out, st = model(x, ps, st)
        return jnp.mean((out - y) ** 2), st

    return loss


def masked_loss(model, axis):
    """A ratio of sums, over all devices if there are several."""
    total = functools.partial(jax.lax.psum, axis_name=axis) if axis else lambda x: x

    def loss(ps, st, batch):
        x, y, mask = batch
        out, st = model(x, ps, st)
        return total(jnp.sum(mask * (out - y) ** 2)) / total(jnp.sum(mask)), st

    return loss


def mlp():
    return fl.Chain(fl.Dense(3, 16, jnp.tanh), fl.Dense(16, 2))


def with_norm(axis_name):
    return fl.Chain(fl.Dense(3, 16, jnp.tanh), fl.BatchNorm(16, axis_name=axis_name), fl.Dense(16, 2))


OPTIMIZER = optax.chain(optax.clip_by_global_norm(0.05), optax.adamw(1e-2))


@jax.numpy_dtype_promotion("standard")  # as optax needs it
def one_device(loss, ps, st, steps=50):
    @jax.jit
    def step(ps, st, state):
        (value, st), gradient = jax.value_and_grad(loss, has_aux=True)(ps, st, (X, Y, MASK))
        updates, state = OPTIMIZER.update(gradient, state, ps)
        return value, optax.apply_updates(ps, updates), st, state

    values, state = [], OPTIMIZER.init(ps)
    for _ in range(steps):
        value, ps, st, state = step(ps, st, state)
        values.append(value)
    return np.array(values), ps, st


@jax.numpy_dtype_promotion("standard")
def many_devices(loss, ps, st, mesh, steps=50):
    value_and_grad = fl.sharded_value_and_grad(loss, mesh)

    @functools.partial(jax.jit, donate_argnums=(0, 2))
    def step(ps, st, state, batch):
        (value, st), gradient = value_and_grad(ps, st, batch)
        updates, state = OPTIMIZER.update(gradient, state, ps)
        return value, optax.apply_updates(ps, updates), st, state

    ps = fl.shard(ps, mesh)
    state = fl.optimizer_state(OPTIMIZER, ps)
    batch = jax.device_put((X, Y, MASK), NamedSharding(ps.mesh, PartitionSpec("data")))
    values = []
    for _ in range(steps):
        value, ps, st, state = step(ps, st, state, batch)
        # Before the next step: devices of the host share threads, and steps that wait could take them all.
        values.append(float(value))
    return np.array(values), ps.gather(), st


CASES = {
    "mlp": (mean_loss(mlp()), mean_loss(mlp()), mlp()),
    "batch norm": (mean_loss(with_norm(None)), mean_loss(with_norm("data")), with_norm(None)),
    "masked mean": (masked_loss(mlp(), None), masked_loss(mlp(), "data"), mlp()),
}


@pytest.mark.long
@pytest.mark.parametrize("devices", [1, 3, 8])
@pytest.mark.parametrize("name", CASES)
def test_fifty_steps_are_those_of_one_device(name, devices):
    alone, together, model = CASES[name]
    ps, st = fl.setup(jax.random.key(0), model, jnp.float64)
    values, last, state = one_device(alone, ps, st)
    found, found_last, found_state = many_devices(together, ps, st, mesh_of(devices))
    assert values[-1] < 0.8 * values[0]
    np.testing.assert_allclose(found, values, rtol=1e-12)
    np.testing.assert_allclose(found_last.data, last.data, rtol=1e-10, atol=1e-12)
    assert_close(found_state, state, rtol=1e-12)
    # The last axis does not divide by all numbers of devices, and the caller's vector is still there.
    assert not ps.data.is_deleted()


@pytest.mark.long
@pytest.mark.parametrize(
    ("mesh", "jit"),
    [
        (mesh_of(8), True),
        (mesh_of(8, AxisType.Explicit), True),
        (mesh_of_two_axes(), True),
        (mesh_of_two_axes(AxisType.Explicit), True),
        (mesh_of(8), False),
    ],
)
def test_the_gradient_is_that_of_one_device(mesh, jit):
    ps, st = fl.setup(jax.random.key(0), mlp(), jnp.float64)
    loss = mean_loss(mlp())
    (value, _), gradient = jax.value_and_grad(loss, has_aux=True)(ps, st, (X, Y, MASK))
    (found, _), sharded = value_and_gradient(mesh, loss, ps, st, (X, Y, MASK), jit)
    assert isinstance(sharded, fl.ShardedVector)
    np.testing.assert_allclose(found, value, rtol=1e-14)
    np.testing.assert_allclose(sharded.gather().data, gradient.data, rtol=1e-12, atol=1e-15)


def test_a_batch_on_an_explicit_mesh():
    mesh = mesh_of(8, AxisType.Explicit)
    ps, st = fl.setup(jax.random.key(0), mlp(), jnp.float64)
    loss = mean_loss(mlp())
    batch = jax.device_put((X, Y, MASK), NamedSharding(mesh, PartitionSpec("data")))
    (found, _), _ = value_and_gradient(mesh, loss, ps, st, batch)
    np.testing.assert_allclose(found, loss(ps, st, (X, Y, MASK))[0], rtol=1e-14)
    with jax.set_mesh(mesh), pytest.raises(ValueError, match="expected axes of type Auto in the mesh of"):
        value_and_gradient(mesh, loss, ps, st, batch)


def test_leading_axes():
    """The mean loss of three models, whose vectors are one."""
    ps, st = fl.setup(jax.random.key(0), mlp(), jnp.float64)
    many = fl.ComponentVector(jnp.stack([ps.data, 2 * ps.data, -ps.data]), ps.layout)

    def loss(ps, st, batch):
        return jnp.mean(jax.vmap(lambda p: mean_loss(mlp())(p, st, batch)[0])(ps)), st

    gradient = jax.grad(lambda p: loss(p, st, (X, Y, MASK))[0])(many)
    found = value_and_gradient(mesh_of(8), loss, many, st, (X, Y, MASK))[1]
    np.testing.assert_allclose(found.gather().data, gradient.data, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "complex128"])
def test_dtypes_stay(dtype):
    ps = fl.ComponentVector(jnp.arange(1, 8).astype(dtype), fl.Layout({"w": (7,)}))

    def loss(ps, st, x):
        return jnp.mean(x) * jnp.sum(jnp.real(ps.w * jnp.conj(ps.w))), st

    batch = jnp.arange(16.0).astype(ps.data.real.dtype)
    (value, st), gradient = value_and_gradient(mesh_of(8), loss, ps, fl.Record(n=jnp.int32(3)), batch)
    assert value.dtype == ps.data.real.dtype
    assert gradient.dtype == ps.dtype
    assert_same(st, fl.Record(n=jnp.int32(3)))
    np.testing.assert_allclose(np.asarray(gradient.gather().data), 15 * np.conj(ps.data), rtol=1e-2)


def test_single_numbers_of_a_batch_are_for_all():
    ps = fl.ComponentVector.of({"w": 2.0})

    def loss(ps, st, batch):
        assert batch["x"].shape == (2,)
        return batch["scale"] * ps.w * jnp.mean(batch["x"]), st

    batch = {"x": np.arange(16.0), "scale": 3.0}
    (value, _), gradient = value_and_gradient(mesh_of(8), loss, ps, None, batch)
    np.testing.assert_allclose([value, gradient.gather().w], [45.0, 22.5])


def test_layers_know_the_axis_while_the_loss_is_traced():
    seen = []

    def loss(ps, st, x):
        seen.append(current_data_axis())
        return ps.w * jnp.mean(x), st

    ps = fl.ComponentVector.of({"w": 1.0})
    value_and_gradient(mesh_of(8), loss, ps, None, jnp.ones(8))
    assert seen == ["data"]
    assert current_data_axis() is None


# Programs


def one_step(loss, mesh):
    value_and_grad = fl.sharded_value_and_grad(loss, mesh)

    def step(ps, st, state, batch):
        (value, st), gradient = value_and_grad(ps, st, batch)
        updates, state = OPTIMIZER.update(gradient, state, ps)
        return value, optax.apply_updates(ps, updates), st, state

    return jax.jit(step, donate_argnums=(0, 2))


def compiled_step(loss, model, batch, mesh, dtype=jnp.float32):
    with jax.numpy_dtype_promotion("standard"):
        ps, st = fl.setup(jax.random.key(0), model, dtype)
        sharded = fl.shard(ps, mesh)
        state = fl.optimizer_state(OPTIMIZER, sharded)
        batch = jax.device_put(batch, NamedSharding(sharded.mesh, PartitionSpec("data")))
        return compiled_by_default(one_step(loss, mesh).lower(sharded, st, state, batch)), ps.layout.length


@pytest.mark.long
@pytest.mark.parametrize("leaves", [2, 200])
def test_a_step_has_one_collective_each_way_whatever_the_number_of_leaves(leaves):
    model = {f"p{i}": fl.Param((3,), fl.initializers.ones) for i in range(leaves)}

    def loss(ps, st, x):
        return jnp.mean(jnp.tanh(x @ jnp.stack(jax.tree.leaves(ps.to_dict())).T)), st

    compiled, length = compiled_step(loss, model, X.astype(np.float32), mesh_of(8))
    found = collectives(compiled.as_text())
    part = -(-length // 8)
    assert found["all-gather"] == [8 * part * 4]
    assert found["reduce-scatter"] == [part * 4]
    assert set(found) <= {"all-gather", "reduce-scatter", "all-reduce"}
    (scalars,) = found["all-reduce"]
    assert scalars <= 64


def test_each_device_has_its_part_of_the_arguments():
    """Parameters and two moments are cut, and so is the batch; a count and no more is on each device."""
    model = mlp()
    batch = tuple(x.astype(np.float32) for x in (X, Y, MASK))
    compiled, length = compiled_step(mean_loss(model), model, batch, mesh_of(8))
    size = compiled.memory_analysis().argument_size_in_bytes
    assert size <= 3 * -(-length // 8) * 4 + sum(x.nbytes for x in batch) // 8 + 64


@pytest.mark.long
def test_no_device_waits_for_another_inside_of_a_solve():
    model = fl.NeuralODE(fl.Chain(fl.Dense(3, 8, jnp.tanh), fl.Dense(8, 3)), t1=1.0)

    def loss(ps, st, x):
        y, st = model(x, ps, st)
        return jnp.mean(y**2), st

    compiled, _ = compiled_step(loss, model, X, mesh_of(8), jnp.float64)
    text = compiled.as_text()
    assert "while(" in text
    assert collectives_in_loops(text) == {}
    found = collectives(text)
    assert len(found.pop("all-gather")) == len(found.pop("reduce-scatter")) == 1
    # Numbers of steps, which are states, are integers: they take one of their own.
    assert len(found["all-reduce"]) <= 2
    assert sum(found.pop("all-reduce")) <= 64
    assert not found


def test_collectives_in_loops_are_found():
    mesh = mesh_of(8)

    def loop(x):
        return jax.lax.fori_loop(0, 3, lambda i, y: jax.lax.psum(jnp.sin(y), "data"), x)

    mapped = jax.shard_map(
        loop, mesh=mesh, in_specs=PartitionSpec("data"), out_specs=PartitionSpec("data"), check_vma=False
    )
    text = compiled_by_default(jax.jit(mapped).lower(jnp.ones(8))).as_text()
    assert "all-reduce" in collectives_in_loops(text)


def test_types_alone():
    ps, st = fl.setup(jax.random.key(0), mlp(), jnp.float64)
    sharded = fl.shard(ps, mesh_of(8))
    function = fl.sharded_value_and_grad(mean_loss(mlp()), mesh_of(8))
    (value, _), gradient = jax.eval_shape(function, sharded, st, (X, Y, MASK))
    assert (value.shape, gradient.shape) == ((), ps.shape)
    assert jax.tree.structure(gradient) == jax.tree.structure(sharded)


# Errors


def quotient(ps, st, x):
    return ps.w * jnp.mean(x), st


@pytest.mark.parametrize(
    ("loss", "error", "text"),
    [
        (lambda ps, st, x: ps.w, TypeError, r"expected the loss to return \(value, st\) or"),
        (lambda ps, st, x: (x, st), TypeError, r"expected the loss to be one floating number.*float64\[2\]"),
        (lambda ps, st, x: (jnp.int32(1), st), TypeError, r"expected the loss to be .*found int32\[\]"),
        (lambda ps, st, x: (jnp.sum(x.astype(complex)), st), TypeError, r"found complex128\[\]"),
        (lambda ps, st, x: ("one", st), TypeError, "one"),
        (
            lambda ps, st, x: (ps.w, (st, {"count": 3})),
            TypeError,
            "expected the metric 'count' to be one floating",
        ),
        (lambda ps, st, x: (ps.w, (st, {"all": x})), TypeError, r"metric 'all' to be .* found float64\[2\]"),
        (lambda ps, st, x: (ps.w, (st, ps.w)), TypeError, "expected metrics as a mapping of numbers"),
    ],
)
def test_losses_that_are_refused(loss, error, text):
    with pytest.raises(error, match=text):
        value_and_gradient(mesh_of(8), loss, fl.ComponentVector.of({"w": 1.0}), None, jnp.ones(16))


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (lambda ps, x: (ps.gather(), x), TypeError, r"expected a ShardedVector, as `fl.shard\(ps, mesh\)`"),
        (lambda ps, x: (fl.shard(ps.gather(), mesh_of(4)), x), TypeError, "expected a vector in parts along"),
        (
            lambda ps, x: (fl.shard(ps.gather(), mesh_of_two_axes()), x),
            TypeError,
            r"expected a vector in parts along 'data' of .*, found one along 'data' of",
        ),
        (lambda ps, x: (ps, jnp.ones(9)), ValueError, r"samples 8 devices divide, found 9 samples, shape"),
        (
            lambda ps, x: (ps, {"x": x, "y": jnp.ones((8, 2))}),
            ValueError,
            r"the same number of samples in fr",
        ),
        (lambda ps, x: (ps, {"y": jnp.ones((7, 2))}), ValueError, r"found 7 samples at \['y'\]"),
    ],
)
@pytest.mark.parametrize("jit", [True, False])
def test_arguments_that_are_refused(change, error, text, jit):
    function = fl.sharded_value_and_grad(quotient, mesh_of(8))
    ps, x = change(fl.shard(fl.ComponentVector.of({"w": 1.0}), mesh_of(8)), jnp.ones(16))
    with pytest.raises(error, match=text):
        (jax.jit(function) if jit else function)(ps, None, x)


def test_meshes_that_are_refused():
    with pytest.raises(TypeError, match="sharded_value_and_grad: expected a mesh"):
        fl.sharded_value_and_grad(quotient, 8)
    with pytest.raises(ValueError, match="expected an axis of the mesh, data, found 'batch'"):
        fl.sharded_value_and_grad(quotient, mesh_of(8), "batch")


def test_how_a_batch_lies():
    batch = {"x": np.ones((16, 3)), "n": 2}
    assert batch_specs(batch, "data", 8) == {"x": PartitionSpec("data"), "n": PartitionSpec()}
    many = {"x": np.ones((100, 16, 3)), "n": np.ones(100)}
    specs = batch_specs(many, "data", 8, lead=1)
    assert specs == {"x": PartitionSpec(None, "data"), "n": PartitionSpec()}
