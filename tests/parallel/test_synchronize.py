import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flatlayers as fl
from tests.helpers import assert_same

from .processes import run_processes


def a_tree(number):
    """Arrays of all kinds, other ones for each number."""
    return {
        "array": jnp.arange(3.0) + number,
        "half": jnp.full((2, 2), number, jnp.bfloat16),
        "numpy": np.arange(4) + number,
        "wide": np.array([2**60 + number, -number]),  # int32 would not hold it
        "key": jax.random.split(jax.random.key(number), 2),
        "count": 3 + number,
        "rate": 0.1 + number,
        "flag": number == 0,
        "scalar": np.float32(number),
        "empty": jnp.zeros((0, 3)),
        "ps": fl.initial_parameters(jax.random.key(number), fl.Dense(3, 2)),
        "st": fl.Record(mean=jnp.ones(2) * number, training=True),
    }


def as_data(tree):
    """Keys as numbers, and vectors as arrays, which can be pickled and compared anywhere."""

    def one(x):
        is_key = isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(x) if is_key else x)

    return [(type(x).__name__, one(x)) for x in jax.tree.leaves(tree)]


def error_of(call, *args):
    try:
        call(*args)
    except ValueError as error:
        return str(error)
    return ""


def many_things():
    """What `synchronize` gives in this process, and the errors of trees that differ."""
    me = jax.process_index()
    tree = a_tree(me)
    mesh = jax.make_mesh((4,), ("data",))
    same = fl.synchronize(tree)
    assert jax.tree.structure(same) == jax.tree.structure(tree)
    fl.check_synchronized(same)
    fl.check_synchronized(a_tree(5))
    fl.check_synchronized({})
    fl.check_synchronized(jnp.ones(3))
    assert fl.synchronize({}) == {}
    replicated = jax.make_array_from_process_local_data(
        jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()), np.full(3, float(me))
    )
    sharded = fl.shard(same["ps"], mesh)
    fl.check_synchronized(sharded)
    assert fl.synchronize(sharded).data is sharded.data
    again = fl.synchronize({"x": replicated})["x"]
    assert again.sharding == replicated.sharding
    with jax.enable_x64(False):
        narrow = as_data(fl.synchronize({"wide": np.array([2**60 + me]), "number": 0.1 + me}))
    errors = {
        "seeds": error_of(fl.check_synchronized, {"ps": a_tree(me)["ps"], "other": 1}),
        "replicated": error_of(fl.check_synchronized, {"x": replicated}),
        "shape": error_of(fl.check_synchronized, {"a": jnp.ones(2 + me)}),
        "dtype": error_of(fl.synchronize, {"a": jnp.ones(2, [jnp.float32, jnp.float64][me])}),
        "names": error_of(fl.synchronize, {"ab"[me]: jnp.ones(2)}),
        "number": error_of(fl.check_synchronized, [1.0] * (2 + me)),
        "key": error_of(fl.check_synchronized, {"st": {"key": jax.random.key(me)}}),
        "negative zero": error_of(fl.check_synchronized, jnp.array([0.0, -0.0][me])),
        "shard": error_of(fl.shard, a_tree(me)["ps"], mesh),
    }
    return {
        "same": as_data(same),
        "narrow": narrow,
        "replicated": np.asarray(again),
        "local": float(again.addressable_shards[1].data[0]),
        "errors": errors,
    }


@pytest.fixture(scope="module")
def found():
    return run_processes(many_things)


@pytest.mark.long
def test_all_have_the_arrays_of_the_first(found):
    expected = as_data(a_tree(0))
    for one in found:
        assert [kind for kind, _ in one["same"]] == [kind for kind, _ in expected]
        for (_, x), (_, y) in zip(one["same"], expected, strict=True):
            assert x.dtype == y.dtype
            np.testing.assert_array_equal(x, y)
        np.testing.assert_array_equal(one["replicated"], np.zeros(3))
        assert one["local"] == 0.0


def test_nothing_is_converted_without_x64(found):
    for one in found:
        numbers = dict(one["narrow"])
        assert numbers["ndarray"] == [2**60]
        assert numbers["float"] == 0.1


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "seeds",
            "same numbers in all processes, found others at ps.data in process 1 than in process 0",
        ),
        ("seeds", "drawn from different seeds"),
        ("replicated", "found others at x in process 1"),
        ("shape", "expected the same shapes and dtypes in all processes, found others at a in process 1"),
        ("dtype", "expected the same shapes and dtypes in all processes, found others at a in process 1"),
        ("names", "expected the same shapes and dtypes"),
        ("number", "found 2 of them in process 0 and 3 in process 1"),
        ("key", "found others at st.key in process 1"),
        ("negative zero", "found others in process 1"),
        ("shard", "found others at data in process 1"),
    ],
)
def test_differences_are_named_in_all_processes(found, name, text):
    for one in found:
        assert text in one["errors"][name]


def test_one_process_is_always_the_same_as_itself():
    tree = a_tree(1)
    assert fl.synchronize(tree) is tree
    fl.check_synchronized(tree)
    assert_same(fl.synchronize(tree), a_tree(1))
