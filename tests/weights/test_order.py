"""Names by order, where there are none: each layer has to fit, and equal ones to be numbered."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flatlayers as fl


def taken(layer, state_dict):
    ps = fl.ComponentVector.zeros(layer.layout, jnp.float32)
    return fl.from_torch(state_dict, layer, ps, fl.initial_states(jax.random.key(0), layer))[0]


def dense(*prefixes, shape=(2, 2)):
    """The arrays of as many layers, each full of its number."""
    found = {}
    for i, prefix in enumerate(prefixes):
        found |= {
            f"{prefix}.weight": np.full(shape, i, np.float32),
            f"{prefix}.bias": np.full(shape[:1], i, np.float32),
        }
    return found


@pytest.mark.parametrize(
    "prefixes",
    [
        ("0", "2", "4"),
        ("fc1", "fc2", "fc10"),
        ("net.0.fc", "net.1.fc", "net.2.fc"),
        ("a.0.fc1", "a.0.fc2", "a.1.fc1"),
    ],
)
def test_numbers_say_the_order(prefixes):
    layer = fl.Chain(*[fl.Dense(2, 2)] * 3)
    ps = taken(layer, dense(*prefixes))
    assert [float(ps[f"layer_{i}.bias"][0]) for i in range(3)] == [0, 1, 2]


@pytest.mark.parametrize("prefixes", [("decoder", "encoder"), ("q", "k"), ("fc2", "fc1"), ("a.1.x", "a.0.x")])
def test_equal_shapes_without_numbers_in_order_are_refused(prefixes):
    layer = fl.Chain(fl.Dense(2, 2), fl.Dense(2, 2))
    with pytest.raises(
        fl.LayoutMismatchError, match="layers of equal shapes could be in any order"
    ) as caught:
        taken(layer, dense(*prefixes))
    assert caught.value.lines == [f"layer_{i} (Dense): perhaps {prefixes[i]!r}" for i in range(2)]


def test_our_own_names_are_certain():
    layer = fl.Chain(encoder=fl.Dense(2, 2), decoder=fl.Dense(2, 2))
    ps = taken(layer, dense("decoder", "encoder"))  # in another order
    assert (float(ps.encoder.bias[0]), float(ps.decoder.bias[0])) == (1, 0)


def test_different_shapes_need_no_numbers():
    layer = fl.Chain(fl.Dense(2, 3), fl.Dense(3, 1))
    given = dense("encoder", shape=(3, 2)) | dense("head", shape=(1, 3))
    assert taken(layer, given).size == 13


def test_another_order_is_refused_even_if_shapes_tell():
    layer = fl.Chain(fl.Dense(2, 3), fl.Dense(3, 1))
    given = dense("head", shape=(1, 3)) | dense("encoder", shape=(3, 2))
    with pytest.raises(fl.LayoutMismatchError, match=r"layer_0 \(Dense\): expected weight: \(3, 2\), bias"):
        taken(layer, given)


def test_what_is_left_over_is_named():
    layer = fl.Chain(fl.Dense(2, 2, use_bias=False), jnp.tanh)
    with pytest.raises(fl.LayoutMismatchError, match="expected the arrays of this model") as caught:
        taken(layer, dense("fc"))
    assert caught.value.lines == ["fc.bias: (2,) is left over"]
    with pytest.raises(fl.LayoutMismatchError) as caught:
        taken(fl.Chain(fl.Dense(2, 2)), dense("a.0", "a.1"))
    assert caught.value.lines == ["a.1.weight: (2, 2) is left over", "a.1.bias: (2,) is left over"]
    with pytest.raises(fl.LayoutMismatchError) as caught:
        taken(fl.Chain(fl.Dense(2, 2), fl.Dense(2, 2)), dense("a.0"))
    assert caught.value.lines == ["layer_1 (Dense): expected weight: (2, 2), bias: (2,) next, found none"]


def test_a_layer_without_arrays_takes_none():
    layer = fl.Chain(fl.BatchNorm(2, affine=False, track_stats=False), fl.Dropout(0.5), fl.Dense(2, 2))
    assert float(taken(layer, dense("5")).layer_2.bias[0]) == 0
    assert taken(fl.Chain(jnp.tanh), {}).size == 0
