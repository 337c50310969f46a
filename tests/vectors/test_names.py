import dataclasses

import jax.numpy as jnp
import pytest

import flatlayers as fl
from flatlayers.vectors.names import RESERVED_NAMES, describe


@pytest.mark.parametrize("name", ["_a", "a.b", "1a", "", "a b", *sorted(RESERVED_NAMES)])
def test_refuses_bad_and_reserved_names(name):
    with pytest.raises(ValueError, match=repr(name)):
        fl.Layout({"inner": {name: (2,)}})


def test_reserved_names_are_exactly_the_attributes_of_a_vector_and_the_methods_of_a_mapping():
    attributes = {name for name in dir(fl.ComponentVector) if not name.startswith("_")}
    assert attributes | {"keys", "values", "items", "get"} == RESERVED_NAMES


def test_values_are_described_by_their_parts():
    @dataclasses.dataclass
    class Pair:
        first: object
        second: object

    number = jnp.ones((2, 3), jnp.float32)
    assert describe({"a": number, "b": [1.0, None]}) == "{a: float32[2,3], b: [1.0, None]}"
    assert describe((fl.ComponentVector.of({"a": number}),)) == "(ComponentVector(float32[6]))"
    assert describe(Pair(number, describe)) == "Pair(first: float32[2,3], second: function)"
    assert describe(Pair) == "type"
