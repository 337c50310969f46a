import dataclasses
import functools
import itertools
import pickle

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flatlayers as fl
from tests.helpers import counting_jit


class Scale(fl.Layer):
    by: object

    def parameters(self):  # itself: what it holds may be a layer, whose parameters it does not use
        return {}

    def forward(self, x, ps, st):
        return x * self.by, st


@dataclasses.dataclass(frozen=True)
class Options:
    by: object


NAN = float("nan")
SAME_TO_PYTHON = [
    [2, 2.0, np.int64(2), np.float32(2), np.float64(2), 2 + 0j],
    [1, True, 1.0, np.bool_(True)],
    [0.0, -0.0, 0, False, complex(0.0, -0.0), complex(-0.0, 0.0)],
]
WRAPPED = {
    "itself": lambda value: value,
    "tuple": lambda value: (1, (value,)),
    "list": lambda value: [value],
    "dict": lambda value: {"a": {"b": value}},
    "layer": lambda value: fl.Chain(Scale(value), jnp.tanh),
    "initializer": lambda value: fl.initializers.constant(value),
    "dataclass": lambda value: Options((value,)),
    "module": lambda value: diffrax.PIDController(rtol=1e-3, atol=1e-3, safety=value),
}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
@pytest.mark.parametrize("values", SAME_TO_PYTHON, ids=["two", "one", "zero"])
def test_numbers_of_other_types_and_signs_are_other_fields(wrap, values):
    layers = [Scale(wrap(value)) for value in values]
    for a, b in itertools.combinations(layers, 2):
        assert a != b
    assert layers == [Scale(wrap(value)) for value in values]
    assert len({*layers, *(Scale(wrap(value)) for value in values)}) == len(values)


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
@pytest.mark.parametrize("nan", [lambda: float("nan"), lambda: np.float32("nan"), lambda: complex(1.0, NAN)])
def test_a_nan_is_equal_to_itself(wrap, nan):
    assert Scale(wrap(nan())) == Scale(wrap(nan()))
    assert hash(Scale(wrap(nan()))) == hash(Scale(wrap(nan())))


def test_what_was_compiled_is_shared_by_layers_that_compute_the_same():
    f, traced = counting_jit(lambda layer, x: layer(x, {}, {})[0])
    x = jnp.arange(3)
    with jax.numpy_dtype_promotion("standard"):
        for by in (2, 2.0, True, np.float32(2), -2):
            np.testing.assert_array_equal(f(Scale(by), x), Scale(by)(x, {}, {})[0])
            assert f(Scale(by), x).dtype == Scale(by)(x, {}, {})[0].dtype
    assert len(traced) == 5


@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_the_sign_of_a_zero_counts(zero):
    class Sign(fl.Layer):
        by: float

        def forward(self, x, ps, st):
            return jnp.copysign(x, self.by), st

    f = jax.jit(lambda layer, x: layer(x, {}, {})[0])
    signs = [float(f(Sign(by), jnp.ones(()))) for by in (zero, -zero, zero)]
    assert signs == [np.copysign(1.0, by) for by in (zero, -zero, zero)]


def test_a_nan_field_compiles_once():
    f, traced = counting_jit(lambda layer, x: layer(x, {}, {})[0])
    for _ in range(4):
        f(Scale(float("nan")), jnp.ones(2))
        f(Scale({"a": np.float64("nan")}["a"]), jnp.ones(2))
    assert len(traced) == 2


def test_a_field_that_is_not_compared_does_not_count():
    class Noted(fl.Layer):
        by: float
        note: str = dataclasses.field(default="", compare=False)

    assert Noted(1.0, "a") == Noted(1.0, "b") != Noted(2.0, "a")


def test_what_was_computed_for_a_comparison_is_not_pickled():
    layer = fl.NeuralODE(fl.Dense(2, 2), saveat=np.linspace(0.0, 1.0, 3))
    hash(layer)
    assert layer.layout.length == 6
    again = pickle.loads(pickle.dumps(layer))
    assert again == layer
    assert hash(again) == hash(layer)
    initializer = fl.initializers.normal(stddev=0.1)
    hash(initializer)
    assert pickle.loads(pickle.dumps(initializer)) == initializer


@pytest.mark.long
def test_a_partial_function_is_shown_by_its_parts():
    assert repr(Scale(functools.partial(jnp.sum, axis=0))) == "Scale(partial(sum, axis=0))"
