import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage

import flatlayers as fl
from tests.helpers import assert_close, central_difference


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


# Upsample


def weights(i, n, size, mode, align_corners):
    """The entries that entry `i` of the new axis is made of, and their shares."""
    if mode == "nearest":
        return [(math.floor(i * n / size), 1.0)]
    place = i * (n - 1) / max(size - 1, 1) if align_corners else (i + 0.5) * n / size - 0.5
    place = min(max(place, 0.0), n - 1.0)
    low = min(math.floor(place), n - 1)
    return [(low, 1 - (place - low)), (min(low + 1, n - 1), place - low)]


def upsample(x, sizes, mode, align_corners):
    """One image `x (*spatial, channels)`, an output at a time."""
    y = np.zeros((*sizes, x.shape[-1]))
    for i in np.ndindex(*sizes):
        axes = [
            weights(j, n, size, mode, align_corners) for j, n, size in zip(i, x.shape, sizes, strict=False)
        ]
        for corner in np.ndindex(*(len(axis) for axis in axes)):
            chosen = [axis[c] for axis, c in zip(axes, corner, strict=True)]
            y[i] += math.prod(share for _, share in chosen) * x[tuple(place for place, _ in chosen)]
    return y


MODES = [
    ("nearest", False),
    ("bilinear", False),
    ("bilinear", True),
    ("trilinear", False),
    ("trilinear", True),
]
SIZES = [
    ({"scale": 2}, (3,), (6,)),
    ({"scale": 1.5}, (3,), (4,)),
    ({"scale": (2, 3)}, (2, 3), (4, 9)),
    ({"scale": 0.5}, (4, 5), (2, 2)),
    ({"size": (5, 4)}, (3, 4), (5, 4)),
    ({"size": 1}, (3, 2), (1, 1)),
    ({"size": (4, 2, 3)}, (2, 1, 2), (4, 2, 3)),
]


@pytest.mark.parametrize(("mode", "align_corners"), MODES)
@pytest.mark.parametrize(("options", "sizes", "new_sizes"), SIZES)
def test_upsample_equals_the_loop(mode, align_corners, options, sizes, new_sizes):
    layer = fl.Upsample(mode, **options, align_corners=align_corners)
    for dtype in ("float32", "float64"):
        x = draw(2, *sizes, 3, dtype=dtype)
        y = call(layer, x)
        expected = [upsample(image, new_sizes, mode, align_corners) for image in np.asarray(x, float)]
        rtol = 1e-5 if dtype == "float32" else 1e-12
        np.testing.assert_allclose(y, np.stack(expected), rtol=rtol, atol=rtol)
    mapped = jax.jit(jax.vmap(lambda x: layer(x[None], {}, {})[0][0]))
    assert_close(mapped(x), y)


def test_upsample_against_scipy():
    x = draw(1, 4, 5, 1)
    image = np.asarray(x[0, :, :, 0])
    for align_corners in (False, True):
        y, _ = fl.Upsample("bilinear", scale=2, align_corners=align_corners)(x, {}, {})
        expected = scipy.ndimage.zoom(image, 2, order=1, mode="nearest", grid_mode=not align_corners)
        np.testing.assert_allclose(y[0, :, :, 0], expected, atol=1e-12)


def test_nearest_repeats():
    x = draw(2, 3, 4, 5)
    y, _ = fl.Upsample(scale=(2, 3))(x, {}, {})
    np.testing.assert_array_equal(y, np.repeat(np.repeat(x, 2, 1), 3, 2))


@pytest.mark.parametrize("mode", ["bilinear", "trilinear"])
def test_corners_stay_where_they_are(mode):
    x = draw(1, 3, 4, 2)
    y = call(fl.Upsample(mode, size=(7, 5), align_corners=True), x)
    assert_close(np.asarray(y)[:, ::6, ::4], np.asarray(x)[:, ::2, ::3])
    # And so a linear function stays one.
    line = jnp.linspace(0, 1, 4)[None, :, None]
    y, _ = fl.Upsample(mode, size=9, align_corners=True)(line, {}, {})
    assert_close(y[0, :, 0], np.linspace(0, 1, 9))


def test_documented_sizes_of_upsample():
    def size_of(layer, *shape):
        return fl.output_shape(layer, jax.ShapeDtypeStruct(shape, "float32"))

    assert size_of(fl.Upsample(scale=(2, 3)), 1, 2, 2, 1) == (1, 4, 6, 1)
    assert size_of(fl.Upsample("bilinear", size=(4, 5)), 1, 2, 2, 1) == (1, 4, 5, 1)
    assert size_of(fl.Upsample("trilinear", scale=2), 2, 3, 4, 5, 6) == (2, 6, 8, 10, 6)
    # 2.3 * 10 is 22.999999999999996.
    assert size_of(fl.Upsample(scale=2.3), 1, 10, 1) == (1, 23, 1)


@pytest.mark.parametrize(
    "layer",
    [
        fl.Upsample(scale=2),
        fl.Upsample("bilinear", size=(5, 4)),
        fl.Upsample("trilinear", size=(5, 4), align_corners=True),
        fl.PixelShuffle(2),
    ],
    ids=repr,
)
def test_gradient(layer):
    x, direction = draw(2, 3, 2, 4), draw(2, 3, 2, 4, seed=1)

    @jax.jit
    def loss(step):
        return jnp.sum(layer(x + step * direction, {}, {})[0] ** 3)

    np.testing.assert_allclose(jax.jit(jax.grad(loss))(0.0), central_difference(loss, 0.0, 1.0), rtol=1e-6)


# PixelShuffle


def torch_pixel_shuffle(x, r):
    """On `(batch, channels, height, width)`, entry by entry as PyTorch documents it."""
    batch, channels, height, width = x.shape
    y = np.zeros((batch, channels // r**2, height * r, width * r))
    for c, i, j in np.ndindex(*y.shape[1:]):
        y[:, c, i, j] = x[:, c * r**2 + (i % r) * r + j % r, i // r, j // r]
    return y


@pytest.mark.parametrize(("r", "channels"), [(1, 3), (2, 8), (3, 9)])
def test_pixel_shuffle_is_that_of_pytorch_on_the_transposed_image(r, channels):
    for dtype in ("float32", "float64"):
        x = draw(2, 2, 3, channels, dtype=dtype)
        y = call(fl.PixelShuffle(r), x)
        expected = torch_pixel_shuffle(np.transpose(x, (0, 3, 1, 2)), r)
        np.testing.assert_array_equal(np.transpose(y, (0, 3, 1, 2)), expected)
    mapped = jax.jit(jax.vmap(lambda x: fl.PixelShuffle(r)(x[None], {}, {})[0][0]))
    np.testing.assert_array_equal(mapped(x), y)


def test_documented_pixel_shuffle():
    """The example of Flux, whose first axis is the last spatial one here."""
    pixel, ends = np.arange(1, 5) / 10, np.array([1, 2])
    x = 2 * ends[None, :, None] + ends[:, None, None] + pixel
    y, _ = fl.PixelShuffle(2)(jnp.asarray(x[None]), {}, {})
    expected = [[3.1, 3.3, 4.1, 4.3], [3.2, 3.4, 4.2, 4.4], [5.1, 5.3, 6.1, 6.3], [5.2, 5.4, 6.2, 6.4]]
    np.testing.assert_allclose(y[0, :, :, 0].T, expected)


def test_pixel_shuffle_on_one_and_three_axes():
    x = jnp.arange(12.0).reshape(1, 2, 6)
    y, _ = fl.PixelShuffle(3)(x, {}, {})
    np.testing.assert_array_equal(y[0], [[0, 3], [1, 4], [2, 5], [6, 9], [7, 10], [8, 11]])
    y, _ = fl.PixelShuffle(2)(jnp.arange(8.0).reshape(1, 1, 1, 1, 8), {}, {})
    np.testing.assert_array_equal(y[0, ..., 0], np.arange(8.0).reshape(2, 2, 2))


@pytest.mark.parametrize(
    "layer",
    [fl.PixelShuffle(2), fl.Upsample(scale=2), fl.Upsample("bilinear", size=[4, 5], align_corners=True)],
)
def test_the_printed_layer_rebuilds_it(layer):
    assert eval(repr(layer), vars(fl)) == layer


# Bad input


def test_both_or_neither_of_scale_and_size():
    with pytest.raises(ValueError, match="expected one of scale and size, found neither"):
        fl.Upsample("bilinear")
    with pytest.raises(ValueError, match="expected one of scale and size, found scale=2.0 and size=4"):
        fl.Upsample(scale=2, size=4)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (
            ("cubic",),
            {"scale": 2},
            ValueError,
            "Upsample.mode: expected 'nearest', 'bilinear' or 'trilinear', found 'cubic'",
        ),
        (
            (),
            {"scale": 2, "align_corners": True},
            ValueError,
            "expected align_corners with the mode bilinear",
        ),
        ((), {"scale": 0}, ValueError, "Upsample.scale: expected a finite number above 0 .* found 0"),
        (
            (),
            {"scale": (2, -1)},
            ValueError,
            r"Upsample.scale: expected a finite number above 0 .* found \(2, -1\)",
        ),
        ((), {"scale": "2"}, TypeError, "Upsample.scale: expected a finite number .* found '2'"),
        ((), {"size": (2, 0)}, ValueError, r"Upsample.size: expected .*at least 1.*, found \(2, 0\)"),
        ((), {"size": 2.0}, ValueError, "Upsample.size: expected an integer .*found 2.0"),
        ((), {"scale": float("nan")}, ValueError, "Upsample.scale: expected a finite number .*found nan"),
        ((), {"scale": ()}, ValueError, r"Upsample.scale: expected one number or more, found \(\)"),
        ((), {"size": ()}, ValueError, r"Upsample.size: expected one number or more, found \(\)"),
    ],
)
def test_bad_arguments_of_upsample(arguments, options, error, message):
    with pytest.raises(error, match=message):
        fl.Upsample(*arguments, **options)


def test_bad_input_of_upsample():
    for layer in (fl.Upsample(scale=(2, 2)), fl.Upsample("bilinear", size=(4, 4))):
        for shape in ((1, 2, 1), (1, 2, 2, 2, 1), (2, 2), (1, 0, 2, 1)):
            with pytest.raises(ValueError, match="channels.* with 2 spatial axes, found shape"):
                layer(jnp.ones(shape), {}, {})
    with pytest.raises(ValueError, match="expected x of shape .* with spatial axes, found shape"):
        fl.Upsample(scale=2)(jnp.ones((2, 2)), {}, {})
    with pytest.raises(ValueError, match="expected spatial sizes that scale=0.25 leaves"):
        fl.Upsample(scale=0.25)(jnp.ones((1, 3, 1)), {}, {})
    with pytest.raises(TypeError, match="expected floating x, found int"):
        fl.Upsample("bilinear", scale=2)(jnp.ones((1, 3, 1), int), {}, {})


@pytest.mark.long
def test_bad_input_of_pixel_shuffle():
    for shape in ((1, 2, 2, 6), (1, 2, 2, 2)):
        with pytest.raises(ValueError, match=r"with channels a multiple of 4, found shape \("):
            fl.PixelShuffle(2)(jnp.ones(shape), {}, {})
    with pytest.raises(ValueError, match=r"found shape \(4, 4\)"):
        fl.PixelShuffle(2)(jnp.ones((4, 4)), {}, {})
    with pytest.raises(ValueError, match="PixelShuffle.factor: expected an integer of at least 1, found 0"):
        fl.PixelShuffle(0)
    with pytest.raises(
        TypeError, match=r"PixelShuffle.factor: expected an integer of at least 1, found \(2, 2\)"
    ):
        fl.PixelShuffle((2, 2))
