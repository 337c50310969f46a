import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flatlayers as fl
from tests.helpers import assert_same, central_difference, count_primitives


CASTS = [(fl.f16, "float16"), (fl.bf16, "bfloat16"), (fl.f32, "float32"), (fl.f64, "float64")]


# Casting


@pytest.mark.parametrize(("cast", "dtype"), CASTS)
def test_a_vector_keeps_its_layout(cast, dtype):
    ps = fl.ComponentVector.of({"a": 1.0, "b": {"c": [4.0, 1.3]}})
    new = cast(ps)
    assert isinstance(new, fl.ComponentVector)
    assert new.layout == ps.layout
    assert new.dtype == dtype
    np.testing.assert_array_equal(new.data, np.array([1.0, 4.0, 1.3]).astype(dtype))
    assert_same(new, fl.cast(ps, dtype))
    assert cast(fl.ComponentVector.zeros(fl.Layout({"a": (2,)}).stack(3), float)).a.shape == (3, 2)


def test_only_floating_leaves_are_cast(key):
    model = fl.Chain(fl.BatchNorm(3), fl.Dropout(0.5))
    _, st = fl.setup(key, model)
    tree = {
        "st": st,
        "record": fl.Record(count=jnp.arange(2, dtype=jnp.int32), mean=jnp.ones(2), training=True, mask=None),
        "rest": [np.arange(2), jnp.array(True), 3, True, 0.5, np.ones(2, "float32"), 1j, jax.random.key(1)],
    }
    new = fl.f16(tree)
    assert jax.tree.structure(new) == jax.tree.structure(tree)
    assert new["st"].layer_0.running_mean.dtype == new["st"].layer_0.running_var.dtype == jnp.float16
    assert new["st"].layer_0.training is True
    assert new["record"].mean.dtype == jnp.float16
    assert new["record"].count.dtype == jnp.int32
    kinds = [getattr(leaf, "dtype", type(leaf)) for leaf in new["rest"]]
    key_kind = jax.random.key(1).dtype
    assert kinds == [np.arange(2).dtype, bool, int, bool, "float16", "float16", complex, key_kind]
    for a, b in zip(jax.tree.leaves(new["st"].layer_1), jax.tree.leaves(st.layer_1), strict=True):
        assert (a == b).all()
        assert a.dtype == b.dtype


@pytest.mark.long
def test_a_view_in_half_precision_is_one_conversion(key):
    model = fl.Chain(fl.Dense(3, 4, jnp.tanh), fl.Dense(4, 2))
    ps, st = fl.setup(key, model)
    x = jnp.ones(3, jnp.bfloat16)

    def loss(ps):
        return model(x, fl.bf16(ps), st)[0].sum()

    counts = count_primitives(lambda ps: fl.bf16(ps).unpack(), ps)
    assert counts["convert_element_type"] == counts["split"] == 1
    assert count_primitives(lambda ps: fl.f32(ps), ps)["convert_element_type"] == 0
    gradient = jax.grad(loss)(ps)
    assert gradient.dtype == jnp.float32
    assert gradient.layout == ps.layout
    exact = jax.grad(lambda ps: model(jnp.ones(3, jnp.float32), ps, st)[0].sum())(ps)
    np.testing.assert_allclose(gradient.data, exact.data, atol=0.02)


def test_casting_under_transformations():
    ps = fl.ComponentVector.of({"a": [1.0, 2.0]})
    assert jax.jit(fl.f32)(ps).dtype == jnp.float32
    assert jax.vmap(fl.f16)(fl.ComponentVector(jnp.ones((3, 2)), fl.Layout({"a": (2,)}))).a.shape == (3, 2)
    assert jax.eval_shape(fl.bf16, ps).data.dtype == jnp.bfloat16
    assert fl.cast(ps, float).dtype == jnp.float64
    _, tangent = jax.jvp(fl.f32, (ps,), (ps,))
    assert tangent.dtype == jnp.float32


def test_float64_is_not_pretended():
    with jax.enable_x64(False):
        ps = fl.ComponentVector.of({"a": 1.0})
        layer = fl.AlternatePrecision(fl.Dense(2, 2), "float64")
        for call in (
            lambda: fl.f64(ps),
            lambda: fl.cast(ps, "float64"),
            lambda: layer(jnp.ones(2), *fl.setup(jax.random.key(0), layer)),
        ):
            with pytest.raises(ValueError, match=r"found float64 while jax_enable_x64 is off"):
                call()
        half = fl.AlternatePrecision(fl.Dense(2, 2), "float16")
        assert half(np.ones(2), *fl.setup(jax.random.key(0), half))[0].dtype == jnp.float32
        assert fl.cast(ps, float).dtype == fl.f32(np.ones(2)).dtype == jnp.float32


@pytest.mark.parametrize("dtype", [jnp.int32, "bool", complex, None])
def test_other_kinds_of_dtype(dtype):
    with pytest.raises(TypeError, match="expected a floating dtype, found"):
        fl.cast(jnp.ones(2), dtype)
    with pytest.raises(TypeError, match="expected a floating dtype, found"):
        fl.AlternatePrecision(fl.Dense(2, 2), dtype)


# A layer in another precision


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("outside", ["float32", "float64"])
def test_computes_in_the_dtype_and_returns_that_of_x(key, dtype, outside):
    seen = []

    class Watch(fl.Layer):
        def parameters(self):
            return {"weight": fl.Param((3,), fl.initializers.constant(1 / 3))}

        def forward(self, x, ps, st):
            seen.append((x.dtype, ps.weight.dtype))
            return ps.weight * x, st

    layer = fl.AlternatePrecision(Watch(), dtype)
    ps, st = fl.setup(key, layer, outside)
    assert ps.dtype == outside
    y, new = jax.jit(layer)(jnp.ones(3, outside), ps, st)
    assert seen == [(dtype, dtype)]
    assert y.dtype == outside
    assert new == st
    third = np.full(3, 1 / 3, outside).astype(dtype).astype(outside)
    np.testing.assert_array_equal(y, third)


@pytest.mark.long
def test_gradients_have_the_dtype_of_the_parameters(key):
    dense = fl.Chain(fl.Dense(3, 4, jnp.tanh), fl.Dense(4, 2))
    layer = fl.AlternatePrecision(dense, jnp.bfloat16)
    ps, st = fl.setup(key, layer)
    x = jnp.ones((5, 3), jnp.float32)

    def loss(ps, x, model):
        return jnp.mean(model(x, ps, st)[0] ** 2)

    by_ps, by_x = jax.grad(loss, (0, 1))(ps, x, layer)
    exact = jax.grad(loss, (0, 1))(ps, x, dense)
    assert by_ps.dtype == by_x.dtype == jnp.float32
    assert by_ps.layout == dense.layout
    np.testing.assert_allclose(by_ps.data, exact[0].data, atol=0.03)
    np.testing.assert_allclose(by_x, exact[1], atol=0.03)


def test_gradient_in_a_higher_precision(key):
    """In float64 inside, a difference that float32 loses has its derivative."""
    layer = fl.AlternatePrecision(fl.Dense(3, 2, lambda y: (1e9 + y) - 1e9), jnp.float64)
    ps, st = fl.setup(key, layer)
    x = jnp.ones(3, jnp.float32)
    direction = fl.ComponentVector(jnp.ones(8, jnp.float32), ps.layout)

    def loss(ps):
        return layer(x, ps, st)[0].sum()

    assert loss(ps).dtype == jnp.float32
    np.testing.assert_allclose(loss(ps), fl.Dense(3, 2)(x, ps, st)[0].sum(), rtol=1e-5)
    slope = central_difference(loss, ps, direction, eps=jnp.float32(1e-2))
    np.testing.assert_allclose(jax.grad(loss)(ps) @ direction, slope, rtol=1e-3)


def test_running_statistics_keep_their_dtype(key):
    layer = fl.AlternatePrecision(fl.BatchNorm(3), jnp.float16)
    model = fl.Chain(layer, fl.AlternatePrecision(fl.SpectralNorm(fl.Dense(3, 2), "weight"), jnp.bfloat16))
    ps, st = fl.setup(key, model)
    x = 1 + jax.random.normal(key, (64, 3), jnp.float32)
    y, new = jax.jit(model)(x, ps, st)
    assert y.dtype == jnp.float32
    assert fl.preserves_state_type(model)
    assert jax.tree.structure(new) == jax.tree.structure(st)
    assert [leaf.dtype for leaf in jax.tree.leaves(new)] == [leaf.dtype for leaf in jax.tree.leaves(st)]
    assert new.layer_0.running_mean.dtype == jnp.float32
    half = np.asarray(x).astype("float16").astype("float32")
    np.testing.assert_allclose(new.layer_0.running_mean, 0.1 * half.mean(0), rtol=1e-5)


def test_a_state_that_is_an_output_keeps_its_dtype(key):
    class Last(fl.Layer):
        def states(self, key):
            return {"last": jnp.zeros(3), "count": 0, "key": key, "training": True}

        def forward(self, x, ps, st):
            return x, st.replace(last=x, count=st.count + 1)

    layer = fl.AlternatePrecision(fl.Chain(Last()), jnp.float16)
    ps, st = fl.setup(key, layer)
    (y, new), _ = jax.lax.scan(lambda c, _: (layer(c[0], ps, c[1]), None), (jnp.ones(3), st), length=2)
    assert new.layer_0.last.dtype == jnp.float32
    assert new.layer_0.count == 2
    assert y.dtype == jnp.float64


def test_a_state_of_changing_type_is_handed_on(key):
    layer = fl.AlternatePrecision(fl.StatefulRecurrentCell(fl.GRUCell(3, 2)), jnp.float16)
    ps, st = fl.setup(key, layer)
    x = jnp.ones(3, jnp.float32)
    for _ in range(2):
        y, st = layer(x, ps, st)
        assert y.dtype == jnp.float32
    assert not fl.preserves_state_type(layer)


@pytest.mark.long
def test_the_dtype_of_the_result(key):
    embedding = fl.AlternatePrecision(fl.Embedding(5, 2), jnp.float16)
    ps, st = fl.setup(key, embedding)
    y, _ = embedding(jnp.array([0, 3]), ps, st)
    assert y.dtype == jnp.float32
    assert_same(y, ps.weight[jnp.array([0, 3])].astype("float16").astype("float32"))
    count = fl.AlternatePrecision(fl.WrappedFunction(lambda x: x + 1), jnp.float16)
    assert count(jnp.arange(3), *fl.setup(key, count))[0].dtype == jnp.arange(3).dtype
    pair = fl.AlternatePrecision(fl.Parallel(None, jnp.sin, jnp.argmax), jnp.float16)
    x = (jnp.ones(2, jnp.float32), jnp.ones(2, jnp.bfloat16))
    sine, most = pair(x, *fl.setup(key, pair))[0]
    assert sine.dtype == jnp.float32
    assert most.dtype == jnp.argmax(jnp.ones(2)).dtype
    dense = fl.AlternatePrecision(fl.Dense(2, 2), jnp.float16)
    ps, st = fl.setup(key, dense)
    v = fl.ComponentVector.of({"a": 1.0, "b": 2.0}, dtype="float32")
    assert dense(v, ps, st)[0].dtype == jnp.float32
    assert fl.output_shape(dense, v) == (2,)


@pytest.mark.long
def test_a_part_of_a_model_and_of_a_solve(key):
    part = fl.AlternatePrecision(fl.Dense(2, 8, jnp.tanh), jnp.bfloat16)
    field = fl.Chain(part, fl.Dense(8, 2))
    node = fl.NeuralODE(field, dt0=0.1)
    ps, st = fl.setup(key, node)
    assert ps.layout == fl.Chain(part.layer, fl.Dense(8, 2)).layout
    y0 = jnp.ones(2, jnp.float32)
    y, _ = node(y0, ps, st)
    exact, _ = fl.NeuralODE(fl.Chain(part.layer, fl.Dense(8, 2)))(y0, ps, st)
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, exact, atol=0.05)


def test_equal_spellings_are_equal_layers():
    dense = fl.Dense(3, 2)
    spellings = ["float16", jnp.float16, np.float16, jnp.dtype("float16")]
    layers = [fl.AlternatePrecision(dense, dtype) for dtype in spellings]
    assert len(set(layers)) == 1
    assert layers[0].dtype == jnp.float16
    assert repr(layers[0]) == "AlternatePrecision(Dense(3, 2), float16)"
    half = fl.AlternatePrecision(dense, jnp.bfloat16)
    assert half != layers[0]
    assert pickle.loads(pickle.dumps(half)) == half
    assert repr(half) == "AlternatePrecision(Dense(3, 2), bfloat16)"
    assert "float16" in fl.pformat(fl.Chain(layers[0]))


def test_errors_name_the_layer_inside(key):
    model = fl.Chain(half=fl.AlternatePrecision(fl.Chain(fl.Dense(3, 2), fl.Dense(3, 2)), jnp.float16))
    ps, st = fl.setup(key, model)
    with pytest.raises(ValueError, match=r"\(..., 3\), found shape \(2,\)") as info:
        model(jnp.ones(3, jnp.float32), ps, st)
    assert "in the layer half.layer_1: Dense(3, 2)" in info.value.__notes__[0]
