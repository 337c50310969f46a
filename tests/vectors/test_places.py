import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

import flatlayers as fl
from tests.helpers import assert_same
from tests.vectors.layouts import NESTED, layouts, tree_of


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


@pytest.mark.long
@settings(deadline=None, max_examples=30)
@given(layouts)
def test_views_labels_indices_and_masks_agree(layout):
    vector = fl.ComponentVector.of(tree_of(layout), layout, float)
    labels = layout.labels()
    assert len(labels) == len(set(labels)) == layout.length
    covered = np.zeros(layout.length, int)
    # One program, where each view would be several.
    views = jax.jit(lambda v: {path: v[path] for path in (*layout.view_shapes, *layout.groups) if path})(
        vector
    )
    for path, slot in layout.slots():
        view = np.asarray(views[path])
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
            assert_same(views[path].data, np.asarray(vector)[layout.indices(path)])
            assert views[path].layout == layout[path]


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


def test_masks():
    layout = fl.Layout({"encoder": {"weight": (2,), "bias": ()}, "decoder": {"bias": (2,)}})
    assert layout.mask("*.bias").tolist() == [False, False, True, True, True]
    assert layout.mask("encoder").tolist() == [True, True, True, False, False]
    assert layout.mask("encoder.*", "decoder.bias").all()
    assert not layout.mask().any()
    with pytest.raises(KeyError, match="'encodr' matches nothing.*nearest: encoder"):
        layout.mask("encodr")


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


def test_numbers_by_name():
    layout = fl.Layout(NESTED)
    found = layout.values({"weight": 0.1, "inner.*": 2}, default=0)
    assert found.dtype == np.float32
    expected = np.where(layout.mask("weight"), 0.1, 0) + np.where(layout.mask("inner"), 2, 0)
    np.testing.assert_array_equal(found, expected.astype(np.float32))
    groups = layout.values({"inner": 1}, default=0, dtype=int)
    assert_same(groups, layout.mask("inner").astype(int))
    assert layout.values({"*": 0.1}, dtype=float)[0] == 0.1
    assert fl.Layout({}).values({}).shape == (0,)
    stack = fl.Layout({"blocks": fl.Layout({"w": (2,), "b": ()}).stack(2)})
    assert_same(stack.values({"*.w": 1.0, "*.b": 2.0}, dtype=float), np.array([1.0, 1, 2, 1, 1, 2]))


def test_numbers_that_are_named_twice_or_not_at_all():
    layout = fl.Layout({"a": {"weight": (2,), "bias": (2,)}, "gain": ()})
    with pytest.raises(ValueError, match=r"one pattern for 'a.bias\[0\]', found 'a' and '\*.bias'"):
        layout.values({"a": 1.0, "*.bias": 2.0}, default=0.0)
    with pytest.raises(ValueError, match=r"a pattern or a default for 'a.bias\[0\]', found none"):
        layout.values({"*.weight": 1.0})
    with pytest.raises(KeyError, match="the pattern 'b' matches nothing"):
        layout.values({"b": 1.0}, default=0.0)
    for number in (np.ones(2), "1", None):
        with pytest.raises(TypeError, match="expected a number for 'gain'"):
            layout.values({"gain": number}, default=0.0)


def test_numbers_of_tied_names():
    layout = fl.Layout({"a": (2,), "b": (2,), "c": ()}).tie({"b": "a"})
    for name in ("a", "b"):
        assert_same(layout.values({name: 1.0}, default=0.0, dtype=float), np.array([1.0, 1, 0]))
    with pytest.raises(ValueError, match=r"one pattern for 'a\[0\]', found 'a' and 'b'"):
        layout.values({"a": 1.0, "b": 2.0}, default=0.0)
