"""`GaussAdjoint`, against diffrax's own adjoint and against formulas."""

import re
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flatlayers as fl
from tests.adjoints.helpers import DEFAULT, GAUSS, pid, solve, weighted
from tests.helpers import assert_close, central_difference, equations, inner_jaxprs


pytestmark = pytest.mark.slow


# Against diffrax's default


def decay(t, y, rate):
    return -rate * y


def field(t, y, args):
    """A field on a pytree; not all of its arguments are arrays, and not all arrays are real numbers."""
    rate, weight, name, rows = args
    assert name == "name"
    u, v = y["u"], y["v"]
    return {"u": jnp.tanh(weight[rows] @ u) - rate * u + jnp.sin(t) * v, "v": -v * jnp.sum(u) * rate}


Y0 = {"u": jnp.array([1.0, -0.5, 0.3]), "v": jnp.array(0.7)}
WEIGHT = jnp.array([[0.1, 1.0, -0.4], [-1.2, 0.3, 0.5], [0.2, -0.6, 0.9]])
ARGS = (jnp.array(0.4), WEIGHT, "name", jnp.array([2, 0, 1]))

CASES = {
    "t0, ts, t1": (
        diffrax.Tsit5(),
        0.0,
        2.0,
        {"t0": True, "ts": [0.0, 0.01, 1.5, 1.5, 2.0], "t1": True},
        1e-9,
    ),
    "back in time, ts before the end": (diffrax.Dopri8(), 1.0, -0.7, {"ts": [0.6, 0.5, -0.3]}, 1e-9),
    "implicit": (diffrax.Kvaerno5(), 0.0, 1.0, {"ts": [0.3, 1.0]}, 1e-7),
}


@pytest.mark.parametrize("case", CASES)
def test_agrees_with_the_default(case):
    solver, t0, t1, saveat, tolerance = CASES[case]

    def gradient(adjoint):
        @eqx.filter_jit
        @eqx.filter_grad
        def loss(inputs):
            y0, args = inputs
            options = {"saveat": diffrax.SaveAt(**saveat), "max_steps": 256}
            return weighted(
                solve(
                    field, y0, args, t1, t0=t0, solver=solver, tolerance=tolerance, adjoint=adjoint, **options
                ).ys
            )

        return loss((Y0, ARGS))

    found, expected = gradient(GAUSS), gradient(DEFAULT)
    size = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
    assert_close(found, expected, 0, 20 * tolerance * size)


# Against numbers and formulas


def test_forcing_through_an_interpolant_under_vmap():
    """Rows of a batch have their own numbers of steps. Both solves step to the corners of the forcing."""
    ts = jnp.linspace(0, 3, 7)
    controller = diffrax.ClipStepSizeController(pid(1e-8), jump_ts=ts[1:-1])
    options = {"controller": controller, "saveat": diffrax.SaveAt(ts=[1.0, 2.2, 3.0])}

    def gradient(adjoint):
        def loss(data, y0):
            def forcing(t, y, data):
                return diffrax.LinearInterpolation(ts, data).evaluate(t) - y**3

            return weighted(solve(forcing, y0, data, 3.0, adjoint=adjoint, **options).ys)

        return jax.jit(jax.vmap(jax.grad(loss, (0, 1))))

    data = jnp.stack([jnp.sin(ts), 10 * jnp.cos(3 * ts)])
    y0 = jnp.array([0.1, 2.0])
    assert_close(gradient(GAUSS)(data, y0), gradient(DEFAULT)(data, y0), 1e-7, 1e-7)


# Leaves without numbers


@pytest.mark.parametrize(
    "y0",
    [
        {"a": jnp.array([1.0, 0.5]), "b": jnp.zeros((0, 3)), "c": None},
        (jnp.zeros(0), jnp.array(0.3)),
        [jnp.zeros((2, 0))],
        None,
        {"a": None},
    ],
)
def test_leaves_without_numbers(y0):
    def loss(p, y0, adjoint):
        def field(t, y, p):
            return jax.tree.map(lambda x: -p * x, y)

        options = {"controller": diffrax.ConstantStepSize(), "dt0": 0.01, "adjoint": adjoint}
        return 3 * p + weighted(solve(field, y0, p, solver=diffrax.Bosh3(), **options).ys)

    inexact = eqx.filter(y0, eqx.is_inexact_array)
    found, expected = (
        jax.grad(lambda p, y0, a=adjoint: loss(p, y0, a), (0, 1))(0.7, inexact)
        for adjoint in (GAUSS, DEFAULT)
    )
    assert_close(found, expected, 1e-6)


# Options


def test_terms_that_hold_arrays_and_two_terms():
    class Decay(eqx.Module):
        rate: jax.Array

        def __call__(self, t, y, args):
            return -self.rate * y

    @jax.jit
    @jax.grad
    def gradient(rate):
        terms = diffrax.MultiTerm(diffrax.ODETerm(Decay(rate)), diffrax.ODETerm(Decay(2 * rate)))
        solution: Any = diffrax.diffeqsolve(
            terms, diffrax.KenCarp4(), 0, 1, None, 1.0, stepsize_controller=pid(1e-4), adjoint=GAUSS
        )
        return solution.ys[0]

    assert_close(gradient(jnp.array(0.5)), -3 * np.exp(-1.5), 1e-3)


# Errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"saveat": diffrax.SaveAt(steps=True)}, "found steps.*RecursiveCheckpointAdjoint"),
        ({"saveat": diffrax.SaveAt(t1=True, dense=True)}, "found dense"),
        ({"saveat": diffrax.SaveAt(t1=True, fn=lambda t, y, args: 2 * y)}, "found fn"),
        (
            {"saveat": diffrax.SaveAt(subs=[diffrax.SubSaveAt(t1=True)])},
            "found subs.*AdaptiveCheck",
        ),
        ({"event": diffrax.Event(lambda t, y, args, **kwargs: y - 0.5)}, "does not support events"),
        ({"max_steps": None}, "expected max_steps to be an integer"),
    ],
)
def test_options_that_are_not_supported(options, message):
    with pytest.raises(ValueError, match=message):
        solve(decay, 1.0, 2.0, **options)


def test_terms_that_are_not_supported():
    noise = diffrax.VirtualBrownianTree(0.0, 1.0, 1e-3, (), jax.random.key(0))
    terms = diffrax.MultiTerm(diffrax.ODETerm(decay), diffrax.ControlTerm(lambda t, y, args: y, noise))
    with pytest.raises(TypeError, match="expected a diffrax.ODETerm.*found ControlTerm for Heun"):
        diffrax.diffeqsolve(terms, diffrax.Heun(), 0.0, 1.0, 0.1, 1.0, 2.0, adjoint=GAUSS)
    pair = (diffrax.ODETerm(decay), diffrax.ODETerm(decay))
    with pytest.raises(TypeError, match="found tuple for SemiImplicitEuler"):
        diffrax.diffeqsolve(pair, diffrax.SemiImplicitEuler(), 0.0, 1.0, 0.1, (1.0, 1.0), 2.0, adjoint=GAUSS)


def test_values_that_have_no_gradient():
    with pytest.raises(RuntimeError, match="pass it in `args`"):
        jax.grad(lambda rate: solve(lambda t, y, _: -rate * y, 1.0, None).ys[0])(2.0)
    with pytest.raises(RuntimeError, match="no gradient with respect to t1"):
        jax.grad(lambda t1: solve(decay, 1.0, 2.0, t1).ys[0])(1.0)
    with pytest.raises(RuntimeError, match=r"no gradient with respect to SaveAt\(ts=...\)"):
        jax.grad(lambda t: solve(decay, 1.0, 2.0, saveat=diffrax.SaveAt(ts=t[None])).ys[0])(0.5)


CONTROLLERS = {
    "PIDController(dtmax=...)": lambda x: diffrax.PIDController(rtol=1e-3, atol=1e-3, dtmax=x),
    "PIDController(dtmin=...)": lambda x: diffrax.PIDController(rtol=1e-3, atol=1e-3, dtmin=x / 9),
    "PIDController(dtmax=...) ": lambda x: diffrax.ClipStepSizeController(
        diffrax.PIDController(rtol=1e-3, atol=1e-3, dtmax=x)
    ),
    "ClipStepSizeController": lambda x: diffrax.ClipStepSizeController(pid(1e-3), step_ts=x[None]),
    "StepTo": lambda x: diffrax.StepTo(jnp.stack([jnp.zeros_like(x), x, jnp.ones_like(x)])),
}


@pytest.mark.parametrize("name", CONTROLLERS)
def test_a_controller_has_no_gradient(name):
    message = re.escape(
        f"GaussAdjoint gives no gradient with respect to {name.strip()}. Use diffrax.Recursive"
    )

    def end(x):
        dt0 = None if name == "StepTo" else 0.1
        return solve(decay, 1.0, 2.0, controller=CONTROLLERS[name](x), dt0=dt0).ys[0]

    with pytest.raises(RuntimeError, match=message):
        jax.grad(end)(jnp.array(0.1))


def test_tolerances_have_a_gradient_of_zero_as_with_the_default():
    def end(tolerance, solver, adjoint):
        return solve(decay, 1.0, 2.0, controller=pid(tolerance), dt0=0.1, solver=solver, adjoint=adjoint).ys[
            0
        ]

    for solver in (diffrax.Tsit5(), diffrax.Kvaerno3()):
        for adjoint in (GAUSS, DEFAULT):
            assert jax.grad(lambda x, s=solver, a=adjoint: end(x, s, a))(1e-3) == 0


def test_the_backward_controller_has_no_gradient():
    def end(x):
        back = diffrax.PIDController(rtol=1e-3, atol=1e-3, dtmax=x)
        return solve(decay, 1.0, 2.0, adjoint=fl.GaussAdjoint(stepsize_controller=back)).ys[0]

    with pytest.raises(RuntimeError, match=r"with respect to PIDController\(dtmax=...\)"):
        jax.grad(end)(jnp.array(0.1))


def test_forward_mode_and_second_derivatives_are_refused():
    def end(rate):
        return solve(decay, 1.0, rate).ys[0]

    for derivative in (jax.jacfwd(end), lambda x: jax.jvp(jax.jit(end), (x,), (x,))):
        with pytest.raises(TypeError, match=r"GaussAdjoint has reverse mode.*diffrax.ForwardMode\(\)"):
            derivative(0.7)

    def value(x):
        return jax.value_and_grad(end)(x)[0]

    for derivative in (jax.hessian(end), jax.grad(jax.grad(end)), jax.grad(value)):
        with pytest.raises(TypeError, match="GaussAdjoint has no second derivative. Use adjoint=fl.Adaptive"):
            derivative(0.7)


def test_order_that_is_none():
    with pytest.raises(ValueError, match="`order` to be None or an integer of at least 1, found 0"):
        fl.GaussAdjoint(order=0)


# With a layer


def test_neural_ode_is_float32_and_unpacks_outside_the_loops():
    node = fl.NeuralODE(fl.Chain(fl.Dense(2, 7, jnp.tanh), fl.Dense(7, 2)), adjoint=GAUSS)
    ps, st = fl.setup(jax.random.key(0), node)
    y0 = jnp.array([[1.0, -0.5], [0.3, 0.2], [0.1, 0.9]], jnp.float32)
    gradient = jax.grad(lambda ps, y0: weighted(node(y0, ps, st)[0]), (0, 1))
    dps, dy0 = jax.jit(gradient)(ps, y0)
    assert dps.layout == ps.layout
    assert (dps.dtype, dy0.dtype) == (jnp.float32, jnp.float32)

    def double(ps, y0):
        return weighted(node(y0, ps, st)[0])

    ps, y0 = jax.tree.map(lambda x: x.astype(jnp.float64), (ps, y0))
    direction = ps.map(jnp.cos)
    expected = central_difference(lambda ps: double(ps, y0), ps, direction, 1e-3)
    assert_close(jnp.vdot(dps.data.astype(jnp.float64), direction.data), expected, 1e-3)

    jaxpr = jax.make_jaxpr(gradient)(ps, y0).jaxpr
    loops = [eqn for eqn in equations(jaxpr) if eqn.primitive.name in ("while", "scan")]
    inside = [e for loop in loops for inner in inner_jaxprs(loop) for e in equations(inner)]
    assert len(inside) > 100
    assert not [e for e in inside if e.primitive.name == "split" and e.invars[0].aval.size >= ps.size]
