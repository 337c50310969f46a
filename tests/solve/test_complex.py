"""Gradients of the default adjoint through complex numbers, against diffrax's own."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flatlayers as fl
from tests.helpers import assert_close, central_difference


DEFAULT = diffrax.RecursiveCheckpointAdjoint()
PID = diffrax.PIDController(rtol=1e-4, atol=1e-6)
SIZE = 5


def draw(seed, *shape):
    real, imag = jax.random.normal(jax.random.key(seed), (2, *shape), float) / 3
    return real + 1j * imag


Y0 = draw(0, SIZE)
WEIGHTS = {"product": draw(1, SIZE, SIZE), "scale": draw(2, SIZE), "real": jnp.real(draw(3, SIZE, SIZE))}


def schroedinger(t, y, p):
    """A complex state, real and complex weights, and a product that is put off."""
    hamiltonian = (p["real"] + p["real"].T).astype(y.dtype)
    return (
        -1j * (hamiltonian @ y)
        + 0.3 * jnp.tanh(p["product"] @ y)
        + jnp.sin(t) * jnp.exp(0.2 * p["scale"] * y)
    )


def fourier(t, y, p):
    """A real state with a transform inside of the field."""
    modes = jnp.fft.rfft(y)
    modes = p["scale"][: modes.size] * (p["product"][: modes.size, : modes.size] @ modes)
    return jnp.tanh(jnp.fft.irfft(modes, SIZE) + p["real"] @ y * jnp.cos(t))


def inside_of_control_flow(t, y, p):
    """Complex numbers in a scan and under a condition alone."""

    def body(z, row):
        return jnp.tanh(row * z + 0.1 * jnp.exp(z)), jnp.sin(z)

    z, zs = jax.lax.scan(body, y.astype(complex), p["product"][:3])
    last = jax.lax.cond(t > 0.4, lambda z: jnp.real(z * p["scale"]), lambda z: jnp.abs(z) ** 2, z)
    return last + jnp.imag(jnp.sum(zs, 0)) - p["real"] @ y


FIELDS = {f.__name__: f for f in (schroedinger, fourier, inside_of_control_flow)}


def gradient(field, adjoint, solver, controller, *inputs):
    def loss(y0, p):
        ys = diffrax.diffeqsolve(
            diffrax.ODETerm(field),
            solver,
            0.0,
            1.0,
            None if controller is PID else 0.1,
            y0,
            p,
            saveat=diffrax.SaveAt(ts=[0.31, 1.0]),
            stepsize_controller=controller,
            adjoint=adjoint,
            max_steps=64,
        ).ys
        return jnp.sum(jnp.arange(1.0, SIZE + 1) * jnp.abs(ys) ** 2) + jnp.sum(jnp.real((1 + 2j) * ys))

    return jax.grad(loss, (0, 1)), inputs


@pytest.mark.parametrize(
    ("field", "solver", "controller"),
    [
        ("schroedinger", diffrax.Tsit5(), PID),
        ("fourier", diffrax.Heun(), diffrax.ConstantStepSize()),
        ("inside_of_control_flow", diffrax.Bosh3(), PID),
        *(
            pytest.param(field, solver, controller, marks=pytest.mark.slow)
            for field in FIELDS
            for solver, controller in [
                (diffrax.Euler(), diffrax.ConstantStepSize()),
                (diffrax.Midpoint(), PID),
                (diffrax.Ralston(), diffrax.ConstantStepSize()),
                (diffrax.Dopri5(), PID),
                (diffrax.Dopri8(), PID),
            ]
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else type(x).__name__,
)
def test_equals_the_default(field, solver, controller):
    y0 = Y0 if field == "schroedinger" else jnp.real(Y0)
    found, expected = (
        jax.jit(grad)(*inputs)
        for adjoint in (fl.AdaptiveCheckpointAdjoint(), DEFAULT)
        for grad, inputs in [gradient(FIELDS[field], adjoint, solver, controller, y0, WEIGHTS)]
    )
    assert_close(found, expected, 1e-12, 1e-12 * float(np.abs(expected[1]["product"]).max()))


@pytest.mark.parametrize("field", [schroedinger, pytest.param(fourier, marks=pytest.mark.slow)])
def test_each_sample_with_its_own_steps(field):
    y0 = jnp.stack([Y0, 3 * Y0]) if field is schroedinger else jnp.real(jnp.stack([Y0, 3 * Y0]))
    found, expected = (
        jax.jit(jax.vmap(grad, (0, None)))(*inputs)
        for adjoint in (fl.AdaptiveCheckpointAdjoint(every=2), DEFAULT)
        for grad, inputs in [gradient(field, adjoint, diffrax.Tsit5(), PID, y0, WEIGHTS)]
    )
    assert_close(found, expected, 1e-12, 1e-12 * float(np.abs(expected[1]["product"]).max()))


def test_a_linear_equation_has_the_gradient_of_its_formula():
    """`y' = i w y` from `y0` has `y(1) = exp(i w) y0`, with JAX's convention for complex numbers."""

    def end(w, y0):
        term = diffrax.ODETerm(lambda t, y, w: 1j * w * y)
        options = {"adjoint": fl.AdaptiveCheckpointAdjoint(), "max_steps": 64}
        return diffrax.diffeqsolve(term, diffrax.Dopri8(), 0.0, 1.0, 0.05, y0, w, **options).ys[0]

    def loss(f):
        return lambda w, y0: jnp.real((2 - 1j) * f(w, y0)) + jnp.abs(f(w, y0)) ** 2

    w, y0 = jnp.array(0.7 + 0.2j), jnp.array(0.4 - 0.3j)
    found = jax.grad(loss(end), (0, 1))(w, y0)
    assert_close(found, jax.grad(loss(lambda w, y0: jnp.exp(1j * w) * y0), (0, 1))(w, y0), 1e-12)


class Spectral(fl.Layer):
    """Multiplies the real Fourier transform of the last axis by weights."""

    size: int

    def parameters(self):
        modes = self.size // 2 + 1
        return {
            "re": fl.Param((modes,), fl.initializers.normal),
            "im": fl.Param((modes,), fl.initializers.normal),
        }

    def forward(self, x, ps, st):
        return jnp.fft.irfft(jnp.fft.rfft(x) * jax.lax.complex(ps.re, ps.im), self.size), st


@pytest.mark.parametrize("batching", ["shared", pytest.param("each", marks=pytest.mark.slow)])
def test_a_spectral_layer_in_a_neural_ode(batching):
    model = fl.Chain(Spectral(6), fl.Dense(6, 6, jnp.tanh))
    y0 = jnp.array([[0.3, -0.2, 0.5, 0.1, -0.7, 0.4], [1.3, 0.2, -0.5, 0.8, 0.7, -0.4]])

    def loss(ps, adjoint):
        node = fl.NeuralODE(model, adjoint=adjoint, batching=batching)
        _, st = fl.setup(jax.random.key(0), node, float)
        return jnp.sum(jnp.sin(node(y0, ps, st)[0]))

    ps, _ = fl.setup(jax.random.key(0), fl.NeuralODE(model), float)
    found = jax.jit(jax.grad(lambda ps: loss(ps, None)))(ps)
    assert_close(found, jax.jit(jax.grad(lambda ps: loss(ps, DEFAULT)))(ps), 1e-12, 1e-13)
    direction = ps.map(jnp.cos)
    by_differences = central_difference(jax.jit(lambda ps: loss(ps, None)), ps, direction, 1e-4)
    np.testing.assert_allclose(jnp.vdot(found.data, direction.data), by_differences, rtol=1e-4)


def test_real_numbers_are_computed_again_as_before():
    """Only a field with complex numbers in it keeps all: the policy is there for a real one."""

    def has_policy(y0, w):
        def end(y0, w):
            term = diffrax.ODETerm(lambda t, y, w: jnp.tanh(w * y))
            adjoint = fl.AdaptiveCheckpointAdjoint()
            ys = diffrax.diffeqsolve(term, diffrax.Heun(), 0.0, 1.0, 0.1, y0, w, adjoint=adjoint).ys
            return jnp.sum(jnp.abs(ys) ** 2)

        return "reduce_precision" in str(jax.make_jaxpr(jax.grad(end))(y0, w))

    assert has_policy(jnp.ones(2), jnp.array(0.3))
    assert not has_policy(jnp.ones(2) + 0j, jnp.array(0.3 + 0j))
