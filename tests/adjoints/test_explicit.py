"""Steps of explicit methods made again: against diffrax's, written out, and with complex numbers."""

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
# Euler's method of diffrax has no tableau: its steps are made again by diffrax's own `step`.
METHODS = [solver for solver in SOLVERS if isinstance(solver, diffrax.AbstractERK)]
FAST = (diffrax.Heun, diffrax.Tsit5)
explicit_methods = pytest.mark.parametrize(
    "solver",
    [pytest.param(solver, marks=() if isinstance(solver, FAST) else pytest.mark.slow) for solver in METHODS],
    ids=lambda solver: type(solver).__name__,
)


def forced(t, y, args):
    weight, rate = args
    return jnp.tanh(weight @ y) - rate * y + jnp.sin(3 * t)


START = jnp.array([1.0, -0.5, 0.3])
ARGUMENTS = (jnp.array([[0.1, 1.0, -0.4], [-1.2, 0.3, 0.5], [0.2, -0.6, 0.9]]), jnp.array(0.4))


def four_steps(solver, y0, args, **options):
    options = {"adjoint": fl.AdaptiveCheckpointAdjoint(every=2), "max_steps": 4} | options
    return diffrax.diffeqsolve(diffrax.ODETerm(forced), solver, 0.0, 1.0, 0.25, y0, args, **options).ys


@pytest.mark.long
@explicit_methods
def test_a_step_that_is_made_again_is_the_same(solver):
    """The cotangent of a factor of saved values is these values, of the steps of the way back."""

    def saved(scale):
        subs = {
            "ends": diffrax.SubSaveAt(steps=True, fn=lambda t, y, args: scale * y),
            "inside": diffrax.SubSaveAt(ts=[0.1, 0.3, 0.33, 0.99], fn=lambda t, y, args: scale * y),
        }
        return four_steps(solver, START, ARGUMENTS, saveat=diffrax.SaveAt(subs=subs))

    @jax.jit
    def found(scale, weights):
        ys, pull = jax.vjp(saved, scale)
        return ys, pull(weights)[0]

    weights = jnp.cos(jnp.arange(24.0)).reshape(2, 4, 3)
    weights = {"ends": weights[0], "inside": weights[1]}
    ys, ct = found(jnp.ones(3), weights)
    assert_close(ct, sum(jnp.sum(weights[name] * ys[name], 0) for name in ys), 1e-13)


@pytest.mark.long
@explicit_methods
def test_the_vjp_of_a_step_is_that_of_the_formula(solver):
    """The method written out from its tableau, in forward mode."""

    def written_out(y, args):
        tableau, h = solver.tableau, 0.25
        for n in range(4):
            ks = []
            for row, c in zip([[], *tableau.a_lower], [tableau.c1, *tableau.c], strict=True):
                inside = sum((a * k for a, k in zip(map(float, row), ks, strict=True)), start=y)
                ks.append(h * forced((n + float(c)) * h, inside, args))
            y = sum((b * k for b, k in zip(map(float, tableau.b_sol), ks, strict=True)), start=y)
        return y

    found = jax.jit(jax.jacrev(lambda y, args: four_steps(solver, y, args)[0], (0, 1)))(START, ARGUMENTS)
    assert_close(found, jax.jit(jax.jacfwd(written_out, (0, 1)))(START, ARGUMENTS), 1e-12)


# Complex numbers, against the gradients of diffrax's default


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


@pytest.mark.long
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


@pytest.mark.long
@pytest.mark.parametrize("batching", ["shared", "each"])
def test_a_spectral_neural_ode(key, batching):
    x = jax.random.normal(key, (2, 8))

    def gradient(adjoint):
        node = spectral(adjoint=adjoint, batching=batching)
        ps, st = fl.setup(key, node, float)
        return jax.jit(jax.grad(lambda ps: size(node(x, ps, st)[0])))(ps)

    assert_close(gradient(None), gradient(DEFAULT), rtol=1e-11, atol=1e-12)


@pytest.mark.long
def test_a_spectral_neural_ode_against_finite_differences(key):
    node = spectral(stepsize_controller=diffrax.PIDController(rtol=1e-9, atol=1e-9))
    ps, st = fl.setup(key, node, float)
    x = jnp.linspace(-1.0, 1.0, 8)
    loss = jax.jit(lambda ps: size(node(x, ps, st)[0]))
    direction = ps.map(jnp.cos)
    expected = central_difference(loss, ps, direction, 1e-5)
    assert_close(jax.grad(loss)(ps) @ direction, expected, rtol=1e-6)


@pytest.mark.long
def test_under_vmap(key):
    field, y0, args = FIELDS["complex weights"]
    many = jnp.stack([args, 2 * args, 1j * args])

    def each(adjoint):
        return jax.vmap(lambda args: gradients(field, diffrax.Heun(), y0, args, adjoint))(many)

    assert_close(each(fl.AdaptiveCheckpointAdjoint()), each(DEFAULT), rtol=1e-12, atol=1e-13)
