import pickle

import jax
import jax.numpy as jnp
import pytest

import flatlayers as fl
from flatlayers import ComponentVector, Record


def test_reads_by_attribute_name_and_path():
    r = Record({"a": 1}, b={"c": 2})
    assert (r.a, r["a"], r.b.c, r["b.c"], r["b", "c"]) == (1, 1, 2, 2, 2)
    assert list(r) == ["a", "b"]
    assert len(r) == 2
    assert "a" in r
    assert "b.c" in r
    assert "z" not in r
    assert r.to_dict() == {"a": 1, "b": {"c": 2}}


def test_equality_and_hash_go_by_content():
    assert Record(a=1, b=2) == Record(b=2, a=1) == {"a": 1, "b": 2}
    assert Record(a=1) != Record(a=2)
    assert Record(a=1) != Record(a=1, b=2)
    assert hash(Record(a=1, b="x")) == hash(Record(b="x", a=1))
    assert Record(w=jnp.ones(2)) == {"w": jnp.ones(2)}
    assert Record(w=jnp.ones(2)) != Record(w=jnp.zeros(2))
    assert Record(w=jnp.ones(2)) != Record(w=jnp.ones(3))
    assert Record(w=jnp.ones(2)) != Record(w=jnp.ones(2, jnp.float32))
    assert Record(k=jax.random.key(0)) == Record(k=jax.random.key(0))
    assert Record(k=jax.random.key(0)) != Record(k=jax.random.key(1))


def test_is_immutable():
    r = Record(a=1)
    with pytest.raises(AttributeError, match=r"replace\(a=...\)"):
        r.a = 2
    with pytest.raises(AttributeError):
        del r.a
    new = r.replace(a=2)
    assert (r.a, new.a) == (1, 2)
    with pytest.raises(KeyError, match="nearest: a"):
        r.replace(aa=3)


def test_flags_given_at_construction_are_static():
    r = Record(x=1.0, training=True, mode="fast", nothing=None, inner={"training": False})
    assert jax.tree.leaves(r) == [1.0]
    assert jax.tree.structure(r) != jax.tree.structure(r.replace(training=False))
    compilations = []

    @jax.jit
    def f(r):
        compilations.append(r.training)
        return r.x * 2 if r.training else r.x

    assert (f(r), f(r), f(r.replace(training=False))) == (2.0, 2.0, 1.0)
    assert compilations == [True, False]


def test_children_stay_children_whatever_tree_map_puts_there():
    r = Record(x=1.0, y=2.0, flag=True)
    booleans = jax.tree.map(lambda leaf: leaf > 1, r)
    assert (booleans.x, booleans.y, booleans.flag) == (False, True, True)
    assert jax.tree.structure(booleans) == jax.tree.structure(r)
    nones = jax.tree.map(lambda leaf: None, r)
    assert nones.x is None
    assert jax.tree.structure(nones, is_leaf=lambda leaf: leaf is None) == jax.tree.structure(r)
    assert jax.tree.leaves(booleans.replace(flag=False)) == [False, True]


def test_keys_are_attribute_keys():
    paths = [
        jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(Record(a={"b": 1.0}))
    ]
    assert paths == [".a.b"]


def test_pickles():
    r = jax.tree.map(lambda leaf: leaf > 0, Record(x=1.0, flag=True, inner={"n": 2}))
    copy = pickle.loads(pickle.dumps(r))
    assert copy == r
    assert jax.tree.structure(copy) == jax.tree.structure(r)


@pytest.mark.parametrize("name", ["_x", "a b", "1a", "data", "keys", "to_dict", ""])
def test_refuses_bad_names(name):
    with pytest.raises(ValueError, match=repr(name)):
        Record({name: 1})


def test_unknown_names_come_with_the_nearest():
    r = Record(weight=1, bias=2)
    with pytest.raises(KeyError, match="nearest: weight"):
        r["wieght"]
    with pytest.raises(AttributeError, match="nearest: weight"):
        _ = r.wieght
    with pytest.raises(TypeError, match="strings"):
        Record({1: 2})


def test_equality_of_what_is_inside():
    pair = Record(c=(jnp.ones(2), jnp.zeros(2)))
    assert pair == Record(c=(jnp.ones(2), jnp.zeros(2))) != Record(c=(jnp.ones(2), jnp.ones(2)))
    v = ComponentVector.of({"a": 1.0})
    assert Record(v=v) == Record(v=v) != Record(v=2 * v)
    assert Record(k=jax.random.key(0)) != Record(k=1.0)
    assert 1 not in Record(a=1)


def test_what_the_library_makes_is_a_record_like_any_other():
    layout = fl.Layout({"w": (2,), "inner": {"b": ()}})
    unpacked = layout.unpack(jnp.arange(3.0))
    written = Record(w=jnp.arange(2.0), inner={"b": jnp.array(2.0)})
    assert unpacked == written
    assert jax.tree.structure(unpacked) == jax.tree.structure(written)
    changed = unpacked.replace(w="off", inner={"b": True})
    assert jax.tree.structure(changed) == jax.tree.structure(Record(w="off", inner={"b": True}))
    assert isinstance(changed.inner, Record)


def test_what_replace_leaves_alone_stays_static_or_a_child():
    r = jax.tree.map(lambda leaf: leaf > 0, Record(x=1.0, y=2.0, flag=True))
    new = r.replace(y=3.0)
    assert jax.tree.leaves(new) == [True, 3.0]
    assert jax.tree.structure(new) == jax.tree.structure(Record(x=1.0, y=2.0, flag=True))
    assert jax.tree.structure(new) != jax.tree.structure(new.replace(flag=False))
    assert list(new.replace(flag=1.0)) == ["x", "y", "flag"]
