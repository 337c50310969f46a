"""A solve that fails."""

import diffrax
import jax
import jax.numpy as jnp

import flatlayers as fl
from flatlayers.equations.failures import advice

from .values import DENSE, ONES, called


def _failed(layer, code):
    """Fail as a solve that ended with a code."""
    (code,) = jax.tree.leaves(code)
    return advice(layer, jnp.float64)(ONES, code, jnp.array(True))


def too_many_steps():
    return called(fl.NeuralODE(DENSE, max_steps=1, rtol=1e-9, atol=1e-9), ONES)


def too_many_constant_steps():
    return _failed(fl.NeuralSDE(DENSE, DENSE), diffrax.RESULTS.max_steps_reached)


def steps_that_become_too_small():
    smallest = diffrax.PIDController(rtol=1e-9, atol=1e-9, dtmin=1e-3, force_dtmin=False)
    square = fl.WrappedFunction(lambda y: 1e6 * y**2)
    return called(fl.NeuralODE(square, stepsize_controller=smallest), ONES)


def solution_that_is_not_finite():
    return _failed(fl.NeuralODE(DENSE), diffrax.RESULTS.nonfinite)
