"""Arithmetic on pytrees."""

import diffrax
import jax
import jax.numpy as jnp
import pytest

import flatlayers as fl
from tests.adjoints.helpers import ADJOINT


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
