"""Tied parameters: one place, the sum of the gradients."""

import pickle

import jax
import jax.numpy as jnp
import optax
import pytest

import flatlayers as fl
from tests.helpers import assert_close, assert_same


AUTOENCODER = fl.Chain(encoder=fl.Dense(4, 4, jnp.tanh), middle=fl.Dense(4, 4), decoder=fl.Dense(4, 4))
TIED = fl.share_parameters(AUTOENCODER, {"decoder.weight": "encoder.weight"})
X = jnp.linspace(-1.0, 1.0, 12).reshape(3, 4)


def loss(model, ps, st):
    return jnp.mean((model(X, ps, st)[0] - X) ** 2)


def untied(ps):
    """The vector of the model without ties, with the same numbers under each name."""
    return fl.ComponentVector.of(ps.unpack(), AUTOENCODER.layout)


@pytest.mark.long
def test_the_gradient_is_the_sum_over_both_names(key):
    ps, st = fl.setup(key, TIED, float)
    assert ps.size == fl.parameter_length(TIED) == AUTOENCODER.layout.length - 16
    assert_close(loss(TIED, ps, st), loss(AUTOENCODER, untied(ps), st))
    found = jax.jit(jax.grad(lambda ps: loss(TIED, ps, st)))(ps)
    parts = jax.grad(lambda ps: loss(AUTOENCODER, ps, st))(untied(ps))
    assert_close(found.encoder.weight, parts.encoder.weight + parts.decoder.weight)
    assert_close(found.middle.data, parts.middle.data)
    assert_close(found.decoder.bias, parts.decoder.bias)


def test_initial_values_are_those_of_the_name_that_stays(key):
    ps, plain = (fl.initial_parameters(key, model, float) for model in (TIED, AUTOENCODER))
    assert_same(ps.decoder.weight, plain.encoder.weight)
    assert_same(ps.middle.data, plain.middle.data)


def test_training_keeps_the_tie(key):
    ps, st = fl.setup(key, TIED, float)
    optimizer = optax.adam(0.1)
    opt_state = optimizer.init(ps)
    start = loss(TIED, ps, st)
    for _ in range(5):
        gradient = jax.grad(lambda ps: loss(TIED, ps, st))(ps)
        with jax.numpy_dtype_promotion("standard"):  # optax divides floats by integers
            updates, opt_state = optimizer.update(gradient, opt_state)
        ps = optax.apply_updates(ps, updates)
    assert loss(TIED, ps, st) < start
    assert_same(ps.decoder.weight, ps.encoder.weight)
    assert opt_state[0].mu.shape == (TIED.layout.length,)


def test_whole_groups_and_chains_of_ties(key):
    model = fl.share_parameters(AUTOENCODER, {"decoder": "middle", "middle": "encoder"})
    assert model.layout.length == 20
    twice = fl.share_parameters(
        fl.share_parameters(AUTOENCODER, {"decoder": "middle"}), {"middle": "encoder"}
    )
    assert twice.layout == model.layout
    ps, _ = fl.setup(key, model, float)
    assert_same(ps.decoder.data, ps.encoder.data)


def test_ties_inside_other_layers(key):
    net = fl.share_parameters(fl.Chain(fl.Dense(2, 2, jnp.tanh), fl.Dense(2, 2)), {"layer_1": "layer_0"})
    for model, length in [
        (fl.NeuralODE(net), 6),
        (fl.Chain(net, head=fl.Dense(2, 1)), 9),
        (fl.Repeated(net, 3), 18),
        (fl.StatefulRecurrentCell(net), 6),
    ]:
        assert model.layout.length == length
    model = fl.Repeated(net, 3)
    ps, st = fl.setup(key, model, float)
    assert_same(ps.layer.layer_0.weight, ps.layer.layer_1.weight)
    x = jnp.ones(2)
    y = x
    for i in range(3):
        one = jax.tree.map(lambda leaf, i=i: leaf[i], ps.unpack().layer)
        y = net(y, one, {"layer_0": {}, "layer_1": {}})[0]
    assert_close(model(x, ps, st)[0], y)


def test_a_norm_of_a_tied_weight_is_refused():
    net = fl.share_parameters(AUTOENCODER, {"decoder.weight": "encoder.weight"})
    with pytest.raises(TypeError, match="expected 'encoder' to be a parameter"):
        fl.WeightNorm(net, "encoder")
    dense = fl.share_parameters(fl.Bilinear(2, 2, 2), {})
    assert fl.WeightNorm(dense, "weight").layout.length == 2 + 8 + 2


def test_saved_stacked_mapped(key):
    ps, st = fl.setup(key, TIED, float)
    again = fl.ComponentVector(pickle.loads(pickle.dumps(ps)).data, fl.Layout.from_json(ps.layout.to_json()))
    assert again.layout == ps.layout
    linear = fl.share_parameters(fl.Chain(fl.Dense(2, 2), fl.Dense(2, 2)), {"layer_1": "layer_0"})
    assert pickle.loads(pickle.dumps(linear)) == linear
    ensemble = jax.vmap(lambda key: fl.initial_parameters(key, TIED, float))(jax.random.split(key, 3))
    ys = jax.vmap(lambda ps: TIED(X, ps, st)[0])(ensemble)
    one = fl.initial_parameters(jax.random.split(key, 3)[1], TIED, float)
    assert_close(ys[1], TIED(X, one, st)[0])


@pytest.mark.parametrize(
    ("ties", "kind", "message"),
    [
        ({"decoder.wieght": "encoder.weight"}, KeyError, "no name 'wieght'; the nearest: weight"),
        (
            {"decoder.weight": "encoder.bias"},
            ValueError,
            r"expected the same shapes, found .*\(4, 4\).*\(4,\)",
        ),
        ({"decoder": "encoder", "encoder": "decoder"}, ValueError, "that is a cycle"),
        ({"decoder": "decoder"}, ValueError, "that is a cycle"),
    ],
)
def test_bad_ties(ties, kind, message):
    with pytest.raises(kind, match=message):
        fl.share_parameters(AUTOENCODER, ties)
