"""Runs over eight devices against the same runs on one."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

import flatlayers as fl
from flatlayers.fitting.data import OneBatch, source_of
from flatlayers.fitting.placing import OnMesh, placing_of
from flatlayers.fitting.steps import Carry, Steps, compiled_steps
from flatlayers.vectors.record import as_record
from tests.helpers import assert_close, compiled_by_default, count_primitives
from tests.parallel.hlo import collectives


RNG = np.random.default_rng(0)
X = RNG.normal(size=(64, 3))
Y = np.sin(X[:, :1]) + X[:, 1:2] * X[:, 2:]
# So many in the first parts, so few in the others, that means of means are other means.
MASK = np.arange(64) % 13 < np.arange(64) // 8

AUTO = Mesh(np.array(jax.devices()), ("data",), axis_types=(AxisType.Auto,))


@pytest.fixture
def mesh():
    return jax.make_mesh((8,), ("data",))


@pytest.fixture(autouse=True)
def _standard():
    """Optimisers mix floats and integers."""
    with jax.numpy_dtype_promotion("standard"):
        yield


SMALL = fl.MLP(3, (5,), 1, jnp.tanh)
MODELS = {
    "small": SMALL,
    "MLP": fl.MLP(3, (16, 16), 1, jnp.tanh),
    "BatchNorm": fl.Chain(fl.Dense(3, 16, use_bias=False), fl.BatchNorm(16), fl.Dense(16, 1, jnp.tanh)),
    "Dropout": fl.Chain(fl.Dense(3, 16, jnp.tanh), fl.Dropout(0.3), fl.Dense(16, 1)),
    "BatchNorm over the axis": fl.Chain(
        fl.Dense(3, 16, use_bias=False), fl.BatchNorm(16, axis_name="data"), fl.Dense(16, 1, jnp.tanh)
    ),
}


def loss_of(model):
    def loss(ps, st, batch):
        x, y = batch
        found, st = model(x, ps, st)
        return jnp.mean((found - y) ** 2), (st, {"largest": jnp.abs(found).mean()})

    return loss


def masked(ps, st, batch):
    x, y, mask = batch
    found, st = MODELS["MLP"](x, ps, st)
    return jnp.sum(jnp.where(mask[:, None], (found - y) ** 2, 0.0)) / jnp.sum(mask), st


LOSSES = {name: loss_of(model) for name, model in MODELS.items()}
OPTIMIZER = optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(1e-2, weight_decay=1e-3))
WHOLE = (X, Y)


def few(names, *fast):
    """All names, those that are not among the fast ones marked slow."""
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in names]


def train(loss, ps, st, data=WHOLE, optimizer=OPTIMIZER, steps=50, **options):
    return fl.train_loop(
        loss, ps, st, optimizer, data, steps=steps, **{"chunk": 20, "progress": False, **options}
    )


def assert_same_run(found, expected, bound=1e-12):
    np.testing.assert_allclose(found.losses, expected.losses, rtol=bound)
    assert_close(numbers(found.st), numbers(expected.st), rtol=1e-9)
    np.testing.assert_allclose(whole(found.ps), whole(expected.ps), rtol=0, atol=1e-10)
    for name in expected.metrics:
        np.testing.assert_allclose(found.metrics[name], expected.metrics[name], rtol=bound)


def numbers(tree):
    return [
        jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        for x in jax.tree.leaves(tree)
    ]


def whole(ps):
    return np.asarray((ps.gather() if isinstance(ps, fl.ShardedVector) else ps).data)


@pytest.mark.parametrize("name", ["MLP", "BatchNorm", "Dropout"])
def test_the_global_view_is_one_device(key, mesh, name):
    ps, st = fl.setup(key, MODELS[name], float)
    assert ps.layout.length % 8
    expected = train(LOSSES[name], ps, st)
    found = train(LOSSES[name], ps, st, mesh=mesh)
    assert_same_run(found, expected)
    assert isinstance(found.ps, fl.ComponentVector)
    assert jax.tree.structure(found.opt_state) == jax.tree.structure(expected.opt_state)
    assert_close(found.opt_state, expected.opt_state, rtol=1e-6)


def test_a_masked_mean_in_the_global_view(key, mesh):
    ps, st = fl.setup(key, MODELS["MLP"], float)
    data = (X, Y, MASK)
    assert_same_run(train(masked, ps, st, data, mesh=mesh), train(masked, ps, st, data))


@pytest.mark.parametrize("name", ["MLP", "BatchNorm over the axis"])
def test_each_device_its_part(key, mesh, name):
    ps, st = fl.setup(key, MODELS[name], float)
    alone = LOSSES["BatchNorm" if name != "MLP" else "MLP"]
    expected = train(alone, ps, st)
    found = train(LOSSES[name], ps, st, mesh=mesh, per_device=True)
    assert_same_run(found, expected)


def test_lbfgs(key, mesh):
    ps, st = fl.setup(key, MODELS["MLP"], float)
    optimizer = optax.lbfgs()
    expected = train(LOSSES["MLP"], ps, st, optimizer=optimizer, steps=10)
    for per_device in (False, True):
        found = train(LOSSES["MLP"], ps, st, optimizer=optimizer, steps=10, mesh=mesh, per_device=per_device)
        np.testing.assert_allclose(found.losses, expected.losses, rtol=1e-9)


def test_kinds_and_what_was_given_survives(key, mesh):
    ps, st = fl.setup(key, MODELS["Dropout"], float)
    before = np.asarray(ps.data).copy()
    seen = []

    def callback(step, loss, ps, st, metrics):
        seen.append(ps)

    given = train(LOSSES["Dropout"], ps, st, mesh=mesh, callback=callback, steps=40)
    shards = fl.shard(ps, mesh)
    found = train(LOSSES["Dropout"], shards, st, mesh=mesh, callback=callback, steps=40)
    assert [type(ps) for ps in seen] == [fl.ComponentVector] * 2 + [fl.ShardedVector] * 2
    assert isinstance(found.ps, fl.ShardedVector)
    assert isinstance(found.opt_state[1][0].mu, fl.ShardedVector)
    assert isinstance(given.opt_state[1][0].mu, fl.ComponentVector)
    assert found.ps.data.sharding.shard_shape(found.ps.data.shape) == (found.ps.data.shape[0] // 8,)
    np.testing.assert_array_equal(whole(found.ps), whole(given.ps))
    np.testing.assert_array_equal(np.asarray(ps.data), before)
    np.testing.assert_array_equal(whole(shards), before)
    # It goes on, in each kind and from each kind.
    expected = train(LOSSES["Dropout"], ps, st, mesh=mesh, steps=80)
    for first, with_mesh in [(given, {"mesh": mesh}), (found, {"mesh": mesh}), (given, {})]:
        on = train(
            LOSSES["Dropout"], first.ps, first.st, opt_state=first.opt_state, start=40, steps=40, **with_mesh
        )
        np.testing.assert_allclose(on.losses, expected.losses[40:], rtol=1e-12)


@pytest.mark.slow
def test_large_vectors_are_trained_in_place(key, mesh, monkeypatch):
    monkeypatch.setattr("flatlayers.fitting.run._SMALL_BYTES", 0)
    ps, st = fl.setup(key, MODELS["BatchNorm"], float)
    seen = []

    def callback(step, loss, ps, st, metrics):
        seen.append((ps, st))

    expected = train(LOSSES["BatchNorm"], ps, st)
    shards = fl.shard(ps, mesh)
    opt_state = fl.optimizer_state(OPTIMIZER, shards)
    for given in (ps, shards):
        found = train(LOSSES["BatchNorm"], given, st, mesh=mesh, callback=callback, opt_state=opt_state)
        assert_same_run(found, expected)
    for tree in (ps, shards, st, opt_state, *seen):
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(tree))


# Files, validation, going on


@pytest.mark.slow
@pytest.mark.parametrize("per_device", [False, True])
def test_a_file_does_not_depend_on_devices(key, mesh, tmp_path, per_device):
    name = "BatchNorm over the axis" if per_device else "BatchNorm"
    ps, st = fl.setup(key, MODELS[name], float)
    few = Mesh(np.array(jax.devices()[:4]), ("data",))
    validate = (LOSSES[name], WHOLE, 8)

    def run(ps, steps, **options):
        batches = fl.batches(WHOLE, 16, key=jax.random.key(1))
        return train(LOSSES[name], ps, st, batches, steps=steps, validate=validate, **options)

    def save(path, ps, **options):
        result = run(ps, 20, save=path, save_every=10, **options)
        like = fl.initial_parameters(key, MODELS[name], float)
        again = fl.load(path, ps=like, opt_state=jax.eval_shape(OPTIMIZER.init, like))
        assert isinstance(again["ps"], fl.ComponentVector)
        np.testing.assert_array_equal(again["ps"].data, whole(result.ps))
        np.testing.assert_array_equal(again["best"]["ps"].data, whole(result.best.ps))
        return result

    options = {"per_device": per_device}
    alone = "BatchNorm" if per_device else name
    expected = train(
        LOSSES[alone],
        *(ps, st, fl.batches(WHOLE, 16, key=jax.random.key(1))),
        steps=40,
        validate=(LOSSES[alone], WHOLE, 8),
    )
    first = save(tmp_path / "many", ps, mesh=mesh, **options)
    assert isinstance(first.best.ps, fl.ComponentVector)
    sharded = save(tmp_path / "parts", fl.shard(ps, mesh), mesh=mesh, **options)
    assert isinstance(sharded.best.ps, fl.ShardedVector)
    resumed = [
        run(ps, 40, resume=tmp_path / "many", mesh=mesh, **options),
        run(ps, 40, resume=tmp_path / "many", mesh=few, **options),
        run(fl.shard(ps, few), 40, resume=tmp_path / "parts", mesh=few, **options),
    ]
    if not per_device:
        run(ps, 20, save=tmp_path / "one")
        resumed += [
            run(ps, 40, resume=tmp_path / "many"),
            run(fl.shard(ps, mesh), 40, resume=tmp_path / "one", mesh=mesh),
        ]
    for found in resumed:
        np.testing.assert_allclose(found.losses, expected.losses, rtol=1e-12)
        np.testing.assert_allclose(found.validation.values, expected.validation.values, rtol=1e-12)
        assert found.best.step == expected.best.step
        np.testing.assert_allclose(whole(found.best.ps), whole(expected.best.ps), atol=1e-10)
        np.testing.assert_allclose(whole(found.ps), whole(expected.ps), atol=1e-10)


@pytest.mark.slow
def test_validation_data_that_do_not_divide_and_patience(key, mesh):
    ps, st = fl.setup(key, MODELS["BatchNorm"], float)
    for data in [(X[:13], Y[:13]), [(X[:8], Y[:8]), (X[8:13], Y[8:13])], fl.batches(WHOLE, 2, shuffle=False)]:
        options = {"validate": (LOSSES["BatchNorm"], data, 5), "patience": 2, "steps": 60}
        # A rate at which validations get worse soon.
        optimizer = optax.sgd(0.3)
        expected = train(LOSSES["BatchNorm"], ps, st, optimizer=optimizer, **options)
        found = train(LOSSES["BatchNorm"], ps, st, optimizer=optimizer, mesh=mesh, **options)
        np.testing.assert_allclose(found.validation.values, expected.validation.values, rtol=1e-10)
        assert (found.step, found.stopped) == (expected.step, expected.stopped)
    with pytest.raises(
        ValueError, match="train_loop: expected a batch whose number of samples 8 devices div"
    ):
        train(
            *(LOSSES["MLP"], *fl.setup(key, MODELS["MLP"], float)),
            mesh=mesh,
            per_device=True,
            validate=(LOSSES["MLP"], (X[:13], Y[:13]), 5),
        )


def test_losses_that_are_not_finite(mesh):
    def falling(ps, st, batch):
        return jnp.where(ps.a[0] < 0, jnp.nan, ps.a[0]) + batch.mean(), {"count": st.count + 1}

    ps, st = fl.ComponentVector.of({"a": [3.5]}), fl.Record(count=0)
    for given, kind in [(ps, fl.ComponentVector), (fl.shard(ps, mesh), fl.ShardedVector)]:
        with pytest.raises(fl.NonFiniteLossError, match="found nan in step 4") as info:
            train(falling, given, st, np.zeros(8), optax.sgd(1.0), steps=10, mesh=mesh)
        assert isinstance(info.value.ps, kind)
        assert_close(whole(info.value.ps), [0.5])

    def broken(step, *_):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no") as info:
        train(falling, ps, st, np.zeros(8), optax.sgd(0.0), steps=10, mesh=mesh, callback=broken)
    assert isinstance(info.value.result.ps, fl.ComponentVector)


def test_a_state_that_changes_its_type_in_the_first_step(key, mesh):
    def counting(ps, st, batch):
        return jnp.sum(ps.a**2) + batch.mean(), {"count": st.count + 1.0}

    ps, st = fl.ComponentVector.of({"a": [3.5, 1.0]}), fl.Record(count=0)
    found = train(counting, ps, st, np.zeros(8), optax.adam(0.1), steps=5, mesh=mesh)
    expected = train(counting, ps, st, np.zeros(8), optax.adam(0.1), steps=5)
    assert_same_run(found, expected)


# Optimisers, trees and ensembles


RATES = fl.initial_parameters(jax.random.key(0), SMALL, float).layout.values(
    {"*.weight": 1e-2, "*.bias": 1e-3}, dtype=float
)
OPTIMIZERS = {
    "per leaf": fl.per_leaf(optax.lamb(1e-2)),
    "factored": fl.per_leaf(optax.adafactor(1e-2, min_dim_size_to_factor=2)),
    "one link per leaf": optax.chain(
        optax.scale_by_adam(), fl.per_leaf(optax.clip_by_block_rms(0.1)), optax.scale(-0.01)
    ),
    "by name": optax.adamw(optax.constant_schedule(RATES), weight_decay=RATES),
    "several steps": optax.MultiSteps(optax.adam(1e-2), 2),
}


@pytest.mark.parametrize("name", few(OPTIMIZERS, "per leaf", "by name"))
@pytest.mark.parametrize("per_device", [False, True])
def test_optimisers_that_see_the_leaves_and_arrays_by_name(key, mesh, name, per_device):
    ps, st = fl.setup(key, SMALL, float)
    options = {"optimizer": OPTIMIZERS[name], "steps": 10}
    expected = train(LOSSES["small"], ps, st, **options)
    found = train(LOSSES["small"], ps, st, mesh=mesh, per_device=per_device, **options)
    np.testing.assert_allclose(found.losses, expected.losses, rtol=1e-10)
    assert jax.tree.structure(found.opt_state) == jax.tree.structure(expected.opt_state)


@pytest.mark.slow
def test_other_trees_of_parameters(key, mesh):
    ps, st = fl.setup(key, MODELS["MLP"], float)

    def of_tree(tree, st, batch):
        (value, st) = LOSSES["MLP"](tree["net"], st, (batch[0], batch[1] - tree["offset"]))
        return value, st

    for net in (ps, ps.to_dict()):
        tree = {"net": net, "offset": np.zeros((1, 1))}
        expected = train(of_tree, tree, st, steps=10)
        found = train(of_tree, tree, st, steps=10, mesh=mesh)
        np.testing.assert_allclose(found.losses, expected.losses, rtol=1e-12)
        assert jax.tree.structure(found.ps) == jax.tree.structure(expected.ps)
        with pytest.raises(
            TypeError, match="train_loop: expected ps to be a ComponentVector or a ShardedVec"
        ):
            train(of_tree, tree, st, steps=10, mesh=mesh, per_device=True)


@pytest.mark.parametrize("per_device", [False, True])
def test_ensembles(key, mesh, per_device):
    members = [fl.setup(k, MODELS["MLP"], float) for k in jax.random.split(key, 3)]
    ps = fl.ComponentVector(jnp.stack([ps.data for ps, _ in members]), members[0][0].layout)

    def together(ps, st, batch):
        def one(ps):
            return jnp.mean((MODELS["MLP"](batch[0], ps, members[0][1])[0] - batch[1]) ** 2)

        return jnp.sum(jax.vmap(one)(ps)), st

    expected = train(together, ps, {}, optimizer=optax.adam(1e-2))
    for given in (ps, fl.shard(ps, mesh)):
        found = train(together, given, {}, optimizer=optax.adam(1e-2), mesh=mesh, per_device=per_device)
        assert_same_run(found, expected)
        assert found.ps.shape == ps.shape


# Data


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


@pytest.mark.slow
def test_other_axes_and_other_meshes(key):
    ps, st = fl.setup(key, MODELS["MLP"], float)
    expected = train(LOSSES["MLP"], ps, st, steps=10)
    two = jax.make_mesh((4, 2), ("rows", "model"))
    one = jax.make_mesh((1,), ("rows",), devices=jax.devices()[:1])
    for mesh in (two, one):
        for per_device in (False, True):
            found = train(LOSSES["MLP"], ps, st, steps=10, mesh=mesh, axis="rows", per_device=per_device)
            np.testing.assert_allclose(found.losses, expected.losses, rtol=1e-12)


# Errors


def test_what_does_not_go_together(key, mesh):
    ps, st = fl.setup(key, MODELS["MLP"], float)
    shards = fl.shard(ps, mesh)
    few = jax.make_mesh((4,), ("data",), devices=jax.devices()[:4])
    short = (X[:13], Y[:13])
    for error, message, given, options in [
        (
            ValueError,
            "expected an axis of the mesh, data, found 'batch'",
            ps,
            {"mesh": mesh, "axis": "batch"},
        ),
        (TypeError, "expected a mesh, such as", ps, {"mesh": 8}),
        (ValueError, "expected a mesh with per_device=True, found none", ps, {"per_device": True}),
        (ValueError, "expected mesh= with the ShardedVector", shards, {}),
        (TypeError, "expected vectors in parts along 'data' of Mesh", shards, {"mesh": few}),
        (ValueError, r"8 devices divide, found 13 samples at \[0\]", ps, {"mesh": mesh, "data": short}),
        (ValueError, r"8 devices divide, found 13 samples at \[0\]", ps, {"mesh": mesh, "data": [short]}),
        (
            ValueError,
            "expected batches of a size that 8 devices divide, found 12",
            ps,
            {"mesh": mesh, "data": fl.batches(WHOLE, 12, key=key)},
        ),
        (
            ValueError,
            "expected the opt_state of this opt",
            ps,
            {"mesh": mesh, "opt_state": optax.sgd(1).init(ps)},
        ),
    ]:
        with pytest.raises(error, match=f"train_loop: .*{message}"):
            train(LOSSES["MLP"], given, st, **options)


# Programs


def test_without_a_mesh_the_program_says_nothing_of_devices(key):
    ps, st = fl.setup(key, MODELS["Dropout"], float)
    steps = compiled_steps(LOSSES["Dropout"], OPTIMIZER, OneBatch.pick)
    carry = Carry(ps, as_record(st), OPTIMIZER.init(ps), (ps, as_record(st)))

    def step(carry, batch):
        (value, (st, metrics)), gradient = jax.value_and_grad(LOSSES["Dropout"], has_aux=True)(
            carry.ps, carry.st, batch
        )
        updates, opt_state = OPTIMIZER.update(gradient, carry.opt_state, carry.ps)
        ps, fine = optax.apply_updates(carry.ps, updates), jnp.isfinite(value)
        finite = fine & (jnp.max(jnp.abs(ps.data), initial=0) < jnp.inf)
        before = jax.tree.map(lambda a, b: jax.lax.select(fine, a, b), (carry.ps, carry.st), carry.before)
        failure = jnp.where(fine, jnp.where(finite, 0, 2), 1).astype(jnp.int8)
        return Carry(ps, st, opt_state, before), value, metrics, failure

    found = count_primitives(lambda carry, batch: steps._step(carry, batch), carry, WHOLE)
    expected = count_primitives(lambda carry, batch: jax.jit(step)(carry, batch), carry, WHOLE)
    assert found == expected
    assert not any("shard" in name for name in found)


def program(loss, ps, st, mesh, per_device):
    """The compiled loop over a mesh, and its arguments."""
    placing = placing_of(mesh, "data", per_device, ps)
    ps, st, data = placing.parameters(ps), placing.everywhere(as_record(st)), placing.batch(WHOLE)
    steps = Steps(loss, OPTIMIZER, OneBatch.pick, placing)
    carry = Carry(ps, st, placing.optimizer_state(OPTIMIZER, ps), (ps, st))
    return compiled_by_default(steps.beside.lower(carry, data, 0, 20, 20))


@pytest.mark.parametrize("layers", [1, 40])
def test_the_collectives_of_a_step(key, mesh, layers):
    model = fl.MLP(3, (5,) * layers, 1, jnp.tanh)
    ps, st = fl.setup(key, model, float)
    compiled = program(loss_of(model), ps, st, mesh, True)
    found = collectives(compiled.as_text())
    assert {kind: len(sizes) for kind, sizes in found.items() if kind != "all-reduce"} == {
        "all-gather": 1,
        "reduce-scatter": 1,
    }
    assert sum(found["all-reduce"]) <= 64
    # Parameters, those before them and two moments in parts, the batch in parts, numbers.
    part = -(-ps.size // 8) * 8
    room = 5 * part + 64 * 4 * 8 // 8 + 200
    assert compiled.memory_analysis().argument_size_in_bytes <= room
    compiled = program(loss_of(model), ps, st, mesh, False)
    found = collectives(compiled.as_text())
    assert len(found["all-gather"]) == 1
    assert set(found) <= {"all-gather", "all-reduce", "reduce-scatter"}
    assert compiled.memory_analysis().argument_size_in_bytes <= room
