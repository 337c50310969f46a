import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

import flatlayers as fl
from tests.helpers import assert_same
from tests.vectors.layouts import NESTED, autoencoder, layouts


@settings(deadline=None, max_examples=30)
@given(layouts)
def test_json_round_trip(layout):
    leaves = [path for path, shape in layout.view_shapes.items() if shape == ()]
    layout = layout.tie(dict.fromkeys(leaves[1:], leaves[0])) if leaves else layout
    copy = fl.Layout.from_json(layout.to_json())
    assert copy == layout
    assert hash(copy) == hash(layout)
    assert copy.diff(layout) == []


def test_is_a_value():
    a, b = fl.Layout(NESTED), fl.Layout({**NESTED, "inner": fl.Layout(NESTED["inner"])})
    assert a == b
    assert hash(a) == hash(b)
    assert a != fl.Layout({"inner": NESTED["inner"], "weight": (4, 2), "bias": (4,)})
    assert fl.Layout(a) == a
    with pytest.raises(AttributeError):
        a.length = 3


def test_of_arrays_and_numbers():
    assert fl.Layout.of({"a": 1.0, "b": {"c": np.ones((2, 3)), "d": [1, 2]}}) == fl.Layout(
        {"a": (), "b": {"c": (2, 3), "d": (2,)}}
    )


# Ties


def test_tied_names_share_a_place():
    layout = autoencoder().tie({"decoder.weight": "encoder.weight"})
    assert layout.length == 14
    assert layout["decoder.weight"] == layout["encoder.weight"]
    assert len(layout.slots()) == 4
    assert len(layout.labels()) == 14
    assert "encoder.weight[0,0]" in layout.labels()
    vector = fl.ComponentVector(jnp.arange(14.0), layout)
    assert_same(vector.decoder.weight, vector.encoder.weight)
    np.testing.assert_array_equal(layout.mask("decoder.weight"), layout.mask("encoder.weight"))
    # A group part of which lies elsewhere is gathered.
    assert vector.decoder.layout == fl.Layout({"weight": (4, 2), "bias": (2,)})
    np.testing.assert_array_equal(vector.decoder.data, [*range(8), 12, 13])


def test_gradients_of_tied_names_add():
    layout = autoencoder().tie({"decoder.weight": "encoder.weight"})
    vector = fl.ComponentVector(jnp.arange(14.0), layout)

    def f(unpack):
        def loss(v):
            p = v.unpack() if unpack else v
            return jnp.sum(jnp.sin(p.encoder.weight)) + jnp.sum(p.decoder.weight**2)

        return loss

    expected = jnp.cos(vector.encoder.weight) + 2 * vector.encoder.weight
    for unpack in (True, False):
        assert_same(jax.grad(f(unpack))(vector).encoder.weight, expected)


def test_whole_groups_and_chains_of_names_tie():
    block = {"w": (2,), "b": ()}
    layout = fl.Layout({"a": block, "b": block, "c": block})
    tied = layout.tie({"b": "a", "c": "b"})
    assert tied.length == 3
    assert tied["c.w"] == tied["a.w"]
    assert tied == layout.tie({"c": "a", "b": "a"}) == layout.tie({"b": "a"}).tie({"c": "b"})
    # A group on its own keeps the ties inside it, and holds what lay outside.
    outer = fl.Layout({"x": (2,), "g": {"p": (2,), "q": (2,), "r": ()}}).tie({"g.p": "x", "g.q": "x"})
    assert outer["g"] == fl.Layout({"p": (2,), "q": (2,), "r": ()}).tie({"q": "p"})
    inner = fl.Layout({"p": (2,), "q": (2,)}).tie({"q": "p"})
    assert fl.Layout({"g": inner}) == fl.Layout({"g": {"p": (2,), "q": (2,)}}).tie({"g.q": "g.p"})


def test_ties_inside_and_between_stacks():
    base = fl.Layout({"w": (2, 2), "v": (2, 2), "b": (2,)})
    inside = fl.Layout({"s": base.tie({"v": "w"}).stack(3)})
    assert inside.length == 3 * 6
    assert inside == fl.Layout({"s": base.stack(3)}).tie({"s.v": "s.w"})
    between = fl.Layout({"s": base.stack(3), "t": base.stack(3)}).tie({"t.w": "s.w"})
    assert between.length == 30 + 18
    for layout in (inside, between):
        vector = fl.ComponentVector(jnp.arange(float(layout.length)), layout)
        record = vector.unpack()
        assert fl.ComponentVector.of(record, layout).data.tolist() == vector.data.tolist()
        for path in layout.view_shapes:
            assert_same(vector[path], record[path])
    vector = fl.ComponentVector(jnp.arange(48.0), between)
    assert_same(vector.t.w, vector.s.w)
    assert_same(vector.t.data, vector.data[between.indices("t")])


def test_bad_ties():
    layout = autoencoder()
    with pytest.raises(ValueError, match=r"same shapes.*\(2,\).*\(4,\)"):
        layout.tie({"decoder.bias": "encoder.bias"})
    with pytest.raises(ValueError, match="cycle"):
        layout.tie({"decoder.weight": "encoder.weight", "encoder.weight": "decoder.weight"})
    with pytest.raises(ValueError, match="cycle"):
        layout.tie({"decoder.weight": "decoder.weight"})
    with pytest.raises(KeyError, match="nearest: weight"):
        layout.tie({"decoder.wieght": "encoder.weight"})


# Bad input


def test_refuses_bad_shapes():
    with pytest.raises(TypeError, match="'w'.*2.5"):
        fl.Layout({"w": (2.5,)})
    with pytest.raises(ValueError, match="'w'.*-1"):
        fl.Layout({"w": (-1,)})
    with pytest.raises(TypeError, match="strings"):
        fl.Layout({3: (2,)})


def test_vectors_of_the_wrong_length():
    layout = fl.Layout({"w": (3,)})
    for data in (jnp.ones(4), jnp.ones((3, 1)), jnp.ones(())):
        with pytest.raises(ValueError, match=r"\(..., 3\), found shape"):
            fl.ComponentVector(data, layout)
        with pytest.raises(ValueError, match=r"\(..., 3\), found shape"):
            layout.unpack(data)


def test_json_of_something_else():
    for text in ("{}", "[]", "x", json.dumps({"flatlayers_layout": 2, "tree": {}, "ties": {}})):
        with pytest.raises(ValueError, match="not the JSON text of a Layout"):
            fl.Layout.from_json(text)


def test_diff_is_readable():
    a = fl.Layout({"w": (2,), "b": (), "g": {"x": (3,)}})
    assert a.diff(a) == []
    assert a.diff(fl.Layout({"w": (2,), "b": (), "g": {"x": (4,)}})) == ["g.x: (3,) became (4,)"]
    assert a.diff(fl.Layout({"b": (), "w": (2,), "g": {"x": (3,)}})) == ["w, b, g became b, w, g"]
    two = fl.Layout({"a": (2,), "b": (2,)})
    assert two.diff(two.tie({"b": "a"})) == ["b: a place of its own became tied to a"]
    stack, plain = fl.Layout({"s": fl.Layout({"w": (2,)}).stack(3)}), fl.Layout({"s": {"w": (3, 2)}})
    assert len(stack.diff(plain)) == 1
    assert fl.Layout({"e": {}}).diff(fl.Layout({})) != []


# What is handed out cannot be written to


def test_layouts_cannot_be_changed():
    layout = fl.Layout({"s": fl.Layout({"x": (2,), "y": ()}).stack(2), "z": ()})
    v = fl.ComponentVector.zeros(layout)
    for name in ("entries", "copies", "ties", "view_shapes", "groups", "length"):
        with pytest.raises(AttributeError, match="immutable"):
            delattr(layout, name)
        with pytest.raises(AttributeError, match="immutable"):
            setattr(layout, name, None)
    for mapping in (layout.entries, layout.ties, layout.view_shapes, layout.groups):
        with pytest.raises((TypeError, AttributeError)):
            mapping["z"] = ()
        with pytest.raises((TypeError, AttributeError)):
            mapping.clear()
    with pytest.raises(ValueError, match="read-only"):
        layout.span("s.x")[:] = 0
    for handed_out in (layout.indices("s.x"), layout.indices("s"), layout.mask("s.x"), layout.labels()):
        handed_out[:] = handed_out[::-1]  # copies of their own
    np.testing.assert_array_equal(v.at["s.x"].set(9.0).data, [9, 9, 0, 9, 9, 0, 0])
    np.testing.assert_array_equal(layout.indices("s.x"), [0, 1, 3, 4])
    assert layout.labels()[-1] == "z"


# Vectors inside of mappings


def test_a_vector_inside_keeps_its_names():
    inner = fl.ComponentVector(np.arange(4.0), fl.Layout({"a": (), "b": fl.Layout({"w": ()}).stack(3)}))
    tied = fl.ComponentVector(np.ones(2), fl.Layout({"x": (2,), "y": (2,)}).tie({"y": "x"}))
    v = fl.ComponentVector.of({"first": 0.5, "inner": inner, "deep": {"er": tied}})
    assert v.layout == fl.Layout({"first": (), "inner": inner.layout, "deep": {"er": tied.layout}})
    np.testing.assert_array_equal(v.inner.b.w, [1.0, 2.0, 3.0])
    np.testing.assert_array_equal(v.deep.er.data, tied.data)
    assert fl.Layout.of(tied) == tied.layout
    assert fl.ComponentVector.of({**v.to_dict(), "inner": inner}).layout["inner"] == inner.layout


@pytest.mark.parametrize(
    ("part", "found"),
    [
        ([{"a": 1.0}, {"a": 2.0}], "found a list of mappings; give each a name"),
        (({"a": 1.0},), "found a list of mappings"),
        (None, "expected an array, a number or a mapping, found None"),
        ("text", "expected an array, a number or a mapping, found 'text'"),
    ],
)
def test_what_is_no_array_is_refused_with_its_path(part, found):
    with pytest.raises(TypeError, match=f"'v.w': .*{found}"):
        fl.ComponentVector.of({"v": {"w": part}})


# Without JAX

WITHOUT_JAX = """
import sys, types
import numpy as np

for name in ("jax", "jaxlib", "jaxtyping"):
    sys.modules[name] = None
for name, path in (("flatlayers", "flatlayers"), ("flatlayers.vectors", "flatlayers/vectors")):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [path]

from flatlayers.vectors.layout import Layout

layout = Layout({"a": (2,), "b": Layout({"c": ()}).stack(2), "d": (2,)}).tie({"d": "a"})
assert Layout.from_json(layout.to_json()) == layout
record = layout.unpack(np.arange(4.0))
assert record == {"a": np.arange(2.0), "b": {"c": np.arange(2.0, 4.0)}, "d": np.arange(2.0)}, record
assert repr(record.b) == "Record(c=float64[2])"
"""


def test_a_layout_takes_arrays_of_numpy_apart_without_jax():
    subprocess.run([sys.executable, "-c", WITHOUT_JAX], check=True)
