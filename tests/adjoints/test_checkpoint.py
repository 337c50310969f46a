"""`AdaptiveCheckpointAdjoint`, against diffrax's own adjoint and against what is known."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flatlayers as fl
from tests.adjoints.helpers import ADJOINT, WIDE
from tests.helpers import equations


def test_lotka_volterra():
    """The reference values of SciMLSensitivity's tests."""

    def loss(p, u0):
        def lotka_volterra(t, u, p):
            x, y = u
            return jnp.stack([p[0] * x - p[1] * x * y * t, -p[2] * y + t * p[3] * x * y])

        ts = jnp.linspace(0.0, 10.0, 21)
        controller = diffrax.PIDController(rtol=1e-10, atol=1e-10)
        us = diffrax.diffeqsolve(
            diffrax.ODETerm(lotka_volterra),
            diffrax.Dopri8(),
            0.0,
            10.0,
            None,
            u0,
            p,
            saveat=diffrax.SaveAt(ts=ts),
            stepsize_controller=diffrax.ClipStepSizeController(controller, step_ts=ts),
            adjoint=ADJOINT,
        ).ys
        return jnp.sum((2 - us) ** 2) / 2

    by_p, by_u0 = jax.jit(jax.grad(loss, (0, 1)))(jnp.array([1.5, 1.0, 3.0, 1.0]), jnp.ones(2))
    np.testing.assert_allclose(by_p, [13.156719527, -16.810514044, 7.702708131, -25.639475860], rtol=1e-8)
    np.testing.assert_allclose(by_u0, [0.211965670, -17.191005071], rtol=1e-8, atol=1e-8 * 17)


@pytest.mark.slow
def test_forcing_through_an_interpolant():
    """dy/dt = g(t) - y with g linear between values: y(1) is linear in them."""
    ts = jnp.linspace(0.0, 1.0, 6)

    def end(values):
        path = diffrax.LinearInterpolation(ts, values)
        return diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, args: path.evaluate(t) - y),
            diffrax.Tsit5(),
            0.0,
            1.0,
            None,
            jnp.array(0.0),
            stepsize_controller=diffrax.ClipStepSizeController(
                diffrax.PIDController(rtol=1e-10, atol=1e-12), step_ts=ts
            ),
            adjoint=ADJOINT,
        ).ys[0]

    values = jnp.array([0.3, -1.0, 2.0, 0.5, 0.1, -0.4])
    found = jax.jit(jax.grad(end))(values)
    fine = np.linspace(0, 1, 100001)
    hats = [np.interp(fine, ts, np.eye(6)[k]) for k in range(6)]
    expected = [np.trapezoid(hat * np.exp(fine - 1), fine) for hat in hats]
    np.testing.assert_allclose(found, expected, rtol=1e-8)


def test_float32_stays_float32():
    node = fl.NeuralODE(WIDE, adjoint=ADJOINT, saveat=[0.3, 1.0])
    ps, st = fl.setup(jax.random.key(0), node, jnp.float32)
    grad = jax.grad(lambda ps, y0: node(y0, ps, st)[0].sum(), (0, 1))
    shapes = jax.eval_shape(grad, ps, jnp.ones(24, jnp.float32))
    assert [leaf.dtype for leaf in jax.tree.leaves(shapes)] == [jnp.float32, jnp.float32]
    eqns = equations(jax.make_jaxpr(grad)(ps, jnp.ones(24, jnp.float32)).jaxpr)
    arrays = [var.aval for eqn in eqns for var in (*eqn.invars, *eqn.outvars) if var.aval.shape]
    assert not [array for array in arrays if array.dtype == jnp.float64]


def test_equal_adjoints_are_equal():
    nodes = [fl.NeuralODE(WIDE, adjoint=fl.AdaptiveCheckpointAdjoint(every=k)) for k in (1, 1, 2)]
    assert nodes[0] == nodes[1] != nodes[2]
    assert hash(nodes[0]) == hash(nodes[1])
