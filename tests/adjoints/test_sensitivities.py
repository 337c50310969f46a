"""Gradients through solves: a published case, and every layer against central differences."""

import functools

import diffrax
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest

import flatlayers as fl
from tests.helpers import assert_close, central_difference


# Lotka-Volterra with time, as SciMLSensitivity.jl tests its adjoints: L = 1/2 sum |2 - u(t_i)|^2.

TIMES = np.arange(0, 10.25, 0.5)
BY_P = (13.156719527, -16.810514044, 7.702708131, -25.639475860)
BY_U0 = (0.211965670, -17.191005071)


class LotkaVolterra(fl.Layer):
    """u' = (p1 u1 - p2 u1 u2 t, -p3 u2 + p4 u1 u2 t)."""

    def parameters(self):
        return {"p": fl.Param((4,), lambda key, shape, dtype: jnp.array([1.5, 1.0, 3.0, 1.0], dtype))}

    def forward(self, x, ps, st):
        t, u = x
        both = t * u[0] * u[1]
        return jnp.stack([ps.p[0] * u[0] - ps.p[1] * both, ps.p[3] * both - ps.p[2] * u[1]]), st


def by_plain_diffrax(adjoint, tolerance):
    """The vector has the mechanism's parameters and the start, and is `args` as it is."""
    layer = LotkaVolterra()

    @jax.grad
    def gradient(v):
        ys = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, u, v: layer((t, u), v.mechanism, {})[0]),
            diffrax.Tsit5(),
            0.0,
            10.0,
            None,
            v.u0,
            v,
            saveat=diffrax.SaveAt(ts=jnp.asarray(TIMES)),
            stepsize_controller=diffrax.PIDController(rtol=tolerance, atol=tolerance),
            adjoint=adjoint,
        ).ys
        return jnp.sum((2 - ys) ** 2) / 2

    v = fl.ComponentVector.of({"mechanism": {"p": [1.5, 1.0, 3.0, 1.0]}, "u0": [1.0, 1.0]}, dtype=float)
    found = jax.jit(gradient)(v)
    return found.mechanism.p, found.u0


def by_the_layer():
    tight = diffrax.PIDController(rtol=1e-10, atol=1e-10)
    node = fl.NeuralODE(LotkaVolterra(), t1=10.0, saveat=TIMES, with_time=True, stepsize_controller=tight)
    ps, st = fl.setup(jax.random.key(0), node, float)

    def loss(ps, u0):
        return jnp.sum((2 - node(u0, ps, st)[0]) ** 2) / 2

    found, by_u0 = jax.jit(jax.grad(loss, (0, 1)))(ps, jnp.ones(2))
    return found.p, by_u0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("gradients", "rtol"),
    [
        (lambda: by_plain_diffrax(diffrax.RecursiveCheckpointAdjoint(), 1e-10), 1e-7),
        (lambda: by_plain_diffrax(diffrax.BacksolveAdjoint(), 1e-8), 1e-4),
        (by_the_layer, 1e-7),
    ],
    ids=["plain", "backsolve", "layer"],
)
def test_lotka_volterra(gradients, rtol):
    by_p, by_u0 = gradients()
    np.testing.assert_allclose(by_p, BY_P, rtol=rtol)
    np.testing.assert_allclose(by_u0, BY_U0, rtol=rtol, atol=1e-7)


# Layers


class Drifting(fl.Layer):
    """A layer whose state moves with each call, and counts."""

    def states(self, key):
        return {"shift": 0.3, "calls": 0}

    def forward(self, x, ps, st):
        return x + st.shift, st.replace(shift=-st.shift, calls=st.calls + 1)


def field(n_in, n_out):
    hidden = fl.Dense(n_in, 6, jnp.tanh)
    return fl.Chain(hidden, drift=Drifting(), drop=fl.Dropout(0.5), out=fl.Dense(6, n_out))


STEPS = {"t1": 0.4, "dt0": 0.1, "stepsize_controller": diffrax.ConstantStepSize(), "max_steps": 8}
LAYERS = {
    "shared": (fl.NeuralODE(field(2, 2), saveat=[0.2, 0.4], **STEPS), "model"),
    "each, augmented": (
        fl.AugmentedNDE(fl.NeuralODE(field(3, 3), batching="each", **STEPS), 1),
        "model.model",
    ),
    "second order": (fl.SecondOrderNeuralODE(field(4, 2), **STEPS), "model"),
}


@pytest.mark.long
@pytest.mark.parametrize("name", LAYERS)
def test_the_gradient_of_a_layer(key, name):
    """Of the layer in a chain, against central differences, and the numbers of the layer alone."""
    layer, inner = LAYERS[name]
    chain = fl.Chain(solve=layer)
    ps, st = fl.setup(key, chain, float)
    xs = jax.random.normal(key, (2, 3, 2))
    x = (xs[0], xs[1]) if name == "second order" else xs[0]

    def total(layer, ps, x, st):
        y, st = layer(x, ps, st)
        return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(y)), st

    value_and_grad = jax.value_and_grad(functools.partial(total, chain), (0, 1), has_aux=True)
    loss = jax.jit(value_and_grad)
    (value, new), (by_ps, by_x) = loss(ps, x, st)
    assert jax.tree.structure(new) == jax.tree.structure(st)
    assert new.solve[inner].drift.calls == 1
    direction = fl.ComponentVector(jax.random.normal(jax.random.key(1), ps.shape), ps.layout)
    np.testing.assert_allclose(
        by_ps @ direction, central_difference(lambda ps: loss(ps, x, st)[0][0], ps, direction), rtol=1e-6
    )
    flat, restore = jax.flatten_util.ravel_pytree(x)
    along = jax.random.normal(jax.random.key(2), flat.shape)
    slope = central_difference(lambda flat: loss(ps, restore(flat), st)[0][0], flat, along)
    np.testing.assert_allclose(jax.flatten_util.ravel_pytree(by_x)[0] @ along, slope, rtol=1e-6)
    alone = jax.jit(functools.partial(total, layer))
    assert_close(alone(ps.solve, x, st.solve)[0], value, rtol=1e-12)
    if name == "shared":
        many = jax.jit(jax.vmap(value_and_grad, (None, 0, None)))(ps, jnp.stack([x, -x]), st)
        assert_close(jax.tree.map(lambda g: g[0], many[1]), (by_ps, by_x))


def test_a_mechanism_with_a_network_inside(key):
    """A universal differential equation needs no layer: x' = -alpha x + net(x), by plain diffrax."""
    net = fl.Dense(2, 2, jnp.tanh)
    model = {"alpha": fl.Param((), fl.initializers.constant(0.5)), "net": net}
    ps, st = fl.setup(key, model, float)
    assert ps.layout == fl.Layout({"alpha": (), "net": net.layout})
    assert list(ps.layout.names) == ["alpha", "net"]

    def rhs(t, x, ps):
        return -ps.alpha * x + net(x, ps.net, st.net)[0]

    @jax.jit
    @jax.value_and_grad
    def loss(ps):
        term, controller = diffrax.ODETerm(rhs), diffrax.ConstantStepSize()
        y0 = jnp.array([1.0, -1.0])
        ys = diffrax.diffeqsolve(
            term, diffrax.Tsit5(), 0.0, 0.5, 0.1, y0, ps, stepsize_controller=controller
        ).ys
        return jnp.sum(ys**2)

    _, gradient = loss(ps)
    assert gradient.layout == ps.layout
    direction = fl.ComponentVector(jnp.arange(1.0, 1.0 + ps.size), ps.layout)
    np.testing.assert_allclose(
        gradient @ direction, central_difference(lambda p: loss(p)[0], ps, direction), rtol=1e-7
    )
