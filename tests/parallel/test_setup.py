import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import flatlayers as fl
from flatlayers.core import drawing, setup
from tests.core.models import Counter
from tests.core.test_drawing import DTYPES, MODELS
from tests.helpers import assert_same
from tests.parallel.processes import run_processes


MESHES = {
    "one axis": lambda: jax.make_mesh((8,), ("data",)),
    "auto": lambda: jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,)),
    "two axes": lambda: jax.make_mesh((2, 4), ("model", "data")),
    "three devices": lambda: jax.make_mesh((3,), ("data",), devices=jax.devices()[:3]),
}


@pytest.mark.long
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_the_numbers_are_those_of_setup(key, model, dtype, monkeypatch):
    mesh = MESHES["one axis"]()
    expected = fl.setup(key, model, dtype)
    for piece in (drawing.PIECE, 1000):
        monkeypatch.setattr(drawing, "PIECE", piece)
        ps, st = fl.setup_sharded(key, model, mesh, dtype=dtype)
        assert_same(ps.gather(), expected[0])
        assert_same(st, expected[1])


@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
@pytest.mark.parametrize("length", [1, 7, 8, 147])
def test_meshes_and_lengths(key, mesh, length):
    mesh = mesh()
    model = {"w": fl.Param((length,), fl.initializers.normal)}
    ps, _ = fl.setup_sharded(key, model, mesh)
    parts = mesh.shape["data"]
    assert isinstance(ps, fl.ShardedVector) if hasattr(fl, "ShardedVector") else True
    assert ps.data.shape == (-(-length // parts) * parts,)
    assert {part.data.shape for part in ps.data.addressable_shards} == {(-(-length // parts),)}
    whole = fl.initial_parameters(key, model)
    assert_same(ps.gather(), whole)
    assert_same(np.asarray(ps.data)[length:], np.zeros(ps.padding, np.float32))
    assert_same(ps.data, fl.shard(whole, mesh).data)
    assert ps.data.sharding == fl.shard(whole, mesh).data.sharding


def test_states_are_on_each_device(key):
    mesh = MESHES["one axis"]()
    model = fl.Chain(fl.Dense(3, 4), fl.BatchNorm(4), fl.Dropout(0.5), Counter())
    _, st = fl.setup_sharded(key, model, mesh)
    expected = fl.initial_states(key, model)
    assert jax.tree.structure(st) == jax.tree.structure(expected)
    assert_same(st, expected)
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(st))
    assert {len(leaf.devices()) for leaf in jax.tree.leaves(st)} == {8}


def test_each_part_draws_only_what_it_holds(key, monkeypatch):
    drawn = []

    def noting(key, shape, dtype):
        drawn.append(shape)
        return jnp.zeros(shape, dtype)

    model = {f"layer_{i}": fl.Param((i + 1, 10), noting) for i in range(7)}  # 280 numbers, 35 a part
    fl.setup_sharded(key, model, MESHES["one axis"]())
    ends = np.cumsum([10 * (i + 1) for i in range(7)])
    reached = [(ends[i] - 1) // 35 - (ends[i] - 10 * (i + 1)) // 35 + 1 for i in range(7)]
    assert sorted(drawn) == sorted((i + 1, 10) for i in range(7) for _ in range(reached[i]))
    # What is drawn number by number is drawn once, in pieces, but for those that two parts share.
    monkeypatch.setattr(drawing, "PIECE", 100)
    sizes, uniform = [], jax.random.uniform
    monkeypatch.setattr(
        jax.random, "uniform", lambda key, shape, *a, **k: sizes.append(shape) or uniform(key, shape, *a, **k)
    )
    fl.setup_sharded(key, {"w": fl.Param((40, 40), fl.initializers.uniform)}, MESHES["one axis"]())
    assert sizes == [(100,)] * 16


def test_what_it_cannot_take(key):
    mesh = MESHES["one axis"]()
    model = fl.Dense(3, 2)
    with pytest.raises(ValueError, match=r"expected one PRNG key, found an array of them, of shape \(2,\)"):
        fl.setup_sharded(jax.random.split(key), model, mesh)
    with pytest.raises(TypeError, match="outside of jax.jit"):
        jax.jit(lambda key: fl.setup_sharded(key, model, mesh)[0].data)(key)
    with pytest.raises(TypeError, match="expected a PRNG key"):
        fl.setup_sharded(0, model, mesh)
    with pytest.raises(TypeError, match="setup_sharded: expected a mesh"):
        fl.setup_sharded(key, model, 8)
    with pytest.raises(ValueError, match="expected an axis of the mesh, data, found 'model'"):
        fl.setup_sharded(key, model, mesh, "model")
    with pytest.raises(TypeError, match="expected a layer or a mapping"):
        fl.setup_sharded(key, fl.Param((2,), fl.initializers.ones), mesh)


def test_a_large_vector_is_drawn_in_the_same_pieces(key, monkeypatch):
    """As `fl.setup` draws one: both are above its limit."""
    monkeypatch.setattr(setup, "LARGE", 10)
    model = fl.Chain(fl.Dense(40, 40), fl.Dense(40, 3))
    assert_same(
        fl.setup_sharded(key, model, MESHES["one axis"]())[0].gather(), fl.initial_parameters(key, model)
    )


# Several processes

MODEL = fl.Chain(fl.Dense(30, 40), fl.BatchNorm(40), fl.Dropout(0.5), fl.Repeated(fl.Dense(40, 40), 3))


def parts_of_a_process(seeds):
    """The whole vector, the places of this process's parts, a state: as each process has them."""
    mesh = jax.make_mesh((4,), ("data",))
    ps, st = fl.setup_sharded(jax.random.key(seeds[jax.process_index()]), MODEL, mesh, dtype=jnp.float32)
    places = [part.index[0].indices(ps.data.shape[0])[0] for part in ps.data.addressable_shards]
    mean = st.layer_1.running_mean
    assert mean.is_fully_replicated
    return np.asarray(ps.gather().data), sorted(places), np.asarray(jax.random.key_data(st.layer_2.key))


@pytest.mark.long
def test_each_process_has_its_own_parts():
    ps, st = fl.setup(jax.random.key(3), MODEL)
    quarter = -(-ps.layout.length // 4)
    found = run_processes(parts_of_a_process, (3, 3))
    assert [places for _, places, _ in found] == [[0, quarter], [2 * quarter, 3 * quarter]]
    for whole, _, state_key in found:
        assert_same(whole, np.asarray(ps.data))
        assert_same(state_key, np.asarray(jax.random.key_data(st.layer_2.key)))


@pytest.mark.long
def test_processes_with_different_seeds_are_told():
    with pytest.raises(AssertionError, match="expected the same numbers in all processes"):
        run_processes(parts_of_a_process, (3, 4))
