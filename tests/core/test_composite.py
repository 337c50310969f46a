import jax.numpy as jnp
import pytest

import flatlayers as fl
from tests.core.models import Counter, net


def test_lists_and_dicts_in_fields_are_frozen():
    model = net()
    assert isinstance(model.hidden, tuple)
    assert model.hidden[1] == fl.WrappedFunction(jnp.tanh)
    assert hash(model) == hash(net())
    assert model == net()


def test_wrappers_have_no_name_of_their_own(key):
    class Twice(fl.Wrapper):
        layer: fl.Layer
        times: int = 2

        def forward(self, x, ps, st):
            for _ in range(self.times):
                x, st = self.layer(x, ps, st)
            return x, st

    wrapped = Twice(fl.Chain(fl.Dense(2, 2), Counter()))
    ps, st = fl.setup(key, wrapped)
    assert ps.layout == wrapped.layer.layout
    assert wrapped(jnp.ones(2, jnp.float32), ps, st)[1].layer_1.count == 2
    assert fl.Wrapper.__call__ is fl.Layer.__call__
    assert Twice(jnp.sin).layer == fl.WrappedFunction(jnp.sin)

    class Two(fl.Wrapper):
        a: object
        b: object

    with pytest.raises(TypeError, match=r"one field that is a layer, found \['a', 'b'\]"):
        Two(fl.NoOpLayer(), fl.NoOpLayer())
    with pytest.raises(TypeError, match="expected a layer or a function"):
        Two(3, 4)


def test_the_hook_of_a_wrapper_finds_the_child():
    class Inner(fl.Wrapper):
        layer: fl.Layer
        size: int | None = None

        def check_fields(self):
            self.size = fl.parameter_length(self.child)

    assert Inner(jnp.sin).size == 0
    assert Inner(fl.Dense(3, 2)).size == 8


def test_fields_take_any_dict_and_nested_lists():
    class Options(fl.Layer):
        options: dict

    assert hash(Options({"data": 1, 2: "x", "a-b": None})) == hash(Options({"data": 1, 2: "x", "a-b": None}))

    class Nested(fl.Container):
        blocks: tuple

    assert Nested([fl.NoOpLayer(), [fl.Dense(2, 2), jnp.sin]]).layout == fl.Layout(
        {"blocks": {"layer_0": {}, "layer_1": {"layer_0": {"weight": (2, 2), "bias": (2,)}, "layer_1": {}}}}
    )


def test_a_function_in_a_field_for_a_layer_is_one(key):
    class Two(fl.Container):
        first: fl.Layer
        second: "fl.Layer"

        def forward(self, x, ps, st):
            x, first = self.first(x, ps.first, st.first)
            x, second = self.second(x, ps.second, st.second)
            return x, st.replace(first=first, second=second)

    model = Two(fl.Dense(2, 2), jnp.tanh)
    assert model == Two(fl.Dense(2, 2), fl.WrappedFunction(jnp.tanh))
    ps, st = fl.setup(key, model, float)
    assert jnp.allclose(
        model(jnp.ones(2), ps, st)[0], jnp.tanh(model.first(jnp.ones(2), ps.first, st.first)[0])
    )
    with pytest.raises(TypeError, match=r"Two\.second: expected a layer or a function, found 3"):
        Two(fl.Dense(2, 2), 3)


def test_a_plain_layer_holds_no_layers():
    class Plain(fl.Layer):
        inner: object

        def forward(self, x, ps, st):
            return x, st

    assert Plain(3).inner == 3
    for inside in (fl.Dense(2, 2), (fl.Dense(2, 2), jnp.tanh), {"a": fl.Dense(2, 2)}):
        with pytest.raises(TypeError, match=r"Plain\.inner: expected no layer .* use fl\.Container"):
            Plain(inside)
