import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flatlayers as fl
from tests.helpers import assert_same


def vector(names, start=0.0, dtype=None):
    layout = names if isinstance(names, fl.Layout) else fl.Layout(names)
    return fl.ComponentVector(start + jnp.arange(layout.length, dtype=dtype or float), layout)


OLD = {"hidden": {"weight": (3, 2), "bias": (3,)}, "gain": ()}


def test_the_same_names_are_taken_over():
    old, into = vector(OLD), vector({"gain": (), "hidden": {"bias": (3,), "weight": (3, 2)}}, 100.0)
    new, lines = fl.transfer(old, into)
    assert lines == []
    assert new.layout == into.layout
    for path in old.layout.view_shapes:
        assert_same(new[path], old[path])
    # `into` is as it was.
    assert_same(into.data, 100.0 + jnp.arange(10.0))


def test_what_is_new_keeps_its_numbers_or_is_refused():
    old, into = vector(OLD), vector({**OLD, "more": (2,)}, 100.0)
    new, lines = fl.transfer(old, into)
    assert_same(new.data, jnp.asarray([*range(10), 110.0, 111.0]))
    assert lines == ["more: (2,) is new"]
    with pytest.raises(fl.LayoutMismatchError) as info:
        fl.transfer(old, into, missing="error")
    assert info.value.lines == ["more: (2,) is new"]


def test_what_is_gone_is_refused_or_left():
    old, into = vector(OLD), vector({"gain": ()}, 100.0)
    with pytest.raises(fl.LayoutMismatchError) as info:
        fl.transfer(old, into)
    assert info.value.lines == ["hidden.weight: (3, 2) is gone", "hidden.bias: (3,) is gone"]
    new, lines = fl.transfer(old, into, gone="ignore")
    assert new.data.tolist() == [9.0]
    assert lines == info.value.lines


def test_other_shapes():
    old, into = vector(OLD), vector({"hidden": {"weight": (2, 4), "bias": (5,)}, "gain": ()}, 100.0)
    lines = ["hidden.weight: (3, 2) became (2, 4)", "hidden.bias: (3,) became (5,)"]
    with pytest.raises(fl.LayoutMismatchError) as info:
        fl.transfer(old, into)
    assert info.value.lines == lines
    kept, found = fl.transfer(old, into, changed="keep")
    assert found == lines
    assert_same(kept.hidden.data, into.hidden.data)
    assert float(kept.gain) == 9.0
    corner, found = fl.transfer(old, into, changed="corner")
    assert found == lines
    np.testing.assert_array_equal(corner.hidden.weight, [[0, 1, 102, 103], [2, 3, 106, 107]])
    np.testing.assert_array_equal(corner.hidden.bias, [6, 7, 8, 111, 112])
    # Another number of axes has no corner.
    with pytest.raises(fl.LayoutMismatchError, match=r"gain: \(\) became \(1,\)"):
        fl.transfer(old, vector({**OLD, "gain": (1,)}), changed="corner")
    assert fl.transfer(old, vector({**OLD, "gain": (1,)}), changed="keep")[1] == ["gain: () became (1,)"]


def test_new_names_of_leaves_and_groups():
    old, into = (
        vector(OLD),
        vector({"encoder": {"dense": {"weight": (3, 2), "shift": (3,)}}, "gain": ()}, 100.0),
    )
    rename = {"hidden": "encoder.dense", "hidden.bias": "encoder.dense.shift"}
    new, lines = fl.transfer(old, into, rename=rename)
    assert lines == []
    assert_same(new.data, old.data)
    two = vector({"a": (), "b": ()})
    swapped, _ = fl.transfer(two, two, rename={"a": "b", "b": "a"})
    assert swapped.data.tolist() == [1.0, 0.0]
    with pytest.raises(KeyError, match="no name 'hiden'; the nearest: hidden"):
        fl.transfer(old, into, rename={"hiden": "x"})
    with pytest.raises(ValueError, match="different new names, found 'gain' twice"):
        fl.transfer(old, into, rename={"hidden.bias": "gain"})


def test_a_whole_vector_that_became_a_group_and_back():
    whole, part = vector(OLD), vector({"encoder": OLD, "readout": (2,)}, 100.0)
    new, lines = fl.transfer(whole, part, rename={"": "encoder"})
    assert new.data.tolist() == [*range(10), 110.0, 111.0]
    assert lines == ["readout: (2,) is new"]
    back, lines = fl.transfer(part, whole, rename={"encoder": ""}, gone="ignore")
    assert back.data.tolist() == [100.0 + i for i in range(10)]
    assert lines == ["readout: (2,) is gone"]
    # The longest name is the one that counts, and the path in front may have several names.
    into = vector({"gain": (), "a": {"b": {"hidden": OLD["hidden"]}}}, 100.0)
    new, lines = fl.transfer(whole, into, rename={"": "a.b", "gain": "gain"})
    assert new.data.tolist() == [9.0, *range(9)]
    assert lines == []
    assert_same(fl.transfer(whole, whole, rename={"": ""})[0], whole)
    with pytest.raises(ValueError, match="a name for the leaf 'gain', found ''"):
        fl.transfer(whole, part, rename={"gain": ""})


def test_ties():
    free = fl.Layout({"a": (2,), "b": (2,), "c": (2,)})
    tied = free.tie({"b": "a"})
    # From one place to two.
    new, lines = fl.transfer(vector(tied), vector(free, 100.0))
    assert (new.data.tolist(), lines) == ([0, 1, 0, 1, 2, 3], [])
    # From one place to one, and to the one that only the tied name has numbers for.
    new, lines = fl.transfer(vector(tied), vector(tied, 100.0))
    assert (new.data.tolist(), lines) == ([0, 1, 2, 3], [])
    new, lines = fl.transfer(vector({"b": (2,)}), vector(tied, 100.0))
    assert (new.data.tolist(), lines) == ([0, 1, 102, 103], ["c: (2,) is new"])
    # From two places to one.
    with pytest.raises(fl.LayoutMismatchError) as info:
        fl.transfer(vector(free), vector(tied))
    assert info.value.lines == ["b: a place of its own became tied to a"]
    new, lines = fl.transfer(vector(free), vector(tied, 100.0), changed="keep")
    assert (new.data.tolist(), lines) == ([0, 1, 4, 5], info.value.lines)


def test_stacks_and_leading_axes():
    block = fl.Layout({"w": (2,), "b": ()})
    old, into = fl.Layout({"s": block.stack(2)}), fl.Layout({"s": block.stack(3)})
    new, lines = fl.transfer(vector(old), vector(into, 100.0), changed="corner")
    assert new.data.tolist() == [0, 1, 2, 3, 4, 5, 106, 107, 108]
    assert lines == ["s.w: (2, 2) became (3, 2)", "s.b: (2,) became (3,)"]
    many = [
        fl.ComponentVector(jnp.stack([v.data, -v.data]), v.layout) for v in (vector(old), vector(into, 100.0))
    ]
    both, _ = fl.transfer(*many, changed="corner")
    assert_same(both.data[0], new.data)
    assert_same(both.data[1], -new.data)
    with pytest.raises(ValueError, match="same leading axes"):
        fl.transfer(many[0], vector(into))


def test_dtypes_are_asked_for():
    old, into = vector(OLD, dtype=jnp.float32), vector({**OLD, "x": ()}, 100.0)
    with pytest.raises(TypeError, match="expected one dtype, found float32 and float64"):
        fl.transfer(old, into)
    for dtype in (jnp.float64, jnp.bfloat16, "float32"):
        new, _ = fl.transfer(old, into, dtype=dtype)
        assert new.dtype == jnp.dtype(dtype)
        assert float(new.gain) == 9.0
    with jax.enable_x64(False), pytest.raises(TypeError, match="found float64, which needs x64"):
        fl.transfer(old, old, dtype="float64")


@pytest.mark.parametrize("option", ["missing", "changed", "gone"])
def test_unknown_options(option):
    with pytest.raises(ValueError, match=f"{option}: expected one of .*found 'drop'"):
        fl.transfer(vector(OLD), vector(OLD), **{option: "drop"})
