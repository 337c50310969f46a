"""Solves of more steps than there are slots for their states."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flatlayers as fl
from flatlayers.adjoints import _checkpoints
from tests.adjoints.helpers import ADJOINT, assert_equals_default
from tests.helpers import compiled_by_default


@pytest.mark.slow
def test_more_steps_than_are_kept():
    def solve(adjoint, y0, rate):
        return diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, rate: jnp.stack([y[1], -jnp.sin(rate * y[0])])),
            diffrax.Heun(),
            0.0,
            7.31,
            0.01,
            y0,
            rate,
            saveat=diffrax.SaveAt(ts=[0.005, 3.0, 7.3], t1=True),
            adjoint=adjoint,
        ).ys

    adjoints = (ADJOINT, fl.AdaptiveCheckpointAdjoint(every=3))
    assert_equals_default(solve, jnp.array([1.0, 0.0]), jnp.array(1.1), adjoints=adjoints)


@pytest.mark.slow
def test_every_number_of_steps(monkeypatch):
    """Euler's method for dy/dt = -rate y is (1 - rate h)^n y0."""
    monkeypatch.setattr(_checkpoints, "PLAIN", 4)
    counts, h = jnp.arange(1.0, 81.0), 0.01

    def end(y0, rate, count, adjoint):
        term = diffrax.ODETerm(lambda t, y, rate: -rate * y)
        t1 = count * h
        return diffrax.diffeqsolve(
            term, diffrax.Euler(), 0.0, t1, h, y0, rate, adjoint=adjoint, max_steps=80
        ).ys[0]

    y0, rate = 1.5, 0.7
    for every in (1, 3):
        adjoint = fl.AdaptiveCheckpointAdjoint(every=every)
        assert _checkpoints.thins(80, every)
        grad = jax.grad(lambda y0, rate, count, a=adjoint: end(y0, rate, count, a), (0, 1))
        by_y0, by_rate = jax.jit(jax.vmap(grad, (None, None, 0)))(y0, rate, counts)
        np.testing.assert_allclose(by_y0, (1 - rate * h) ** counts, rtol=1e-12)
        np.testing.assert_allclose(by_rate, -counts * h * (1 - rate * h) ** (counts - 1) * y0, rtol=1e-12)


def temporary(adjoint, max_steps, size=10_000):
    def end(y0, rate):
        return diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, rate: -rate * y**2),
            diffrax.Euler(),
            0.0,
            1.0,
            0.1,
            y0,
            rate,
            adjoint=adjoint,
            max_steps=max_steps,
        ).ys.sum()

    compiled = compiled_by_default(jax.jit(jax.grad(end)).lower(jnp.ones(size), jnp.array(0.3)))
    return compiled.memory_analysis().temp_size_in_bytes / (8 * size)


@pytest.mark.slow
def test_memory_in_states():
    few, more, default = (temporary(ADJOINT, steps) for steps in (20, 120, 4096))
    assert 0.9 < (more - few) / 100 < 1.1
    assert default < 160
    assert temporary(fl.AdaptiveCheckpointAdjoint(every=8), 4096) < default / 2
