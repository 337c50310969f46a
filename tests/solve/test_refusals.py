"""What an adjoint gives no gradient for is refused in words that name the way out."""

import diffrax
import jax
import jax.numpy as jnp
import optimistix as optx
import pytest

import flatlayers as fl
from tests.helpers import assert_close


Y0 = jnp.array([0.5])
ADJOINTS = {"checkpoint": fl.AdaptiveCheckpointAdjoint(), "gauss": fl.GaussAdjoint()}


def solve(rate, adjoint, **options):
    options = {"stepsize_controller": diffrax.PIDController(rtol=1e-3, atol=1e-3), "dt0": 0.2} | options
    term = diffrax.ODETerm(lambda t, y, rate: -rate * y)
    t0, t1, dt0 = options.pop("t0", 0.0), options.pop("t1", 1.0), options.pop("dt0")
    return diffrax.diffeqsolve(term, diffrax.Heun(), t0, t1, dt0, 1.0, rate, adjoint=adjoint, **options).ys[
        -1
    ]


def clipped(controller, **options):
    return diffrax.ClipStepSizeController(controller, **options)


PID = diffrax.PIDController(rtol=1e-3, atol=1e-3)
OF_TAU = {
    "dtmax": lambda tau: {"stepsize_controller": diffrax.PIDController(1e-3, 1e-3, dtmax=0.2 * tau)},
    "dtmin": lambda tau: {"stepsize_controller": diffrax.PIDController(1e-3, 1e-3, dtmin=1e-3 * tau)},
    "nested dtmax": lambda tau: {
        "stepsize_controller": clipped(diffrax.PIDController(1e-3, 1e-3, dtmax=tau), step_ts=jnp.array([0.5]))
    },
    "step_ts": lambda tau: {"stepsize_controller": clipped(PID, step_ts=jnp.array([0.5]) * tau)},
    "jump_ts": lambda tau: {"stepsize_controller": clipped(PID, jump_ts=jnp.array([0.5]) * tau)},
    "StepTo": lambda tau: {
        "stepsize_controller": diffrax.StepTo(jnp.array([0.0, 0.5, 1.0]) + tau * jnp.array([0.0, 0.1, 0.0])),
        "dt0": None,
    },
    "ts": lambda tau: {"saveat": diffrax.SaveAt(ts=jnp.array([0.5]) * tau)},
    "t1": lambda tau: {"t1": tau},
    "dt0": lambda tau: {"dt0": 0.1 * tau},
}


@pytest.mark.parametrize("adjoint", ADJOINTS)
@pytest.mark.parametrize("what", OF_TAU)
def test_gradients_of_times_and_step_sizes(adjoint, what):
    with pytest.raises(Exception, match=r"gives no gradient with respect to .*RecursiveCheckpointAdjoint"):
        jax.grad(lambda tau: solve(1.0, ADJOINTS[adjoint], **OF_TAU[what](tau)))(0.7)


@pytest.mark.parametrize("adjoint", ADJOINTS)
def test_step_sizes_that_have_no_tangent_are_taken(adjoint):
    options = {"stepsize_controller": diffrax.PIDController(1e-7, 1e-7, dtmax=0.2, dtmin=1e-6)}
    found = jax.grad(lambda rate: solve(rate, ADJOINTS[adjoint], **options))(0.7)
    assert_close(found, -jnp.exp(-0.7), rtol=1e-5)


@pytest.mark.parametrize("adjoint", ADJOINTS)
def test_forward_mode(adjoint):
    f = lambda rate: solve(rate, ADJOINTS[adjoint])  # noqa: E731
    for forward in (lambda: jax.jvp(f, (0.7,), (1.0,)), lambda: jax.jacfwd(f)(0.7)):
        with pytest.raises(TypeError, match="reverse mode.*found forward-mode.*ForwardMode"):
            forward()


def node_loss(key, **options):
    node = fl.NeuralODE(fl.Dense(1, 1), max_steps=32, **options)
    ps, st = fl.setup(key, node, float)
    return ps, lambda ps, y=Y0: node(y, ps, st)[0]


def test_least_squares_by_default(key):
    ps, f = node_loss(key)
    with pytest.raises(TypeError, match=r"options=\{'jac': 'bwd'\}"):
        optx.least_squares(lambda ps, _: f(ps), optx.LevenbergMarquardt(1e-4, 1e-4), ps, max_steps=4)


def test_reverse_over_reverse(key):
    ps, f = node_loss(key)
    with pytest.raises(TypeError, match="reverse mode over reverse mode|no second derivative"):
        jax.grad(lambda ps: jax.grad(lambda y: f(ps, y)[0])(Y0)[0])(ps)


@pytest.mark.slow
def test_the_ways_out_work(key):
    ps, f = node_loss(key, solver=diffrax.Tsit5(scan_kind="lax"))
    H = fl.hessian(lambda ps: f(ps).sum())(ps)
    ps, direct = node_loss(key, adjoint=diffrax.DirectAdjoint())
    assert_close(H.data, fl.hessian(lambda ps: direct(ps).sum())(ps).data, rtol=1e-6, atol=1e-8)
    ps, forward = node_loss(key, adjoint=diffrax.ForwardMode())
    _, tangent = jax.jvp(forward, (ps,), (ps,))
    ps, reverse = node_loss(key)
    assert_close(tangent[0], jax.grad(lambda ps: reverse(ps)[0])(ps) @ ps, rtol=1e-8)
    solution = optx.least_squares(
        lambda ps, _: reverse(ps) - 0.1,
        optx.LevenbergMarquardt(1e-6, 1e-6),
        ps,
        options={"jac": "bwd"},
        max_steps=50,
    )
    assert_close(reverse(solution.value), jnp.array([0.1]), rtol=1e-3)
