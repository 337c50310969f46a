"""Frozen parameters: the same model, with a shorter vector."""

import jax
import jax.numpy as jnp
import optax
import pytest

import flatlayers as fl
from tests.helpers import assert_same


MODEL = fl.Chain(
    encoder=fl.Chain(fl.Dense(3, 4, jnp.tanh), fl.BatchNorm(4)),
    drop=fl.Dropout(0.5),
    head=fl.Dense(4, 2),
)
TIED = fl.share_parameters(
    fl.Chain(fl.Dense(3, 3), fl.Dense(3, 3), fl.Dense(3, 3)), {"layer_1.weight": "layer_0.weight"}
)
X = jnp.linspace(-1.0, 1.0, 15).reshape(5, 3)


@pytest.mark.long
@pytest.mark.parametrize("names", ["encoder.*", ("*.bias", "encoder.layer_1"), "head.weight", None])
def test_freezing_changes_nothing_but_the_vector(key, names):
    ps, st = fl.setup(key, MODEL, float)
    frozen, trained, state = fl.freeze_parameters(MODEL, names, ps, st)
    patterns = (names,) if isinstance(names, str) else names or ("*",)
    mask = MODEL.layout.mask(*patterns)
    assert_same(trained.data, ps.data[~mask])
    assert frozen.layout == trained.layout
    assert fl.parameter_length(frozen) == (~mask).sum()
    assert fl.state_length(frozen) == fl.state_length(MODEL) + mask.sum()
    y, new = MODEL(X, ps, st)
    y_frozen, new_frozen = jax.jit(frozen)(X, trained, state)
    assert jnp.allclose(y, y_frozen, rtol=1e-14)
    assert_same(new_frozen.frozen, state.frozen)
    assert jax.tree.structure(new_frozen.layer) == jax.tree.structure(new)
    assert fl.preserves_state_type(frozen)


@pytest.mark.parametrize("model", [MODEL, TIED, fl.Repeated(fl.Dense(3, 3), 4)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64, jnp.bfloat16])
def test_setup_gives_the_values_of_the_layer(key, model, dtype):
    ps, st = fl.setup(key, model, dtype)
    frozen = fl.freeze(model, "*.weight")
    expected = fl.freeze_parameters(model, "*.weight", ps, st)
    found = fl.setup(key, frozen, dtype)
    assert_same(found, expected[1:])
    inside, around = fl.Chain(first=frozen), fl.Chain(first=model)
    assert_same(
        fl.setup(key, inside, dtype),
        fl.freeze_parameters(around, "*.weight", *fl.setup(key, around, dtype))[1:],
    )


@pytest.mark.parametrize("names", ["*.weight", "layer_2", "layer_1.weight", None])
@pytest.mark.parametrize("model", [TIED, fl.Chain(*TIED.layer)])
def test_unfreeze_is_the_inverse(key, model, names):
    ps, st = fl.setup(key, model, float)
    layer, ps_again, st_again = fl.unfreeze_parameters(*fl.freeze_parameters(model, names, ps, st))
    assert layer == model == fl.unfreeze(fl.freeze(model, names))
    assert ps_again.layout == ps.layout
    assert_same((ps_again, st_again), (ps, st))


def test_both_names_of_a_tie_are_frozen(key):
    frozen = fl.freeze(TIED, "layer_1.weight")
    assert frozen.layout["layer_0"].names == ("bias",)
    ps, st = fl.setup(key, frozen, float)
    assert [*st.frozen] == ["layer_0"]
    plain, _ = fl.setup(key, TIED, float)
    assert_same(frozen(X, ps, st)[0], TIED(X, plain, fl.initial_states(key, TIED))[0])


def test_ties_between_trained_parameters_stay():
    frozen = fl.freeze(TIED, "layer_2")
    assert dict(frozen.layout.ties) == {"layer_1.weight": "layer_0.weight"}
    assert frozen.layout.length == 9 + 3 + 3


def test_two_steps_of_training_leave_frozen_values_alone(key):
    model, ps, st = fl.freeze_parameters(MODEL, "encoder.*", *fl.setup(key, MODEL, float))
    before = st.frozen
    optimizer = optax.adam(0.1)
    opt_state = optimizer.init(ps)

    @jax.jit
    def train(ps, st, opt_state):
        def loss(ps):
            y, new = model(X, ps, st)
            return jnp.mean(y**2), new

        gradient, st = jax.grad(loss, has_aux=True)(ps)
        with jax.numpy_dtype_promotion("standard"):  # optax divides floats by integers
            updates, opt_state = optimizer.update(gradient, opt_state)
        return optax.apply_updates(ps, updates), st, opt_state

    start = ps
    for _ in range(2):
        ps, st, opt_state = train(ps, st, opt_state)
    assert_same(st.frozen, before)
    assert not (ps.data == start.data).any()
    assert opt_state[0].mu.shape == (10,)


@pytest.mark.long
def test_frozen_inside_other_layers(key):
    model = fl.NeuralODE(fl.freeze(fl.Dense(2, 2, jnp.tanh), "weight"))
    ps, st = fl.setup(key, model, float)
    plain, plain_st = fl.setup(key, fl.NeuralODE(fl.Dense(2, 2, jnp.tanh)), float)
    assert ps.size == 2
    y, _ = model(jnp.ones(2), ps, st)
    assert_same(y, fl.NeuralODE(fl.Dense(2, 2, jnp.tanh))(jnp.ones(2), plain, plain_st)[0])
    stack = fl.Repeated(fl.freeze(fl.Dense(3, 3), "weight"), 4)
    ps, st = fl.setup(key, stack, jnp.bfloat16)
    assert st.layer.frozen.weight.shape == (4, 3, 3)
    assert st.layer.frozen.weight.dtype == jnp.bfloat16
    plain, _ = fl.setup(key, fl.Repeated(fl.Dense(3, 3), 4), jnp.bfloat16)
    assert_same(st.layer.frozen.weight, plain.layer.weight)


def test_freezing_twice(key):
    ps, st = fl.setup(key, MODEL, float)
    first = fl.freeze_parameters(MODEL, "head", ps, st)
    second = fl.freeze_parameters(first[0], "encoder.layer_0", *first[1:])
    assert second[0].layout.names == ("encoder",)
    assert second[0].layout["encoder"].names == ("layer_1",)
    assert_same(fl.unfreeze_parameters(*fl.unfreeze_parameters(*second))[1:], (ps, st))


def test_a_layer_without_parameters():
    layer = fl.freeze(fl.Dropout(0.5))
    assert layer.layout.length == 0
    assert fl.unfreeze(layer) == fl.Dropout(0.5)


def test_what_is_left_of_an_ensemble_keeps_its_axes_and_its_dtype(key):
    layer, x = fl.Dense(2, 3), jnp.ones(2, jnp.float32)
    many, st = jax.vmap(lambda key: fl.setup(key, layer))(jax.random.split(key, 4))
    frozen, nothing, state = fl.freeze_parameters(layer, None, many, st)
    assert (nothing.shape, nothing.dtype) == ((4, 0), jnp.float32)
    y, _ = jax.vmap(frozen, (None, 0, 0))(x, nothing, state)
    assert_same(y, jax.vmap(layer, (None, 0, 0))(x, many, st)[0])
    assert_same(fl.unfreeze_parameters(frozen, nothing, state)[1], many)
    assert_same(fl.layer_map(lambda *parts: parts[:3], frozen, nothing, state)[1], nothing)


def test_no_pattern_freezes_nothing(key):
    ps, st = fl.setup(key, MODEL, float)
    frozen, trained, state = fl.freeze_parameters(MODEL, (), ps, st)
    assert_same(trained, ps)
    assert_same(state, fl.Record(frozen={}, layer=st))
    assert fl.parameter_length(frozen) == ps.size


def test_bad_input(key):
    ps, st = fl.setup(key, fl.Dense(2, 2))
    with pytest.raises(TypeError, match="the state of the layer with its parameters, found None"):
        fl.freeze_parameters(fl.Dense(2, 2), "bias", ps, None)
    with pytest.raises(TypeError, match="the state of the layer with its parameters, found None"):
        fl.unfreeze_parameters(fl.freeze(fl.Dense(2, 2)), ps, None)
    with pytest.raises(TypeError, match="expected a layer or a function, found 3"):
        fl.freeze(3)  # pyright: ignore[reportArgumentType]
    with pytest.raises(KeyError, match="'heads.*' matches nothing: no name 'heads.*'; the nearest: head"):
        fl.freeze(MODEL, "heads.*")
    with pytest.raises(TypeError, match=r"expected a layer that `fl.freeze` made, found Dense\(1, 2\)"):
        fl.unfreeze(fl.Dense(1, 2))
    with pytest.raises(TypeError, match="expected the same layout for both, found: weight"):
        fl.freeze_parameters(fl.Dense(2, 2), "bias", fl.initial_parameters(key, fl.Dense(2, 3)), st)
