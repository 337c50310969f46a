"""`AdaptiveCheckpointAdjoint`, against diffrax's own adjoint and against what is known."""

import diffrax
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest

import flatlayers as fl
from tests.adjoints.helpers import ADJOINT, DEFAULT, PID, WIDE, assert_equals_default, flat_loss
from tests.helpers import assert_close, equations


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
    ("solver", "controller"),
    [
        pytest.param(diffrax.Euler(), diffrax.ConstantStepSize(), marks=pytest.mark.slow),
        (diffrax.ItoMilstein(), diffrax.ConstantStepSize()),
        (diffrax.Heun(), diffrax.PIDController(rtol=0.05, atol=0.05, error_order=1.0, dtmin=0.003)),
    ],
    ids=["Euler", "ItoMilstein", "Heun"],
)
@pytest.mark.slow
def test_stochastic(solver, controller):
    """`dy = -a sin(y) dt + b cos(y) dW`."""

    def solve(adjoint, y0, args):
        path = diffrax.VirtualBrownianTree(0.0, 1.0, 1e-3, (2,), jax.random.key(1))
        terms = diffrax.MultiTerm(
            diffrax.ODETerm(lambda t, y, args: -args[0] * jnp.sin(y)),
            diffrax.ControlTerm(lambda t, y, args: lx.DiagonalLinearOperator(args[1] * jnp.cos(y)), path),
        )
        return diffrax.diffeqsolve(
            terms,
            solver,
            0.0,
            1.0,
            0.05,
            y0,
            args,
            saveat=diffrax.SaveAt(ts=[0.31, 1.0]),
            stepsize_controller=controller,
            adjoint=adjoint,
            max_steps=200,
        ).ys

    assert_equals_default(solve, jnp.array([1.0, 0.5]), (jnp.array(0.8), jnp.array(0.3)))


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


@pytest.mark.slow
def test_a_network_with_its_own_steps_for_each_sample():
    ps, _ = fl.setup(jax.random.key(0), WIDE, float)
    y0 = jax.random.normal(jax.random.key(1), (3, 24)) * jnp.array([[0.01], [1.0], [5.0]])
    found, expected = (
        jax.jit(jax.grad(lambda ps, y0, f=f: jax.vmap(f, (None, 0))(ps, y0).sum(), (0, 1)))(ps, y0)
        for f in (flat_loss(ADJOINT), flat_loss(DEFAULT))
    )
    assert_close(found, expected, atol=1e-10)


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


@pytest.mark.parametrize(
    ("solver", "adjoint", "dtype"),
    [
        (diffrax.Euler(), ADJOINT, jnp.bfloat16),
        (diffrax.Euler(), ADJOINT, jnp.float16),
        (diffrax.ReversibleHeun(), ADJOINT, jnp.bfloat16),
        (diffrax.Euler(), fl.GaussAdjoint(), jnp.bfloat16),
    ],
    ids=["explicit", "float16", "traced", "gauss"],
)
def test_a_gradient_in_half_precision_is_added_up_in_float32(solver, adjoint, dtype):
    """500 steps, against the same parameters in float32. A sum in bfloat16 is 22 % off."""
    node = fl.NeuralODE(
        fl.Chain(fl.Dense(2, 8, jnp.tanh), fl.Dense(8, 2)),
        solver=solver,
        stepsize_controller=diffrax.ConstantStepSize(),
        dt0=0.002,
        adjoint=adjoint,
        max_steps=512,
    )
    ps, st = fl.setup(jax.random.key(0), node, dtype)
    gradient = jax.jit(jax.grad(lambda ps, y0: jnp.sum(node(y0, ps, st)[0] ** 2)))
    for y0 in ([1.0, 0.5], [-0.3, 2.0], [0.1, -3.0]):
        y0 = jnp.array(y0, dtype)
        found = gradient(ps, y0).data
        expected = gradient(ps.map(lambda x: x.astype(jnp.float32)), y0.astype(jnp.float32)).data
        assert found.dtype == dtype
        error = jnp.linalg.norm(found.astype(jnp.float32) - expected)
        assert error < 0.02 * jnp.linalg.norm(expected)
