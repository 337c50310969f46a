"""Parts of layers that are compiled once."""

import types

import jax
import jax.numpy as jnp

import flatlayers as fl
from flatlayers.core.data_axis import current_data_axis, data_axis
from flatlayers.layers.compiled import compiled_once


TRACED = []


def scaled(layer, factor, x, ps):
    TRACED.append(current_data_axis())
    return factor * layer.in_dims * x + ps.shift


def test_equal_options_are_traced_once_for_each_type_and_axis():
    TRACED.clear()
    ps = fl.Record(shift=jnp.array(1.0))
    for n in (2, 2, 3):
        assert compiled_once(scaled, (fl.Dense(n, 1), 2.0), jnp.array(0.5), ps) == n + 1
    assert len(TRACED) == 2
    compiled_once(scaled, (fl.Dense(3, 1), 2.0), jnp.ones(4), ps)
    assert len(TRACED) == 3
    with data_axis("batch"):
        compiled_once(scaled, (fl.Dense(3, 1), 2.0), jnp.ones(4), ps)
    assert TRACED == [None, None, None, "batch"]


def test_nothing_is_left_of_it_in_a_program():
    ps = fl.Record(shift=jnp.array(1.0))

    def f(x):
        return compiled_once(scaled, (fl.Dense(2, 1), 2.0), x, ps)

    # Not in what is compiled: newer JAX keeps it in a jaxpr.
    assert "call @" not in jax.jit(f).lower(jnp.ones(4)).as_text()
    assert jax.grad(f)(1.0) == 4.0


def test_parameters_that_are_no_arrays_are_taken_as_they_are():
    ps = types.SimpleNamespace(shift=1.0)
    assert compiled_once(scaled, (fl.Dense(2, 1), 2.0), jnp.array(0.5), ps) == 3.0
