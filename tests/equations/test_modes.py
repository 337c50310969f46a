"""Solver layers in fitters and in second derivatives: the modes that each adjoint has."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest

import flatlayers as fl
from tests.helpers import assert_close


class Predation(fl.Layer):
    """Lotka and Volterra's equations."""

    def parameters(self):
        return {name: fl.Param((), fl.initializers.ones) for name in ("growth", "loss")}

    def forward(self, y, ps, st):
        prey, predators = y
        return jnp.stack([ps.growth * prey - prey * predators, prey * predators - ps.loss * predators]), st


Y0, TIMES = jnp.array([1.0, 0.5]), jnp.linspace(0.0, 4.0, 9)
NODE = fl.NeuralODE(Predation(), t1=4.0, saveat=TIMES)
PS, ST = fl.setup(jax.random.key(0), NODE, float)
TRUTH = fl.ComponentVector(jnp.array([1.2, 0.8]), PS.layout)


def residual(ps, args, node=NODE):
    return node(Y0, ps, ST)[0] - args


@pytest.fixture(scope="module")
def data():
    return NODE(Y0, TRUTH, ST)[0]


@pytest.fixture(autouse=True)
def _promotion_of_optimistix():
    with jax.numpy_dtype_promotion("standard"):
        yield


SOLVERS = [optx.LevenbergMarquardt(1e-8, 1e-8), optx.GaussNewton(1e-8, 1e-8), optx.Dogleg(1e-8, 1e-8)]
CASES = [
    (SOLVERS[0], "fwd"),
    pytest.param(SOLVERS[0], "bwd", marks=pytest.mark.slow),
    pytest.param(SOLVERS[1], "fwd", marks=pytest.mark.slow),
    pytest.param(SOLVERS[2], "fwd", marks=pytest.mark.slow),
]


@pytest.mark.long
@pytest.mark.parametrize(("solver", "jac"), CASES)
def test_least_squares(solver, jac, data):
    found = optx.least_squares(residual, solver, PS, data, options={"jac": jac})
    assert_close(found.value.data, TRUTH.data, 1e-6)
    assert found.value.layout == PS.layout


def test_minimise(data):
    def loss(ps, data):
        return jnp.mean(residual(ps, data) ** 2) / 10  # the first step is the gradient

    found = optx.minimise(loss, optx.BFGS(1e-8, 1e-8), PS, data)
    assert_close(found.value.data, TRUTH.data, 1e-5)


@pytest.mark.long
def test_a_jacobian_by_finite_differences(data):
    constant = diffrax.ConstantStepSize()
    node = fl.NeuralODE(Predation(), t1=4.0, saveat=TIMES, dt0=0.1, stepsize_controller=constant)

    def f(x):
        return residual(fl.ComponentVector(x, PS.layout), data, node)

    found, step = jax.jit(jax.jacfwd(f))(PS.data), 1e-5
    for i in range(2):
        e = step * jnp.eye(2)[i]
        np.testing.assert_allclose(found[..., i], (f(PS.data + e) - f(PS.data - e)) / (2 * step), 1e-6, 1e-8)


@pytest.mark.long
def test_a_hessian(data):
    def hessian(adjoint):
        node = fl.NeuralODE(Predation(), t1=4.0, saveat=TIMES, adjoint=adjoint)
        return jax.jit(fl.hessian(lambda ps: jnp.sum(residual(ps, data, node) ** 2)))(PS).data

    found = hessian(None)
    assert_close(found, hessian(diffrax.ForwardMode()), 1e-7)  # forward over forward mode
    assert_close(found, found.T, 1e-7)


@pytest.mark.long
def test_each_sample_with_steps_of_its_own(data):
    node = fl.NeuralODE(Predation(), t1=4.0, batching="each")
    y0 = jnp.stack([Y0, 2 * Y0])

    def ends(x):
        return node(y0, fl.ComponentVector(x, PS.layout), ST)[0]

    assert_close(jax.jit(jax.jacfwd(ends))(PS.data), jax.jit(jax.jacrev(ends))(PS.data), 1e-8)


@pytest.mark.slow
def test_a_stochastic_equation():
    layer = fl.NeuralSDE(lambda y: -y, fl.Dense(1, 1), dt0=0.1)
    ps, st = fl.setup(jax.random.key(0), layer, float)

    def end(x):
        return layer(jnp.ones(1), fl.ComponentVector(x, ps.layout), st)[0]

    assert_close(jax.jit(jax.jacfwd(end))(ps.data), jax.jit(jax.jacrev(end))(ps.data), 1e-9)


REVERSE_ONLY = {
    "an event": ({"event": diffrax.Event(lambda t, y, args, **_: y[0] - 9.0)}, "RecursiveCheckpointAdjoint"),
    "checkpoints": ({"adjoint": diffrax.RecursiveCheckpointAdjoint()}, "RecursiveCheckpointAdjoint"),
    "backwards": ({"adjoint": diffrax.BacksolveAdjoint()}, "BacksolveAdjoint"),
    "quadrature": ({"adjoint": fl.GaussAdjoint()}, "fl.GaussAdjoint"),
    "stages": ({"solver": diffrax.Kvaerno3()}, r"Kvaerno3.*scan_kind='bounded'"),
}


@pytest.mark.parametrize("name", REVERSE_ONLY)
def test_what_has_reverse_mode_alone_says_so(name):
    options, found = REVERSE_ONLY[name]
    node = fl.NeuralODE(Predation(), **options)

    def end(x):
        return node(Y0, fl.ComponentVector(x, PS.layout), ST)[0]

    with pytest.raises(TypeError, match=rf"NeuralODE with .*{found}.*DirectAdjoint\(\).*'bwd'"):
        jax.jacfwd(end)(PS.data)
    with pytest.raises(TypeError, match=r"no second derivative.*DirectAdjoint\(\)"):
        fl.hessian(lambda ps: end(ps.data).sum())(PS)
