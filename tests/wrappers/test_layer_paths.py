"""`select` and `replace_layer`: layers by their paths."""

import jax.numpy as jnp
import pytest

import flatlayers as fl
from tests.helpers import assert_same
from tests.wrappers.models import Body, Residual, body, setup


# select


def test_layers_are_listed_depth_first_with_groups():
    model = fl.Chain(body=body(), head=fl.MLP(2, (3,), 1), ode=fl.NeuralODE(Residual(fl.Dense(1, 1))))
    everything = fl.select(model, "*")
    assert [path for path, _ in everything] == [
        "body",
        "body.parts.a",
        "body.parts.b",
        "body.parts.b.layer_0",
        "body.parts.b.layer_1",
        "body.steps.layer_0",
        "body.steps.layer_1",
        "head",
        "head.layer_0",
        "head.layer_1",
        "ode",
        "ode",
        "ode",
    ]
    assert [type(layer) for _, layer in everything[-3:]] == [fl.NeuralODE, Residual, fl.Dense]
    assert fl.select(model, "body.parts.?") == [
        ("body.parts.a", fl.Dense(2, 3)),
        ("body.parts.b", dict(everything)["body.parts.b"]),
    ]
    assert [path for path, _ in fl.select(model, "*.layer_1")] == [
        "body.parts.b.layer_1",
        "body.steps.layer_1",
        "head.layer_1",
    ]
    layers = {"rate": fl.Param((), fl.initializers.ones), "nets": {"a": fl.Stacked(fl.Dense(1, 1), 2)}}
    assert fl.select(layers, "nets.*") == [("nets.a", fl.Dense(1, 1))]


def test_a_pattern_that_matches_nothing():
    model = fl.Chain(encoder=fl.Chain(fl.Dense(2, 2)), head=fl.Dense(2, 2))
    for error in (KeyError, ValueError):
        with pytest.raises(error, match=r"'encodr' matches nothing: no name 'encodr'; the nearest: encoder"):
            fl.select(model, "encodr")
    with pytest.raises(KeyError, match="there are no names here"):
        fl.select(fl.Dense(2, 2), "*")


# replace_layer


def test_the_model_with_one_layer_replaced():
    new = fl.Dense(2, 2, jnp.sin)
    model = fl.Chain(fl.Dense(2, 2), jnp.tanh, fl.Dense(2, 2))
    assert fl.replace_layer(model, "layer_2", new) == fl.Chain(fl.Dense(2, 2), jnp.tanh, new)
    assert fl.replace_layer(model, "layer_1", jnp.sin) == fl.Chain(fl.Dense(2, 2), jnp.sin, fl.Dense(2, 2))
    assert model == fl.Chain(fl.Dense(2, 2), jnp.tanh, fl.Dense(2, 2))
    deep = fl.Chain(body=body(), node=fl.NeuralODE(Residual(model), t1=2.0))
    other = fl.replace_layer(
        fl.replace_layer(deep, "body.parts.b.layer_1", fl.Dense(3, 2, jnp.sin)), "node.layer_2", new
    )
    parts = {"a": fl.Dense(2, 3), "b": fl.Chain(jnp.tanh, fl.Dense(3, 2, jnp.sin))}
    node = fl.NeuralODE(Residual(fl.Chain(fl.Dense(2, 2), jnp.tanh, new)), t1=2.0)
    assert other == fl.Chain(body=Body(parts, body().steps), node=node)
    assert fl.replace_layer(deep, "node", new)["node"] == new
    assert fl.replace_layer(deep, ("body", "steps", "layer_0"), new)["body"].steps == (new, fl.Dense(2, 2))
    ps, _ = setup(deep)
    changed, _ = setup(fl.replace_layer(deep, "body.parts.a", fl.Dense(2, 3, use_bias=False)))
    assert_same(changed.node, ps.node)
    assert_same(changed.body.parts.a.weight, ps.body.parts.a.weight)


def test_replacing_in_a_mapping_and_under_two_names():
    layers = {"rate": fl.Param((), fl.initializers.ones), "nets": {"a": fl.Stacked(fl.Dense(1, 1), 2)}}
    new = fl.replace_layer(layers, "nets.a", fl.Dense(1, 3))
    assert new == {**layers, "nets": {"a": fl.Stacked(fl.Dense(1, 3), 2)}}
    both = fl.BidirectionalRNN(fl.GRUCell(2, 3))
    assert fl.replace_layer(both, "backward", fl.GRUCell(2, 4)) == fl.BidirectionalRNN(fl.GRUCell(2, 4))


def test_a_path_that_leads_to_no_layer():
    model = fl.Chain(encoder=fl.Chain(fl.Dense(2, 2)), mlp=fl.MLP(2, (3,), 2))
    with pytest.raises(KeyError, match=r"'encodr': no name 'encodr'; the nearest: encoder"):
        fl.replace_layer(model, "encodr", jnp.sin)
    for path in ("", "encoder.layer_0.weight", "enc", "encoder."):
        with pytest.raises(KeyError, match=f"'{path}': no name"):
            fl.replace_layer(model, path, jnp.sin)
    with pytest.raises(KeyError, match="'mlp.layer_0': the layer around it makes this layer itself"):
        fl.replace_layer(model, "mlp.layer_0", jnp.sin)
    with pytest.raises(TypeError, match="expected a layer or a function, found <class"):
        fl.replace_layer(model, "mlp", fl.Dense)
    with pytest.raises(KeyError, match="'nets': no name"):
        fl.replace_layer({"nets": {"a": fl.Dense(1, 1)}}, "nets", jnp.sin)
