"""What tests of the adjoints share: solves and their gradients, against diffrax's own adjoint."""

from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp

import flatlayers as fl
from tests.helpers import assert_close


DEFAULT = diffrax.RecursiveCheckpointAdjoint()

ADJOINT = fl.AdaptiveCheckpointAdjoint()

GAUSS = fl.GaussAdjoint()

PID = diffrax.PIDController(rtol=1e-6, atol=1e-8)


def sum_of_squares(tree):
    """A function with another weight for each number; what was not saved is infinite."""
    total = 0.0
    for leaf in jax.tree.leaves(eqx.filter(tree, eqx.is_inexact_array)):
        leaf = jnp.where(jnp.isfinite(leaf), leaf, 0).ravel()
        total = total + jnp.sum(jnp.cos(jnp.arange(leaf.size, dtype=leaf.dtype)) * leaf**2 + leaf)
    return total


def gradient(solve, adjoint, *inputs):
    """The value and the gradient with respect to all floating-point arrays in `inputs`."""

    @eqx.filter_jit
    @eqx.filter_value_and_grad
    def loss(inputs):
        return sum_of_squares(solve(adjoint, *inputs))

    return loss(inputs)


def assert_equals_default(solve, *inputs, adjoints=(ADJOINT,), rtol=1e-10):
    value, expected = gradient(solve, DEFAULT, *inputs)
    size = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
    assert 1e-3 < size < 1e6
    for adjoint in adjoints:
        same, found = gradient(solve, adjoint, *inputs)
        assert_close(same, value)
        assert_close(found, expected, rtol, rtol * size)


def field(t, y, args):
    """A field on a pytree; not all of its arguments are arrays."""
    rate, weight, name = args
    assert name == "name"
    u, v = y["u"], y["v"]
    return {"u": jnp.tanh(weight @ u) - rate * u + jnp.sin(t) * v, "v": -v * jnp.sum(u) * rate}


Y0 = {"u": jnp.array([1.0, -0.5, 0.3]), "v": jnp.array(0.7)}

ARGS = (jnp.array(0.4), jnp.array([[0.1, 1.0, -0.4], [-1.2, 0.3, 0.5], [0.2, -0.6, 0.9]]), "name")

WIDE = fl.Chain(fl.Dense(24, 40, jnp.tanh), fl.Dense(40, 24))


def flat_loss(adjoint):
    """A loss of the flat vector itself, as `args` of plain diffrax."""
    st = fl.initial_states(jax.random.key(0), WIDE)

    def loss(ps, y0):
        term = diffrax.ODETerm(lambda t, y, ps: WIDE(y, ps, st)[0])
        options = {"stepsize_controller": PID, "adjoint": adjoint, "max_steps": 64}
        saveat = diffrax.SaveAt(ts=[0.3, 1.0])
        ys = diffrax.diffeqsolve(term, diffrax.Tsit5(), 0.0, 1.0, None, y0, ps, saveat=saveat, **options).ys
        return jnp.sum(ys**2)

    return loss


def decay(t0=0.0, t1=1.0, dt0=0.1, rate=1.0, **options):
    term = diffrax.ODETerm(lambda t, y, rate: -rate * y)
    options = {"adjoint": ADJOINT, "solver": diffrax.Tsit5()} | options
    return diffrax.diffeqsolve(term, t0=t0, t1=t1, dt0=dt0, y0=jnp.array(1.0), args=rate, **options)


def pid(tolerance):
    return diffrax.PIDController(rtol=tolerance, atol=tolerance)


def solve(field, y0, args, t1=1.0, *, t0=0.0, solver=None, tolerance=1e-8, adjoint=GAUSS, **options) -> Any:
    return diffrax.diffeqsolve(
        diffrax.ODETerm(field),
        solver or diffrax.Tsit5(),
        t0,
        t1,
        options.pop("dt0", None),
        y0,
        args,
        stepsize_controller=options.pop("controller", pid(tolerance)),
        adjoint=adjoint,
        **options,
    )


def weighted(tree):
    """A function with another weight for each number."""
    leaves = [leaf.ravel() for leaf in jax.tree.leaves(tree)]
    return sum(jnp.sum(jnp.cos(jnp.arange(x.size, dtype=x.dtype)) * x**2 + x) for x in leaves)
