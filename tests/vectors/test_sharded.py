import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import flatlayers as fl
from flatlayers.vectors.sharded import cut, padded_length


def mesh_of(number):
    return jax.make_mesh((number,), ("data",), (AxisType.Auto,), devices=jax.devices()[:number])


def vector(length, *lead, dtype=jnp.float64):
    """Numbers from 1 on, with names for the first and all others."""
    layout = fl.Layout({"first": (), "rest": {"w": (length - 1,)}})
    numbers = jnp.arange(1, 1 + int(np.prod([*lead, length])), dtype=dtype).reshape(*lead, length)
    return fl.ComponentVector(numbers, layout)


@pytest.fixture
def sharded():
    return fl.shard(vector(5), mesh_of(2))


@pytest.mark.parametrize(("length", "padded"), [(1, 8), (7, 8), (8, 8), (9, 16), (0, 0)])
def test_padded_length(length, padded):
    assert padded_length(length, 8) == padded


def test_what_it_knows(sharded):
    assert (sharded.parts, sharded.padding, sharded.shape, sharded.dtype) == (2, 1, (5,), jnp.float64)
    assert sharded.data.shape == (6,)
    assert sharded.sharding(2).spec == PartitionSpec(None, None, "data")


def test_the_length_of_the_data_is_checked(sharded):
    again = fl.ShardedVector(sharded.data, sharded.layout, sharded.mesh, "data")
    assert again.data is sharded.data
    with pytest.raises(ValueError, match=r"of shape \(..., 6\) for 5 numbers in 2 parts, found shape"):
        fl.ShardedVector(jnp.ones(5), sharded.layout, sharded.mesh, "data")
    with pytest.raises(ValueError, match=r"expected data of shape \(..., 6\), or one part inside"):
        fl.ShardedVector(jnp.ones(3), sharded.layout, sharded.mesh, "data").gather()


@pytest.mark.parametrize(
    ("use", "text"),
    [
        (lambda v: v.first, r"a shard has no views: call `.gather\(\)` for `.first`"),
        (lambda v: v.rest.w, "a shard has no views"),
        (lambda v: v.unpack(), "for `.unpack`"),
        (lambda v: v.at["first"], "for `.at`"),
        (lambda v: v["rest.w"], r"for `\['rest.w'\]`"),
        (lambda v: v[0], r"for `\[0\]`"),
        (lambda v: v + 1, "no arithmetic"),
        (lambda v: 2 * v, "no arithmetic"),
        (lambda v: np.ones(5) * v, "no arithmetic"),
        (lambda v: jnp.ones(5) - v, "no arithmetic"),
        (lambda v: v @ v, "no arithmetic"),
        (lambda v: -v, "no arithmetic"),
        (lambda v: v == v, "no arithmetic"),
        (lambda v: v < 1, "no arithmetic"),
        (lambda v: bool(v), "no arithmetic"),
        (lambda v: len(v), "no arithmetic"),
        (lambda v: list(v), "no arithmetic"),
        (lambda v: np.asarray(v), "no arithmetic"),
        (lambda v: jnp.sum(v), "ShardedVector"),
        (lambda v: {v}, "unhashable"),
        (lambda v: pickle.dumps(v), r"cannot be pickled, .*`fl.save`"),
        (lambda v: fl.ComponentVector.of(v), "found ShardedVector"),
    ],
)
def test_what_it_has_not(use, text, sharded):
    with pytest.raises(TypeError, match=text):
        use(sharded)


def test_a_layer_needs_the_whole_vector():
    model = fl.Chain(fl.Dense(2, 2), fl.Dense(2, 2))
    ps, st = fl.setup(jax.random.key(0), model, jnp.float64)
    with pytest.raises(TypeError, match=r"call `.gather\(\)` for `.layer_0`"):
        model(jnp.ones(2), fl.shard(ps, mesh_of(2)), st)


def test_unknown_names_are_attributes_that_are_missing(sharded):
    with pytest.raises(AttributeError, match="object has no attribute 'nothing'"):
        sharded.nothing  # noqa: B018
    assert not hasattr(sharded, "nothing")
    assert not hasattr(sharded, "first")
    assert not hasattr(sharded, "ndim")
    assert not hasattr(sharded, "__jax_array__")
    with pytest.raises(AttributeError, match="immutable"):
        sharded.data = None


def test_it_is_a_pytree_of_one_leaf(sharded):
    (leaf,), structure = jax.tree.flatten(sharded)
    assert leaf is sharded.data
    assert structure == jax.tree.structure(fl.shard(vector(5) * 2, mesh_of(2)))
    assert structure != jax.tree.structure(fl.shard(vector(5), mesh_of(3)))
    doubled = jax.tree.map(lambda x: 2 * x, sharded)
    np.testing.assert_array_equal(doubled.gather().data, 2 * vector(5).data)
    ((path, _),) = jax.tree_util.tree_leaves_with_path({"ps": sharded})
    assert jax.tree_util.keystr(path, simple=True, separator=".") == "ps.data"


def test_copies(sharded):
    assert copy.copy(sharded).data is sharded.data
    deep = copy.deepcopy(sharded)
    assert deep.data is not sharded.data
    assert jax.tree.structure(deep) == jax.tree.structure(sharded)
    np.testing.assert_array_equal(deep.data, sharded.data)


def test_text(sharded):
    text = "ShardedVector(float64[5], first=(), rest=(w=(4,)), 2 parts along 'data')"
    assert repr(sharded) == str(sharded) == text
    types = jax.eval_shape(lambda v: v, sharded)
    assert repr(types) == text
    assert repr(sharded.with_data(None)) == text.replace("float64[5], ", "")
    seen = []
    jax.jit(lambda v: seen.append(repr(v)))(sharded)
    assert seen == [text]


def test_types_without_numbers(sharded):
    types = jax.eval_shape(lambda v: v, sharded)
    assert isinstance(types, fl.ShardedVector)
    assert (types.shape, types.dtype, types.mesh) == ((5,), jnp.float64, sharded.mesh)
    assert jax.eval_shape(lambda v: v.gather(), sharded).shape == (5,)


@pytest.mark.parametrize("lead", [(), (3,)])
@pytest.mark.parametrize("parts", [1, 3, 8])
@pytest.mark.parametrize("length", [1, 7, 8, 147])
def test_numbers_of_the_host(length, parts, lead):
    numbers = np.random.default_rng(0).normal(size=(*lead, length))
    layout = fl.Layout({"a": (length,)})
    found = cut(numbers, layout, mesh_of(parts), "data")
    part = -(-length // parts)
    assert found.data.shape == (*lead, part * parts)
    assert found.data.sharding == NamedSharding(found.mesh, PartitionSpec(*[None] * len(lead), "data"))
    assert all(shard.data.shape == (*lead, part) for shard in found.data.addressable_shards)
    np.testing.assert_array_equal(np.asarray(found.data)[..., :length], numbers)
    assert not np.asarray(found.data)[..., length:].any()
    np.testing.assert_array_equal(found.gather().data, numbers)
    numbers[...] = 0  # the parts are copies
    assert np.asarray(found.data)[..., :length].all()


def test_numpys_numbers_are_gathered_on_the_host(sharded):
    host = jax.device_get(sharded)
    assert isinstance(host.gather().data, np.ndarray)
    np.testing.assert_array_equal(host.gather().data, vector(5).data)
