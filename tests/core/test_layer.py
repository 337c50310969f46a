import copy
import dataclasses
import functools
import pickle
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flatlayers as fl
from tests.core.models import Linear, net
from tests.helpers import assert_same, count_primitives


# A frozen description


def test_a_subclass_is_a_frozen_dataclass():
    assert Linear(3, 2) == Linear(in_dims=3, out_dims=2)
    assert hash(Linear(3, 2)) == hash(Linear(3, 2))
    assert Linear(3, 2) != Linear(2, 3)
    assert dataclasses.replace(Linear(3, 2), out_dims=5) == Linear(3, 5)
    with pytest.raises(dataclasses.FrozenInstanceError, match="'in_dims' of Linear"):
        Linear(3, 2).in_dims = 4
    with pytest.raises(dataclasses.FrozenInstanceError):
        del Linear(3, 2).in_dims
    assert pickle.loads(pickle.dumps(net().encoder)) == Linear(3, 4)
    assert pickle.loads(pickle.dumps(fl.Dense(3, 2, use_bias=False))) == fl.Dense(3, 2, use_bias=False)


def test_an_init_written_out_may_assign():
    class Own(fl.Container):
        first: fl.Layer
        sizes: tuple

        def __init__(self, *sizes):
            self.sizes = list(sizes)
            self.first = Linear(sizes[0], sizes[1])

    class Inherited(Own):
        def extra(self):
            return 1

    for cls in (Own, Inherited):
        layer = cls(2, 3)
        assert layer.sizes == (2, 3)
        assert layer == cls(2, 3)
        assert fl.parameter_length(layer) == 9
        with pytest.raises(dataclasses.FrozenInstanceError):
            layer.sizes = ()


class Sized(fl.Layer):
    """Its hook completes one field from another."""

    sizes: list
    total: int | None = None

    def check_fields(self):
        if not self.sizes:
            raise ValueError("Sized.sizes: expected one size or more, found none")
        self.sizes = [2 * size for size in self.sizes] if self.total is None else self.sizes
        self.total = sum(self.sizes)


def test_the_hook_completes_fields_by_plain_assignment():
    layer = Sized([1, 2])
    assert (layer.sizes, layer.total) == ((2, 4), 6)
    assert hash(layer) == hash(Sized((1, 2)))
    with pytest.raises(ValueError, match="one size or more"):
        Sized([])
    with pytest.raises(dataclasses.FrozenInstanceError):
        layer.total = 3
    assert pickle.loads(pickle.dumps(layer)) == layer
    assert dataclasses.replace(layer, sizes=(3,)).total == 3

    class Empty(fl.Layer):
        def check_fields(self):
            self.extra = 3

    assert Empty().extra == 3  # a layer without fields has the hook, too


def test_an_attribute_of_its_own_init_is_declared():
    class Scaled(fl.Layer):
        factor = 1.0

        def __init__(self, factor):
            self.factor = factor

    class Declared(fl.Layer):
        factor: float

        def __init__(self, factor):
            self.factor = factor

    # Layers are compared by their fields: those of two factors were equal, and one ran the other's program.
    message = r"Scaled: expected fields alone, found the attribute 'factor'; declare it by `factor: float`"
    with pytest.raises(TypeError, match=message):
        Scaled(2.0)
    assert Declared(2.0) != Declared(3.0)


def test_the_hook_is_called_once_by_the_class_itself():
    calls = []

    class Base(fl.Layer):
        size: int

        def __init__(self, size):
            self.size = size

        def check_fields(self):
            calls.append(type(self).__name__)

    class Derived(Base):
        def __init__(self):
            super().__init__(3)
            self.size = 4

    assert (Base(2).size, Derived().size) == (2, 4)
    assert calls == ["Base", "Derived"]


def test_what_the_hook_leaves_is_checked():
    class Holder(fl.Layer):
        value: object

        def check_fields(self):
            self.value = jnp.ones(2)

    with pytest.raises(TypeError, match=r"Holder.value: layers hold no arrays"):
        Holder(3)


def test_a_post_init_works_as_in_any_dataclass():
    class Plain(fl.Layer):
        size: int

        def __post_init__(self):
            self.size = self.size + 1

        def check_fields(self):
            self.size = 10 * self.size

    assert Plain(1).size == 20


def test_arrays_in_fields_are_refused():
    class Holder(fl.Layer):
        value: object

    for value in (
        jnp.ones(2),
        np.ones(2),
        (1, jnp.ones(2)),
        {"a": np.ones(1)},
        fl.ComponentVector.of({"a": 1.0}),
    ):
        with pytest.raises(
            TypeError, match=r"Holder.value: layers hold no arrays; declare it in `parameters`"
        ):
            Holder(value)
    with pytest.raises(TypeError, match=r"Holder.value: expected a value with a hash"):
        Holder({1, 2})
    with pytest.raises(TypeError, match="Holder"):
        Holder(lambda: 0).forward(1, {}, {})


def test_a_layer_is_an_argument_of_plain_jit():
    traces = []

    @jax.jit
    def call(layer, x, ps, st):
        traces.append(layer)
        return layer(x, ps, st)[0]

    ps, st = fl.setup(jax.random.key(0), Linear(3, 2), float)
    for _ in range(2):
        assert call(Linear(3, 2), jnp.ones((1, 3)), ps, st).shape == (1, 2)
    assert len(traces) == 1
    assert jax.tree.leaves(Linear(3, 2)) == []


# Parameters and states


def test_parameters_may_be_any_object_with_the_right_attributes():
    Params = __import__("collections").namedtuple("Params", "weight bias")
    layer = Linear(3, 2)
    ps, st = fl.setup(jax.random.key(0), layer, float)
    x = jnp.ones((1, 3))
    assert_same(layer(x, Params(ps.weight, ps.bias), st)[0], layer(x, ps, st)[0])


def test_names_and_questions():
    class Named(fl.Layer):
        name: str = "the encoder"

    assert fl.display_name(Named()) == "the encoder"
    assert fl.display_name(Linear(2, 3)) == "Linear"
    assert fl.contains_layer({"a": [(Linear(2, 3),)]})
    assert not fl.contains_layer({"a": [1, jnp.sin]})


# Structure


@pytest.mark.parametrize("depth", [1, 3, 9])
def test_one_split_and_one_concatenation_at_any_depth(key, depth):
    model = functools.reduce(lambda inner, _: fl.Chain(fl.Dense(2, 2), inner), range(depth), fl.Dense(2, 2))
    ps, st = fl.setup(key, model)
    x = jnp.ones((3, 2), jnp.float32)
    counts = count_primitives(jax.grad(lambda ps: model(x, ps, st)[0].sum()), ps)
    assert counts["split"] == 1
    assert counts["concatenate"] == 1
    assert counts["pad"] == counts["slice"] == 0


# Errors say where


def test_an_error_names_the_layer_and_its_input(key):
    model = fl.Chain(Linear(2, 2), fl.Chain(fl.NoOpLayer(), encoder=fl.Chain(fl.Dense(3, 4))))
    ps, st = fl.setup(key, model)
    for call in (model, jax.jit(model)):
        with pytest.raises(ValueError, match=r"\(..., 3\), found shape \(5, 2\)") as info:
            call(jnp.ones((5, 2), jnp.float32), ps, st)
        (note,) = [note for note in info.value.__notes__ if "layer" in note]
        assert "layer_1.encoder.layer_0: Dense(3, 4)" in note
        assert "float32[5,2]" in note
    with pytest.raises(ValueError, match="found shape") as info:
        fl.Dense(3, 4)(jnp.ones(2), *fl.setup(key, fl.Dense(3, 4)))
    assert "in the layer Dense: Dense(3, 4)" in info.value.__notes__[0]


def test_two_uses_of_one_layer_are_told_apart(key):
    layer = fl.Dense(2, 2)

    def fail(x):
        raise RuntimeError("no")

    inner = fl.Chain(layer, fail)
    for model, path in [
        (fl.Chain(fl.NoOpLayer(), inner), "layer_1.layer_1"),
        (net_of(inner), "second.layer_1"),
    ]:
        ps, st = fl.setup(key, model)
        with pytest.raises(RuntimeError, match="no") as info:
            model(jnp.ones(2, jnp.float32), ps, st)
        assert f"in the layer {path}: WrappedFunction(fail)" in info.value.__notes__[0]


def net_of(layer):
    class Two(fl.Container):
        first: fl.Layer
        second: fl.Layer

        def forward(self, x, ps, st):
            return self.second(x, ps.second, st.second)

    return Two(layer, layer)


# What once went wrong


def test_the_order_of_layers_counts():
    one, two = fl.Chain(a=jnp.sin, b=jnp.square), fl.Chain(b=jnp.square, a=jnp.sin)
    assert one != two
    ps = {"a": {}, "b": {}}
    call = jax.jit(lambda layer, x, ps, st: layer(x, ps, st)[0])
    assert call(one, 1.0, ps, ps) == jnp.sin(1.0) ** 2
    assert call(two, 1.0, ps, ps) == jnp.sin(1.0)


def test_a_subclass_with_a_class_variable_keeps_the_init_it_inherits():
    class Forgetful(fl.Chain):
        keeps_state_type: ClassVar[bool] = False

    assert len(Forgetful(fl.Dense(2, 2), jnp.tanh)) == 2
    assert not fl.preserves_state_type({"a": Forgetful(fl.Dense(2, 2))})


def test_a_class_variable_is_known_by_its_annotation_not_by_the_word():
    class ClassVariety:
        pass

    class Tagged(fl.Dense):
        tag: ClassVariety | None = None

    class Written(fl.Dense):
        tag: "ClassVariety | None" = None
        count: "ClassVar[ClassVariety | int]" = 3

    assert Tagged(3, 2, tag=None) == Tagged(3, 2)
    assert [field.name for field in dataclasses.fields(Tagged)][-1] == "tag"
    assert Written(3, 2, tag=None) == Written(3, 2)
    assert Written.count == Written(3, 2).count == 3


def test_layers_copy_and_replace():
    model = fl.Chain(fl.Dense(2, 2, jnp.tanh), head=fl.Dense(2, 1))
    assert copy.deepcopy(model) == model
    assert dataclasses.replace(model, name="net") == fl.Chain(*model[:1], name="net", head=fl.Dense(2, 1))
    with pytest.raises(ValueError, match="two layers named 'layer_0'"):
        fl.Chain(fl.Dense(2, 2), layer_0=fl.Dense(2, 2))
