"""Weights of Equinox and Flax NNX by name: outputs of both, and names that are refused."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flatlayers as fl


KEY = jax.random.key(1)


def drawn(module, seed=0):
    """An Equinox module with different numbers everywhere: biases and scales do not start as 0 and 1."""
    rng = np.random.default_rng(seed)
    dynamic, static = eqx.partition(module, eqx.is_inexact_array)
    dynamic = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape), jnp.float32), dynamic)
    return eqx.combine(dynamic, static)


def inputs(*shape):
    return jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_a_perceptron_of_equinox():
    module = drawn(eqx.nn.MLP(3, 2, 5, 2, activation=jnp.tanh, key=KEY, dtype=jnp.float32))
    x = inputs(4, 3)
    for layer in (fl.MLP(3, (5, 5), 2), fl.Chain(*[fl.Dense(a, b, f) for a, b, f in SIZES])):
        ps, st = fl.from_equinox(module, layer)
        close(layer(x, ps, st)[0], jax.vmap(module)(x))


SIZES = [(3, 5, jnp.tanh), (5, 5, jnp.tanh), (5, 2, None)]


@pytest.mark.long
@pytest.mark.parametrize(("groups", "cross"), [(1, True), (2, False)])
def test_convolutions_of_equinox(groups, cross):
    options = {"stride": 2, "dilation": 1, "groups": groups}
    module = drawn(eqx.nn.Conv2d(2, 4, (3, 2), padding=1, key=KEY, dtype=jnp.float32, **options))
    layer = fl.Conv((3, 2), 2, 4, pad=1, cross_correlation=cross, **options)
    x = inputs(6, 7, 2)
    ps, st = fl.from_equinox(module, layer)
    close(layer(x, ps, st)[0], jnp.moveaxis(module(jnp.moveaxis(x, -1, 0)), 0, -1))


@pytest.mark.parametrize("cross", [True, False])
def test_transposed_convolutions_of_equinox(cross):
    module = drawn(eqx.nn.ConvTranspose1d(2, 4, 3, stride=2, padding=1, key=KEY, dtype=jnp.float32))
    layer = fl.ConvTranspose((3,), 2, 4, stride=2, pad=1, cross_correlation=cross)
    x = inputs(6, 2)
    ps, st = fl.from_equinox(module, layer)
    close(layer(x, ps, st)[0], jnp.moveaxis(module(jnp.moveaxis(x, -1, 0)), 0, -1))


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize(("kind", "ours"), [(eqx.nn.LSTMCell, fl.LSTMCell), (eqx.nn.GRUCell, fl.GRUCell)])
def test_cells_of_equinox(kind, ours, use_bias):
    module = drawn(kind(3, 4, use_bias=use_bias, key=KEY, dtype=jnp.float32))
    layer, x, h = ours(3, 4, use_bias=use_bias), inputs(3), inputs(4)
    carry = (h, -h) if kind is eqx.nn.LSTMCell else (h,)
    ps, st = fl.from_equinox(module, layer)
    (y, _), _ = layer((x, carry), ps, st)
    expected = module(x, carry if kind is eqx.nn.LSTMCell else h)
    close(y, expected[0] if kind is eqx.nn.LSTMCell else expected)


def test_attention_of_equinox():
    biases = {f"use_{name}_bias": True for name in ("query", "key", "value", "output")}
    attention = drawn(eqx.nn.MultiheadAttention(2, 4, key=KEY, dtype=jnp.float32, **biases))
    layer, x = fl.MultiHeadAttention(4, heads=2, use_bias=True), inputs(5, 4)
    close(layer(x, *fl.from_equinox(attention, layer))[0], attention(x, x, x))


@pytest.mark.long
def test_norms_and_tables_of_equinox():
    x = inputs(5, 4)
    for module, layer in (
        (eqx.nn.LayerNorm(4), fl.LayerNorm(4)),
        (eqx.nn.RMSNorm(4, use_bias=False), fl.RMSNorm(4)),
    ):
        module = drawn(module)
        close(layer(x, *fl.from_equinox(module, layer))[0], jax.vmap(module)(x))
    module, layer = drawn(eqx.nn.GroupNorm(2, 4)), fl.GroupNorm(4, 2)
    expected = module(jnp.moveaxis(x, -1, 0)).T
    close(layer(x[None], *fl.from_equinox(module, layer))[0][0], expected)
    module, layer = drawn(eqx.nn.Embedding(5, 3, key=KEY, dtype=jnp.float32)), fl.Embedding(5, 3)
    close(layer(jnp.array(3), *fl.from_equinox(module, layer))[0], module(3))


class Ours(fl.Container):
    encoder: fl.Layer
    heads: tuple[fl.Layer, ...]

    def forward(self, x, ps, st):
        z, _ = self.encoder(x, ps.encoder, st.encoder)
        one, _ = self.heads[0](z, ps.heads.layer_0, st.heads.layer_0)
        two, _ = self.heads[1](z, ps.heads.layer_1, st.heads.layer_1)
        return one - two, st


class Theirs(eqx.Module):
    heads: list  # in another order than ours
    encoder: eqx.Module

    def __call__(self, x):
        z = self.encoder(x)
        return self.heads[0](z) - self.heads[1](z)


def dense(a, b):
    return eqx.nn.Linear(a, b, key=KEY, dtype=jnp.float32)


def test_attributes_are_names_and_order_does_not_count():
    steps = [dense(3, 3), eqx.nn.Lambda(jnp.tanh), dense(3, 3)]
    module = drawn(Theirs([dense(3, 3), dense(3, 3)], eqx.nn.Sequential(steps)))
    heads, x = (fl.Dense(3, 3), fl.Dense(3, 3)), inputs(3)
    same = Ours(fl.Chain(fl.Dense(3, 3), jnp.tanh, fl.Dense(3, 3)), heads)
    close(same(x, *fl.from_equinox(module, same))[0], module(x))
    shorter = Ours(fl.Chain(fl.Dense(3, 3, jnp.tanh), fl.Dense(3, 3)), heads)
    with pytest.raises(fl.LayoutMismatchError) as caught:
        fl.from_equinox(module, shorter)
    assert caught.value.lines == [
        "encoder.layers.1.weight: expected (3, 3) for encoder.layer_1.weight, found none",
        "encoder.layers.1.bias: expected (3,) for encoder.layer_1.bias, found none",
        "encoder.layers.2.weight: (3, 3) is left over",
        "encoder.layers.2.bias: (3,) is left over",
    ]
    ps, st = fl.from_equinox(module, shorter, {"encoder.layer_1": "encoder.layers.2"})
    close(shorter(x, ps, st)[0], module(x))


def test_dtypes_and_statistics_of_equinox():
    assert (
        fl.from_equinox(eqx.nn.Linear(2, 2, key=KEY, dtype=jnp.float16), fl.Dense(2, 2))[0].dtype
        == jnp.float16
    )
    mixed = eqx.tree_at(lambda m: m.bias, dense(2, 2), jnp.zeros(2, jnp.float64))
    with pytest.raises(
        TypeError, match="expected arrays of one dtype, found float32 for 'weight', float64 for"
    ):
        fl.from_equinox(mixed, fl.Dense(2, 2))
    norm = eqx.nn.BatchNorm(3, "batch", mode="batch", dtype=jnp.float32)
    with pytest.raises(fl.LayoutMismatchError, match="expected layers that Equinox has, too"):
        fl.from_equinox(norm, fl.BatchNorm(3))


def test_the_key_of_a_dropout_is_given():
    layer = fl.Chain(fl.Dense(2, 2), fl.Dropout(0.5))
    module = eqx.nn.Sequential([dense(2, 2), eqx.nn.Dropout(0.5)])
    one, other = (fl.from_equinox(module, layer, key=jax.random.key(i))[1].layer_1.key for i in (0, 1))
    assert one != other
    assert fl.from_equinox(module, layer)[1].layer_1.key == one


# Flax NNX


def nnx_drawn(module):
    from flax import nnx

    rng = np.random.default_rng(0)
    graph, numbers, rest = nnx.split(module, nnx.Any(nnx.Param, nnx.BatchStat), ...)
    numbers = jax.tree.map(lambda a: jnp.asarray(rng.uniform(0.5, 1.5, a.shape), jnp.float32), numbers)
    return nnx.merge(graph, numbers, rest)


@pytest.fixture
def nnx():
    return pytest.importorskip("flax.nnx")


def test_a_chain_of_flax(nnx):
    """Its leaves are sorted by name there: biases first."""
    rngs = nnx.Rngs(0)
    steps = [
        *(nnx.Linear(3, 4, rngs=rngs), jnp.tanh, nnx.BatchNorm(4, rngs=rngs)),
        *(
            nnx.LayerNorm(4, epsilon=1e-5, rngs=rngs),
            nnx.Dropout(0.5, rngs=rngs),
            nnx.Linear(4, 4, rngs=rngs),
        ),
    ]
    module = nnx_drawn(nnx.Sequential(*steps))
    module.eval()
    layer = fl.Chain(
        *(fl.Dense(3, 4), jnp.tanh, fl.BatchNorm(4)), *(fl.LayerNorm(4), fl.Dropout(0.5), fl.Dense(4, 4))
    )
    ps, st = fl.from_nnx(module, layer)
    x = inputs(5, 3)
    close(layer(x, ps, fl.testmode(st))[0], module(x))


@pytest.mark.parametrize("cross", [True, False])
def test_convolutions_of_flax(nnx, cross):
    module = nnx_drawn(
        nnx.Conv(2, 4, (3, 2), strides=2, padding="VALID", feature_group_count=2, rngs=nnx.Rngs(0))
    )
    layer, x = fl.Conv((3, 2), 2, 4, stride=2, groups=2, cross_correlation=cross), inputs(2, 6, 7, 2)
    close(layer(x, *fl.from_nnx(module, layer))[0], module(x))


@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "ours"),
    [
        ("LSTMCell", fl.LSTM),
        ("OptimizedLSTMCell", fl.LSTM),
        ("GRUCell", fl.GRU),
        ("SimpleCell", fl.RNN),
    ],
)
def test_recurrent_layers_of_flax(nnx, kind, ours):
    module = nnx_drawn(nnx.RNN(getattr(nnx, kind)(3, 4, rngs=nnx.Rngs(0))))
    layer, x = ours(3, 4, return_sequence=True), inputs(2, 5, 3)
    expected = module(x, initial_carry=jax.tree.map(jnp.zeros_like, carry_of(kind)))
    close(layer(x, *fl.from_nnx(module, layer))[0], expected)
    cell = layer.cell
    close(fl.from_nnx(module.cell, cell)[0].data, fl.from_nnx(module, layer)[0].data)


def carry_of(kind):
    h = jnp.zeros((2, 4), jnp.float32)
    return (h, h) if "LSTM" in kind else h


def test_attention_and_tables_of_flax(nnx):
    module = nnx_drawn(nnx.MultiHeadAttention(2, 4, decode=False, rngs=nnx.Rngs(0)))
    layer, x = fl.MultiHeadAttention(4, heads=2, use_bias=True), inputs(5, 4)
    close(layer(x, *fl.from_nnx(module, layer))[0], module(x))


def test_other_heads_than_those_of_flax_are_refused(nnx):
    """The same numbers in another number of heads are another function."""
    module = nnx.MultiHeadAttention(2, 4, decode=False, rngs=nnx.Rngs(0))
    with pytest.raises(fl.LayoutMismatchError) as caught:
        fl.from_nnx(module, fl.MultiHeadAttention(4, heads=4, use_bias=True))
    assert "query.kernel: expected (4, 4, 1) for q_proj.weight, found (4, 2, 2)" in caught.value.lines
    assert "key.bias: expected (4, 1) for k_proj.bias, found (2, 2)" in caught.value.lines
    assert "out.kernel: expected (4, 1, 4) for out_proj.weight, found (2, 2, 4)" in caught.value.lines


def test_norms_and_tables_of_flax(nnx):
    x = inputs(5, 4)
    module, layer = nnx_drawn(nnx.Embed(5, 3, rngs=nnx.Rngs(0))), fl.Embedding(5, 3)
    close(layer(jnp.array(3), *fl.from_nnx(module, layer))[0], module(jnp.array(3)))
    for kind, ours in (
        (nnx.GroupNorm(4, 2, epsilon=1e-5, rngs=nnx.Rngs(0)), fl.GroupNorm(4, 2)),
        (nnx.RMSNorm(4, epsilon=1e-5, rngs=nnx.Rngs(0)), fl.RMSNorm(4)),
    ):
        module = nnx_drawn(kind)
        close(ours(x[:, None], *fl.from_nnx(module, ours))[0], module(x[:, None]))


def test_what_flax_does_not_have(nnx):
    with pytest.raises(fl.LayoutMismatchError, match="expected layers that Flax NNX has, too"):
        fl.from_nnx(nnx.ConvTranspose(2, 2, (3,), rngs=nnx.Rngs(0)), fl.ConvTranspose((3,), 2, 2))
    with pytest.raises(TypeError, match="expected a module of Flax NNX, found Linear"):
        fl.from_nnx(dense(2, 2), fl.Dense(2, 2))
    with pytest.raises(fl.LayoutMismatchError) as caught:
        fl.from_nnx(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), fl.Dense(2, 4))
    assert caught.value.lines == [
        "kernel: expected (2, 4) for weight, found (2, 3)",
        "bias: expected (4,) for bias, found (3,)",
    ]
