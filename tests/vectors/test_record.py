import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flatlayers as fl
from flatlayers import ComponentVector, Record
from tests.helpers import assert_close, assert_same


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


def test_replace_takes_paths():
    r = Record(a=Record(b=1.0, c=Record(d=2.0, flag=True)), e=3.0)
    new = r.replace(**{"a.c.d": 4.0, "a.b": 5.0, "a.c.flag": False, "e": 6.0})
    assert new.to_dict() == {"a": {"b": 5.0, "c": {"d": 4.0, "flag": False}}, "e": 6.0}
    assert r["a.c.d"] == 2.0
    assert jax.tree.leaves(new) == [5.0, 4.0, 6.0]
    for path, name in (("a.x", "x"), ("x.a", "x"), ("a.c.x", "x"), ("e.x", "x")):
        with pytest.raises(KeyError, match=f"no name '{name}'"):
            r.replace(**{path: 0.0})


def test_what_replace_leaves_alone_stays_static_or_a_child():
    r = jax.tree.map(lambda leaf: leaf > 0, Record(x=1.0, y=2.0, flag=True))
    new = r.replace(y=3.0)
    assert jax.tree.leaves(new) == [True, 3.0]
    assert jax.tree.structure(new) == jax.tree.structure(Record(x=1.0, y=2.0, flag=True))
    assert jax.tree.structure(new) != jax.tree.structure(new.replace(flag=False))
    assert list(new.replace(flag=1.0)) == ["x", "y", "flag"]


class Experts(fl.Container):
    """Layers of a tuple side by side, found by their places."""

    gate: fl.Layer
    experts: tuple[fl.Layer, ...]

    def forward(self, x, ps, st):
        shares, _ = self.gate(x, ps.gate, st.gate)
        y, states = 0.0, {}
        for i, expert in enumerate(self.experts):
            out, states[f"layer_{i}"] = expert(x, ps.experts[i], st.experts[i])
            y = y + shares[..., i : i + 1] * out
        return y, st.replace(experts=st.experts.replace(**states))


def test_a_tuple_of_layers_is_read_by_places(key):
    model = Experts(fl.Dense(3, 2), (fl.Dense(3, 4), fl.Dense(3, 4)))
    ps, st = fl.setup(key, model, float)
    record = ps.unpack()
    assert len(record.experts) == len(st.experts) == len(model.experts) == 2
    assert record.experts[0] == record.experts.layer_0
    assert record.experts[-1] == record.experts[np.int64(1)] == record.experts["layer_1"]
    assert st.experts[1] == st.experts.layer_1
    assert list(record.experts.values()) == [record.experts[0], record.experts[1]]
    x = np.linspace(-1, 1, 21).reshape(7, 3)
    shares, *outs = (
        x @ np.asarray(part.weight).T + np.asarray(part.bias)
        for part in (record.gate, *record.experts.values())
    )
    assert_close(model(jnp.asarray(x), ps, st)[0], shares[:, :1] * outs[0] + shares[:, 1:] * outs[1])


def test_the_places_of_a_tuple_in_a_vector_are_part_of_a_path():
    layout = fl.Layout({"experts": {"layer_0": {"bias": (2,)}, "layer_1": {"bias": (3,)}}})
    v = fl.ComponentVector(jnp.arange(5.0), layout)
    assert_same(v["experts", 1, "bias"], v.experts.layer_1.bias)
    assert_same(v["experts", 0], v.experts.layer_0)
    assert layout["experts", 1] == v.experts.layer_1.layout
    assert_same(v.at["experts", 0, "bias"].set(2.0).data, jnp.array([2.0, 2.0, 2.0, 3.0, 4.0]))
    # It is an array: indices alone count numbers.
    assert (v.experts[1], len(v.experts)) == (1.0, 5)


def test_layers_of_a_tuple_are_watched_by_a_summary():
    model = Experts(fl.Dense(3, 2), (fl.Dense(3, 4), fl.Dense(3, 4)))
    assert "experts.layer_1" in str(fl.summary(model, jnp.ones(3)))


@pytest.mark.parametrize("index", [2, -3, 100])
def test_a_place_outside_of_the_tuple(index):
    with pytest.raises(IndexError, match=f"below 2, found {index}"):
        Record(layer_0=1.0, layer_1=2.0)[index]


@pytest.mark.parametrize("names", [{"weight": 1.0, "bias": 2.0}, {"layer_0": 1.0, "layer_2": 2.0}])
def test_places_are_for_tuples_of_layers(names):
    with pytest.raises(TypeError, match=rf"layer_1, ...; found 0 for the names {', '.join(names)}"):
        Record(names)[0]
    with pytest.raises(TypeError, match="a path is a string"):
        Record(names)[True]
    with pytest.raises(IndexError):
        Record()[0]
