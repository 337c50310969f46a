"""Adjoints against each other: time, memory, accuracy, and how they grow."""

import dataclasses
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from timing import Program, Result, program, race
from training import Problem, flat_loss, gradient

import flatlayers as fl


ADJOINTS: dict[str, diffrax.AbstractAdjoint] = {
    "diffrax default": diffrax.RecursiveCheckpointAdjoint(),
    "AdaptiveCheckpoint": fl.AdaptiveCheckpointAdjoint(),
    "Gauss": fl.GaussAdjoint(),
    "Backsolve": diffrax.BacksolveAdjoint(),
}


STATES_ONLY = fl.AdaptiveCheckpointAdjoint(keep=0)


def adjoints(problem: Problem, **options: Any) -> Result:
    """The time of the gradient."""
    return race(
        {name: gradient(problem, flat_loss, adjoint=adjoint) for name, adjoint in ADJOINTS.items()}, **options
    )


KEEPING: dict[str, diffrax.AbstractAdjoint] = {
    "diffrax default": diffrax.RecursiveCheckpointAdjoint(),
    "nothing": STATES_ONLY,
    "4 MiB": fl.AdaptiveCheckpointAdjoint(keep=2**22),
    "auto": fl.AdaptiveCheckpointAdjoint(),
    "64 MiB": fl.AdaptiveCheckpointAdjoint(keep=2**26),
}


def keeping(problem: Problem, **options: Any) -> Result:
    """The time of the gradient with so many bytes for residuals."""
    made = {name: gradient(problem, flat_loss, adjoint=adjoint) for name, adjoint in KEEPING.items()}
    return race(made, **options)


def memory(problem: Problem) -> dict[str, Program]:
    """What their programs take, for a solve that may take as many steps as it does."""
    steps = problem.counts()[1]
    problem = dataclasses.replace(problem, max_steps=steps + 2)
    return {
        name: program(gradient(problem, flat_loss, adjoint=adjoint)) for name, adjoint in ADJOINTS.items()
    }


def errors(problem: Problem) -> dict[str, float]:
    """Errors in float64, relative to the largest number of the gradient.

    That of `AdaptiveCheckpoint` is against the default, as its gradient is that of the numerical solution
    too; those of the others, and the default's, against the gradient at a hundredth of the tolerance.
    """

    def value(problem: Problem, adjoint: diffrax.AbstractAdjoint) -> np.ndarray:
        with jax.enable_x64(True):
            node, ps, st = problem.layer(adjoint=adjoint)
            ps, y0 = fl.cast(ps, jnp.float64), problem.start().astype(jnp.float64)
            gradient = jax.jit(jax.grad(lambda ps, y0: jnp.mean(node(y0, ps, st)[0] ** 2)))
            return np.asarray(gradient(ps, y0).data)

    default = ADJOINTS["diffrax default"]
    found = {name: value(problem, adjoint) for name, adjoint in ADJOINTS.items()}
    exact = value(dataclasses.replace(problem, tolerance=problem.tolerance / 100), default)
    references = dict.fromkeys(found, exact) | {"AdaptiveCheckpoint": found["diffrax default"]}
    scale = np.abs(exact).max()
    return {name: float(np.abs(found[name] - references[name]).max() / scale) for name in found}


def slope(xs: Any, ys: Any) -> float:
    """Of the line through the logarithms."""
    return float(np.polyfit(np.log(xs), np.log(ys), 1)[0])
