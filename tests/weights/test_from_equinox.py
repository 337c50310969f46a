"""Equinox modules as layers: their numbers are the vector, the rest is part of the layer."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flatlayers as fl
from tests.helpers import assert_close, assert_same, counting_jit


KEY = jax.random.key(1)


def perceptron(seed=1):
    return eqx.nn.MLP(3, 2, 5, 2, activation=jnp.tanh, key=jax.random.key(seed), dtype=jnp.float32)


@pytest.mark.long
def test_the_vector_is_the_arrays_of_the_module(key):
    module = perceptron()
    layer = fl.FromEquinox(module, sample_ndim=1)
    ps, st = fl.setup(key, layer)
    flat, _ = jax.flatten_util.ravel_pytree(eqx.filter(module, eqx.is_inexact_array))
    assert_same(ps.data, flat)
    assert ps.layers.layer_2.bias.shape == (2,)
    x = jax.random.normal(KEY, (4, 2, 3), jnp.float32)
    y, new = layer(x, ps, st)
    assert_close(y, jax.vmap(jax.vmap(module))(x), rtol=1e-6)
    assert new == st == fl.Record()
    assert fl.output_shape(layer, x) == (4, 2, 2)
    assert fl.parameter_length(layer) == ps.size


def test_gradients_are_those_of_the_module(key):
    module, x = perceptron(), jax.random.normal(KEY, (3,), jnp.float32)
    layer = fl.FromEquinox(module)
    ps, st = fl.setup(key, layer)
    slope = jax.grad(lambda ps: jnp.sum(layer(x, ps, st)[0] ** 2))(ps)
    expected = eqx.filter_grad(lambda module: jnp.sum(module(x) ** 2))(module)
    assert_close(slope.data, jax.flatten_util.ravel_pytree(expected)[0], rtol=1e-6)


def test_it_is_a_part_of_a_model_like_any_other(key):
    module = perceptron()
    model = fl.Chain(fl.Dense(2, 3), net=fl.FromEquinox(module, sample_ndim=1))
    ps, st = fl.setup(key, model)
    x = jnp.ones((4, 2), jnp.float32)
    expected = jax.vmap(module)(fl.Dense(2, 3)(x, ps.layer_0, {})[0])
    assert_close(model(x, ps, st)[0], expected, rtol=1e-6)
    frozen, part, frozen_st = fl.freeze_parameters(model, "net.*", ps, st)
    assert_same(frozen(x, part, frozen_st)[0], model(x, ps, st)[0])
    field = fl.NeuralODE(fl.FromEquinox(eqx.nn.Linear(2, 2, key=KEY, dtype=jnp.float32)))
    assert fl.output_shape(field, jnp.ones(2, jnp.float32)) == (2,)


def test_layers_of_equal_modules_are_equal(key):
    one, same, other = (fl.FromEquinox(perceptron(i)) for i in (1, 1, 2))
    assert one == same
    assert hash(one) == hash(same)
    assert one != other
    run, traced = counting_jit(lambda layer, x, ps: fl.stateless_apply(layer, x, ps))
    ps = fl.initial_parameters(key, one)
    x = jnp.ones(3, jnp.float32)
    run(one, x, ps)
    run(same, x, ps)
    assert len(traced) == 1
    assert repr(fl.FromEquinox(perceptron(), sample_ndim=1)) == "FromEquinox(MLP, sample_ndim=1)"
    assert str(one).startswith("FromEquinox(MLP)  # 62 parameters")
    assert one.module is fl.FromEquinox(one.module).module


class Odd(eqx.Module):
    """Names that are none of a vector, and all kinds of leaves."""

    _shift: jax.Array
    data: jax.Array
    steps: list
    table: dict
    counts: jax.Array
    fixed: np.ndarray
    rate: float
    nothing: None
    function: object = eqx.field(static=True)

    def __call__(self, x):
        kept = isinstance(self.counts, jax.Array) and isinstance(self.fixed, np.ndarray)
        assert kept
        y = self.function(x * self.data + self._shift) + self.rate * self.counts.sum().astype(x.dtype)
        return y + self.steps[0] * self.table["a"] + jnp.asarray(self.fixed, x.dtype)


def odd(**changes):
    number = jnp.asarray(2.0, jnp.float32)
    fields = {
        "_shift": number,
        "data": 2 * number,
        "steps": [3 * number],
        "table": {"a": 4 * number},
        "counts": jnp.arange(3),
        "fixed": np.array(5),
        "rate": 0.5,
        "nothing": None,
        "function": jnp.sin,
    }
    return Odd(**(fields | changes))


def test_names_that_a_vector_cannot_have_get_an_underscore(key):
    layer = fl.FromEquinox(odd())
    ps, st = fl.setup(key, layer)
    assert ps.layout.view_shapes == dict.fromkeys(("shift_", "data_", "steps.layer_0", "table.a"), ())
    x = jnp.asarray(0.3, jnp.float32)
    assert_close(layer(x, ps, st)[0], odd()(x), rtol=1e-6)
    with pytest.raises(ValueError, match="identifiers.*'a b'"):
        fl.FromEquinox(odd(table={"a b": x}))
    with pytest.raises(ValueError, match=r"expected different names, found 'table.a_' twice"):
        fl.FromEquinox(odd(table={"_a": x, "a_": x}))


@pytest.mark.long
def test_random_numbers_come_from_the_state(key):
    module = eqx.nn.Sequential([eqx.nn.Linear(3, 8, key=KEY, dtype=jnp.float32), eqx.nn.Dropout(0.5)])
    layer = fl.FromEquinox(module, sample_ndim=1, with_key=True)
    ps, st = fl.setup(key, layer)
    x = jnp.ones((50, 3), jnp.float32)
    y, new = layer(x, ps, st)
    assert_same(layer(x, ps, st)[0], y)
    assert not (layer(x, ps, new)[0] == y).all()
    # Each sample has a mask of its own, and a half is left.
    assert len({tuple(row) for row in np.asarray(y == 0)}) > 40
    assert 0.4 < float((y == 0).mean()) < 0.6
    y, same = layer(x, ps, fl.testmode(new))
    assert_close(y, jax.vmap(module.layers[0])(x), rtol=1e-6)
    assert same.key == new.key
    plain = fl.FromEquinox(module)
    with pytest.raises(RuntimeError, match="key"):
        plain(x[0], ps, fl.Record())


def test_a_tuple_has_the_arguments(key):
    cell = eqx.nn.LSTMCell(3, 4, key=KEY, dtype=jnp.float32)
    layer = fl.FromEquinox(cell, sample_ndim=1)
    ps, st = fl.setup(key, layer)
    x, h = jnp.ones((5, 3), jnp.float32), jnp.zeros((5, 4), jnp.float32)
    y, _ = layer((x, (h, h)), ps, st)
    assert_close(y, jax.vmap(cell)(x, (h, h)), rtol=1e-6)
    with pytest.raises(ValueError, match="expected x of 1 axes for a sample, behind the same axes for all"):
        layer((x, (h[0], h[0])), ps, st)


def test_other_dtypes(key):
    layer = fl.FromEquinox(eqx.nn.Linear(3, 2, key=KEY, dtype=jnp.float32))
    assert fl.initial_parameters(key, layer, jnp.float64).dtype == jnp.float64
    complex_ = fl.FromEquinox(eqx.nn.Linear(3, 2, key=KEY, dtype=jnp.complex64))
    assert fl.initial_parameters(key, complex_, jnp.complex64).dtype == jnp.complex64
    with pytest.raises(TypeError, match="complex"):
        fl.initial_parameters(key, complex_)


def test_numbers_that_are_not_known_are_no_initial_values(key):
    module = eqx.nn.Linear(2, 2, key=key)
    with pytest.raises(TypeError, match=r"numbers are known, found float\d+\[2,2\] at 'weight'"):
        fl.FromEquinox(eqx.filter_eval_shape(lambda: module))
    with pytest.raises(TypeError, match=r"numbers are known, found float\d+\[2,2\] at 'weight'"):
        eqx.filter_jit(lambda module: fl.FromEquinox(module).layout.length)(module)


def test_what_is_refused():
    norm = eqx.nn.BatchNorm(3, "batch", mode="batch", dtype=jnp.float32)
    with pytest.raises(TypeError, match=r"expected a module without eqx.nn.State, found one in Sequential"):
        fl.FromEquinox(eqx.nn.Sequential([norm]))
    with pytest.raises(TypeError, match="expected a module without PRNG keys, found one at 'steps.layer_0'"):
        fl.FromEquinox(odd(steps=[jax.random.key(0)]))
    for wrong in (3, jnp.tanh, fl.Dense(2, 2), eqx.Module()):
        with pytest.raises(
            TypeError, match="FromEquinox.module: expected an Equinox module that can be called"
        ):
            fl.FromEquinox(wrong)
