import itertools

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import flatlayers as fl
from flatlayers.layers import spectral
from tests.helpers import assert_close, central_difference, count_primitives
from tests.parallel.meshes import mesh_of


def formula(x, weight, bias, modes):
    """By NumPy's transforms of all frequencies, of which those that are kept are multiplied."""
    axes = tuple(range(x.ndim - 1 - len(modes), x.ndim - 1))
    sizes = [x.shape[axis] for axis in axes]
    z = np.fft.rfftn(x, axes=axes, norm="forward")
    out = np.zeros((*z.shape[:-1], weight.shape[-1]), z.dtype)
    numbers = [range(-(m // 2), m - m // 2) for m in modes[:-1]] + [range(modes[-1] // 2 + 1)]
    for place in itertools.product(*map(enumerate, numbers)):
        at = (..., *(k for _, k in place), slice(None))
        part = weight[(slice(None), *(i for i, _ in place))]
        out[at] = z[at] @ (part[0] + 1j * part[1])
    out = np.fft.ifftn(out, axes=axes[:-1], norm="forward") if axes[:-1] else out
    return np.fft.irfft(out, sizes[-1], axis=axes[-1], norm="forward") + bias


def drawn_configurations():
    """Grids of 1 to 3 axes, even and odd, with one mode up to as many as there are."""
    rng = np.random.default_rng(0)
    yield (8,), (9,), (), 2, 3  # nine modes are eight and one that a real function does not have
    yield (1,), (1,), (2,), 1, 1
    for rank in (1, 1, 2, 2, 2, 3, 3):
        sizes = rng.integers(2, [0, 40, 12, 7][rank], rank)
        modes = tuple(int(rng.integers(1, n + 1)) for n in sizes)
        batch = tuple(map(int, rng.integers(1, 4, rng.integers(0, 3))))
        yield tuple(map(int, sizes)), modes, batch, *map(int, rng.integers(1, 4, 2))


@pytest.fixture(params=["product", "transform"])
def way(request, monkeypatch):
    if request.param == "transform":
        monkeypatch.setattr(spectral, "MOST_FREQUENCIES", 0)
    return request.param


@pytest.mark.parametrize("configuration", list(drawn_configurations()), ids=str)
def test_formula(key, way, configuration):
    sizes, modes, batch, ins, outs = configuration
    layer = fl.SpectralConv(modes, ins, outs)
    ps, st = fl.setup(key, layer, float)
    ps = ps + jax.random.normal(jax.random.key(1), ps.shape)
    x = jax.random.normal(jax.random.key(2), (*batch, *sizes, ins))
    y, new = jax.jit(layer.forward)(x, ps, st)
    expected = formula(np.asarray(x), np.asarray(ps.weight), np.asarray(ps.bias), modes)
    np.testing.assert_allclose(y, expected, rtol=1e-12, atol=1e-12)
    assert y.shape == fl.output_shape(layer, x) == (*batch, *sizes, outs)
    assert new == st
    kept = (*modes[:-1], modes[-1] // 2 + 1)
    assert ps.weight.shape == (2, *kept, ins, outs)
    assert fl.parameter_length(layer) == 2 * np.prod(kept) * ins * outs + outs


def test_many_modes_and_points_are_transformed_fast(key):
    few, many = fl.SpectralConv((4, 8), 1, 1), fl.SpectralConv((66, 66), 1, 1)
    x = jnp.ones((70, 80, 1))

    def primitives(layer, x):
        return count_primitives(layer.forward, x, *fl.setup(key, layer, float))

    assert primitives(few, x)["fft"] == 0
    assert primitives(many, x)["fft"] == 4
    assert primitives(few, jnp.ones((8, 4096, 1)))["fft"] == 2
    assert not {name for name in primitives(many, x) if "scatter" in name or "gather" in name}


@pytest.mark.long
@pytest.mark.parametrize(
    ("dtype", "rtol"),
    [(jnp.float32, 2e-6), (jnp.float16, 2e-3), (jnp.bfloat16, 2e-2)],
    ids=["32", "16", "b16"],
)
def test_lower_precisions(key, dtype, rtol):
    """Half precisions are rounded at the end alone."""
    layer = fl.FourierLayer((5, 4), 2, 3, None)
    ps, st = fl.setup(key, layer, dtype)
    x = jax.random.normal(key, (4, 9, 10, 2), dtype)
    y, _ = layer(x, ps, st)
    assert y.dtype == dtype
    exact, _ = layer(x.astype(float), jax.tree.map(lambda a: a.astype(float), ps), st)
    np.testing.assert_allclose(y.astype(float), exact, atol=rtol * float(jnp.abs(exact).max()))


def band_limited(sizes, frequencies, channels):
    """The sum of all waves up to a frequency along each axis, with drawn amplitudes, on a periodic grid."""
    rng = np.random.default_rng(3)
    grid = np.stack(np.meshgrid(*(np.arange(n) / n for n in sizes), indexing="ij"), axis=-1)
    waves = itertools.product(*(range(-k, k + 1) for k in frequencies))
    return sum(
        np.cos(2 * np.pi * (grid @ np.array(k) + rng.uniform()))[..., None] * rng.normal(size=channels)
        for k in waves
    )


@pytest.mark.parametrize(
    ("modes", "sizes", "factor"), [((9,), (12,), 2), ((6,), (15,), 3), ((4, 5), (10, 11), 3), (3, (7,), 2)]
)
def test_the_resolution_makes_no_difference(key, way, modes, sizes, factor):
    layer = fl.SpectralConv(modes, 2, 3)
    ps, st = fl.setup(key, layer, float)
    coarse, fine = (
        layer(band_limited([f * n for n in sizes], [4] * len(sizes), 2), ps, st)[0] for f in (1, factor)
    )
    every = (slice(None, None, factor),) * len(sizes)
    np.testing.assert_allclose(fine[every], coarse, rtol=0, atol=1e-12)


def test_initial_spread(key):
    """The variance of a complex weight is that of neuraloperator: `2 / (in + out)`."""
    ps = fl.initial_parameters(key, fl.SpectralConv((8, 8), 20, 30), float)
    assert float(jnp.mean(jnp.sum(ps.weight**2, axis=0))) == pytest.approx(2 / 50, rel=0.02)
    assert not ps.bias.any()


# Its version 2.0 shifts the frequencies of odd sizes the wrong way back, along all axes but the last.
@pytest.mark.parametrize(("modes", "sizes"), [((8,), (13,)), ((5, 4), (8, 6)), ((3, 4, 5), (4, 6, 7))])
def test_equals_neuraloperator(key, modes, sizes):
    torch = pytest.importorskip("torch", reason="PyTorch is an optional package")
    convolution = pytest.importorskip("neuralop.layers.spectral_convolution", reason="it is optional")
    torch.manual_seed(0)
    other = convolution.SpectralConv(3, 4, modes)
    layer = fl.SpectralConv(modes, 3, 4)
    numbers = sum(p.numel() * (2 if p.is_complex() else 1) for p in other.parameters())
    assert fl.parameter_length(layer) == numbers
    weight = np.moveaxis(other.weight.to_tensor().detach().numpy(), (0, 1), (-2, -1))
    ps = {"weight": jnp.array([weight.real, weight.imag]), "bias": jnp.array(other.bias.detach()).ravel()}
    x = np.random.default_rng(0).normal(size=(5, *sizes, 3)).astype(np.float32)
    theirs = other(torch.from_numpy(np.moveaxis(x, -1, 1).copy())).detach().numpy()
    np.testing.assert_allclose(layer(x, ps, {})[0], np.moveaxis(theirs, 1, -1), rtol=1e-4, atol=1e-5)


@pytest.mark.long
def test_gradients_and_vmap(key, way):
    layer = fl.FourierLayer((3, 4), 2, 2, jnp.tanh, norm=fl.LayerNorm(2))
    ps, st = fl.setup(key, layer, float)
    x = jax.random.normal(key, (3, 5, 6, 2))
    directions = [jax.random.normal(jax.random.key(2), a.shape) for a in (ps, x)]

    @jax.jit
    def loss(s):
        changed = fl.ComponentVector(ps.data + s * directions[0], ps.layout)
        return jnp.sum(layer(x + s * directions[1], changed, st)[0] ** 2)

    np.testing.assert_allclose(jax.grad(loss)(0.0), central_difference(loss, 0.0, 1.0), rtol=1e-7)
    together, each = jax.jit(lambda x: (layer(x, ps, st)[0], jax.vmap(lambda x: layer(x, ps, st)[0])(x)))(x)
    assert_close(together, each)


@pytest.mark.long
def test_through_the_default_adjoint(key, way):
    """A learned field and a known one, `u_t = 0.1 u_xx + f(u)`."""

    class Field(fl.Container):
        known: fl.Layer
        learned: fl.Layer

        def forward(self, u, ps, st):
            diffusion, _ = self.known(u, ps.known, st.known)
            return 0.1 * diffusion + self.learned(u, ps.learned, st.learned)[0], st

    field = Field(fl.SpectralDerivative(2, 2 * np.pi), fl.FourierLayer(4, 1, 1, jnp.tanh))
    model = fl.NeuralODE(field, stepsize_controller=diffrax.ConstantStepSize(), dt0=0.1)
    ps, st = fl.setup(key, model, float)
    u = jnp.sin(2 * np.pi * np.arange(8) / 8)[:, None]
    direction = jax.random.normal(jax.random.key(2), ps.shape)

    @jax.jit
    def loss(ps):
        return jnp.sum(model(u, ps, st)[0] ** 2)

    slope = jnp.sum(jax.grad(loss)(ps).data * direction)
    direction = fl.ComponentVector(direction, ps.layout)
    np.testing.assert_allclose(slope, central_difference(loss, ps, direction), rtol=1e-7)


def test_over_a_divided_batch(key, way):
    layer = fl.FourierLayer(6, 2, 2)
    ps, st = fl.setup(key, layer, float)
    x = jax.random.normal(key, (8, 10, 2))
    divided = jax.device_put(x, NamedSharding(mesh_of(4), PartitionSpec(mesh_of(4).axis_names[0])))
    y = jax.jit(lambda x: layer(x, ps, st)[0])(divided)
    assert_close(y, layer(x, ps, st)[0])
    assert len(y.sharding.device_set) == 4


@pytest.mark.long
def test_fourier_layer(key):
    norm = fl.BatchNorm(3)
    layer = fl.FourierLayer(5, 2, 3, jnp.tanh, norm=norm)
    ps, st = fl.setup(key, layer, float)
    assert ps.layout.names == ("spectral", "pointwise", "norm")
    x = jax.random.normal(key, (4, 8, 2))
    y, new = layer(x, ps, st)
    z = formula(np.asarray(x), np.asarray(ps.spectral.weight), np.asarray(ps.spectral.bias), (5,))
    z = z + np.asarray(x) @ np.asarray(ps.pointwise.weight).T
    normal = (z - z.mean((0, 1))) / np.sqrt(z.var((0, 1)) + norm.epsilon)
    np.testing.assert_allclose(y, np.tanh(normal), rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(new.norm.running_mean, 0.1 * z.mean((0, 1)), rtol=1e-10)
    plain, _ = fl.FourierLayer(5, 2, 3, None)(x, ps, st)
    np.testing.assert_allclose(plain, z, rtol=1e-12, atol=1e-12)
    half, _ = fl.FourierLayer(5, 2, 3, None, norm=lambda z: z / 2)(x, ps, st)
    np.testing.assert_allclose(half, z / 2, rtol=1e-12, atol=1e-12)


WAVES = [np.sin, np.cos, lambda x: -np.sin(x), lambda x: -np.cos(x)]


@pytest.mark.parametrize("n", [12, 13])
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_derivatives_of_waves(n, order):
    length = 3.0
    x = np.arange(n) * length / n
    frequencies = 2 * np.pi / length * np.arange(6)[:, None, None]
    u = np.sin(frequencies * x[:, None] + 0.3)
    expected = frequencies**order * WAVES[order % 4](frequencies * x[:, None] + 0.3)
    y, _ = fl.SpectralDerivative(order, length)(u, {}, {})
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-12 * np.abs(expected).max())


@pytest.mark.parametrize("axis", [-1, -2, -3, 1, 2])
def test_derivatives_along_other_axes(axis):
    u = np.random.default_rng(0).normal(size=(3, 6, 7))
    y, _ = fl.SpectralDerivative(1, 2.0, axis=axis)(u, {}, {})
    moved = np.moveaxis(u, axis, 0)
    k = np.fft.fftfreq(len(moved), 1 / len(moved))
    k = np.where(2 * np.abs(k) == len(k), 0.0, k)
    factors = (1j * np.pi * k)[:, None, None]
    expected = np.fft.ifft(factors * np.fft.fft(moved, axis=0), axis=0).real
    np.testing.assert_allclose(np.moveaxis(y, axis, 0), expected, atol=1e-12)


def test_the_highest_frequency_of_an_even_grid():
    """Its wave `(-1)^j` is the cosine of frequency `n / 2`: odd derivatives are 0 at all points."""
    u = np.resize([1.0, -1.0], 8)[:, None]
    for order in (1, 3):
        assert not fl.SpectralDerivative(order, 1.0)(u, {}, {})[0].any()
    for order in (2, 4):
        expected = (-1) ** (order // 2) * (8 * np.pi) ** order * u
        assert_close(fl.SpectralDerivative(order, 1.0)(u, {}, {})[0], expected)


def test_derivatives_are_derived_and_keep_the_dtype():
    layer = fl.SpectralDerivative(3, 1.0)
    u, v = np.random.default_rng(0).normal(size=(2, 9, 1))
    _, pullback = jax.vjp(lambda u: layer(u, {}, {})[0], u)
    # The third derivative is antisymmetric.
    assert_close(pullback(v)[0], -layer(v, {}, {})[0], atol=1e-9)
    for dtype in (jnp.float32, jnp.bfloat16):
        assert layer(jnp.asarray(u, dtype), {}, {})[0].dtype == dtype
    assert not fl.SpectralDerivative(1, 1.0)(np.ones((1, 1)), {}, {})[0].any()


CONV = fl.SpectralConv((4, 6), 2, 3)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((5, 8, 3), r"expected x of shape \(\.\.\., height, width, 2\), found shape \(5, 8, 3\)"),
        ((8, 2), r"expected x of shape \(\.\.\., height, width, 2\), found shape \(8, 2\)"),
        ((3, 8, 2), r"at least \(4, 6\), for the modes \(4, 6\), found \(3, 8\)"),
        ((9, 4, 5, 2), r"at least \(4, 6\), for the modes \(4, 6\), found \(4, 5\)"),
    ],
)
def test_a_shape_that_does_not_fit(key, shape, message):
    model = fl.Chain(body=CONV)
    ps, st = fl.setup(key, model, float)
    with pytest.raises(ValueError, match=message) as error:
        model(jnp.ones(shape), ps, st)
    assert "in the layer body: SpectralConv((4, 6), 2, 3)" in error.value.__notes__[0]


@pytest.mark.parametrize("layer", [CONV, fl.FourierLayer((4, 6), 2, 3), fl.SpectralDerivative(1, 1.0)])
@pytest.mark.parametrize("dtype", [complex, int])
def test_numbers_that_are_not_floating(key, layer, dtype):
    ps, st = fl.setup(key, layer, float)
    with pytest.raises(TypeError, match=r"expected floating x, found (complex128|int64)\[6, 8, 2\]"):
        layer(jnp.ones((6, 8, 2), dtype), ps, st)


@pytest.mark.long
def test_complex_weights(key):
    ps, st = fl.setup(key, CONV, complex)
    with pytest.raises(TypeError, match="expected real parameters, found complex128"):
        CONV(jnp.ones((6, 8, 2)), ps, st)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fl.SpectralConv((), 1, 1), r"SpectralConv.modes: expected modes for 1, 2 or 3 axes, found"),
        (lambda: fl.FourierLayer((4,) * 4, 1, 1), "FourierLayer.modes: expected modes for 1, 2 or 3 axes"),
        (lambda: fl.SpectralConv(0, 1, 1), "SpectralConv.modes: expected an integer of at least 1"),
        (lambda: fl.SpectralDerivative(0, 1.0), "Derivative.order: expected an integer of at least 1"),
        (lambda: fl.SpectralDerivative(1, 0.0), "Derivative.length: expected a finite number above 0"),
    ],
)
def test_options_that_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_an_axis_that_there_is_not():
    with pytest.raises(ValueError, match=r"expected x with the axis -2, found shape \(8,\)"):
        fl.SpectralDerivative(1, 1.0)(jnp.ones(8), {}, {})
