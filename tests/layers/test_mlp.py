import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flatlayers as fl
from tests.helpers import assert_close, assert_same, central_difference


def formula(x, ps, activations):
    for i, activation in enumerate(activations):
        part = ps[f"layer_{i}"]
        x = activation(x @ np.asarray(part.weight).T + np.asarray(part.bias))
    return x


def same(x):
    return x


MODELS = [
    (fl.MLP(3, (8, 5), 2), [np.tanh, np.tanh, same]),
    (fl.MLP(3, (8,), 2, jnp.sin, final_activation=jnp.exp), [np.sin, np.exp]),
    (fl.MLP(3, 8, 2, None), [same, same]),
    (fl.MLP(3, (), 2, final_activation=jnp.tanh), [np.tanh]),
]


@pytest.mark.parametrize(("model", "activations"), MODELS, ids=map(repr, (m for m, _ in MODELS)))
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("lead", [(), (5,), (4, 5)])
def test_formula(key, model, activations, dtype, lead):
    ps, st = fl.setup(key, model, dtype)
    ps = ps + 0.1 * jax.random.normal(key, ps.shape, dtype)
    x = jax.random.normal(jax.random.key(1), (*lead, 3), dtype)
    y, new = jax.jit(model)(x, ps, st)
    assert y.dtype == dtype
    assert new == st
    rtol = 1e-5 if dtype == jnp.float32 else 1e-12
    np.testing.assert_allclose(y, formula(np.asarray(x), ps, activations), rtol=rtol, atol=rtol)
    assert y.shape == fl.output_shape(model, x) == (*lead, 2)
    assert fl.parameter_length(model) == ps.size
    assert fl.state_length(model) == 0


def test_equals_the_chain_of_the_same_layers(key):
    model = fl.MLP(3, (8, 5), 2)
    chain = fl.Chain(fl.Dense(3, 8, jnp.tanh), fl.Dense(8, 5, jnp.tanh), fl.Dense(5, 2))
    ps, st = fl.setup(key, model, float)
    assert (ps.data == fl.setup(key, chain, float)[0].data).all()
    assert ps.layout == chain.layout
    assert st == fl.initial_states(key, chain)
    x = jax.random.normal(key, (5, 3))
    assert_same(model(x, ps, st)[0], chain(x, ps, st)[0])
    assert "layer_1=Dense(8, 5, activation=tanh),  # 45 parameters" in fl.pformat(model)


def test_gradient_and_vmap(key):
    model = fl.MLP(3, (8, 5), 2)
    ps, st = fl.setup(key, model, float)
    x = jax.random.normal(key, (5, 3))
    direction = fl.ComponentVector(jax.random.normal(jax.random.key(2), ps.shape), ps.layout)

    def loss(ps):
        return jnp.sum(model(x, ps, st)[0] ** 2)

    slope = jax.grad(loss)(ps) @ direction
    np.testing.assert_allclose(slope, central_difference(loss, ps, direction), rtol=1e-7)
    assert_close(model(x, ps, st)[0], jax.vmap(lambda x: model(x, ps, st)[0])(x))


def test_is_a_value():
    tanh, exp = jnp.tanh, jnp.exp
    assert repr(fl.MLP(3, (8, 5), 2, final_activation=exp)) == "MLP(3, (8, 5), 2, final_activation=exp)"
    for model in (fl.MLP(3, [8, 5], 2), fl.MLP(3, (8,), 2, exp, final_activation=tanh)):
        assert eval(repr(model), {**vars(fl), "tanh": tanh, "exp": exp}) == model
        assert hash(model) == hash(eval(repr(model), {**vars(fl), "tanh": tanh, "exp": exp}))


def test_wrong_number_of_features(key):
    model = fl.Chain(field=fl.MLP(3, (8,), 2))
    ps, st = fl.setup(key, model, float)
    with pytest.raises(ValueError, match=r"shape \(..., 3\), found shape \(5, 4\)") as error:
        model(jnp.ones((5, 4)), ps, st)
    assert "in the layer field.layer_0: Dense(3, 8, activation=tanh)" in error.value.__notes__[0]
