"""Gradients with times from picoseconds to Unix seconds: no tolerance on a time is absolute."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flatlayers as fl
from tests.helpers import assert_close


pytestmark = pytest.mark.long


DEFAULT = diffrax.RecursiveCheckpointAdjoint()
PARTS = np.array([0.0, 1e-7, 0.1, 0.1 + 1e-9, 0.5, 1 - 1e-9, 1.0])
WEIGHTS = np.arange(1.0, PARTS.size + 1)


def gradient(adjoint, t0, tau, controller):
    """That of saved values of `y' = -p y / tau` by `p` and `y0`, and the times as parts of `tau`."""
    ts = jnp.array(t0 + tau * PARTS).at[-1].set(t0 + tau)

    @jax.jit
    @jax.grad
    def found(inputs):
        p, y0 = inputs
        ys = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, p: -p * y / tau),
            diffrax.Tsit5(),
            t0,
            t0 + tau,
            tau / 50,
            y0,
            p,
            saveat=diffrax.SaveAt(ts=ts),
            stepsize_controller=controller,
            adjoint=adjoint,
            max_steps=256,
        ).ys
        return jnp.sum(WEIGHTS * ys)

    return np.array(found((1.0, 1.0))), (np.asarray(ts) - t0) / tau


@pytest.mark.parametrize(
    ("t0", "tau"),
    [
        (0.0, 1e-12),
        pytest.param(0.0, 1e-9, marks=pytest.mark.slow),
        pytest.param(1e-3, -1e-9, marks=pytest.mark.slow),
        (0.0, 1e12),
        pytest.param(-3e12, 1e12, marks=pytest.mark.slow),
        (1e10, 100.0),
        pytest.param(1.7e9, -3600.0, marks=pytest.mark.slow),
        pytest.param(2460000.5, 1.0, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("adaptive", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_decay_over_one_time_constant(t0, tau, adaptive):
    controller = diffrax.PIDController(rtol=1e-9, atol=1e-9) if adaptive else diffrax.ConstantStepSize()
    found, parts = gradient(fl.AdaptiveCheckpointAdjoint(), t0, tau, controller)
    exact = np.array([-np.sum(WEIGHTS * parts * np.exp(-parts)), np.sum(WEIGHTS * np.exp(-parts))])
    resolution = abs(t0 / tau) * np.finfo(float).eps
    assert_close(found, exact, 2e-8 + 10 * resolution)
    assert_close(found, gradient(DEFAULT, t0, tau, controller)[0], 1e-12)
    assert_close(gradient(fl.GaussAdjoint(), t0, tau, controller)[0], exact, 2e-8 + 10 * resolution)
