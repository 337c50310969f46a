import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import flatlayers as fl
from tests.helpers import assert_same
from tests.vectors.layouts import NESTED, autoencoder, layouts, tree_of


@pytest.mark.long
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


def test_pack_with_two_values_for_one_place():
    layout = autoencoder().tie({"decoder.weight": "encoder.weight"})
    tree = tree_of(autoencoder())
    with pytest.raises(ValueError, match=r"'decoder.weight' and 'encoder.weight'"):
        fl.ComponentVector.of(tree, layout)
    tree["decoder"]["weight"] = tree["encoder"]["weight"].copy()
    assert fl.ComponentVector.of(tree, layout).unpack() == tree


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


def test_stacks_without_leaves_keep_the_dtype():
    layout = fl.Layout({"o": (2, 2), "b": fl.Layout({"w": (2,)}).stack(2)}).tie({"b.w": "o"})
    w = jnp.ones((2, 2), jnp.float32)
    assert fl.ComponentVector.of({"o": w, "b": {"w": w}}, layout).dtype == jnp.float32
    traced = jax.jit(lambda a, b: fl.ComponentVector.of({"o": a, "b": {"w": b}}, layout).data)(w, 2 * w)
    assert_same(traced, w.ravel())


def test_a_layout_in_the_place_of_a_dtype_says_so():
    layout = fl.Layout({"a": (), "b": (2,)})
    assert fl.ComponentVector.of({"b": [2, 3], "a": 1}, layout, int).data.tolist() == [1, 2, 3]
    assert fl.ComponentVector.of({"a": 1.0}, dtype=jnp.float32).dtype == jnp.float32
    with pytest.raises(TypeError, match="expected a Layout, found .*; a dtype is `dtype=`"):
        fl.ComponentVector.of({"a": 1.0}, float)
