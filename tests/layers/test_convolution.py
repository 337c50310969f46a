import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal

import flatlayers as fl
from tests.helpers import assert_close, central_difference


# The equations as loops, for one image `x (*spatial, in)`


def as_tuple(value, rank):
    return (value,) * rank if isinstance(value, int) else value


def as_pads(pad, rank):
    pad = as_tuple(pad, rank)
    return (
        tuple(zip(pad[::2], pad[1::2], strict=True)) if len(pad) == 2 * rank else tuple((p, p) for p in pad)
    )


def correlate(x, w, *, stride=1, pad=0, dilation=1, groups=1):
    rank = w.ndim - 2
    stride, dilation, pads = as_tuple(stride, rank), as_tuple(dilation, rank), as_pads(pad, rank)
    x = np.pad(x, [*pads, (0, 0)])
    kernel, ins, outs = w.shape[:rank], w.shape[-2], w.shape[-1] // groups
    sizes = [
        (n - d * (k - 1) - 1) // s + 1 for n, k, s, d in zip(x.shape, kernel, stride, dilation, strict=False)
    ]
    y = np.zeros((*sizes, w.shape[-1]))
    for i in np.ndindex(*sizes):
        for k in np.ndindex(*kernel):
            place = tuple(np.array(i) * stride + np.array(k) * dilation)
            for g in range(groups):
                part = x[place][g * ins : (g + 1) * ins]
                y[i][g * outs : (g + 1) * outs] += part @ w[k][:, g * outs : (g + 1) * outs]
    return y


def transposed_correlate(x, w, *, stride=1, pad=0, dilation=1, groups=1, output_pad=0):
    rank = w.ndim - 2
    stride, dilation, pads = as_tuple(stride, rank), as_tuple(dilation, rank), as_pads(pad, rank)
    kernel, outs, ins = w.shape[:rank], w.shape[-2], w.shape[-1] // groups
    extra = as_tuple(output_pad, rank)
    sizes = [
        (n - 1) * s + d * (k - 1) + 1 + e
        for n, k, s, d, e in zip(x.shape, kernel, stride, dilation, extra, strict=False)
    ]
    y = np.zeros((*sizes, outs * groups))
    for i in np.ndindex(*x.shape[:-1]):
        for k in np.ndindex(*kernel):
            place = tuple(np.array(i) * stride + np.array(k) * dilation)
            for g in range(groups):
                part = x[i][g * ins : (g + 1) * ins]
                y[place][g * outs : (g + 1) * outs] += w[k][:, g * ins : (g + 1) * ins] @ part
    return y[tuple(slice(low, n - high) for (low, high), n in zip(pads, sizes, strict=True))]


def flip(w):
    return np.flip(w, range(w.ndim - 2))


def reference(layer, x, ps):
    """The output for one image, by the loops above."""
    w, rank = np.asarray(ps.weight), len(layer.kernel)
    groups = layer.in_channels if isinstance(layer, fl.DepthwiseConv) else layer.groups
    options = {"stride": layer.stride, "pad": layer.pad, "dilation": layer.dilation, "groups": groups}
    crossed = isinstance(layer, fl.CrossCor) or layer.cross_correlation
    if isinstance(layer, fl.ConvTranspose):
        y = transposed_correlate(x, w if crossed else flip(w), **options, output_pad=layer.output_pad)
    else:
        y = correlate(x, w if crossed else flip(w), **options)
    y = y + np.asarray(ps.bias) if layer.use_bias else y
    assert y.ndim == rank + 1
    return y if layer.activation is None else np.asarray(layer.activation(y))


LAYERS = [
    (fl.Conv((3,), 2, 3), (7,)),
    (fl.Conv((3,), 2, 4, jnp.tanh, stride=2, pad=(2, 1), groups=2), (8,)),
    (fl.Conv((3, 2), 2, 3, stride=(2, 1), pad=(1, 0, 2, 1), dilation=(1, 2), use_bias=False), (6, 5)),
    (fl.Conv((2, 3), 4, 6, pad=(1, 2), groups=2, cross_correlation=True), (3, 4)),
    (fl.Conv((2, 1, 2), 1, 2, jnp.sin, dilation=2, pad=1), (3, 2, 4)),
    (fl.CrossCor((3,), 2, 3, stride=3, pad=1), (7,)),
    (fl.CrossCor((2, 3), 4, 2, groups=2, dilation=(2, 1)), (4, 5)),
    (fl.DepthwiseConv((3,), 2, 6, jnp.tanh, pad=1), (5,)),
    (fl.DepthwiseConv((2, 2), 3, 3, stride=2, use_bias=False, cross_correlation=True), (4, 5)),
    (fl.ConvTranspose((3,), 2, 3, stride=2, pad=(0, 1)), (4,)),
    (fl.ConvTranspose((3,), 4, 2, jnp.tanh, stride=3, groups=2, output_pad=2, dilation=2), (3,)),
    (fl.ConvTranspose((3, 2), 4, 6, stride=(2, 3), pad=(1, 0), groups=2, output_pad=(1, 0)), (3, 2)),
    (fl.ConvTranspose((2, 3), 1, 2, pad=(1, 0, 2, 1), cross_correlation=True, use_bias=False), (4, 5)),
    (fl.ConvTranspose((2, 2, 1), 2, 1, stride=(1, 2, 1)), (2, 2, 3)),
]
IDS = [repr(layer) for layer, _ in LAYERS]


def example(layer, sizes, lead=(), dtype=float):
    """A vector with a bias that is not zero, the empty state, and an input."""
    random = np.random.default_rng(0)
    ps = fl.ComponentVector(jnp.asarray(random.normal(size=layer.layout.length), dtype), layer.layout)
    x = random.normal(size=(*lead, *sizes, layer.in_channels))
    return ps, fl.Record(), jnp.asarray(x, dtype)


@pytest.mark.parametrize(("layer", "sizes"), LAYERS, ids=IDS)
@pytest.mark.parametrize(("dtype", "lead"), [("float32", (2,)), ("float64", ()), ("float64", (2, 3))])
def test_equals_the_loop(layer, sizes, dtype, lead):
    ps, st, x = example(layer, sizes, lead, dtype)
    y, new = jax.jit(layer)(x, ps, st)
    images = np.asarray(x, float).reshape(-1, *x.shape[len(lead) :])
    expected = np.stack([reference(layer, image, ps) for image in images])
    expected = expected.reshape(*lead, *expected.shape[1:])
    assert y.dtype == dtype
    assert y.shape == expected.shape
    rtol = 2e-5 if dtype == "float32" else 1e-12
    np.testing.assert_allclose(y, expected, rtol=rtol, atol=rtol)
    assert new == st == {}


@pytest.mark.parametrize(("layer", "sizes"), LAYERS, ids=IDS)
def test_lengths_and_shapes(key, layer, sizes):
    ps, st, x = example(layer, sizes, (2,), "float32")
    initial, states = jax.eval_shape(lambda key: fl.setup(key, layer), key)
    assert initial.layout == ps.layout
    assert states == st
    assert fl.parameter_length(layer) == ps.size == initial.size
    assert fl.state_length(layer) == 0
    assert fl.output_shape(layer, x) == jax.eval_shape(layer, x, ps, st)[0].shape


@pytest.mark.parametrize(("layer", "sizes"), LAYERS, ids=IDS)
def test_gradient(layer, sizes):
    ps, st, x = example(layer, sizes, (2,))
    random = np.random.default_rng(1)
    directions = [jnp.asarray(random.normal(size=a.shape)) for a in (ps, x)]

    @jax.jit
    def loss(step):
        moved = fl.ComponentVector(ps.data + step * directions[0], ps.layout)
        return jnp.sum(layer(x + step * directions[1], moved, st)[0] ** 2)

    slope = jax.jit(jax.grad(loss))(0.0)
    np.testing.assert_allclose(slope, central_difference(loss, 0.0, 1.0), rtol=1e-6)


@pytest.mark.parametrize(("layer", "sizes"), [LAYERS[1], LAYERS[7], LAYERS[11]])
def test_vmap_over_inputs_and_over_vectors(layer, sizes):
    ps, st, x = example(layer, sizes, (3,))
    call = jax.jit(lambda x, ps: layer(x, ps, st)[0])
    y = call(x, ps)
    assert_close(jax.jit(jax.vmap(call, (0, None)))(x, ps), y)
    ensemble = fl.ComponentVector(jnp.stack([ps.data, 2 * ps.data]), ps.layout)
    both = jax.jit(jax.vmap(call, (None, 0)))(x, ensemble)
    assert_close(both[0], y)
    assert_close(both[1], call(x, 2 * ps))


@pytest.mark.parametrize("kernel", [(4,), (3, 2), (2, 3, 2)])
def test_conv_is_the_convolution_of_scipy(key, kernel):
    layer = fl.Conv(kernel, 1, 1, use_bias=False)
    ps, st, x = example(layer, (5, 6, 7)[: len(kernel)])
    expected = scipy.signal.convolve(x[..., 0], ps.weight[..., 0, 0], "valid")
    np.testing.assert_allclose(layer(x, ps, st)[0][..., 0], expected, atol=1e-13)
    full = fl.Conv(kernel, 1, 1, use_bias=False, pad=tuple(k - 1 for k in kernel))
    expected = scipy.signal.convolve(x[..., 0], ps.weight[..., 0, 0], "full")
    np.testing.assert_allclose(full(x, ps, st)[0][..., 0], expected, atol=1e-13)
    crossed = fl.CrossCor(kernel, 1, 1, use_bias=False)
    expected = scipy.signal.correlate(x[..., 0], ps.weight[..., 0, 0], "valid")
    np.testing.assert_allclose(crossed(x, ps, st)[0][..., 0], expected, atol=1e-13)


TRANSPOSES = [
    ((3,), (4,), {"stride": 2, "output_pad": 1}),
    ((3,), (4,), {"stride": 4, "output_pad": 3, "pad": (1, 2), "cross_correlation": True}),
    ((2, 3), (4, 3), {"stride": (1, 2), "pad": (1, 0, 0, 2), "dilation": (2, 1), "groups": 2}),
    ((2, 2), (3, 3), {"stride": 2, "output_pad": (0, 1), "pad": 1, "groups": 2, "cross_correlation": True}),
]


@pytest.mark.parametrize(("kernel", "sizes", "options"), TRANSPOSES)
def test_conv_transpose_is_the_transpose_of_conv(kernel, sizes, options):
    layer = fl.ConvTranspose(kernel, 4, 6, use_bias=False, **options)
    ps, st, x = example(layer, sizes, (2,))
    options = {name: value for name, value in options.items() if name != "output_pad"}
    forward = fl.Conv(kernel, 6, 4, use_bias=False, **options)
    assert forward.layout == layer.layout
    y, _ = jax.jit(layer)(x, ps, st)
    transpose = jax.linear_transpose(lambda z: forward(z, ps, st)[0], y)
    assert_close(jax.jit(transpose)(x)[0], y)


# Sizes and counts documented by Flux and Lux


def size_of(layer, *shape):
    return fl.output_shape(layer, jax.ShapeDtypeStruct(shape, "float32"))


IMAGES = (50, 100, 100, 3)


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (fl.Conv((5, 5), 3, 7, use_bias=False), (50, 96, 96, 7)),
        (fl.Conv((5, 5), 3, 7, stride=2), (50, 48, 48, 7)),
        (fl.Conv((5, 5), 3, 7, stride=2, pad=fl.SamePad()), (50, 50, 50, 7)),
        (fl.Conv((1, 1), 3, 7, pad=(20, 10, 0, 0)), (50, 130, 100, 7)),
        (fl.Conv((5, 5), 3, 7, stride=2, dilation=4), (50, 42, 42, 7)),
        (fl.Conv((2, 2), 3, 7, pad=fl.SamePad()), (50, 100, 100, 7)),
        (fl.Conv((2, 2), 3, 7), (50, 99, 99, 7)),
        (fl.ConvTranspose((5, 5), 3, 7), (50, 104, 104, 7)),
        (fl.ConvTranspose((5, 5), 3, 7, stride=2), (50, 203, 203, 7)),
        (fl.ConvTranspose((5, 5), 3, 7, stride=2, output_pad=1), (50, 204, 204, 7)),
        (fl.ConvTranspose((5, 5), 3, 7, stride=3, pad=fl.SamePad()), (50, 300, 300, 7)),
        (fl.DepthwiseConv((5, 5), 3, 6, use_bias=False), (50, 96, 96, 6)),
        (fl.DepthwiseConv((5, 5), 3, 9, stride=2, pad=2), (50, 50, 50, 9)),
        (fl.CrossCor((5, 5), 3, 6, use_bias=False), (50, 96, 96, 6)),
        (fl.CrossCor((5, 5), 3, 7, stride=3, pad=(2, 0)), (50, 34, 32, 7)),
    ],
    ids=repr,
)
def test_documented_sizes(layer, expected):
    assert size_of(layer, *IMAGES) == expected
    assert size_of(layer, *IMAGES[1:]) == expected[1:]


def test_documented_sizes_of_sequences():
    assert size_of(fl.Conv((3,), 4, 5), 64, 100, 4) == (64, 98, 5)
    assert size_of(fl.CrossCor((3,), 4, 5), 64, 100, 4) == (64, 98, 5)
    assert size_of(fl.ConvTranspose((3,), 5, 4), 64, 100, 5) == (64, 102, 4)


@pytest.mark.parametrize(
    ("layer", "count"),
    [
        (fl.Conv((5, 5), 3, 7, use_bias=False), 525),
        (fl.Conv((5, 5), 3, 7), 532),
        (fl.Conv((2, 2), 3, 7), 91),
        (fl.Conv((3,), 4, 5), 65),
        (fl.ConvTranspose((5, 5), 3, 7), 532),
        (fl.ConvTranspose((3,), 5, 4), 64),
        (fl.DepthwiseConv((5, 5), 3, 6, use_bias=False), 150),
        (fl.CrossCor((5, 5), 3, 6, use_bias=False), 450),
        (fl.CrossCor((3,), 4, 5), 65),
    ],
    ids=repr,
)
def test_documented_counts(layer, count):
    assert fl.parameter_length(layer) == count


def test_weights_have_the_documented_shapes():
    def shape(layer):
        return layer.layout["weight"].shape

    assert shape(fl.Conv((3, 2), 4, 6, groups=2)) == (3, 2, 2, 6)
    assert shape(fl.CrossCor((3, 2), 4, 6)) == (3, 2, 4, 6)
    assert shape(fl.DepthwiseConv((3, 2), 4, 8)) == (3, 2, 1, 8)
    assert shape(fl.ConvTranspose((3, 2), 4, 6, groups=2)) == (3, 2, 3, 4)


@pytest.mark.parametrize(
    ("layer", "fan_in", "fan_out"),
    [
        (fl.Conv((5, 5), 8, 16), 200, 400),
        (fl.Conv((5, 5), 8, 16, groups=4), 50, 100),
        (fl.DepthwiseConv((5, 5), 8, 16), 25, 50),
        (fl.ConvTranspose((5, 5), 8, 16), 200, 400),
        (fl.ConvTranspose((5, 5), 8, 16, groups=4), 50, 100),
    ],
    ids=repr,
)
def test_spread_of_the_initial_weight(key, layer, fan_in, fan_out):
    ps, _ = fl.setup(key, layer)
    bound = math.sqrt(6 / (fan_in + fan_out))
    assert 0.98 * bound < np.abs(ps.weight).max() <= bound
    assert (ps.bias == 0).all()


@pytest.mark.parametrize(
    "layer",
    [
        fl.Conv((3,), 2, 3, stride=2, pad=fl.SamePad(), groups=1, use_bias=False),
        fl.CrossCor([3, 2], 4, 6, pad=(1, 0, 0, 1), groups=2),
        fl.DepthwiseConv((3,), 2, 4, dilation=(2,), cross_correlation=True),
        fl.ConvTranspose((3, 3), 2, 4, stride=2, output_pad=(1, 0)),
    ],
)
def test_the_printed_layer_rebuilds_it(layer):
    assert eval(repr(layer), vars(fl)) == layer


def test_dtypes(key):
    layer = fl.Conv((3,), 2, 3)
    ps, st = fl.setup(key, layer)
    with pytest.raises(Exception, match="promotion"):
        layer(jnp.ones((5, 2)), ps, st)
    with jax.numpy_dtype_promotion("standard"):
        assert layer(jnp.ones((5, 2)), ps, st)[0].dtype == jnp.float64
        assert layer(jnp.ones((5, 2), "uint8"), ps, st)[0].dtype == jnp.float32
    half, _ = fl.setup(key, layer, jnp.bfloat16)
    assert layer(jnp.ones((5, 2), jnp.bfloat16), half, st)[0].dtype == jnp.bfloat16


def test_no_images_give_no_images():
    for layer in (fl.Conv((3,), 2, 3), fl.ConvTranspose((3,), 2, 3)):
        ps, st, x = example(layer, (5,), (0, 2))
        assert layer(x, ps, st)[0].shape == (0, 2, 5 + (2 if isinstance(layer, fl.ConvTranspose) else -2), 3)


# Bad input


KINDS = [fl.Conv, fl.CrossCor, fl.DepthwiseConv, fl.ConvTranspose]


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_channels_or_axes(kind):
    layer = kind((3, 3), 3, 6)
    ps, st = fl.setup(jax.random.key(0), layer, float)
    for shape in ((2, 8, 8, 4), (3,), (8, 3), ()):
        with pytest.raises(ValueError, match=r"expected x of shape \(..., height, width, 3\), found"):
            layer(jnp.ones(shape), ps, st)


@pytest.mark.parametrize("kind", [fl.Conv, fl.CrossCor, fl.DepthwiseConv])
def test_a_kernel_longer_than_the_padded_input(kind):
    layer = kind((3, 3), 1, 1, dilation=(2, 1), pad=(1, 0))
    ps, st = fl.setup(jax.random.key(0), layer, float)
    assert layer(jnp.ones((3, 3, 1)), ps, st)[0].shape == (1, 1, 1)
    with pytest.raises(ValueError, match=r"the kernel, which spans \(5, 3\), found \(4, 3\) with"):
        layer(jnp.ones((2, 3, 1)), ps, st)


def test_nothing_left_of_a_transpose():
    layer = fl.ConvTranspose((3,), 1, 1, pad=2)
    ps, st = fl.setup(jax.random.key(0), layer, float)
    assert layer(jnp.ones((3, 1)), ps, st)[0].shape == (1, 1)
    with pytest.raises(ValueError, match=r"found \(2,\), which gives \(0,\) with pad=2"):
        layer(jnp.ones((2, 1)), ps, st)


def test_an_error_names_the_place(key):
    model = fl.Chain(fl.Conv((3,), 2, 3), head=fl.Chain(fl.Conv((3,), 4, 3)))
    ps, st = fl.setup(key, model, float)
    with pytest.raises(
        ValueError, match=r"expected x of shape \(..., width, 4\), found shape \(7, 3\)"
    ) as caught:
        model(jnp.ones((9, 2)), ps, st)
    assert "in the layer head.layer_0: Conv((3,), 4, 3)" in caught.value.__notes__[0]


@pytest.mark.parametrize("kind", [fl.Conv, fl.CrossCor, fl.ConvTranspose])
@pytest.mark.parametrize(("ins", "outs", "groups"), [(3, 4, 2), (4, 3, 2), (4, 6, 3)])
def test_groups_that_do_not_divide(kind, ins, outs, groups):
    message = f"groups that divide the {ins} input and {outs} output channels, found {groups}"
    with pytest.raises(ValueError, match=message):
        kind((3,), ins, outs, groups=groups)


def test_depthwise_channels_that_are_no_multiple():
    with pytest.raises(ValueError, match="groups that divide the 3 input and 4 output channels, found 3"):
        fl.DepthwiseConv((3,), 3, 4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("kernel", "options", "error", "message"),
    [
        (3, {}, TypeError, "kernel: expected a tuple, each part an integer of at least 1, found 3"),
        ((3.0,), {}, ValueError, r"kernel: expected a tuple, .* integer of at least 1, found \(3.0,\)"),
        ((True,), {}, TypeError, r"kernel: expected a tuple, .* integer of at least 1, found \(True,\)"),
        ((), {}, ValueError, r"kernel: expected one size or more, found \(\)"),
        ((0,), {}, ValueError, r"kernel: expected a tuple, .* integer of at least 1, found \(0,\)"),
        ((1, 1, 1, 1), {}, ValueError, r"kernel: expected a kernel of 1, 2 or 3 sizes, found \(1, 1, 1, 1\)"),
        ((3,), {"stride": 0}, ValueError, "stride: expected an integer of at least 1 or a tuple.*, found 0"),
        ((3,), {"stride": (1, 2)}, ValueError, r"stride: expected an integer or 1 of them, found \(1, 2\)"),
        ((3,), {"stride": 1.5}, ValueError, "stride: expected an integer of at least 1 .*found 1.5"),
        ((3, 3), {"dilation": (1,)}, ValueError, r"dilation: expected .* 2 of them, found \(1,\)"),
        ((3,), {"pad": -1}, ValueError, "pad: expected an integer of at least 0 .* or a SamePad, found -1"),
        ((3, 3), {"pad": (1, 2, 3)}, ValueError, r"pad: expected .*2 or 4 of them, found \(1, 2, 3\)"),
        ((3,), {"pad": "same"}, TypeError, "pad: expected .* or a SamePad, found 'same'"),
        ((3,), {"groups": 0}, ValueError, "groups: expected an integer of at least 1, found 0"),
        ((3,), {"groups": -2}, ValueError, "groups: expected an integer of at least 1, found -2"),
        ((3,), {"activation": fl.Dense}, TypeError, "activation: expected an elementwise function or None"),
        ((3,), {"init_weight": 0.0}, TypeError, "init_weight: expected an initializer .*, found 0.0"),
        ((3,), {"use_bias": 1}, TypeError, "use_bias: expected True or False, found 1"),
    ],
)
def test_arguments_that_are_none(kind, kernel, options, error, message):
    if options.keys() <= kind.__dataclass_fields__.keys():
        with pytest.raises(error, match=f"{kind.__name__}.{message}"):
            kind(kernel, 1, 1, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_numpy_integers_are_integers(kind):
    two = np.int64(2)
    layer = kind(
        (np.int32(3), np.uint8(1)), two, np.int8(4), stride=two, pad=(np.int16(0), two), dilation=two
    )
    assert layer == kind((3, 1), 2, 4, stride=2, pad=(0, 2), dilation=2)
    assert eval(repr(layer), vars(fl)) == layer
    for size in (0, -1, 2.5, "2", True, None, jnp.ones(2, int)):
        with pytest.raises(
            (TypeError, ValueError), match=f"{kind.__name__}.in_channels: expected an integer"
        ):
            kind((3,), size, 4)


@pytest.mark.parametrize(("output_pad", "stride"), [(1, 1), (2, 2), ((0, 3), (4, 3))])
def test_an_output_pad_that_the_stride_does_not_allow(output_pad, stride):
    with pytest.raises(ValueError, match="expected an output_pad under the stride"):
        fl.ConvTranspose((3, 3), 1, 1, stride=stride, output_pad=output_pad)


def test_keywords_that_a_layer_does_not_have():
    for kind, name in itertools.product(KINDS, ("groups", "cross_correlation", "output_pad")):
        has = name in {
            fl.Conv: ("groups", "cross_correlation"),
            fl.CrossCor: ("groups",),
            fl.DepthwiseConv: ("cross_correlation",),
            fl.ConvTranspose: ("groups", "cross_correlation", "output_pad"),
        }.get(kind, ())
        value = {"groups": 1, "cross_correlation": True, "output_pad": 0}[name]
        if has:
            kind((3,), 1, 1, **{name: value})
        else:
            with pytest.raises(TypeError, match=name):
                kind((3,), 1, 1, **{name: value})
