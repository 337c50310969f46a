"""Parameters and states of another model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flatlayers as fl
from tests.helpers import assert_same, count_primitives


PAIRS = {
    "Dense": (fl.Dense(3, 5), fl.Dense(3, 7), jnp.ones(3), "bias: (5,) became (7,)"),
    "Diagonal": (fl.Diagonal(4), fl.Diagonal(1), jnp.ones(4), "(4,) became (1,)"),
    "no bias": (fl.Dense(3, 5), fl.Dense(3, 5, use_bias=False), jnp.ones(3), "bias: (5,) is gone"),
    "LayerNorm": (fl.LayerNorm(4), fl.LayerNorm(1), jnp.arange(4.0), "scale: (4,) became (1,)"),
    "BatchNorm": (fl.BatchNorm(4), fl.BatchNorm(1), jnp.ones((3, 4)), "(4,) became (1,)"),
    "Embedding": (fl.Embedding(10, 2), fl.Embedding(5, 2), jnp.array([9]), "weight: (10, 2) became (5, 2)"),
    "Conv": (
        fl.Conv((3,), 2, 4),
        fl.Conv((5,), 2, 4),
        jnp.ones((8, 2)),
        "weight: (3, 2, 4) became (5, 2, 4)",
    ),
    "Repeated": (
        fl.Repeated(fl.Dense(2, 2), 3),
        fl.Repeated(fl.Dense(2, 2), 5),
        jnp.ones(2),
        "(3, 2, 2) became (5, 2, 2)",
    ),
    "LSTM": (fl.LSTM(3, 4), fl.LSTM(3, 2), jnp.ones((5, 3)), "(16, 3) became (8, 3)"),
    "NeuralODE": (
        fl.NeuralODE(fl.Diagonal(3)),
        fl.NeuralODE(fl.Diagonal(1)),
        jnp.ones(3),
        "(3,) became (1,)",
    ),
    "names": (
        fl.Chain(a=fl.Dense(2, 2), b=fl.Dense(2, 2)),
        fl.Chain(a=fl.Dense(2, 2), c=fl.Dense(2, 2)),
        jnp.ones(2),
        "b.weight: (2, 2) is gone",
    ),
    "nested": (
        fl.Chain(fl.SkipConnection(fl.Diagonal(2), jnp.add), fl.Diagonal(2)),
        fl.Chain(fl.SkipConnection(fl.Diagonal(1), jnp.add), fl.Diagonal(2)),
        jnp.ones(2),
        "layer_0.",
    ),
}


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit, jax.vmap], ids=["eager", "jit", "vmap"])
@pytest.mark.parametrize(("layer", "other", "x", "line"), PAIRS.values(), ids=PAIRS)
def test_parameters_of_another_model_are_refused(key, layer, other, x, line, transform):
    ps, _ = fl.setup(key, other)
    _, st = fl.setup(key, layer)
    x = x[None] if transform is jax.vmap else x
    with pytest.raises(ValueError, match="expected the parameters of this layer") as error:
        transform(lambda x: layer(x, ps, st)[0])(x)
    assert line in str(error.value)
    assert "in the layer" in error.value.__notes__[0]


def test_states_of_another_model_are_refused(key):
    layer, x = fl.BatchNorm(4), jnp.ones((3, 4))
    ps, _ = fl.setup(key, layer, float)
    with pytest.raises(
        ValueError, match=r"expected the state of this layer.*running_mean: \(4,\) became \(1,\)"
    ):
        layer(x, ps, fl.setup(key, fl.BatchNorm(1))[1])
    with pytest.raises(ValueError, match=r"running_mean: \(4,\) is gone"):
        layer(x, ps, {})
    node = fl.NeuralODE(fl.Dense(2, 2))
    ps, st = fl.setup(key, fl.Dense(2, 2), float)
    with pytest.raises(ValueError, match=r"stats.num_steps: \(\) is gone"):
        node(jnp.ones(2), ps, st)
    chain = fl.Chain(fl.Dense(2, 2), fl.Dropout(0.5))
    ps, st = fl.setup(key, chain, float)
    with pytest.raises(ValueError, match=r"layer_1.key: \(\) became \(3,\)"):
        chain(jnp.ones(2), ps, fl.update_state(st, "key", jax.random.split(key, 3)))
    with pytest.raises(ValueError, match=r"layer_1.training: its value is gone"):
        chain(jnp.ones(2), ps, {"layer_0": {}, "layer_1": {"key": key}})


def test_more_names_are_allowed(key):
    chain = fl.Chain(fl.Dense(2, 2), fl.Dropout(0.5), fl.Dense(2, 1))
    ps, st = fl.setup(key, chain, float)
    st = fl.testmode(st)
    y, _ = chain[:2](jnp.ones(2), ps, st)
    assert_same(y, ps.layer_0.weight @ jnp.ones(2) + ps.layer_0.bias)


def test_a_frozen_vector_is_not_that_of_the_whole_model(key):
    model = fl.Chain(fl.Dense(2, 3), fl.Dense(3, 1))
    frozen, ps, st = fl.freeze_parameters(model, "layer_0.*", *fl.setup(key, model, float))
    assert frozen(jnp.ones(2), ps, st)[0].shape == (1,)
    with pytest.raises(ValueError, match=r"layer_0.weight: \(3, 2\) is gone"):
        model(jnp.ones(2), ps, st)


def test_records_and_mappings_are_not_checked(key):
    layer = fl.Dense(3, 5)
    ps, _ = fl.setup(key, fl.Dense(3, 7), float)
    assert layer(jnp.ones(3), ps.unpack(), {})[0].shape == (7,)
    assert layer(jnp.ones(3), ps.to_dict(), {})[0].shape == (7,)


def test_a_state_that_changes_its_type_is_taken(key):
    cell = fl.StatefulRecurrentCell(fl.GRUCell(2, 3))
    ps, st = fl.setup(key, cell, float)
    _, st = cell(jnp.ones(2), ps, st)
    y, _ = cell(jnp.ones(2), ps, st)
    assert y.shape == (3,)

    class Growing(fl.Layer):
        keeps_state_type = False

        def states(self, key):
            return {"seen": jnp.zeros((0,))}

        def forward(self, x, ps, st):
            return x, st.replace(seen=jnp.append(st.seen, x))

    model = fl.Chain(Growing(), fl.Diagonal(1))
    ps, st = fl.setup(key, model, float)
    for n in (1, 2):
        _, st = model(jnp.ones(1), ps, st)
        assert st.layer_0.seen.shape == (n,)


def test_a_state_that_is_made_of_the_numbers_of_a_key_is_checked(key):
    class Drawn(fl.Layer):
        def states(self, key):
            return {"order": np.argsort(np.asarray(jax.random.uniform(key, (4,))))}

        def forward(self, x, ps, st):
            return x[st.order], st

    layer = Drawn()
    ps, st = fl.setup(key, layer)
    f = jax.jit(lambda x: layer(x, ps, st)[0])
    assert_same(f(jnp.arange(4.0)), jnp.arange(4.0)[st.order])
    with pytest.raises(ValueError, match=r"order: \(4,\) became \(3,\)"):
        layer(jnp.ones(3), ps, {"order": np.arange(3)})


def test_the_check_adds_nothing_to_a_program(key):
    model = fl.Chain(fl.Dense(3, 4), fl.Dropout(0.5), fl.BatchNorm(4))
    ps, st = fl.setup(key, model, float)
    x = jnp.ones((2, 3))
    checked = count_primitives(lambda ps, x: model(x, ps, st)[0], ps, x)
    assert checked == count_primitives(lambda ps, x: model(x, ps.unpack(), st)[0], ps, x)


@pytest.mark.long
def test_the_check_passes_under_all_transformations(key):
    model = fl.Chain(fl.Dense(3, 4, jnp.tanh), fl.Dense(4, 1))
    x = jnp.ones((2, 3))

    def loss(ps, x):
        st = fl.initial_states(key, model, float)
        return model(x, ps, st)[0].sum()

    ps, _ = fl.setup(key, model, float)
    ensemble = jax.vmap(lambda key: fl.setup(key, model, float)[0])(jax.random.split(key, 5))
    with jax.checking_leaks():
        jax.jit(jax.grad(loss))(ps, x)
    assert jax.vmap(loss, (0, None))(ensemble, x).shape == (5,)
    assert fl.hessian(loss)(ps, x).shape == (21, 21)
    assert jax.jit(jax.checkpoint(loss))(ps, x).shape == ()
