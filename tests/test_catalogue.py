"""What holds for every layer of the catalogue alike."""

import contextlib
import dataclasses
import inspect

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flatlayers as fl
from tests.helpers import assert_same, central_difference


def image(channels):
    return (2, 8, 8, channels)


def add_and_squash(z, x):
    return jnp.tanh(0.1 * z + x)


# Each layer with the shape (or shapes) of an input.
LAYERS = [
    (fl.Bilinear(3, 4, 2, jnp.tanh), ((5, 3), (5, 4))),
    (fl.Dense(3, 2, jax.nn.relu, use_bias=False), (5, 3)),
    (fl.Diagonal(3), (5, 3)),
    (fl.Conv((3, 3), 2, 4, jnp.tanh, stride=2, groups=2), image(2)),
    (fl.ConvTranspose((3, 3), 2, 3, pad=fl.SamePad(), stride=2), image(2)),
    (fl.CrossCor((3,), 2, 4, dilation=2), (5, 8, 2)),
    (fl.DepthwiseConv((2, 2), 2, 4), image(2)),
    (fl.PixelShuffle(2), image(4)),
    (fl.Upsample("bilinear", scale=2), image(2)),
    (fl.MaxPool((2, 2), stride=1), image(2)),
    (fl.MeanPool((2, 2), pad=1), image(2)),
    (fl.LPPool((2, 2), p=3), image(2)),
    (fl.GlobalMaxPool(), image(2)),
    (fl.GlobalMeanPool(), image(2)),
    (fl.GlobalLPPool(), image(2)),
    (fl.AdaptiveMaxPool((2, 2)), image(2)),
    (fl.AdaptiveMeanPool((2, 3)), image(2)),
    (fl.AdaptiveLPPool((2, 2)), image(2)),
    (fl.BatchNorm(2, jnp.tanh, momentum=0.3), image(2)),
    (fl.GroupNorm(4, 2), image(4)),
    (fl.InstanceNorm(2, affine=True, track_stats=True), image(2)),
    (fl.LayerNorm((8, 2)), image(2)),
    (fl.RMSNorm((2,)), image(2)),
    (fl.WeightNorm(fl.Dense(3, 2), "weight"), (5, 3)),
    (fl.SpectralNorm(fl.Dense(3, 2), "weight", iterations=2), (5, 3)),
    (fl.Dropout(0.5), (5, 3)),
    (fl.AlphaDropout(0.5), (5, 3)),
    (fl.VariationalHiddenDropout(0.5), (5, 3)),
    (fl.RNNCell(3, 4), (5, 3)),
    (fl.LSTMCell(3, 4, learn_initial_state=True), (5, 3)),
    (fl.GRUCell(3, 4, use_bias=False), (5, 3)),
    (fl.LSTM(3, 4, return_sequence=True), (5, 6, 3)),
    (fl.StatefulRecurrentCell(fl.GRUCell(3, 4)), (5, 3)),
    (fl.BidirectionalRNN(fl.RNNCell(3, 4), fl.GRUCell(3, 2)), (5, 6, 3)),
    (fl.MultiHeadAttention(4, heads=2, dropout=0.1, causal=True), (5, 6, 4)),
    (fl.SinusoidalPositionalEmbedding(4), (5,)),
    (fl.RotaryPositionalEmbedding(4), (5, 6, 2, 4)),
    (fl.ReverseSequence(1), (5, 6, 3)),
    (fl.PatchEmbedding((4, 4), 2, 3), image(2)),
    (fl.PeriodicEmbedding((0, 2), (1.0, 2.0)), (5, 3)),
    (fl.Repeated(fl.Dense(3, 3, jnp.tanh), 4), (5, 3)),
    (fl.Polynomial(3), (5,)),
    (fl.Chebyshev(3), (5,)),
    (fl.Legendre(3), (5,)),
    (fl.Fourier(3), (5,)),
    (fl.Cosine(3), (5,)),
    (fl.Sine(3), (5,)),
    (fl.TensorProductLayer((fl.Fourier(3), fl.Sine(2)), 4), (5, 2)),
    (fl.SplineLayer((0.0, 1.0, 2.0), 3, kind="cubic", learn_grid=True), (5,)),
    (fl.SpectralConv((3, 4), 2, 3), image(2)),
    (fl.FourierLayer(4, 2, 3, jnp.tanh, norm=fl.LayerNorm(3)), (5, 8, 2)),
    (fl.SpectralDerivative(2, 1.0), (5, 8, 2)),
    (fl.FourierNeuralOperator(4, 2, 3, 1, 2), (5, 8, 2)),
    (fl.DeepONet(fl.MLP(3, (4,), 6), fl.Dense(2, 6), out_dims=2), ((5, 3), (7, 2))),
    (fl.MLP(3, (4, 5), 2), (5, 3)),
    (fl.Chain(fl.Dense(3, 2), jnp.tanh, last=fl.Dense(2, 1), name="net"), (5, 3)),
    (fl.Parallel(jnp.add, fl.Dense(3, 2), fl.Dense(3, 2)), (5, 3)),
    (fl.BranchLayer(fl.Dense(3, 2), other=fl.Dense(3, 2)), (5, 3)),
    (fl.PairwiseFusion(jnp.add, fl.Dense(3, 3), fl.Dense(3, 3)), (5, 3)),
    (fl.SkipConnection(fl.Dense(3, 3), jnp.add), (5, 3)),
    (fl.Maxout(fl.Dense(3, 2), fl.Dense(3, 2)), (5, 3)),
    (fl.WrappedFunction(jnp.tanh), (5, 3)),
    (fl.NoOpLayer(), (5, 3)),
    (fl.FlattenLayer(), image(2)),
    (fl.ReshapeLayer((4, 4)), (5, 16)),
    (fl.SelectDim(-1, 0), (5, 3)),
    (fl.FrozenLayer(fl.Dense(3, 2), ("bias",)), (5, 3)),
    (fl.SharedParameters(fl.Chain(fl.Dense(3, 3), fl.Dense(3, 3)), {"layer_1": "layer_0"}), (5, 3)),
]
# Inputs that are no random numbers.
INDICES = (fl.Embedding(7, 3), jnp.array([[0, 6], [3, 3]]))


def vectors(*sizes):
    return lambda dtype: inputs((5, *sizes), dtype)


def path(dtype):
    ts = jnp.linspace(0.0, 1.0, 6, dtype=dtype)
    return inputs((4,), dtype), diffrax.LinearInterpolation(ts, jnp.stack([ts, jnp.sin(ts)], axis=-1))


CELL = fl.Parallel(add_and_squash, fl.Dense(3, 3), fl.Dense(3, 3))
COUPLINGS = ((fl.Diagonal(3), fl.Dense(2, 3)), (fl.Dense(3, 2), fl.Diagonal(2)))
# Layers that solve, and such as change the precision or stop at a NaN, with a function that makes an input.
OTHERS = [
    (fl.NeuralODE(fl.Dense(3, 3, jnp.tanh)), vectors(3)),
    (fl.SecondOrderNeuralODE(fl.Dense(4, 2)), lambda dtype: (inputs((5, 2), dtype),) * 2),
    (fl.NeuralCDE(fl.Dense(4, 8), 2), path),
    (fl.NeuralSDE(fl.Dense(3, 3), fl.Dense(3, 3), dt0=0.1), vectors(3)),
    (fl.FFJORD(fl.Dense(3, 3)), vectors(3)),
    (fl.AugmentedNDE(fl.NeuralODE(fl.Dense(3, 3)), 1), vectors(2)),
    (fl.HamiltonianNN(fl.MLP(4, (5,), 1)), vectors(4)),
    (fl.LagrangianNN(fl.MLP(4, (5,), 1)), vectors(4)),
    (fl.DeepEquilibriumNetwork(CELL), vectors(3)),
    (
        fl.MultiScaleDeepEquilibriumNetwork(
            (CELL, fl.Dense(2, 2, jnp.tanh)), COUPLINGS, None, fl.Anderson(1e-4, 1e-4), (3, 2)
        ),
        vectors(3),
    ),
    (fl.DebugLayer(fl.Dense(3, 2), "encoder"), vectors(3)),
    (fl.AlternatePrecision(fl.Dense(3, 2), jnp.float32), vectors(3)),
]

everywhere = pytest.mark.parametrize(
    ("layer", "shapes"), LAYERS, ids=[type(layer).__name__ for layer, _ in LAYERS]
)


def inputs(shapes, dtype):
    if isinstance(shapes[0], tuple):
        return tuple(inputs(shape, dtype) for shape in shapes)
    return jax.random.uniform(jax.random.key(1), shapes, dtype, 0.1, 0.9)


everything = pytest.mark.parametrize(
    ("layer", "make_input"),
    [*((layer, lambda dtype, shapes=shapes: inputs(shapes, dtype)) for layer, shapes in LAYERS), *OTHERS],
    ids=[type(layer).__name__ for layer, _ in [*LAYERS, *OTHERS]],
)


def test_the_list_is_complete():
    public = {part for part in vars(fl).values() if inspect.isclass(part) and issubclass(part, fl.Layer)}
    bases = {fl.Layer, fl.Container, fl.Wrapper, fl.SolverLayer}
    # A module of another library has no text that makes it again: tests/weights/test_from_equinox.py.
    others = {fl.FromEquinox}
    assert public - bases - others == {type(layer) for layer, _ in [*LAYERS, *OTHERS, INDICES]}


@everything
def test_lengths_text_and_output_shape(key, layer, make_input):
    ps, st = fl.setup(key, layer, jnp.float32)
    assert fl.parameter_length(layer) == ps.size == layer.layout.length
    flags = jax.tree.structure(st) != jax.tree.structure(jax.tree.map(lambda _: 0, st.to_dict()))
    sizes = sum(leaf.size for leaf in jax.tree.leaves(st))
    assert fl.state_length(layer) >= sizes if flags else fl.state_length(layer) == sizes
    names = {**vars(fl), **vars(jnp), **vars(jax.nn), "add_and_squash": add_and_squash}
    assert eval(repr(layer), names) == layer
    x = make_input(jnp.float32)
    y, new = layer(x, ps, st)
    assert fl.output_shape(layer, x) == jax.tree.map(jnp.shape, y)
    # With x64 on, a float32 model stays float32.
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(y))
    if fl.preserves_state_type(layer):
        assert jax.tree.map(jax.typeof, new) == jax.tree.map(jax.typeof, st)
    y_again, new_again = layer(x, ps, st)
    assert_same((y, new), (y_again, new_again))


def test_embedding(key):
    layer, indices = INDICES
    ps, st = fl.setup(key, layer, jnp.float32)
    assert fl.parameter_length(layer) == ps.size == 21
    assert eval(repr(layer), vars(fl)) == layer
    assert_same(layer(indices, ps, st)[0], ps.weight[indices])


@pytest.mark.long
@everywhere
@pytest.mark.parametrize("dtypes", [(jnp.float32, jnp.float64), (jnp.float64, jnp.float32)])
def test_the_result_has_the_promoted_dtype(key, layer, shapes, dtypes):
    ps, st = fl.setup(key, layer, dtypes[1])
    with jax.numpy_dtype_promotion("standard"):
        y, _ = jax.eval_shape(layer, inputs(shapes, dtypes[0]), ps, st)
    expected = jnp.float64 if ps.size else dtypes[0]
    assert {leaf.dtype for leaf in jax.tree.leaves(y)} == {jnp.dtype(expected)}


# Layers that need an order of numbers or a square that is not negative.
REAL = (
    *(fl.BatchNorm, fl.GroupNorm, fl.InstanceNorm, fl.LayerNorm, fl.RMSNorm, fl.SpectralNorm),
    *(fl.MaxPool, fl.MeanPool, fl.LPPool, fl.GlobalMaxPool, fl.GlobalMeanPool, fl.GlobalLPPool),
    *(fl.AdaptiveMaxPool, fl.AdaptiveMeanPool, fl.AdaptiveLPPool, fl.Upsample),
    *(fl.AlphaDropout, fl.MultiHeadAttention, fl.SplineLayer, fl.Maxout),
    *(fl.SpectralConv, fl.FourierLayer, fl.SpectralDerivative, fl.FourierNeuralOperator),
)


@pytest.mark.long
@everywhere
def test_complex_numbers_are_computed_with_or_refused(key, layer, shapes):
    ps, st = fl.setup(key, layer, complex)
    assert ps.dtype == complex
    x = jax.tree.map(lambda a: jax.lax.complex(a, 0.1 * a[..., ::-1]), inputs(shapes, float))
    if isinstance(layer, REAL) or getattr(layer, "activation", None) is jax.nn.relu:
        with pytest.raises((TypeError, ValueError)) if isinstance(layer, REAL) else contextlib.nullcontext():
            layer(x, ps, st)
        return

    def loss(ps):
        return sum(jnp.sum(jnp.abs(leaf) ** 2) for leaf in jax.tree.leaves(layer(x, ps, st)[0]))

    assert all(leaf.dtype == complex for leaf in jax.tree.leaves(layer(x, ps, st)[0]))
    if ps.size:
        direction = fl.ComponentVector(jax.random.normal(jax.random.key(2), ps.shape, complex), ps.layout)
        slope = jnp.real(jnp.sum(jax.grad(loss)(ps).data * direction.data))
        assert jnp.allclose(slope, central_difference(loss, ps, direction), rtol=1e-5)


@pytest.mark.long
@everywhere
def test_nan_in_the_input_is_nan_in_what_depends_on_it(key, layer, shapes):
    """Never a number: a gradient tells what depends on it."""
    ps, st = fl.setup(key, layer, float)
    x, structure = jax.tree.flatten(inputs(shapes, float))
    unit = jnp.zeros(x[0].size).at[x[0].size // 2].set(1.0).reshape(x[0].shape)

    def output(part):
        y, _ = layer(jax.tree.unflatten(structure, [part, *x[1:]]), ps, st)
        return jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(y)])

    y, tangent = jax.jvp(output, (x[0],), (unit,))
    assert not jnp.isnan(y).any()
    bad = output(jnp.where(unit == 1, jnp.nan, x[0]))
    assert jnp.isnan(bad)[tangent != 0].all()


@pytest.mark.parametrize("layer", [fl.Dropout(0.7), fl.AlphaDropout(0.7), fl.VariationalHiddenDropout(0.7)])
def test_dropout_drops_no_nan(key, layer):
    ps, st = fl.setup(key, layer, float)
    y, _ = layer(jnp.full(100, jnp.nan), ps, st)
    assert jnp.isnan(y).all()


@everywhere
def test_a_class_or_an_array_is_no_option(layer, shapes):
    """Refused by the constructor, which names the class and the field."""
    for field in dataclasses.fields(layer):
        if isinstance(layer, fl.WrappedFunction):
            continue
        for bad in (fl.Dense, object(), jnp.ones((2, 2))):
            where = f"{type(layer).__name__}.{field.name}"
            if field.name in ("layers", "bases"):
                where = type(layer).__name__
            with pytest.raises((TypeError, ValueError), match=where):
                dataclasses.replace(layer, **{field.name: bad})


@everything
def test_a_number_that_is_out_of_range_is_no_option(layer, make_input):
    for field in dataclasses.fields(layer):
        value = getattr(layer, field.name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            for bad in (
                float("nan"),
                float("inf"),
                -float("inf"),
                True,
                "1",
                *[2.5] * isinstance(value, int),
            ):
                with pytest.raises(
                    (TypeError, ValueError), match=f"{type(layer).__name__}.{field.name}: .*found"
                ):
                    dataclasses.replace(layer, **{field.name: bad})
            if isinstance(value, int):
                again = dataclasses.replace(layer, **{field.name: np.int64(value)})
                assert again == layer
                assert type(getattr(again, field.name)) is int


@pytest.mark.parametrize(
    ("layer", "make_input"),
    [
        *((layer, lambda dtype, shapes=shapes: inputs(shapes, dtype)) for layer, shapes in LAYERS),
        (fl.RNN(3, 4), lambda dtype: inputs((5, 6, 3), dtype)),
        (fl.GRU(3, 4, reverse=True), lambda dtype: inputs((5, 6, 3), dtype)),
        (fl.Repeated(fl.Dense(3, 3), 2, shared=True), lambda dtype: inputs((5, 3), dtype)),
        *OTHERS,
        (INDICES[0], lambda dtype: INDICES[1]),
    ],
    ids=lambda part: type(part).__name__ if isinstance(part, fl.Layer) else "",
)
def test_a_further_eager_call_compiles_nothing(key, compilations, layer, make_input):
    ps, st = fl.setup(key, layer, jnp.float32)
    x = make_input(jnp.float32)
    _, st = layer(x, ps, st)  # whose state may be of another type
    layer(x, ps, st)
    before = len(compilations)
    for _ in range(2):
        layer(x, ps, st)
    assert len(compilations) == before
