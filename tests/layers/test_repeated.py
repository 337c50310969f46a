from zlib import crc32

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flatlayers as fl
from tests.helpers import assert_close, assert_same, central_difference, count_primitives, equations


class Noisy(fl.Layer):
    """A layer with a parameter and all kinds of state."""

    def parameters(self):
        return {"scale": fl.Param((), fl.initializers.normal)}

    def states(self, key):
        return {"key": key, "count": 0, "rate": 0.5, "training": True}

    def forward(self, x, ps, st):
        key, own = jax.random.split(st.key)
        noise = jax.random.normal(own, x.shape, x.dtype) if st.training else jnp.zeros_like(x)
        return ps.scale * x + st.rate * noise, st.replace(key=key, count=st.count + 1)


class Remembering(fl.Layer):
    """A layer whose state changes type on the first call."""

    keeps_state_type = False

    def states(self, key):
        return {"last": None}

    def forward(self, x, ps, st):
        return (x if st.last is None else x + st.last), st.replace(last=x)


def one_of(tree, i):
    return jax.tree.map(lambda leaf: leaf[i], tree)


def written_out(model, x, ps, st):
    """The applications one after another, with the states stacked again."""
    y, states = x, []
    for i in range(model.n):
        own = ps.layer.unpack() if model.shared else one_of(ps.layer.unpack(), i)
        y, state = model.layer((y, x) if model.input_injection else y, own, one_of(st.layer, i))
        states.append(state)
    return y, st.replace(layer=jax.tree.map(lambda *leaves: jnp.stack(leaves), *states))


INJECTED = fl.Chain(fl.Parallel(jnp.add, fl.Dense(3, 3), fl.Dense(3, 3)), jnp.tanh)
MODELS = [
    fl.Repeated(fl.Dense(3, 3, jnp.tanh), 4),
    fl.Repeated(fl.Dense(3, 3, jnp.tanh), 4, shared=True),
    fl.Repeated(INJECTED, 3, input_injection=True),
    fl.Repeated(INJECTED, 3, shared=True, input_injection=True),
    fl.Repeated(Noisy(), 3),
    fl.Repeated(Noisy(), 3, shared=True),
    fl.Repeated(fl.Repeated(fl.Chain(fl.Dense(3, 3), fl.Dropout(0.5)), 2), 3),
]


@pytest.mark.parametrize("model", MODELS, ids=repr)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_equals_the_applications_written_out(key, model, dtype):
    ps, st = fl.setup(key, model, dtype)
    assert st == fl.initial_states(key, model, dtype)
    x = jax.random.normal(key, (5, 3), dtype)
    for state in (st, fl.testmode(st)):
        y, new = jax.jit(model)(x, ps, state)
        expected, states = written_out(model, x, ps, state)
        rtol = 1e-5 if dtype == jnp.float32 else 1e-12
        np.testing.assert_allclose(y, expected, rtol=rtol, atol=rtol)
        assert y.dtype == dtype
        assert jax.tree.structure(new) == jax.tree.structure(state)
        assert_same(as_data(new), as_data(states))
    assert y.shape == fl.output_shape(model, x)
    assert fl.parameter_length(model) == ps.size


def as_data(st):
    def data(leaf):
        return jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf

    return jax.tree.map(data, st)


def test_equals_a_chain():
    model = fl.Repeated(fl.Dense(3, 3, jnp.tanh), 4)
    chain = fl.Chain(*[fl.Dense(3, 3, jnp.tanh)] * 4)
    ps, st = fl.setup(jax.random.key(0), model, float)
    x = jax.random.normal(jax.random.key(1), (5, 3))
    parts = [one_of(ps.layer.unpack(), i) for i in range(4)]
    tree = {f"layer_{i}": part for i, part in enumerate(parts)}
    ps_chain = fl.ComponentVector.of(tree, chain.layout)
    assert_same(ps_chain.data, ps.data)
    st_chain = fl.initial_states(jax.random.key(0), chain)
    assert_close(model(x, ps, st)[0], chain(x, ps_chain, st_chain)[0])
    of_repeated = jax.grad(lambda ps: model(x, ps, st)[0].sum())(ps)
    of_chain = jax.grad(lambda ps: chain(x, ps, st_chain)[0].sum())(ps_chain)
    assert_close(of_repeated.data, of_chain.data)


def test_four_times_plus_one():
    for shared in (True, False):
        plus = fl.Repeated(lambda x: x + 1, 4, shared=shared)
        ps, st = fl.setup(jax.random.key(0), plus)
        assert plus(3, ps, st)[0] == 7
        assert plus(3, ps, st)[0].dtype == int
        assert_same(plus(jnp.arange(2.0), ps, st)[0], jnp.array([4.0, 5.0]))
    injected = fl.Repeated(lambda yx: 2 * yx[0] + yx[1], 3, input_injection=True)
    assert injected(1.0, *fl.setup(jax.random.key(0), injected))[0] == 2 * (2 * (2 + 1) + 1) + 1


@pytest.mark.parametrize("model", MODELS, ids=repr)
def test_gradient(key, model):
    ps, st = fl.setup(key, model, float)
    x = jax.random.normal(key, (4, 3))
    direction = fl.ComponentVector(jax.random.normal(jax.random.key(2), ps.shape), ps.layout)

    def loss(ps):
        return jnp.sum(model(x, ps, st)[0] ** 2)

    slope = jax.grad(loss)(ps) @ direction
    np.testing.assert_allclose(slope, central_difference(loss, ps, direction), rtol=1e-6)


@pytest.mark.parametrize("model", MODELS[:4], ids=repr)
def test_batched_equals_vmap_and_unbatched(key, model):
    ps, st = fl.setup(key, model, float)
    x = jax.random.normal(key, (5, 3))
    y = model(x, ps, st)[0]
    assert_close(y, jax.vmap(lambda x: model(x, ps, st)[0])(x))
    assert_close(y[0], model(x[0], ps, st)[0])


# Parameters and states


def test_each_application_has_a_key_of_its_own(key):
    layer = fl.Chain(fl.Dense(3, 3), fl.Dropout(0.5))
    ps, st = fl.setup(key, fl.Repeated(layer, 3), float)
    assert ps.layout.names == ("layer",)
    assert ps.layer.layer_0.weight.shape == (3, 3, 3)
    assert len({weight.tobytes() for weight in np.asarray(ps.layer.layer_0.weight)}) == 3
    assert len({data.tobytes() for data in np.asarray(jax.random.key_data(st.layer.layer_1.key))}) == 3
    fewer, fewer_st = fl.setup(key, fl.Repeated(layer, 2), float)
    assert_same(fewer.layer.layer_0.weight, ps.layer.layer_0.weight[:2])
    assert_same(as_data(fewer_st.layer), one_of(as_data(st.layer), slice(2)))
    shared, shared_st = fl.setup(key, fl.Repeated(layer, 3, shared=True), float)
    assert shared.layer.layer_0.weight.shape == (3, 3)
    assert_same(as_data(shared_st), as_data(st))


def test_stacked_is_drawn_copy_by_copy(key):
    normal = fl.initializers.normal
    matrix, vector, scalar = fl.Param((2, 2), normal), fl.Param((2,), normal), fl.Param((), normal)

    class Blocks(fl.Layer):
        def parameters(self):
            parts = {"dense": {"weight": matrix}, "gain": scalar}
            return {"blocks": fl.Stacked(parts, 3), "gains": fl.Stacked(fl.Stacked(vector, 3), 4)}

    ps = fl.initial_parameters(key, Blocks(), float)
    assert ps.layout == fl.Layout(
        {"blocks": fl.Layout({"dense": {"weight": (2, 2)}, "gain": ()}).stack(3), "gains": (4, 3, 2)}
    )
    blocks, gains = (fold_names(key, "flatlayers", name) for name in ("blocks", "gains"))
    for i in range(3):
        copy = jax.random.fold_in(blocks, i)
        assert_same(ps.blocks.dense.weight[i], normal(fold_names(copy, "dense", "weight"), (2, 2), float))
        assert_same(ps.blocks.gain[i], normal(fold_names(copy, "gain"), (), float))
    copy = jax.random.fold_in(jax.random.fold_in(gains, 3), 1)
    assert_same(ps.gains[3, 1], normal(copy, (2,), float))


def fold_names(key, *names):
    for name in names:
        key = jax.random.fold_in(key, crc32(name.encode()))
    return key


def test_stacked_layers_are_found(key):
    class Blocks(fl.Layer):
        def parameters(self):
            return {"blocks": fl.Stacked({"a": fl.Dense(2, 2), "b": fl.Param((), fl.initializers.ones)}, 3)}

    assert Blocks().children() == {"blocks": {"a": fl.Dense(2, 2)}}
    model = fl.Repeated(fl.Dense(2, 2), 3)
    assert model.children() == {"layer": fl.Dense(2, 2)}
    assert fl.contains_layer(fl.Stacked(fl.Dense(2, 2), 3))
    assert not fl.contains_layer(fl.Stacked(fl.Param((), fl.initializers.ones), 3))
    assert "layer=Dense(2, 2),  # 6 parameters" in fl.pformat(model)
    assert fl.pformat(model).endswith("# 18 parameters, 72 bytes")
    assert fl.preserves_state_type(model)
    assert not fl.preserves_state_type(fl.Repeated(Remembering(), 3))
    ps, st = fl.setup(key, {"blocks": fl.Stacked(fl.Dropout(0.5), 3), "one": fl.Dense(2, 2)}, float)
    assert ps.layout == fl.Layout({"blocks": fl.Layout({}).stack(3), "one": {"weight": (2, 2), "bias": (2,)}})
    assert st.blocks.key.shape == (3,)
    assert st.blocks.training is True


def test_states_count_and_modes(key):
    model = fl.Repeated(fl.Dropout(0.5), 4)
    assert fl.state_length(model) == 5
    ps, st = fl.setup(key, model)
    x = jnp.ones(64)
    assert_same(model(x, ps, fl.testmode(st))[0], x)
    y, new = model(x, ps, st)
    assert set(np.unique(y)) <= {0.0, 16.0}
    assert not np.array_equal(model(x, ps, new)[0], y)
    ps, st = fl.setup(key, fl.Repeated(Noisy(), 4, shared=True), jnp.float32)
    assert st.layer.rate.dtype == jnp.float32
    assert (fl.update_state(st, "count", jnp.arange(4)).layer.count == jnp.arange(4)).all()


def test_a_state_that_changes_type(key):
    model = fl.Repeated(Remembering(), 3)
    ps, st = fl.setup(key, model)
    y, new = model(jnp.ones(2), ps, st)
    assert_same(y, jnp.ones(2))
    assert_same(new.layer.last, jnp.ones((3, 2)))
    y, new = jax.jit(model)(jnp.ones(2), ps, new)
    assert_same(y, jnp.full(2, 4.0))
    assert_same(new.layer.last, jnp.array([[1.0] * 2, [2.0] * 2, [3.0] * 2]))


# The program


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("injection", [False, True])
def test_the_program_does_not_grow(key, shared, injection):
    layer = INJECTED if injection else fl.Chain(fl.Dense(3, 3, jnp.tanh), fl.Dropout(0.5))

    def sizes(n):
        model = fl.Repeated(layer, n, shared=shared, input_injection=injection)
        ps, st = fl.setup(key, model, float)
        forward = jax.make_jaxpr(model)(jnp.ones((5, 3)), ps, st)
        gradient = jax.make_jaxpr(jax.grad(lambda ps: model(jnp.ones((5, 3)), ps, st)[0].sum()))(ps)
        initial = jax.make_jaxpr(lambda key: fl.setup(key, model, float))(key)
        return [len(list(equations(program.jaxpr))) for program in (forward, gradient, initial)]

    assert sizes(2) == sizes(50)


def test_unpacking_is_one_split_a_level(key):
    model = fl.Repeated(fl.Repeated(fl.Chain(fl.Dense(3, 3), fl.Dense(3, 3)), 2), 3)
    ps, _ = fl.setup(key, model)
    assert count_primitives(lambda ps: ps.unpack(), ps)["split"] == 3


def test_parts_of_a_vector_are_parameters(key):
    model = fl.Repeated(fl.Dense(3, 3), 4)
    ps, st = fl.setup(key, model, float)
    assert_same(model(jnp.ones(3), {"layer": ps.layer}, st)[0], model(jnp.ones(3), ps, st)[0])


# Dtypes and errors


@pytest.mark.parametrize(
    ("x_dtype", "dtype", "expected"),
    [
        (jnp.float32, jnp.float64, jnp.float64),
        (jnp.float64, jnp.float32, jnp.float64),
        (jnp.bfloat16, jnp.float32, jnp.float32),
        (jnp.int32, jnp.float32, jnp.float32),
    ],
)
def test_promotion_comes_before_the_scan(key, x_dtype, dtype, expected):
    model = fl.Repeated(fl.Dense(3, 3), 4)
    ps, st = fl.setup(key, model, dtype)
    x = jnp.ones((2, 3), x_dtype)
    with jax.numpy_dtype_promotion("standard"):
        y = model(x, ps, st)[0]
        assert y.dtype == expected
        assert_same(
            y, model(x.astype(expected), fl.ComponentVector(ps.data.astype(expected), ps.layout), st)[0]
        )
    with pytest.raises(Exception, match="promotion"):
        model(x, ps, st)


def test_a_pytree_goes_through(key):
    def step(pair):
        count, x = pair
        return count + 1, 2 * x

    model = fl.Repeated(step, 3)
    count, x = model((0, jnp.ones(2, jnp.float32)), *fl.setup(key, model))[0]
    assert (count, count.dtype) == (3, int)
    assert_same(x, jnp.full(2, 8, jnp.float32))


@pytest.mark.parametrize("layer", [fl.Dense(3, 2), lambda x: (x, x)])
def test_a_layer_that_does_not_give_back_what_it_takes(key, layer):
    model = fl.Repeated(layer, 4)
    ps, st = fl.setup(key, model, float)
    with pytest.raises(ValueError, match=r"output is like x, float64\[5,3\], found .*float64\[5,"):
        model(jnp.ones((5, 3)), ps, st)


def test_errors_name_the_layer(key):
    model = fl.Chain(blocks=fl.Repeated(fl.Chain(fl.Dense(3, 3), fl.Dense(3, 3)), 4))
    ps, st = fl.setup(key, model, float)
    with pytest.raises(ValueError, match=r"shape \(..., 3\), found shape \(5, 4\)") as error:
        model(jnp.ones((5, 4)), ps, st)
    assert "in the layer blocks.layer.layer_0: Dense(3, 3)" in error.value.__notes__[0]
    with pytest.raises(ValueError, match="Repeated.n: expected an integer of at least 1, found 0"):
        fl.Repeated(fl.Dense(3, 3), 0)
    with pytest.raises(TypeError, match="expected a layer or a function"):
        fl.Repeated(3, 4)


def test_the_printed_layer_rebuilds_it():
    for model in (MODELS[0], MODELS[1], fl.Repeated(fl.Dense(3, 3), 2, input_injection=True)):
        assert eval(repr(model), {**vars(fl), "tanh": jnp.tanh}) == model
