import jax.numpy as jnp
import numpy as np
import pytest

import flatlayers as fl
from flatlayers.core.fields import Finite, Integer, checked
from flatlayers.layers.fields import Activation, AnyLayer, Exponent, Initial, Probability, Text, sequence_of


@pytest.mark.parametrize(
    "values", [[1, 2], (1, 2), range(1, 3), np.array([1, 2]), jnp.array([1, 2])], ids=repr
)
def test_a_sequence_of_any_kind_becomes_a_tuple(values):
    found = sequence_of(Integer)("indices", values)
    assert found == (1, 2)
    assert all(type(value) is int for value in found)


@pytest.mark.parametrize("values", [3, "ab", ("a",), jnp.ones((2, 2))], ids=repr)
def test_what_is_no_sequence_of_numbers(values):
    with pytest.raises(TypeError, match="places: expected a tuple, each part a finite number, found"):
        sequence_of(Finite)("places", values)


def test_a_layer_is_no_function_but_a_function_a_layer():
    for annotation in (Activation, Initial):
        assert checked(annotation, "f", jnp.tanh) is jnp.tanh
        for wrong in (fl.Dense(3, 2), fl.Dense, 3):
            with pytest.raises(TypeError, match="f: expected an"):
                checked(annotation, "f", wrong)
    assert checked(AnyLayer, "layer", jnp.sin) == fl.WrappedFunction(jnp.sin)
    with pytest.raises(TypeError, match="layer: expected a layer or a function, found 3"):
        checked(AnyLayer, "layer", 3)


def test_numbers_in_range():
    assert (checked(Probability, "p", 1), checked(Exponent, "p", 1)) == (1.0, 1.0)
    for annotation, wrong in ((Probability, 1.1), (Exponent, 0.5), (Exponent, float("inf"))):
        with pytest.raises(ValueError, match="p: expected a .*, found"):
            checked(annotation, "p", wrong)
    with pytest.raises(TypeError, match="name: expected a string, found 3"):
        checked(Text, "name", 3)
