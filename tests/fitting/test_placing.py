"""Runs over eight devices against the same runs on one."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

import flatlayers as fl
from tests.fitting.placed import LOSSES, MODELS, OPTIMIZER, SMALL, WHOLE, X, Y, few, train
from tests.helpers import assert_close


pytestmark = pytest.mark.usefixtures("_standard")

# So many in the first parts, so few in the others, that means of means are other means.
MASK = np.arange(64) % 13 < np.arange(64) // 8


def masked(ps, st, batch):
    x, y, mask = batch
    found, st = MODELS["MLP"](x, ps, st)
    return jnp.sum(jnp.where(mask[:, None], (found - y) ** 2, 0.0)) / jnp.sum(mask), st


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


@pytest.mark.long
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


@pytest.mark.long
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


@pytest.mark.long
def test_lbfgs(key, mesh):
    ps, st = fl.setup(key, MODELS["MLP"], float)
    optimizer = optax.lbfgs()
    expected = train(LOSSES["MLP"], ps, st, optimizer=optimizer, steps=10)
    for per_device in (False, True):
        found = train(LOSSES["MLP"], ps, st, optimizer=optimizer, steps=10, mesh=mesh, per_device=per_device)
        np.testing.assert_allclose(found.losses, expected.losses, rtol=1e-9)


@pytest.mark.long
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


@pytest.mark.long
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


@pytest.mark.long
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


@pytest.mark.long
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
