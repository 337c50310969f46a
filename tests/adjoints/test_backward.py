"""The backward solve of `GaussAdjoint`: its jumps, its steps, its options and how it fails."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flatlayers as fl
from tests.adjoints.helpers import pid, solve, weighted
from tests.helpers import assert_close


pytestmark = pytest.mark.long


def decay(t, y, rate):
    return -rate * y


def test_nothing_after_the_last_saved_time_is_gone_through():
    """The derivative of the field is no number there."""

    @jax.custom_jvp
    def same(y, t):
        return y

    @same.defjvp
    def _(primals, tangents):
        y, t = primals
        return y, jnp.where(t > 0.51, jnp.nan, 1.0) * tangents[0]

    times = np.array([0.2, 0.5, 0.5])

    def loss(a, t1):
        saveat, options = diffrax.SaveAt(ts=times, t1=t1), {"throw": False, "max_steps": 64}
        return jnp.sum(solve(lambda t, y, a: -a * same(y, t), 1.0, a, saveat=saveat, **options).ys)

    found, through = (jax.jit(jax.grad(loss), static_argnums=1)(0.7, t1) for t1 in (False, True))
    assert_close(found, np.sum(-times * np.exp(-0.7 * times)), 1e-7)
    assert np.isnan(through)


@pytest.mark.slow
def test_linear_system_and_scale_of_the_loss():
    a = jnp.array([[0.2, 1.0], [-2.0, -0.3]])
    y0 = jnp.array([1.0, 0.5])

    @jax.jit
    def found(scale):
        return jax.grad(lambda y0, a: scale * weighted(solve(lambda t, y, a: a @ y, y0, a).ys), (0, 1))(y0, a)

    def exact(y0, a):
        return weighted(jax.scipy.linalg.expm(a) @ y0)

    assert_close(found(1.0), jax.grad(exact, (0, 1))(y0, a), 1e-7, 1e-7)
    assert_close(found(1e-9), jax.tree.map(lambda x: 1e-9 * x, found(1.0)), 1e-12, 0)
    assert_close(found(0.0), (jnp.zeros(2), jnp.zeros((2, 2))))
    assert not np.isfinite(found(jnp.nan)[1]).any()


@pytest.mark.slow
def test_running_cost_and_a_constant_adjoint_state():
    """The adjoint state is smooth where the field is not; the cost depends on the parameters."""

    def cost(p):
        def both(t, y, p):
            return jnp.stack([p[0] * jnp.cos(p[1] * t), p[1] * y[0] ** 2])

        return solve(both, jnp.zeros(2), p, 3.0).ys[0, 1]

    def exact(p):  # y = a / w sin(w t), and w int y^2
        rate, frequency = p
        return rate**2 / frequency * (1.5 - jnp.sin(6 * frequency) / (4 * frequency))

    p = jnp.array([1.3, 20.0])
    assert_close(jax.jit(jax.grad(cost))(p), jax.grad(exact)(p), 1e-7, 1e-7)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("solver", "times", "dt0", "rtol"),
    [
        (diffrax.LeapfrogMidpoint(), [0.25, 0.5, 1.0], 0.004, 1e-4),
        (diffrax.LeapfrogMidpoint(), [0.0, 0.0031, 0.0032, 0.7], 0.002, 1e-4),
        (diffrax.ReversibleHeun(), [0.1, 0.45, 0.45, 0.9], 0.004, 1e-4),
        (diffrax.ReversibleHeun(), [-0.3, -1.0], -0.004, 1e-4),
    ],
)
def test_jumps_are_seen_by_a_solver_that_carries_a_state(solver, times, dt0, rtol):
    """`y' = -a y` from 1 has `y = exp(-a t)`."""
    times = jnp.array(times)

    def loss(a):
        options = {"saveat": diffrax.SaveAt(ts=times), "controller": diffrax.ConstantStepSize(), "dt0": dt0}
        ys = solve(decay, 1.0, a, times[-1], solver=solver, max_steps=512, **options).ys
        return jnp.sum(ys**2)

    exact = jnp.sum(-2 * times * jnp.exp(-2 * 0.7 * times))
    assert_close(jax.jit(jax.grad(loss))(0.7), exact, rtol)


@pytest.mark.slow
@pytest.mark.parametrize("tolerance", [1e-3, 1e-5])
def test_reversible_heun_with_adaptive_steps(tolerance):
    times = jnp.array([0.2, 0.4, 0.41, 1.5])

    def loss(a):
        options = {"saveat": diffrax.SaveAt(ts=times), "dt0": 0.01, "tolerance": tolerance}
        ys = solve(decay, jnp.array([1.0, 0.3]), a, 1.5, solver=diffrax.ReversibleHeun(), **options).ys
        return jnp.sum(ys**2)

    exact = 1.09 * jnp.sum(-2 * times * jnp.exp(-2 * 0.7 * times))
    assert_close(jax.jit(jax.grad(loss))(0.7), exact, 10 * tolerance)


@pytest.mark.slow
def test_solver_controller_and_order_of_the_backward_solve():
    rough = fl.GaussAdjoint(order=1, solver=diffrax.Dopri8(), stepsize_controller=pid(1e-2))
    fine = fl.GaussAdjoint(order=9, solver=diffrax.Kvaerno3(), stepsize_controller=pid(1e-7))

    def gradient(adjoint):
        return jax.jit(
            jax.grad(lambda a: solve(lambda t, y, a: -a * y * t**2, 1.0, a, adjoint=adjoint).ys[0])
        )(2.0)

    exact = -np.exp(-2 / 3) / 3
    assert 1e-6 < abs(gradient(rough) - exact) < 0.1
    assert_close(gradient(fine), exact, 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("controller", ["constant", "to"])
def test_steps_that_are_given(controller):
    controllers = {
        "constant": (diffrax.ConstantStepSize(), 0.01),
        "to": (diffrax.StepTo(ts=jnp.linspace(0, 1, 101)), None),
    }
    controller, dt0 = controllers[controller]

    def end(a):
        saveat = diffrax.SaveAt(ts=[0.505, 0.9])
        return solve(
            lambda t, y, a: -a * y,
            1.0,
            a,
            solver=diffrax.Heun(),
            controller=controller,
            dt0=dt0,
            saveat=saveat,
        ).ys.sum()

    assert_close(jax.jit(jax.grad(end))(2.0), -0.505 * np.exp(-1.01) - 0.9 * np.exp(-1.8), 1e-3)


@pytest.mark.slow
def test_a_backward_solve_that_fails():
    strict = fl.GaussAdjoint(stepsize_controller=pid(1e-14))

    def gradient(throw):
        options = {"adjoint": strict, "max_steps": 20, "tolerance": 1e-4, "throw": throw}
        return jax.grad(lambda rate: solve(decay, 1.0, rate, **options).ys[0])(2.0)

    assert np.isnan(gradient(False))
    with pytest.raises(RuntimeError, match="maximum number of solver steps"):
        gradient(True)
