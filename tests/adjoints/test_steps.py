"""Steps by diffrax's own `step`: of implicit solvers, and of those that carry a state."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.adjoints.helpers import ADJOINT, PID, assert_equals_default
from tests.helpers import assert_close


def robertson(t, y, k):
    a, b, c = y
    slow, fast, mid = k[0] * a, k[1] * b**2, k[2] * b * c
    return jnp.stack([-slow + mid, slow - mid - fast, fast])


@pytest.mark.slow
def test_stiff():
    def solve(adjoint, y0, k):
        return diffrax.diffeqsolve(
            diffrax.ODETerm(robertson),
            diffrax.Kvaerno5(),
            0.0,
            100.0,
            None,
            y0,
            k,
            saveat=diffrax.SaveAt(ts=[1.0, 100.0]),
            stepsize_controller=diffrax.PIDController(rtol=1e-8, atol=1e-12),
            adjoint=adjoint,
        ).ys

    y0, k = jnp.array([1.0, 0.0, 0.0]), jnp.array([0.04, 3e7, 1e4])
    np.testing.assert_allclose(solve(ADJOINT, y0, k)[1], [0.6172348816, 6.1536e-06, 0.382758965], rtol=1e-5)
    assert_equals_default(solve, y0, k)


@pytest.mark.slow
def test_implicit_and_explicit_terms():
    def solve(adjoint, y0, args):
        terms = diffrax.MultiTerm(
            diffrax.ODETerm(lambda t, y, args: args[0] * jnp.sin(y[::-1])),
            diffrax.ODETerm(lambda t, y, args: -args[1] * y),
        )
        return diffrax.diffeqsolve(
            terms,
            diffrax.KenCarp4(),
            0.0,
            1.0,
            None,
            y0,
            args,
            saveat=diffrax.SaveAt(ts=[0.4, 0.9], steps=True),
            stepsize_controller=diffrax.PIDController(rtol=1e-3, atol=1e-5),
            adjoint=adjoint,
            max_steps=64,
        ).ys

    assert_equals_default(solve, jnp.array([1.0, 0.3]), (jnp.array(0.7), jnp.array([1.0, 3.0])))


@pytest.mark.parametrize(
    "solver",
    [diffrax.ReversibleHeun(), pytest.param(diffrax.LeapfrogMidpoint(), marks=pytest.mark.slow)],
    ids=["ReversibleHeun", "LeapfrogMidpoint"],
)
@pytest.mark.slow
def test_solvers_that_carry_a_state(solver):
    def solve(adjoint, y0, rate):
        return diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, rate: jnp.stack([y[1], -jnp.sin(rate * y[0])])),
            solver,
            0.0,
            1.0,
            0.02,
            y0,
            rate,
            saveat=diffrax.SaveAt(ts=[0.305, 0.995], t1=True),
            adjoint=adjoint,
            max_steps=64,
        ).ys

    assert_equals_default(solve, jnp.array([1.0, 0.0]), jnp.array(1.1))


@pytest.mark.slow
def test_a_solve_that_goes_on_with_the_state_of_another():
    def solve(adjoint, y0, rate):
        options = {"stepsize_controller": PID, "adjoint": adjoint, "max_steps": 64}
        term = diffrax.ODETerm(lambda t, y, rate: -rate * y**2)
        keep = diffrax.SaveAt(t1=True, solver_state=True, made_jump=True)
        first = diffrax.diffeqsolve(term, diffrax.Bosh3(), 0.0, 1.0, None, y0, rate, saveat=keep, **options)
        return diffrax.diffeqsolve(
            term,
            diffrax.Bosh3(),
            1.0,
            2.0,
            None,
            first.ys[-1],
            rate,
            solver_state=first.solver_state,
            made_jump=first.made_jump,
            **options,
        ).ys

    assert_equals_default(solve, jnp.array([1.0, 2.0]), jnp.array(0.7))


def pendulum(y, rate):
    return jnp.stack([y[1], -jnp.sin(rate * y[0])])


def reversible_heun(y, rate, h, steps):
    other, slope = y, pendulum(y, rate)
    for _ in range(steps):
        other = 2 * y - other + h * slope
        before, slope = slope, pendulum(other, rate)
        y = y + 0.5 * h * (before + slope)
    return y


def leapfrog_midpoint(y, rate, h, steps):
    before, y = y, y + h * pendulum(y, rate)
    for _ in range(steps - 1):
        before, y = y, before + 2 * h * pendulum(y, rate)
    return y


@pytest.mark.parametrize(
    ("solver", "written_out"),
    [(diffrax.ReversibleHeun(), reversible_heun), (diffrax.LeapfrogMidpoint(), leapfrog_midpoint)],
    ids=["ReversibleHeun", "LeapfrogMidpoint"],
)
def test_a_carried_state_against_the_method_written_out(solver, written_out):
    """In forward mode. The start of a step is `y` and what the step before it left."""

    def end(y0, rate):
        term = diffrax.ODETerm(lambda t, y, rate: pendulum(y, rate))
        return diffrax.diffeqsolve(term, solver, 0.0, 1.0, 0.125, y0, rate, adjoint=ADJOINT, max_steps=16).ys[
            0
        ]

    inputs = jnp.array([1.0, 0.2]), jnp.array(1.3)
    found = jax.jit(jax.jacrev(end, (0, 1)))(*inputs)
    assert_close(found, jax.jacfwd(lambda *inputs: written_out(*inputs, 0.125, 8), (0, 1))(*inputs), 1e-12)
