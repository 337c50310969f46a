import jax
import jax.numpy as jnp
import pytest

import flatlayers as fl
from flatlayers.core.declaration import Tied, as_declared
from flatlayers.core.drawing import fold_in_name
from tests.core.models import Counter, Linear, net
from tests.helpers import assert_same


def test_layout_is_declared_and_cached():
    model = net()
    assert model.layout is model.layout
    linear = {"weight": (4, 3), "bias": (4,)}
    head = {"weight": (1, 4), "bias": (1,)}
    expected = {
        "encoder": linear,
        "hidden": {"layer_0": {"weight": (4, 4), "bias": (4,)}, "layer_1": {}},
        "heads": {"mean": head, "spread": head},
        "gain": (),
    }
    assert model.layout == fl.Layout(expected)
    assert fl.parameter_length(model) == model.layout.length == 16 + 20 + 10 + 1


def test_wrong_declarations():
    class Wrong(fl.Layer):
        def parameters(self):
            return {"weight": 3}

    with pytest.raises(TypeError, match="below 'weight': .* found 3"):
        _ = Wrong().layout

    class Reserved(fl.Layer):
        def parameters(self):
            return {"data": fl.Param((), fl.initializers.ones)}

    with pytest.raises(ValueError, match="'data' is reserved"):
        _ = Reserved().layout

    class NoPair(fl.Layer):
        def forward(self, x, ps, st):
            return x

    with pytest.raises(TypeError, match=r"return \(y, st\)"):
        NoPair()(jnp.ones(2), {}, {})

    class BadInit(fl.Layer):
        def parameters(self):
            return {"w": fl.Param((2,), lambda key, shape, dtype: jnp.ones(3))}

    with pytest.raises(ValueError, match=r"\(2,\), found shape \(3,\)") as info:
        fl.setup(jax.random.key(0), {"net": BadInit()})
    assert "'net.w'" in info.value.__notes__[0]
    with pytest.raises(TypeError, match="initializer"):
        fl.Param((2,), 3.0)
    with pytest.raises(TypeError, match=r"Dense\(\.\.\.\)"):
        fl.Chain(fl.Dense)


# The questions that all declarations answer


DECLARED = {
    "layer": (Linear(3, 2), {"weight": (2, 3), "bias": (2,)}),
    "mapping": ({"a": {"b": fl.Param((2,), fl.initializers.ones)}}, {"a": {"b": (2,)}}),
    "stacked": (fl.Stacked(Linear(3, 2), 4), fl.Layout({"weight": (2, 3), "bias": (2,)}).stack(4)),
    "tied": (
        Tied({"a": Linear(3, 2), "b": Linear(3, 2)}, {"b": "a"}),
        fl.Layout({name: {"weight": (2, 3), "bias": (2,)} for name in "ab"}).tie({"b": "a"}),
    ),
}


@pytest.mark.parametrize(("declared", "layout"), DECLARED.values(), ids=DECLARED)
def test_layout_and_initial_leaves(key, declared, layout):
    declared, layout = as_declared(declared), fl.Layout(layout)
    assert declared.layout == layout
    leaves = declared.initial_leaves(key, jnp.float32)
    assert {path: leaf.shape for path, leaf in leaves.items()} == dict(layout.view_shapes)
    below = declared.initial_leaves(key, jnp.float32, "net")
    assert list(below) == [f"net.{path}" for path in leaves]
    assert_same(list(below.values()), list(leaves.values()))


def test_a_parameter_has_a_shape_and_no_states(key):
    param = fl.Param((2,), fl.initializers.ones)
    for declared, shape in [(param, (2,)), (fl.Stacked(fl.Stacked(param, 3), 4), (4, 3, 2))]:
        assert declared.layout == shape
        assert declared.initial_leaves(key, float)[""].shape == shape
        assert declared.declared_states(key) is None
        assert declared.as_child() is None
        assert declared.declared_where(lambda path: False) is None


def test_each_name_folds_the_key(key):
    declared = as_declared({"a": {"b": fl.Param((2,), fl.initializers.normal)}})
    expected = fl.initializers.normal(fold_in_name(fold_in_name(key, "a"), "b"), (2,), jnp.float32)
    assert_same(declared.initial_leaves(key, jnp.float32)["a.b"], expected)
    named = as_declared({"x": fl.Param((2,), fl.initializers.normal, key_name="b")})
    assert_same(named.initial_leaves(fold_in_name(key, "a"), jnp.float32)["x"], expected)


def test_states_are_under_the_names_of_layers(key):
    declared = as_declared(
        {"n": Counter(), "p": fl.Param((), fl.initializers.ones), "inner": {"l": Linear(1, 1)}}
    )
    states = declared.declared_states(key)
    assert list(states) == ["n", "inner"]
    assert states["inner"] == {"l": {}}
    assert_same(states["n"]["key"], fold_in_name(key, "n"))
    stacked = fl.Stacked(Counter(), 3).declared_states(key)
    assert_same(stacked["key"], jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(3)))
    assert stacked["training"] is True


def test_children_are_layers_and_mappings_of_them():
    linear, param = Linear(2, 1), fl.Param((), fl.initializers.ones)
    declared = as_declared({"a": fl.Stacked(linear, 3), "b": {"c": linear, "p": param}, "p": param, "e": {}})
    assert declared.as_child() == {"a": linear, "b": {"c": linear}}
    assert as_declared({"p": param}).as_child() is None
    assert dict(as_declared(fl.Stacked(linear, 3)).declared_parts()) == {"": linear}
    assert dict(fl.Chain(linear, jnp.sin).declared_parts()) == {
        "layer_0": linear,
        "layer_1": fl.WrappedFunction(jnp.sin),
    }


def test_part_of_a_declaration():
    model = {"net": fl.Chain(Linear(3, 2), jnp.tanh), "blocks": fl.Stacked(Linear(2, 2), 4)}
    part = as_declared(model).declared_where(lambda path: path.endswith("bias"))
    assert part.layout == fl.Layout(
        {"net": {"layer_0": {"bias": (2,)}}, "blocks": fl.Layout({"bias": (2,)}).stack(4)}
    )
    assert as_declared(model).declared_where(lambda path: False) is None


def test_what_is_no_declaration():
    for wrong in (3, jnp.tanh, (Linear(2, 2),), None):
        with pytest.raises(TypeError, match="expected a Param, a Layer or a mapping of them, found"):
            as_declared(wrong)
