"""Steps of explicit methods made again, with complex numbers."""

import diffrax
import jax
import jax.numpy as jnp
import pytest

import flatlayers as fl
from tests.adjoints.helpers import DEFAULT
from tests.helpers import assert_close, central_difference


# What diffrax says of complex numbers, which are compared with its own gradients here.
pytestmark = pytest.mark.filterwarnings("ignore:Complex dtype support in Diffrax")

SOLVERS = [
    diffrax.Euler(),
    diffrax.Heun(),
    diffrax.Midpoint(),
    diffrax.Ralston(),
    diffrax.Bosh3(),
    diffrax.Tsit5(),
    diffrax.Dopri5(),
    diffrax.Dopri8(),
]


class Fourier(fl.Layer):
    """A convolution by its spectrum: real numbers in and out, complex ones inside."""

    n: int

    def parameters(self):
        shape = (self.n // 2 + 1,)
        return {"re": fl.Param(shape, fl.initializers.normal), "im": fl.Param(shape, fl.initializers.normal)}

    def forward(self, x, ps, st):
        spectrum = jnp.fft.rfft(x)
        return jnp.fft.irfft(spectrum * jnp.broadcast_to(jax.lax.complex(ps.re, ps.im), spectrum.shape)), st


def numbers(seed, *shape):
    real, imag = jax.random.normal(jax.random.key(seed), (2, *shape))
    return jax.lax.complex(real, imag)


def size(y):
    return jnp.sum(jnp.abs(y) ** 2 * jnp.cos(jnp.arange(y.size).reshape(y.shape)))


def gradients(field, solver, y0, args, adjoint):
    def loss(y0, args):
        options = {"saveat": diffrax.SaveAt(ts=jnp.array([0.3, 1.0])), "adjoint": adjoint}
        ys = diffrax.diffeqsolve(diffrax.ODETerm(field), solver, 0.0, 1.0, 0.25, y0, args, **options).ys
        return size(ys)

    return jax.jit(jax.grad(loss, argnums=(0, 1)))(y0, args)


FIELDS = {
    "complex state, real rate": (lambda t, y, w: 1j * w * jnp.sin(y), numbers(0, 3), jnp.array(0.7)),
    "complex weights": (lambda t, y, w: jnp.tanh(w @ y) - y, numbers(1, 3), numbers(2, 3, 3)),
    "real state, complex weights": (
        lambda t, y, w: jnp.real(w @ jax.lax.complex(y, jnp.cos(y))),
        jnp.array([0.3, -0.2, 0.5]),
        numbers(3, 3, 3),
    ),
    "real state, spectrum": (
        lambda t, y, w: jnp.fft.irfft(jnp.fft.rfft(jnp.tanh(y)) * w, 6) - y,
        jnp.linspace(-1.0, 1.0, 6),
        numbers(4, 4),
    ),
    "complex batch, weights in a product": (
        lambda t, y, w: jnp.sin(y @ w.T),
        numbers(5, 2, 3),
        numbers(6, 3, 3),
    ),
}


@pytest.mark.parametrize("name", FIELDS)
def test_gradients_equal_the_default(name):
    field, y0, args = FIELDS[name]
    found = gradients(field, diffrax.Heun(), y0, args, fl.AdaptiveCheckpointAdjoint())
    assert_close(found, gradients(field, diffrax.Heun(), y0, args, DEFAULT), rtol=1e-12, atol=1e-13)


@pytest.mark.slow
@pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: type(solver).__name__)
def test_all_explicit_methods(solver):
    for field, y0, args in FIELDS.values():
        found = gradients(field, solver, y0, args, fl.AdaptiveCheckpointAdjoint(every=2))
        assert_close(found, gradients(field, solver, y0, args, DEFAULT), rtol=1e-12, atol=1e-13)


def spectral(**options):
    return fl.NeuralODE(fl.Chain(Fourier(8), jnp.tanh), t1=0.5, **options)


@pytest.mark.parametrize("batching", ["shared", "each"])
def test_a_spectral_neural_ode(key, batching):
    x = jax.random.normal(key, (2, 8))

    def gradient(adjoint):
        node = spectral(adjoint=adjoint, batching=batching)
        ps, st = fl.setup(key, node, float)
        return jax.jit(jax.grad(lambda ps: size(node(x, ps, st)[0])))(ps)

    assert_close(gradient(None), gradient(DEFAULT), rtol=1e-11, atol=1e-12)


def test_a_spectral_neural_ode_against_finite_differences(key):
    node = spectral(stepsize_controller=diffrax.PIDController(rtol=1e-9, atol=1e-9))
    ps, st = fl.setup(key, node, float)
    x = jnp.linspace(-1.0, 1.0, 8)
    loss = jax.jit(lambda ps: size(node(x, ps, st)[0]))
    direction = ps.map(jnp.cos)
    expected = central_difference(loss, ps, direction, 1e-5)
    assert_close(jax.grad(loss)(ps) @ direction, expected, rtol=1e-6)


def test_under_vmap(key):
    field, y0, args = FIELDS["complex weights"]
    many = jnp.stack([args, 2 * args, 1j * args])

    def each(adjoint):
        return jax.vmap(lambda args: gradients(field, diffrax.Heun(), y0, args, adjoint))(many)

    assert_close(each(fl.AdaptiveCheckpointAdjoint()), each(DEFAULT), rtol=1e-12, atol=1e-13)
