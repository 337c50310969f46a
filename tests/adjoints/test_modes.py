"""Derivatives of derivatives, and those that are refused."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest

import flatlayers as fl
from tests.adjoints.helpers import ADJOINT, PID, decay
from tests.helpers import assert_close


@pytest.mark.slow
@pytest.mark.parametrize(
    "solver", [diffrax.Tsit5(), diffrax.Dopri5(scan_kind="lax"), diffrax.ReversibleHeun()]
)
def test_a_second_derivative(solver):
    """y(1) = 1 / (1 + rate) for dy/dt = -rate y^2."""

    def end(rate):
        term = diffrax.ODETerm(lambda t, y, rate: -rate * y**2)
        return diffrax.diffeqsolve(term, solver, 0.0, 1.0, 0.005, 1.0, rate, adjoint=ADJOINT).ys[0]

    first, second = jax.jit(lambda x: jax.jvp(jax.grad(end), (x,), (jnp.ones_like(x),)))(jnp.array(0.7))
    rtol = 1e-5 if isinstance(solver, diffrax.ReversibleHeun) else 1e-9
    np.testing.assert_allclose([first, second], [-(1.7**-2), 2 * 1.7**-3], rtol=rtol)
    np.testing.assert_allclose(jax.hessian(end)(0.7), second, rtol=1e-12)


@pytest.mark.slow
def test_the_hessian_of_a_network():
    """Forward over reverse, against an adjoint that has both."""

    def hessian(solver, adjoint):
        node = fl.NeuralODE(
            fl.Chain(fl.Dense(2, 3, jnp.tanh), fl.Dense(3, 2)),
            solver=solver,
            adjoint=adjoint,
            max_steps=16,
        )
        ps, st = fl.setup(jax.random.key(0), node, float)
        return fl.hessian(lambda ps: (node(jnp.array([1.0, -0.5]), ps, st)[0] ** 2).sum())(ps)

    found = hessian(diffrax.Tsit5(), ADJOINT)
    assert_close(found, hessian(diffrax.Tsit5(scan_kind="lax"), ADJOINT))
    assert_close(found, hessian(diffrax.Tsit5(), diffrax.DirectAdjoint()), rtol=1e-8, atol=1e-10)


FORWARD = {
    "jvp": lambda f, x: jax.jvp(f, (x,), (x,)),
    "jvp of jit": lambda f, x: jax.jvp(jax.jit(f), (x,), (x,)),
    "jit of jvp": lambda f, x: jax.jit(lambda x: jax.jvp(f, (x,), (jnp.ones_like(x),)))(x),
    "vmap of jvp": lambda f, x: jax.vmap(lambda x: jax.jvp(f, (x,), (jnp.ones_like(x),)))(x[None]),
    "jvp of vmap": lambda f, x: jax.jvp(jax.vmap(f), (x[None],), (x[None],)),
    "jvp of scan": lambda f, x: jax.jvp(
        lambda x: jax.lax.scan(lambda x, _: (f(x), None), x, length=2)[0], (x,), (x,)
    ),
    "jacfwd": lambda f, x: jax.jacfwd(f)(x),
    "linearize": lambda f, x: jax.linearize(f, x)[1](x),
    "least squares": lambda f, x: optx.least_squares(
        lambda x, _: f(x), optx.LevenbergMarquardt(1e-3, 1e-3), x, throw=False
    ),
}


@pytest.mark.parametrize("name", FORWARD)
def test_forward_mode_of_steps_without_it_is_refused_with_the_way_out(name):
    def end(rate):
        return decay(rate=rate, solver=diffrax.Kvaerno3(), stepsize_controller=PID).ys[0]

    message = r"with Kvaerno3 has reverse mode.*forward-mode.*Kvaerno3\(scan_kind='bounded'\).*'bwd'"
    with pytest.raises(TypeError, match=message):
        FORWARD[name](end, jnp.array(0.7))


SOLVERS = [
    diffrax.Tsit5(),
    pytest.param(diffrax.Kvaerno3(scan_kind="bounded"), marks=pytest.mark.slow),
]


@pytest.mark.long
@pytest.mark.parametrize("solver", SOLVERS)
def test_forward_mode(solver):
    """It is the derivative of the numerical solution, as reverse mode."""

    def end(rate, adjoint=ADJOINT):
        options = {"saveat": diffrax.SaveAt(ts=[0.25, 1.0]), "max_steps": 64, "stepsize_controller": PID}
        return decay(rate=rate, solver=solver, adjoint=adjoint, **options).ys

    rate = jnp.array(0.7)
    expected = jax.jit(jax.jacfwd(end), static_argnums=1)(rate, diffrax.DirectAdjoint())
    assert_close(expected, jnp.array([-0.25, -1.0]) * jnp.exp(rate * jnp.array([-0.25, -1.0])), 1e-4)
    for derivative in (jax.jacfwd(end), jax.jacrev(end), lambda rate: jax.linearize(end, rate)[1](1.0)):
        assert_close(jax.jit(derivative)(rate), expected, 1e-9)


@pytest.mark.long
def test_forward_mode_of_samples_side_by_side():
    rates = jnp.array([0.2, 0.7])

    def end(rate):
        return decay(rate=rate).ys[0]

    expected = -jnp.exp(-rates)
    assert_close(jax.jvp(jax.vmap(end), (rates,), (jnp.ones(2),))[1], expected, 1e-5)
    assert_close(jax.vmap(jax.jacfwd(end))(rates), expected, 1e-5)


def test_reverse_mode_over_forward_mode_is_refused_with_the_way_out():
    def slope(rate):
        return jax.jvp(lambda rate: decay(rate=rate).ys[0], (rate,), (1.0,))[1]

    with pytest.raises(TypeError, match=r"no reverse mode over forward mode.*fl.hessian.*DirectAdjoint"):
        jax.grad(slope)(0.7)


REVERSE_TWICE = {
    "grad of grad": lambda f, x: jax.grad(jax.grad(f))(x),
    "jit": lambda f, x: jax.jit(jax.grad(jax.grad(f)))(x),
    "vmap": lambda f, x: jax.grad(lambda x: jax.vmap(jax.grad(f))(x).sum())(x[None]),
    "the value": lambda f, x: jax.grad(lambda x: jax.value_and_grad(f)(x)[0])(x),
}


@pytest.mark.parametrize("name", REVERSE_TWICE)
@pytest.mark.parametrize("solver", [diffrax.Tsit5(), diffrax.ReversibleHeun()])
def test_reverse_mode_twice_is_refused_with_the_way_out(name, solver):
    with pytest.raises(TypeError, match=r"no reverse mode over reverse mode.*fl.hessian.*DirectAdjoint\(\)"):
        REVERSE_TWICE[name](lambda rate: decay(rate=rate, solver=solver).ys[0], jnp.array(0.7))


@pytest.mark.long
def test_second_derivatives_with_steps_that_have_reverse_mode_only():
    def end(rate):
        return decay(rate=rate, solver=diffrax.Kvaerno3(), stepsize_controller=PID).ys[0]

    for derivative in (jax.hessian(end), jax.grad(jax.grad(end))):
        with pytest.raises(TypeError, match=r"no second derivative with Kvaerno3.*DirectAdjoint\(\)"):
            derivative(0.7)


@pytest.mark.long
def test_reverse_mode_inside_of_transformations():
    """What refuses forward mode is in nobody's way."""

    def f(rate):
        return decay(rate=rate).ys[0]

    rate, expected = jnp.array(0.7), -np.exp(-0.7)
    for gradient in (
        jax.grad(jax.checkpoint(f)),
        jax.jit(jax.grad(lambda x: jax.vmap(jax.checkpoint(f))(x[None])[0])),
        jax.grad(lambda x: jax.lax.cond(x > 0, f, lambda x: x, x)),
        jax.grad(lambda x: f(x) + x * jax.lax.stop_gradient(jax.grad(f)(x)) * 0),
        lambda x: jax.linear_transpose(jax.linearize(f, x)[1], x)(jnp.ones(()))[0],
    ):
        assert_close(gradient(rate), expected, 1e-5)
