"""Files of vectors in parts: the same as without devices, and loaded on any number of them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import flatlayers as fl
from tests.helpers import assert_same
from tests.parallel.processes import run_processes


def mesh_of(number):
    return jax.make_mesh((number,), ("data",), (AxisType.Auto,), devices=jax.devices()[:number])


def vector(length=147, *lead, dtype="float64"):
    numbers = np.random.default_rng(length).normal(size=(*lead, length)) * 10
    layout = fl.Layout({"a": (), "s": fl.Layout({"w": (3,)}).stack(2), "rest": (length - 7,)})
    return fl.ComponentVector(jnp.asarray(numbers).astype(dtype), layout)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "complex128"])
@pytest.mark.parametrize("lead", [(), (3,)])
@pytest.mark.parametrize("parts", [1, 3, 8])
def test_the_bytes_are_those_without_devices(parts, lead, dtype, tmp_path):
    ps = vector(147, *lead, dtype=dtype)
    fl.save(tmp_path / "whole", ps=ps, step=3)
    fl.save(tmp_path / "parts", ps=fl.shard(ps, mesh_of(parts)), step=3)
    assert (tmp_path / "parts").read_bytes() == (tmp_path / "whole").read_bytes()
    assert fl.describe_file(tmp_path / "parts")["ps"].layout == ps.layout


OPTIMIZERS = {
    "adamw": optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.cosine_decay_schedule(0.1, 9))),
    "lbfgs": optax.lbfgs(),
    "adafactor": optax.adafactor(0.1),
    "noise": optax.chain(optax.add_noise(0.1, 0.5, jax.random.key(0)), optax.sgd(0.1, momentum=0.9)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("types", [False, True])
def test_a_run_goes_on_with_another_number_of_devices(name, types, tmp_path):
    optimizer, ps = OPTIMIZERS[name], vector()
    with jax.numpy_dtype_promotion("standard"):
        plain = optimizer.init(ps)
        many = fl.shard(ps, mesh_of(8))
        state = fl.optimizer_state(optimizer, many)
        fl.save(tmp_path / "whole", ps=ps, opt_state=plain)
        fl.save(tmp_path / "parts", ps=many, opt_state=state)
        assert (tmp_path / "parts").read_bytes() == (tmp_path / "whole").read_bytes()
        few = fl.shard(0 * ps, mesh_of(4))
        like = {"ps": few, "opt_state": fl.optimizer_state(optimizer, few)}
    expected = like["opt_state"]
    if types:
        like = jax.eval_shape(lambda like: like, like)
    loaded = fl.load(tmp_path / "parts", **like)
    assert jax.tree.structure(loaded) == jax.tree.structure(like)
    assert loaded["ps"].data.sharding == few.data.sharding
    assert loaded["ps"].data.shape == (148,)
    assert_same(loaded["ps"].gather(), ps)
    for x, y in zip(jax.tree.leaves(loaded["opt_state"]), jax.tree.leaves(expected), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        if x.shape[-1:] == (148,):
            assert x.sharding == y.sharding
            assert not np.asarray(x)[..., 147:].any()
        elif not types:
            assert x.is_fully_replicated
            assert x.sharding.device_set == y.sharding.device_set
    # Without a like it is one vector.
    alone = fl.load(tmp_path / "parts")
    assert_same(alone["ps"], ps)
    assert isinstance(alone["ps"], fl.ComponentVector)


def test_a_whole_vector_is_loaded_in_parts_and_the_other_way_round(tmp_path):
    ps = vector()
    fl.save(tmp_path / "x", ps=ps)
    sharded = fl.load(tmp_path / "x", ps=fl.shard(ps, mesh_of(8)))["ps"]
    assert isinstance(sharded, fl.ShardedVector)
    fl.save(tmp_path / "x", ps=sharded)
    assert_same(fl.load(tmp_path / "x", ps=ps)["ps"], ps)


def test_arrays_are_loaded_where_those_of_like_are(tmp_path):
    everywhere = NamedSharding(mesh_of(8), PartitionSpec())
    along = NamedSharding(mesh_of(8), PartitionSpec("data"))
    parts = {
        "ps": jax.device_put(vector(), everywhere),
        "x": jax.device_put(jnp.arange(16.0), along),
        "key": jax.device_put(jax.random.key(3), everywhere),
        "n": jnp.int32(3),
    }
    fl.save(tmp_path / "x", run=parts)
    loaded = fl.load(tmp_path / "x", run=parts)["run"]
    assert_same(loaded, parts)
    for x, y in zip(jax.tree.leaves(loaded), jax.tree.leaves(parts), strict=True):
        assert x.sharding.is_equivalent_to(y.sharding, x.ndim)
    assert len(fl.load(tmp_path / "x")["run"]["x"].sharding.device_set) == 1


def test_another_layout_is_told_as_for_vectors(tmp_path):
    fl.save(tmp_path / "x", ps=fl.shard(vector(), mesh_of(8)), one=vector(dtype="float32"), number=1.0)
    with pytest.raises(fl.LayoutMismatchError) as found:
        fl.load(tmp_path / "x", ps=fl.shard(vector(150), mesh_of(8)))
    assert found.value.lines == ["ps.rest: (140,) became (143,)"]
    with pytest.raises(fl.LayoutMismatchError, match="one: .*float32.* became .*float64"):
        fl.load(tmp_path / "x", one=fl.shard(vector(), mesh_of(8)))
    with pytest.raises(fl.LayoutMismatchError, match="number: 1.0 became"):
        fl.load(tmp_path / "x", number=fl.shard(vector(), mesh_of(8)))


def test_what_cannot_be_saved(tmp_path):
    sharded = fl.shard(vector(), mesh_of(8))
    with pytest.raises(TypeError, match="cannot save 'ps': expected a vector of numbers"):
        fl.save(tmp_path / "x", ps=jax.eval_shape(lambda v: v, sharded))
    with pytest.raises(TypeError, match="cannot save 'ps': its numbers are known only when"):
        jax.jit(lambda v: fl.save(tmp_path / "x", ps=v))(sharded)


def two_processes(folder):
    """Save what is on both, load it again, and fail to write."""
    me = jax.process_index()
    mesh = jax.make_mesh((4,), ("data",))
    everywhere = NamedSharding(mesh, PartitionSpec())
    ps = vector()
    sharded = fl.shard(ps, mesh)
    optimizer = optax.adamw(0.1)
    key = jax.jit(lambda: jax.random.key(3), out_shardings=everywhere)()
    keys = jax.jit(
        lambda: jax.random.split(jax.random.key(4), 8),
        out_shardings=NamedSharding(mesh, PartitionSpec("data")),
    )()
    parts = {
        "ps": sharded,
        "opt_state": fl.optimizer_state(optimizer, sharded),
        "st": {"mean": jax.device_put(np.arange(3.0), everywhere), "key": key},
        "spread": jax.make_array_from_callback(
            (8,), NamedSharding(mesh, PartitionSpec("data")), lambda index: np.arange(8.0)[index]
        ),
        "keys": keys,
        "mine": np.full(2, me),
        "step": me,
    }
    fl.save(folder / "run", **parts)
    assert (folder / "run").exists()  # in each of them, when `save` returns
    loaded = fl.load(folder / "run", **{name: parts[name] for name in ("ps", "opt_state", "st", "spread")})
    assert jax.tree.structure(loaded["opt_state"]) == jax.tree.structure(parts["opt_state"])
    for x, y in zip(jax.tree.leaves(loaded["opt_state"]), jax.tree.leaves(parts["opt_state"]), strict=True):
        assert x.sharding == y.sharding
    np.testing.assert_array_equal(loaded["ps"].gather().data, ps.data)
    np.testing.assert_array_equal(loaded["mine"], np.zeros(2))
    assert loaded["step"] == 0
    assert loaded["st"]["key"].sharding.is_equivalent_to(everywhere, 0)
    assert loaded["spread"].sharding == parts["spread"].sharding
    # Types say nothing of devices but in sharded vectors.
    types = jax.eval_shape(lambda parts: parts, {"opt_state": parts["opt_state"]})
    count = fl.load(folder / "run", **types)["opt_state"][0].count
    errors = []
    for target, more in [(folder / "not there" / "run", {}), (folder / "run", {"bad": {1: 2}})]:
        try:
            fl.save(target, ps=sharded, **more)
        except Exception as error:
            errors.append((type(error).__name__, str(error)))
    fl.check_synchronized(ps)  # they are still together
    return int(count), errors


@pytest.mark.long
def test_two_processes_write_one_file(tmp_path):
    first, second = run_processes(two_processes, tmp_path)
    ps = vector()
    saved = fl.load(tmp_path / "run")
    assert_same(saved["ps"], ps)
    assert_same(saved["opt_state"][0].mu, 0 * ps)
    assert_same(saved["spread"], jnp.arange(8.0))
    assert_same(saved["keys"], jax.random.split(jax.random.key(4), 8))
    assert_same(saved["st"]["key"], jax.random.key(3))
    assert not list(tmp_path.glob("*.tmp"))
    (missing, bad), (missing_there, bad_there) = first[1], second[1]
    assert missing[0] == "FileNotFoundError"
    assert missing_there[0] == "OSError"
    assert "process 0 could not write the file: FileNotFoundError" in missing_there[1]
    assert bad == bad_there
    assert "expected names that are text, found 1" in bad[1]
    assert first[0] == second[0] == 0


def each_its_own(folder):
    index = jax.process_index()
    mine = vector() * (1.0 + index)
    if index == 0:
        fl.save(folder / "first", ps=mine)
    fl.save(folder / f"of {index}", ps=mine)
    return index


@pytest.mark.long
def test_processes_write_what_is_theirs_alone(tmp_path):
    assert run_processes(each_its_own, tmp_path) == [0, 1]
    for name, factor in {"first": 1.0, "of 0": 1.0, "of 1": 2.0}.items():
        assert_same(fl.load(tmp_path / name)["ps"], factor * vector())


def test_orbax_restores_on_another_number_of_devices(tmp_path):
    """The way of docs/saving.md for vectors that no host has room for."""
    import orbax.checkpoint as ocp

    ps, folder = vector(), tmp_path / "checkpoint"
    many, few = fl.shard(ps, mesh_of(8)), fl.shard(0 * ps, mesh_of(4))
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        layout = ocp.args.JsonSave({"layout": ps.layout.to_json()})
        checkpointer.save(folder, ocp.args.Composite(ps=ocp.args.StandardSave(many), layout=layout))

    def restore(like):
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            found = checkpointer.restore(folder, ocp.args.Composite(layout=ocp.args.JsonRestore()))
            if lines := fl.Layout.from_json(found["layout"]["layout"]).diff(like.layout):
                raise fl.LayoutMismatchError("the checkpoint is of another model:", lines)
            wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
            # Not strict: with other devices there are other zeros behind the numbers.
            args = ocp.args.Composite(ps=ocp.args.StandardRestore(wanted, strict=False))
            return checkpointer.restore(folder, args)["ps"]

    again = restore(few)
    assert again.data.sharding == few.data.sharding
    assert_same(again.gather(), ps)
    with pytest.raises(fl.LayoutMismatchError):
        restore(fl.shard(vector(150), mesh_of(4)))
