"""The cotangents of all that a solve can save."""

import diffrax
import jax
import jax.numpy as jnp
import pytest

from tests.adjoints.helpers import ADJOINT, ARGS, PID, Y0, assert_equals_default, field, gradient
from tests.helpers import assert_close


pytestmark = pytest.mark.long


def test_all_of_saveat():
    def solve(adjoint, y0, args, scale):
        def some(t, y, args):
            return scale * t * y["u"], args[0]

        subs = {
            "all": diffrax.SubSaveAt(t0=True, t1=True, ts=[0.0, 0.01, 0.02, 1.0, 1.5, 2.0], steps=True),
            "some": diffrax.SubSaveAt(t0=True, ts=[0.3, 1.9], steps=2, fn=some),
            "end": diffrax.SubSaveAt(t1=True, steps=3),
        }
        return diffrax.diffeqsolve(
            diffrax.ODETerm(field),
            diffrax.Tsit5(),
            0.0,
            2.0,
            None,
            y0,
            args,
            saveat=diffrax.SaveAt(subs=subs),
            stepsize_controller=PID,
            adjoint=adjoint,
            max_steps=64,
        ).ys

    assert_equals_default(solve, Y0, ARGS, jnp.array(1.3))


def test_backward_in_time_and_what_is_closed_over():
    def solve(adjoint, y0, args):
        return diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, _: field(t, y, args)),
            diffrax.Dopri8(),
            1.0,
            -0.7,
            -0.3,
            y0,
            saveat=diffrax.SaveAt(ts=[0.6, 0.5, -0.7], t0=True),
            stepsize_controller=PID,
            adjoint=adjoint,
            max_steps=64,
        ).ys

    assert_equals_default(solve, Y0, ARGS)


@pytest.mark.slow
def test_dense_output_across_a_jump():
    def solve(adjoint, y0, rate):
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, rate: -rate * y + jnp.where(t < 0.5, 0.0, 2.0)),
            diffrax.Tsit5(),
            0.0,
            1.0,
            None,
            y0,
            rate,
            saveat=diffrax.SaveAt(dense=True, t1=True),
            stepsize_controller=diffrax.ClipStepSizeController(PID, jump_ts=[0.5]),
            adjoint=adjoint,
            max_steps=64,
        )
        return jax.vmap(solution.evaluate)(jnp.linspace(0.0, 1.0, 11)), solution.ys

    assert_equals_default(solve, jnp.array([1.0, 2.0]), jnp.array(0.7))


@pytest.mark.slow
def test_no_steps_and_too_few():
    def solve(adjoint, y0, rate, t1, max_steps=8, ts=(0.0, 0.0)):
        return diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, rate: -rate * y),
            diffrax.Tsit5(),
            0.0,
            t1,
            None,
            y0,
            rate,
            saveat=diffrax.SaveAt(ts=jnp.array(ts), t0=True, t1=True),
            stepsize_controller=PID,
            adjoint=adjoint,
            max_steps=max_steps,
            throw=False,
        ).ys

    y0, rate = jnp.array([1.0, 2.0]), jnp.array(0.7)
    _, (by_y0, by_rate) = gradient(lambda *inputs: solve(*inputs, 0.0), ADJOINT, y0, rate)
    weights = sum(jnp.cos(jnp.array([2.0 * k, 2.0 * k + 1])) for k in range(4))
    assert_close(by_y0, 2 * weights * y0 + 4)
    assert by_rate == 0
    assert_equals_default(lambda *inputs: solve(*inputs, 10.0, 2, (0.01, 0.2, 9.0)), y0, rate)
