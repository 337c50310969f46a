"""`GaussAdjoint` at saved times, at kinks and jumps of the field, on all time scales."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flatlayers as fl
from tests.helpers import assert_close


GAUSS, DEFAULT = fl.GaussAdjoint(), diffrax.RecursiveCheckpointAdjoint()


def decay_gradient(adjoint, solver, ts, **options):
    """The derivative of the sum of squares of `exp(-rate t)` at `rate = 0.7`."""

    def loss(rate):
        term = diffrax.ODETerm(lambda t, y, rate: -rate * y)
        saveat = diffrax.SaveAt(ts=ts)
        options.setdefault("dt0", 0.005)
        solution = diffrax.diffeqsolve(
            term, solver, 0.0, 1.0, y0=jnp.array(1.0), args=rate, saveat=saveat, adjoint=adjoint, **options
        )
        return jnp.sum(solution.ys**2)

    return jax.grad(loss)(0.7)


@pytest.mark.parametrize("solver", [diffrax.LeapfrogMidpoint(), diffrax.ReversibleHeun()], ids=str)
@pytest.mark.parametrize("ts", [[0.25, 0.5, 1.0], [0.1, 0.15, 0.8], [0.4]], ids=str)
def test_a_solver_with_a_state_sees_the_jumps_at_saved_times(solver, ts):
    ts = jnp.array(ts)
    exact = jnp.sum(-2 * ts * jnp.exp(-1.4 * ts))
    assert_close(decay_gradient(GAUSS, solver, ts), exact, rtol=1e-3)


@pytest.mark.slow
def test_its_error_falls_as_that_of_the_method():
    ts = jnp.array([0.25, 0.5, 1.0])
    exact = jnp.sum(-2 * ts * jnp.exp(-1.4 * ts))
    for solver in (diffrax.LeapfrogMidpoint(), diffrax.ReversibleHeun(), diffrax.Heun()):
        wrong = [abs(decay_gradient(GAUSS, solver, ts, dt0=dt0) - exact) for dt0 in (0.02, 0.005)]
        assert wrong[1] < wrong[0] / 8


def test_a_solver_with_a_state_and_adaptive_steps():
    ts = jnp.array([0.3, 1.0])
    found = decay_gradient(
        GAUSS,
        diffrax.ReversibleHeun(),
        ts,
        stepsize_controller=diffrax.PIDController(rtol=1e-5, atol=1e-5),
        dt0=None,
        max_steps=1024,
    )
    assert_close(found, jnp.sum(-2 * ts * jnp.exp(-1.4 * ts)), rtol=1e-3)


# Fields that are piecewise in time, against exact integrals: y' = -2 y + u(t) has
# dy(1)/dx = int exp(-2 (1 - t)) du/dx dt


def forcing(kind, ts, x):
    if kind == "linear":
        return diffrax.LinearInterpolation(ts, x).evaluate
    if kind == "cubic":
        return diffrax.CubicInterpolation(ts, diffrax.backward_hermite_coefficients(ts, x)).evaluate
    return lambda t: x[jnp.clip(jnp.searchsorted(ts, t, side="right") - 1, 0, ts.size - 1)]


def exact_gradient(kind, ts, x):
    """By a Gauss rule of 20 nodes between all knots."""
    points, weights = np.polynomial.legendre.leggauss(20)
    width = np.diff(ts)[:, None]
    t = jnp.asarray((np.asarray(ts)[:-1, None] + width * (1 + points) / 2).ravel())
    w = jnp.asarray((width * weights / 2).ravel()) * jnp.exp(-2 * (1 - t))
    return jax.grad(lambda x: w @ jax.vmap(forcing(kind, ts, x))(t))(x)


UNEVEN = np.array([0.0, 0.07, 0.31, 0.33, 0.62, 0.9, 1.0])


@pytest.mark.parametrize("kind", ["linear", "cubic", "step"])
@pytest.mark.parametrize("ts", [np.linspace(0.0, 1.0, 9), UNEVEN], ids=["even", "uneven"])
@pytest.mark.parametrize("tolerance", [1e-3, pytest.param(1e-6, marks=pytest.mark.slow)])
def test_knots_of_a_forcing(kind, ts, tolerance):
    ts = jnp.asarray(ts)
    x = jax.random.normal(jax.random.key(1), ts.shape)

    def end(x):
        return diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, x: -2 * y + forcing(kind, ts, x)(t)),
            diffrax.Tsit5(),
            0.0,
            1.0,
            None,
            jnp.array(1.0),
            x,
            stepsize_controller=diffrax.PIDController(rtol=tolerance, atol=tolerance),
            adjoint=GAUSS,
        ).ys[-1]

    exact = exact_gradient(kind, ts, x)
    assert jnp.abs(jax.jit(jax.grad(end))(x) - exact).max() < 10 * tolerance * jnp.abs(exact).max()


# Leaves without numbers


@pytest.mark.parametrize(
    "y0",
    [
        (jnp.ones(3), jnp.zeros((0,))),
        {"a": jnp.zeros((2, 0)), "b": jnp.ones(())},
        [None, jnp.ones(2)],
        None,
        (jnp.zeros(0),),
    ],
    ids=str,
)
def test_leaves_without_numbers(y0):
    def loss(rate, adjoint):
        term = diffrax.ODETerm(lambda t, y, rate: jax.tree.map(lambda x: -rate * x, y))
        ys = diffrax.diffeqsolve(term, diffrax.Heun(), 0.0, 1.0, 0.01, y0, rate, adjoint=adjoint).ys
        return rate + sum(jnp.sum(x) for x in jax.tree.leaves(ys))

    assert_close(jax.grad(loss)(0.7, GAUSS), jax.grad(loss)(0.7, DEFAULT), atol=1e-4)


# Time scales and offsets


@pytest.mark.parametrize("adjoint", [GAUSS, fl.AdaptiveCheckpointAdjoint()], ids=["gauss", "checkpoint"])
@pytest.mark.parametrize(
    ("t0", "tau"), [(0.0, 1e-12), (0.0, 1e12), (1e10, 3600.0), (-59000.0, 0.05), (1e-9, 1e-10)]
)
def test_time_scales_and_offsets(adjoint, t0, tau):
    ts = t0 + tau * jnp.array([0.25, 0.5, 1.0])

    def loss(rate):
        return diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, rate: -rate * y / tau),
            diffrax.Tsit5(),
            t0,
            t0 + tau,
            None,
            jnp.array(1.0),
            rate,
            saveat=diffrax.SaveAt(ts=ts),
            stepsize_controller=diffrax.PIDController(rtol=1e-8, atol=1e-8),
            adjoint=adjoint,
        ).ys.sum()

    s = (ts - t0) / tau
    assert_close(jax.grad(loss)(0.7), jnp.sum(-s * jnp.exp(-0.7 * s)), rtol=1e-6)
