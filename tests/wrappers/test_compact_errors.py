"""What `fl.compact` refuses: fields, states, names and uses, and how its errors name the layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flatlayers as fl
from tests.wrappers.compacts import ONES, called, compact


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"w": np.ones(2)}, TypeError, r"<lambda>.w: .*hold no arrays; .*fl.Param.*fl.State"),
        ({"w": jnp.ones(2)}, TypeError, r"<lambda>.w: .*hold no arrays; .*fl.Param.*fl.State"),
        ({"w": (1, jnp.ones(2))}, TypeError, "hold no arrays"),
        ({"w": {1, 2}}, TypeError, r"<lambda>.w: expected a value with a hash, found {1, 2}"),
        ({"w": (fl.Dense(1, 1), 3)}, TypeError, "expected a layer or a function, found 3"),
        ({"w": (fl.Param((), ONES), 3)}, TypeError, r"<lambda>.w: expected a keyword .* each fl.Param"),
        ({"w": {"a": fl.State(1)}}, TypeError, r"<lambda>.w: expected a keyword .* each fl.State"),
        ({"w": fl.Stacked(fl.Dense(1, 1), 2)}, TypeError, "tuples and dicts of layers, found Stacked"),
        ({"data": fl.Dense(1, 1)}, ValueError, "'data' is reserved"),
        ({"data": fl.State(1)}, ValueError, "'data' is reserved"),
        ({"_w": 3}, ValueError, "leading underscore, found '_w'"),
    ],
)
def test_wrong_fields(fields, error, message):
    with pytest.raises(error, match=message):
        compact(**fields)


def test_names_of_hyper_parameters_are_free():
    y, _ = called(compact(lambda m, x: m.size * m.states, size=3, states=2, layout="a"))
    assert y == 6


def test_wrong_uses_of_the_decorator():
    with pytest.raises(TypeError, match=r"keyword arguments alone, as in `@fl.compact\(w1=.*found Dense"):
        fl.compact(fl.Dense(1, 2))
    with pytest.raises(TypeError, match="keyword arguments alone"):
        fl.compact(lambda m, x: x)
    with pytest.raises(TypeError, match="expected a function `f"):
        fl.compact()(3)


@pytest.mark.parametrize("init", [[1.0, 2.0], {"a": 1}, object(), fl.Dense(1, 1), jax.random.key(0)])
def test_wrong_states(init):
    with pytest.raises(TypeError, match="State: expected an array, a number, a flag or a function of a key"):
        fl.State(init)


def assign(name, value=1):
    return lambda m, x: setattr(m, name, value)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (assign("cuont"), "<lambda>: cannot assign 'cuont', which is no state; the states are: count, rate;"),
        (assign("w"), "cannot assign 'w'"),
        (assign("scale"), "cannot assign 'scale'"),
        (assign("size"), "cannot assign 'size'"),
        (assign("_values"), "cannot assign '_values'"),
        (lambda m, x: m.cuont, "<lambda>: no name 'cuont'; the nearest: count"),
        (lambda m, x: delattr(m, "count"), "count"),
    ],
)
def test_wrong_names_in_the_function(function, message):
    layer = compact(
        function,
        w=fl.Dense(2, 2),
        scale=fl.Param((), ONES),
        size=3,
        count=fl.State(0),
        rate=fl.State(1.0),
    )
    with pytest.raises(AttributeError, match=message):
        called(layer)


def test_assigning_where_there_are_no_states():
    with pytest.raises(AttributeError, match=r"states are: none; declare it by `count=fl.State\(...\)`"):
        called(compact(assign("count")))


def test_errors_name_the_path_of_the_layer():
    def outer(m, x):
        return m.blocks["a"][1](m.blocks.a[0](x))

    layer = compact(outer, blocks={"a": (fl.Dense(2, 3), fl.Dense(2, 3))})
    with pytest.raises(ValueError, match=r"expected x of shape \(..., 2\)") as info:
        called(fl.Chain(fl.NoOpLayer(), layer))
    (note,) = info.value.__notes__
    assert "in the layer layer_1.blocks.a.layer_1: Dense(2, 3)\n  called with x: float64[3]" in note
    with pytest.raises(ZeroDivisionError) as info:
        called(fl.Chain(fl.NoOpLayer(), compact(lambda m, x: 1 / 0, size=3)))
    assert "in the layer layer_1: <lambda>(size=3)" in info.value.__notes__[0]
