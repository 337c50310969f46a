import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flatlayers as fl
from tests.helpers import assert_close, assert_same, central_difference


def norm(p):
    return lambda window, axis: (np.abs(window) ** p).sum(axis) ** (1 / p)


def pool(x, reduce, window, stride, pads, dilation, fill):
    """The definition as a loop over the windows of one image `x (*spatial, channels)`."""
    x = np.pad(x, [*pads, (0, 0)], constant_values=fill)
    sizes = [
        (n - d * (k - 1) - 1) // s + 1 for n, k, s, d in zip(x.shape, window, stride, dilation, strict=False)
    ]
    y = np.zeros((*sizes, x.shape[-1]))
    for i in np.ndindex(*sizes):
        corner = np.array(i) * stride
        entries = [x[tuple(corner + np.array(k) * dilation)] for k in np.ndindex(*window)]
        y[i] = reduce(np.stack(entries), axis=0)
    return y


CASES = [
    # window, keywords, and what they mean for each axis: stride, pads, dilation; the spatial sizes
    ((2,), {}, ((2,), ((0, 0),), (1,)), (5,)),
    ((3,), {"stride": 1, "pad": (2, 1), "dilation": 2}, ((1,), ((2, 1),), (2,)), (6,)),
    ((3, 2), {"pad": 1}, ((3, 2), ((1, 1), (1, 1)), (1, 1)), (4, 5)),
    (
        (2, 3),
        {"stride": (1, 2), "pad": (0, 1, 2, 0), "dilation": (2, 1)},
        ((1, 2), ((0, 1), (2, 0)), (2, 1)),
        (4, 5),
    ),
    ((2, 2, 2), {"stride": 1, "pad": (0, 1, 0)}, ((1, 1, 1), ((0, 0), (1, 1), (0, 0)), (1, 1, 1)), (2, 3, 2)),
    ((4,), {"stride": 3, "pad": fl.SamePad()}, ((3,), ((2, 1),), (1,)), (7,)),
]
POOLS = [
    (fl.MaxPool, {}, np.max, -np.inf),
    (fl.MeanPool, {}, np.mean, 0),
    (fl.LPPool, {}, norm(2), 0),
    (fl.LPPool, {"p": 3.5}, norm(3.5), 0),
]
ADAPTIVE = [
    (fl.AdaptiveMaxPool, {}, np.max),
    (fl.AdaptiveMeanPool, {}, np.mean),
    (fl.AdaptiveLPPool, {"p": 3}, norm(3)),
]
GLOBAL = [
    (fl.GlobalMaxPool(), np.max),
    (fl.GlobalMeanPool(), np.mean),
    (fl.GlobalLPPool(), norm(2)),
    (fl.GlobalLPPool(p=1), norm(1)),
]


def draw(*shape, dtype=float, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def call(layer, x):
    """The output, under `jit`; that there is nothing else is checked on the way."""
    assert fl.parameter_length(layer) == fl.state_length(layer) == 0
    y, new = jax.jit(layer)(x, {}, {})
    assert new == {}
    assert y.shape == fl.output_shape(layer, x)
    assert y.dtype == x.dtype
    return y


def check_against(images, y, dtype, reference):
    expected = np.stack([reference(image) for image in np.asarray(images, float)])
    tolerance = 1e-5 if dtype == "float32" else 1e-12
    np.testing.assert_allclose(y, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("kind", "options", "reduce", "fill"), POOLS)
@pytest.mark.parametrize(("window", "keywords", "meaning", "sizes"), CASES)
def test_equals_the_loop(kind, options, reduce, fill, window, keywords, meaning, sizes):
    layer = kind(window, **keywords, **options)
    for dtype in ("float32", "float64"):
        x = draw(3, *sizes, 2, dtype=dtype)
        y = call(layer, x)
        check_against(x, y, dtype, lambda image: pool(image, reduce, window, *meaning, fill))

    @jax.jit
    def in_other_ways(x):
        one, mapped, more = layer(x[1], {}, {}), jax.vmap(lambda x: layer(x, {}, {})[0])(x), x[:, None, None]
        return one[0], mapped, layer(more, {}, {})[0][:, 0, 0]

    assert_close(in_other_ways(x), (y[1], y, y))


@pytest.mark.parametrize(("kind", "options", "reduce"), ADAPTIVE)
@pytest.mark.parametrize(
    ("sizes", "out", "window", "stride"), [((7,), (3,), (3,), (2,)), ((5, 6), (2, 6), (3, 1), (2, 1))]
)
def test_adaptive_pooling_equals_the_loop(kind, options, reduce, sizes, out, window, stride):
    layer = kind(out, **options)
    nothing, ones = [(0, 0)] * len(out), (1,) * len(out)
    for dtype in ("float32", "float64"):
        x = draw(2, *sizes, 3, dtype=dtype)
        y = call(layer, x)
        assert y.shape == (2, *out, 3)
        check_against(x, y, dtype, lambda image: pool(image, reduce, window, stride, nothing, ones, 0))
    assert_close(jax.jit(layer)(x[1], {}, {})[0], y[1])


@pytest.mark.parametrize(("layer", "reduce"), GLOBAL)
@pytest.mark.parametrize("sizes", [(4,), (3, 4), (2, 3, 2)])
def test_global_pooling_equals_the_reduction(layer, reduce, sizes):
    axes = tuple(range(1, len(sizes) + 1))
    for dtype in ("float32", "float64"):
        x = draw(5, *sizes, 3, dtype=dtype)
        y = call(layer, x)
        assert y.shape == (5, *(1 for _ in sizes), 3)
        rtol = 1e-5 if dtype == "float32" else 1e-12
        np.testing.assert_allclose(np.squeeze(y, axes), reduce(np.asarray(x, float), axis=axes), rtol=rtol)
    mapped = jax.jit(jax.vmap(lambda x: layer(x[None], {}, {})[0][0]))
    assert_close(mapped(x), y)


@pytest.mark.parametrize(
    ("adaptive", "everywhere"),
    [
        (fl.AdaptiveMaxPool((1, 1)), fl.GlobalMaxPool()),
        (fl.AdaptiveMeanPool((1, 1)), fl.GlobalMeanPool()),
        (fl.AdaptiveLPPool((1, 1), p=3), fl.GlobalLPPool(p=3)),
    ],
)
def test_adaptive_pooling_to_one_is_global_pooling(adaptive, everywhere):
    x = draw(2, 5, 4, 3)
    assert_close(adaptive(x, {}, {})[0], everywhere(x, {}, {})[0])


@pytest.mark.parametrize(
    ("layer", "sizes"),
    [
        (fl.MaxPool((2, 3), stride=1, pad=1), (3, 4)),
        (fl.MaxPool((2,), stride=1, pad=1, dilation=2), (6,)),
        (fl.MeanPool((3,), stride=2, pad=1, dilation=2), (7,)),
        (fl.LPPool((2, 2), p=3, stride=1, pad=1), (3, 4)),
        (fl.AdaptiveMaxPool((2,)), (5,)),
        (fl.AdaptiveMeanPool((2,)), (5,)),
        (fl.AdaptiveLPPool((2,)), (5,)),
        (fl.GlobalMaxPool(), (3, 4)),
        (fl.GlobalMeanPool(), (3, 4)),
        (fl.GlobalLPPool(), (3, 4)),
    ],
    ids=repr,
)
def test_gradient(layer, sizes):
    x, direction = draw(2, *sizes, 3), draw(2, *sizes, 3, seed=1)

    @jax.jit
    def loss(step):
        return jnp.sum(layer(x + step * direction, {}, {})[0] ** 3)

    backward, forward = jax.jit(jax.grad(loss))(0.0), jax.jit(jax.jacfwd(loss))(0.0)
    np.testing.assert_allclose(backward, central_difference(loss, 0.0, 1.0), rtol=1e-6)
    np.testing.assert_allclose(forward, backward, rtol=1e-10)


@pytest.mark.parametrize("p", [1, 1.5, 2, 3])
def test_the_norm_of_nothing_has_no_slope(p):
    x = jnp.array([[0.0, 0.0, 1.5, 2.0]])[..., None]
    for layer in (fl.LPPool((2,), p=p), fl.AdaptiveLPPool((2,), p=p)):
        slope = jax.grad(lambda x, layer=layer: layer(x, {}, {})[0].sum())(x)
        expected = np.array([1.5, 2.0]) ** (p - 1) / (1.5**p + 2.0**p) ** (1 - 1 / p)
        np.testing.assert_allclose(slope[0, :, 0], [0, 0, *expected])
    slope = jax.grad(lambda x: fl.GlobalLPPool(p=p)(x, {}, {})[0].sum())(jnp.zeros((1, 4, 1)))
    assert (slope == 0).all()


def test_padding_never_wins_a_maximum_and_counts_in_a_mean():
    x = -jnp.ones((2, 1))
    np.testing.assert_array_equal(fl.MaxPool((2,), pad=1)(x, {}, {})[0], [[-1], [-1]])
    np.testing.assert_array_equal(fl.MaxPool((2,), pad=1, dilation=2, stride=1)(x, {}, {})[0], [[-1], [-1]])
    np.testing.assert_array_equal(fl.MeanPool((2,), pad=1)(x, {}, {})[0], [[-0.5], [-0.5]])


def test_a_maximum_of_integers():
    x = jnp.array([[-3], [-7], [-5]])
    y, _ = fl.MaxPool((2,), pad=(0, 1))(x, {}, {})
    assert y.dtype == x.dtype
    np.testing.assert_array_equal(y, [[-3], [-5]])


def test_sums_of_half_precision_are_made_in_float32():
    x = jnp.full((4, 1), 300.0, jnp.float16)
    assert float(fl.LPPool((4,))(x, {}, {})[0][0, 0]) == 600.0
    many = jnp.full((1, 512, 1), 300.0, jnp.float16)
    for layer in (fl.MeanPool((512,)), fl.GlobalMeanPool(), fl.AdaptiveMeanPool((1,))):
        y, _ = layer(many, {}, {})
        assert y.dtype == jnp.float16
        assert float(y[0, 0, 0]) == 300.0


# Sizes documented by Flux and Lux


def size_of(layer, *shape):
    return fl.output_shape(layer, jax.ShapeDtypeStruct(shape, "float32"))


def test_documented_sizes():
    images = (50, 100, 100, 3)
    same = fl.SamePad()
    first = fl.Conv((5, 5), 3, 7, pad=same)
    assert size_of(first, *images) == (50, 100, 100, 7)
    assert size_of(fl.Chain(first, fl.MaxPool((5, 5), pad=same)), *images) == (50, 20, 20, 7)
    assert size_of(fl.MaxPool((5,), pad=2, stride=3), 50, 100, 7) == (50, 34, 7)
    assert size_of(fl.MaxPool((5,), pad=2, stride=(3,)), 100, 7) == (34, 7)
    chain = fl.Chain(fl.Conv((5, 5), 3, 7), fl.MeanPool((5, 5), pad=same))
    assert size_of(chain[0], *images) == (50, 96, 96, 7)
    assert size_of(chain, *images) == (50, 20, 20, 7)
    for adaptive in (fl.AdaptiveMaxPool, fl.AdaptiveMeanPool, fl.AdaptiveLPPool):
        assert size_of(adaptive((25, 25)), *images) == (50, 25, 25, 3)
    for everywhere in (fl.GlobalMaxPool(), fl.GlobalMeanPool(), fl.GlobalLPPool()):
        assert size_of(fl.Chain(fl.Conv((3, 3), 3, 7), everywhere), *images) == (50, 1, 1, 7)
        chain = fl.Chain(fl.Conv((3, 3), 3, 7), everywhere, fl.FlattenLayer())
        assert size_of(chain, *images) == (50, 7)
        assert size_of(everywhere, 7, 3, 5) == (7, 1, 5)


def test_an_even_adaptive_pool_is_a_plain_one():
    x = draw(2, 12, 12, 3)
    for adaptive, plain in ((fl.AdaptiveMaxPool, fl.MaxPool), (fl.AdaptiveMeanPool, fl.MeanPool)):
        assert_close(adaptive((3, 3))(x, {}, {})[0], plain((4, 4))(x, {}, {})[0])


@pytest.mark.parametrize(
    "layer",
    [
        fl.MaxPool((2, 3), stride=1, pad=fl.SamePad()),
        fl.MeanPool([2], pad=(1, 0)),
        fl.LPPool((2,), p=3, dilation=2),
        fl.AdaptiveLPPool((2, 2), p=1.5),
        fl.GlobalLPPool(p=4),
        fl.GlobalMaxPool(),
    ],
)
def test_the_printed_layer_rebuilds_it(layer):
    assert eval(repr(layer), vars(fl)) == layer


# Bad input


@pytest.mark.parametrize("kind", [fl.MaxPool, fl.MeanPool, fl.LPPool])
def test_bad_windows(kind):
    with pytest.raises(
        TypeError, match=f"{kind.__name__}.window: expected a tuple, each part an integer .* 2"
    ):
        kind(2)
    with pytest.raises(ValueError, match=r"window: expected .*at least 1, found \(0,\)"):
        kind((0,))
    with pytest.raises(ValueError, match=r"window: expected .*found \(\)"):
        kind(())
    with pytest.raises(ValueError, match=r"stride: expected .*found \(1, 2, 3\)"):
        kind((2, 2), stride=(1, 2, 3))
    with pytest.raises(ValueError, match=r"pad: expected .*found \(1, 2, 3\)"):
        kind((2, 2), pad=(1, 2, 3))
    message = r"at least as long as the window, which spans \(5,\), found \(4,\) with the padding"
    with pytest.raises(ValueError, match=message):
        kind((3,), dilation=2, pad=(0, 1))(jnp.ones((3, 1)), {}, {})
    with pytest.raises(ValueError, match=r"with 2 spatial axes, found shape \(4, 4\)"):
        kind((2, 2))(jnp.ones((4, 4)), {}, {})


@pytest.mark.parametrize("kind", [fl.AdaptiveMaxPool, fl.AdaptiveMeanPool, fl.AdaptiveLPPool])
def test_bad_adaptive_sizes(kind):
    with pytest.raises(TypeError, match=f"{kind.__name__}.out: expected a tuple, each part an integer .* 2"):
        kind(2)
    with pytest.raises(ValueError, match=r"out: expected .*found \(2, 0\)"):
        kind((2, 0))
    for shape in ((2, 4, 3, 1), (4, 4), (4,)):
        with pytest.raises(ValueError, match=r"spatial sizes of at least \(4, 4\), found shape \("):
            kind((4, 4))(jnp.ones(shape), {}, {})


@pytest.mark.parametrize("layer", [layer for layer, _ in GLOBAL])
def test_global_pooling_needs_spatial_axes(layer):
    for shape in ((5, 3), (5, 0, 3)):
        with pytest.raises(ValueError, match=r"expected x of shape \(batch, \*spatial, channels\)"):
            layer(jnp.ones(shape), {}, {})


@pytest.mark.parametrize(
    "layer", [fl.MeanPool((2,)), fl.LPPool((2,)), fl.GlobalMeanPool(), fl.GlobalLPPool()]
)
def test_means_and_norms_need_floating_numbers(layer):
    with pytest.raises(TypeError, match="expected floating x, found int"):
        layer(jnp.ones((1, 2, 3), int), {}, {})


@pytest.mark.parametrize("p", [0.5, 0, -1, float("inf"), float("nan")])
def test_an_exponent_that_gives_no_norm(p):
    for make in (
        lambda: fl.LPPool((2,), p=p),
        lambda: fl.GlobalLPPool(p=p),
        lambda: fl.AdaptiveLPPool((2,), p=p),
    ):
        with pytest.raises(ValueError, match="expected a finite exponent p of at least 1"):
            make()


# What is no number


def with_nan(shape, at):
    return draw(*shape).at[at].set(jnp.nan)


POOLS = [
    (
        fl.MaxPool((2,)),
        fl.MaxPool((2,), dilation=2),
        fl.MeanPool((2,)),
        fl.LPPool((2,)),
        fl.LPPool((2,), p=1),
    ),
    (fl.LPPool((3,), p=2.5, pad=1), fl.AdaptiveLPPool((2,)), fl.AdaptiveLPPool((3,), p=3)),
    (fl.AdaptiveMaxPool((2,)), fl.AdaptiveMeanPool((2,)), fl.GlobalLPPool(), fl.GlobalLPPool(p=1.5)),
    (fl.GlobalMaxPool(), fl.GlobalMeanPool()),
]


@pytest.mark.parametrize("layer", [layer for group in POOLS for layer in group], ids=repr)
@pytest.mark.parametrize("compiled", [False, True])
def test_a_window_with_nan_gives_nan(layer, compiled):
    """And no other window does."""
    call = jax.jit(layer) if compiled else layer
    x = with_nan((2, 6, 3), (1, 2, 2))
    y, clean = (call(x, {}, {})[0] for x in (x, draw(2, 6, 3)))
    assert jnp.isnan(y[1, :, 2]).any()
    keep = ~jnp.isnan(y)
    assert_same(y[keep], clean[keep])


@pytest.mark.parametrize("layer", [fl.LPPool((2,)), fl.GlobalLPPool(p=3), fl.AdaptiveLPPool((2,), p=1.5)])
def test_a_norm_of_zeros_has_a_finite_gradient_beside_nan(layer):
    x = jnp.zeros((1, 4, 2)).at[0, 1, 1].set(jnp.nan)
    y, pull = jax.vjp(lambda x: layer(x, {}, {})[0], x)
    (slope,) = pull(jnp.ones_like(y))
    assert (y[..., 0] == 0).all()
    assert (slope[..., 0] == 0).all()
    assert jnp.isnan(y[..., 1]).any()


@pytest.mark.parametrize("layer", [fl.MaxPool((2,)), fl.GlobalMaxPool(), fl.AdaptiveMaxPool((1,))])
@pytest.mark.parametrize("dtype", [bool, complex])
def test_what_has_no_order_has_no_largest(layer, dtype):
    with pytest.raises(TypeError, match="expected floating x or integers, found"):
        layer(jnp.ones((1, 2, 3), dtype), {}, {})
