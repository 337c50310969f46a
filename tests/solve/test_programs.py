"""The size of compiled programs: instructions of the HLO, which compile time follows."""

import itertools

import diffrax
import jax
import jax.numpy as jnp
import optax
import pytest

import flatlayers as fl


def instructions(adjoint, hidden, max_steps=4096):
    """Of the training step of a neural ODE, its arguments donated."""
    sizes = [2, *[8] * hidden, 2]
    layers = [fl.Dense(a, b, jnp.tanh) for a, b in itertools.pairwise(sizes)]
    node = fl.NeuralODE(fl.Chain(*layers), adjoint=adjoint, max_steps=max_steps)
    ps, st = fl.setup(jax.random.key(0), node, float)
    optimizer = optax.sgd(0.1)

    def step(ps, state, y0):
        gradient = jax.grad(lambda ps: (node(y0, ps, st)[0] ** 2).sum())(ps)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(ps, updates), state

    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(ps, optimizer.init(ps), jnp.ones(2))
    return lowered.compile().as_text().count(" = ")


@pytest.fixture(scope="module")
def by_default():
    return instructions(None, 2)


def test_a_training_step_is_small(by_default):
    """Measured 1810 with jax 0.10.2 on a CPU, half of what diffrax's default adjoint takes."""
    assert by_default < 2200
    assert by_default < 0.6 * instructions(diffrax.RecursiveCheckpointAdjoint(), 2)


def test_a_layer_more_adds_a_bounded_number(by_default):
    """Each has its part in the solve, in the step that is made again and in its vjp: measured 143."""
    assert instructions(None, 6) - by_default < 4 * 180
