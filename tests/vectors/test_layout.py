import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import flatlayers as fl
from flatlayers.vectors.names import RESERVED_NAMES
from tests.helpers import assert_same


NESTED = {"weight": (4, 2), "bias": (4,), "inner": {"w": (2, 3), "gain": ()}}

names = st.text("abcdefgh_", min_size=1, max_size=4).filter(
    lambda s: s.isidentifier() and not s.startswith("_") and s not in RESERVED_NAMES
)
shapes = st.lists(st.integers(0, 3), max_size=3).map(tuple)


def groups(children):
    layouts = st.dictionaries(names, children, max_size=3).map(fl.Layout)
    return layouts | st.tuples(layouts, st.integers(0, 3)).map(lambda pair: pair[0].stack(pair[1]))


layouts = st.dictionaries(names, st.recursive(shapes, groups, max_leaves=8), max_size=4).map(fl.Layout)


def tree_of(layout, lead=()):
    """A tree with the shapes of the views, every number different."""
    rng = np.random.default_rng(0)
    leaves = {path: rng.normal(size=(*lead, *shape)) for path, shape in layout.view_shapes.items()}
    return layout.nest(leaves).to_dict()


@settings(deadline=None, max_examples=30)
@given(layouts, st.sampled_from([(), (2,), (2, 3)]))
def test_unpack_inverts_pack(layout, lead):
    tree = tree_of(layout, lead)
    vector = fl.ComponentVector.of(tree, layout, float)
    assert vector.layout == layout
    assert vector.unpack() == tree
    assert fl.Record(vector.to_dict()) == tree
    if layout.slots():
        assert vector.shape == (*lead, layout.length)


@settings(deadline=None, max_examples=30)
@given(layouts)
def test_json_round_trip(layout):
    leaves = [path for path, shape in layout.view_shapes.items() if shape == ()]
    layout = layout.tie(dict.fromkeys(leaves[1:], leaves[0])) if leaves else layout
    copy = fl.Layout.from_json(layout.to_json())
    assert copy == layout
    assert hash(copy) == hash(layout)
    assert copy.diff(layout) == []


@settings(deadline=None, max_examples=30)
@given(layouts)
def test_views_labels_indices_and_masks_agree(layout):
    vector = fl.ComponentVector.of(tree_of(layout), layout, float)
    labels = layout.labels()
    assert len(labels) == len(set(labels)) == layout.length
    covered = np.zeros(layout.length, int)
    for path, slot in layout.slots():
        view = np.asarray(vector[path])
        indices = layout.indices(path)
        np.testing.assert_array_equal(view.ravel(), np.asarray(vector)[indices])
        np.testing.assert_array_equal(np.flatnonzero(layout.mask(path)), np.sort(indices))
        assert slot.size == np.prod(slot.shape, dtype=int)
        covered[indices] += 1
        if not slot.copies and slot.shape:
            assert [labels[i] for i in indices] == [
                f"{path}[{','.join(map(str, index))}]" for index in np.ndindex(slot.shape)
            ]
    assert (covered == 1).all()
    for path in layout.groups:
        if path:
            assert_same(vector[path].data, np.asarray(vector)[layout.indices(path)])
            assert vector[path].layout == layout[path]


def test_places():
    layout = fl.Layout(NESTED)
    assert layout.length == 19
    assert layout.names == ("weight", "bias", "inner")
    assert layout["inner.w"] == fl.Slot(12, (2, 3), 6)
    assert layout["inner", "gain"].offset == 18
    assert layout["inner"] == fl.Layout({"w": (2, 3), "gain": ()})
    assert [path for path, _ in layout.slots()] == ["weight", "bias", "inner.w", "inner.gain"]
    assert layout.labels()[-3:] == ["inner.w[1,1]", "inner.w[1,2]", "inner.gain"]
    assert "inner.w" in layout
    assert "inner.x" not in layout


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


# Stacks


def test_stack_keeps_each_copy_together():
    base = fl.Layout({"w": (2, 3), "b": (2,)})
    stack = base.stack(4)
    data = jnp.arange(32.0)
    vector = fl.ComponentVector(data, stack)
    np.testing.assert_array_equal(vector.w, data.reshape(4, 8)[:, 0:6].reshape(4, 2, 3))
    np.testing.assert_array_equal(vector.b, data.reshape(4, 8)[:, 6:8])
    assert_same(vector.unpack().b, vector.b)
    slot = stack["b"]
    assert (slot.offset, slot.shape, slot.size, slot.stride) == (6, (2,), 2, 8)
    assert stack.labels()[8] == "[1].w[0,0]"
    assert fl.Layout({"blocks": stack}).labels()[8] == "blocks[1].w[0,0]"


def test_stacks_nest():
    layout = fl.Layout({"blocks": fl.Layout({"cells": fl.Layout({"w": (2,)}).stack(3), "b": ()}).stack(2)})
    assert layout.length == 2 * (3 * 2 + 1)
    slot = layout["blocks.cells.w"]
    assert (slot.copies, slot.strides) == ((2, 3), (7, 2))
    vector = fl.ComponentVector(jnp.arange(14.0), layout)
    np.testing.assert_array_equal(
        vector.blocks.cells.w, jnp.arange(14.0).reshape(2, 7)[:, :6].reshape(2, 3, 2)
    )
    assert layout.labels()[9] == "blocks[1].cells[1].w[0]"
    assert layout["blocks.cells"].length == 12


# Ties


def autoencoder():
    return fl.Layout(
        {"encoder": {"weight": (4, 2), "bias": (4,)}, "decoder": {"weight": (4, 2), "bias": (2,)}}
    )


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


def test_pack_with_two_values_for_one_place():
    layout = autoencoder().tie({"decoder.weight": "encoder.weight"})
    tree = tree_of(autoencoder())
    with pytest.raises(ValueError, match=r"'decoder.weight' and 'encoder.weight'"):
        fl.ComponentVector.of(tree, layout)
    tree["decoder"]["weight"] = tree["encoder"]["weight"].copy()
    assert fl.ComponentVector.of(tree, layout).unpack() == tree


# Masks


def test_masks():
    layout = fl.Layout({"encoder": {"weight": (2,), "bias": ()}, "decoder": {"bias": (2,)}})
    assert layout.mask("*.bias").tolist() == [False, False, True, True, True]
    assert layout.mask("encoder").tolist() == [True, True, True, False, False]
    assert layout.mask("encoder.*", "decoder.bias").all()
    assert not layout.mask().any()
    with pytest.raises(KeyError, match="'encodr' matches nothing.*nearest: encoder"):
        layout.mask("encodr")


# Bad input


@pytest.mark.parametrize("name", ["_a", "a.b", "1a", "", "a b", *sorted(RESERVED_NAMES)])
def test_refuses_bad_and_reserved_names(name):
    with pytest.raises(ValueError, match=repr(name)):
        fl.Layout({"inner": {name: (2,)}})


def test_reserved_names_are_exactly_the_attributes_of_a_vector_and_the_methods_of_a_mapping():
    attributes = {name for name in dir(fl.ComponentVector) if not name.startswith("_")}
    assert attributes | {"keys", "values", "items", "get"} == RESERVED_NAMES


def test_refuses_bad_shapes():
    with pytest.raises(TypeError, match="'w'.*2.5"):
        fl.Layout({"w": (2.5,)})
    with pytest.raises(ValueError, match="'w'.*-1"):
        fl.Layout({"w": (-1,)})
    with pytest.raises(TypeError, match="strings"):
        fl.Layout({3: (2,)})


def test_pack_says_what_is_wrong():
    layout = fl.Layout(NESTED)
    good = tree_of(layout)
    with pytest.raises(KeyError, match=r"'inner.gain'"):
        fl.ComponentVector.of({**good, "inner": {"w": good["inner"]["w"]}}, layout)
    with pytest.raises(KeyError, match=r"'inner.gian'.*nearest: gain"):
        fl.ComponentVector.of({**good, "inner": {**good["inner"], "gian": 1.0}}, layout)
    with pytest.raises(ValueError, match=r"\(4, 2\) for 'weight'.*\(2, 4\)"):
        fl.ComponentVector.of({**good, "weight": np.ones((2, 4))}, layout)
    with pytest.raises(ValueError, match=r"'bias'"):
        fl.ComponentVector.of({**good, "bias": np.ones((3, 4))}, layout)
    with pytest.raises(TypeError, match=r"float64 for 'weight' and float32 for 'bias'"):
        fl.ComponentVector.of({**good, "bias": np.ones(4, np.float32)}, layout)
    with pytest.raises(TypeError, match="'bias', found int"):
        fl.ComponentVector.of({**good, "bias": np.ones(4, int)}, layout)
    with pytest.raises(TypeError, match="'bias', found bool"):
        fl.ComponentVector.of({**good, "bias": np.ones(4, bool)}, layout)
    with pytest.raises(TypeError, match="'inner'"):
        fl.ComponentVector.of({**good, "inner": 3.0}, layout)
    assert fl.ComponentVector.of({**good, "bias": np.ones(4, int)}, layout, jnp.float32).dtype == jnp.float32


def test_pack_dtypes():
    assert fl.ComponentVector.of({"a": 1, "b": [1.0, 2.0]}).dtype == jnp.float64
    assert fl.ComponentVector.of({"a": 1.0, "b": jnp.ones(2, jnp.float32)}).dtype == jnp.float32
    assert fl.ComponentVector.of({"a": jnp.ones(2, jnp.bfloat16)}).dtype == jnp.bfloat16
    assert fl.ComponentVector.of({}, fl.Layout({})).shape == (0,)


def test_vectors_of_the_wrong_length():
    layout = fl.Layout({"w": (3,)})
    for data in (jnp.ones(4), jnp.ones((3, 1)), jnp.ones(())):
        with pytest.raises(ValueError, match=r"\(..., 3\), found shape"):
            fl.ComponentVector(data, layout)
        with pytest.raises(ValueError, match=r"\(..., 3\), found shape"):
            layout.unpack(data)


def test_unknown_paths_come_with_the_nearest():
    layout = fl.Layout(NESTED)
    with pytest.raises(KeyError, match="nearest: weight"):
        layout["wieght"]
    with pytest.raises(KeyError, match="'inner.gian'.*nearest: gain"):
        layout["inner.gian"]
    with pytest.raises(KeyError):
        layout["weight.x"]
    with pytest.raises(TypeError, match="a path is"):
        layout[3]


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


def test_numbers_of_numpy_are_copied():
    layout = fl.Layout({"a": (2,)})
    for make in (
        lambda a: fl.ComponentVector(a, layout),
        lambda a: fl.ComponentVector.of({"a": a}, layout),
        lambda a: fl.ComponentVector.of({"a": a}),
        lambda a: fl.ComponentVector.zeros(layout).replace(a=a),
        lambda a: fl.ComponentVector.zeros(layout).at["a"].set(a),
    ):
        numbers = np.zeros(2)
        v = make(numbers)
        numbers[:] = 7.0
        np.testing.assert_array_equal(v.data, [0.0, 0.0])
    numbers = np.zeros((2, 2))
    m = fl.ComponentMatrix(numbers, layout, layout)
    numbers[:] = 7.0
    np.testing.assert_array_equal(m.data, 0.0)


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
