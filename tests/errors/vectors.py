"""Vectors and names."""

import types

import jax
import jax.numpy as jnp
import pytest

import flatlayers as fl
from flatlayers.vectors import parts

from .values import PS, STACKED, VECTOR


def unknown_name():
    return PS.wieght


def pattern_without_a_match():
    return VECTOR.layout.mask("*.wieght")


def reserved_name():
    return fl.ComponentVector.of({"shape": jnp.ones(2)})


def keyword():
    return fl.ComponentVector.of({"lambda": jnp.ones(2)})


def truth_value():
    return bool(VECTOR > 0)


def one_number():
    return float(VECTOR)


def list_of_names():
    return VECTOR[["a", "b"]]


def index_with_leading_axes():
    return STACKED[0]


def list_of_mappings():
    return fl.ComponentVector.of({"layers": [{"w": jnp.ones(2)}, {"w": jnp.ones(2)}]})


def two_dtypes():
    return fl.ComponentVector.of({"a": jnp.ones(2), "b": jnp.ones(2, jnp.float32)})


def integers():
    return fl.ComponentVector.of({"a": jnp.arange(2)})


def wrong_length():
    return VECTOR.layout.unpack(jnp.ones(5))


def ligature():
    return fl.ComponentVector.of({"ﬁeld": jnp.ones(2)})


def several_indices():
    return VECTOR[0, 1]


def dtype_for_a_layout():
    return fl.ComponentVector.of({"a": 1.0}, jnp.float32)


def number_for_a_path():
    return VECTOR.pick(3)


def assigned_name():
    VECTOR.a = jnp.zeros(2)


def mapping_without_a_name():
    return fl.ComponentVector.of({"a": jnp.ones(2)}, VECTOR.layout)


def series_of_many():
    pytest.importorskip("pandas")
    return STACKED.to_series()


def solution_without_states():
    return fl.solution_frame(types.SimpleNamespace(ts=None, ys=None))


def labels_of_a_large_layout():
    return fl.Layout({"a": (10**9,)}).labels()


def index_into_a_long_vector():
    layout = fl.Layout({"a": (2**31,), "b": (2,)})
    vector = fl.ComponentVector(jax.ShapeDtypeStruct((layout.length,), jnp.int8), layout)
    with jax.enable_x64(False):
        return jax.eval_shape(lambda v: v[jnp.arange(3)], vector)


def tied_group_of_a_long_vector():
    layout = fl.Layout({"a": {"u": (2,), "v": (3,)}, "b": {"u": (2,), "v": (3,)}}).tie({"b.u": "a.u"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "too_long", lambda length: True)  # there is no memory for one that is
        return fl.ComponentVector.zeros(layout).at["b"].set(0.0)
