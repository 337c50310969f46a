"""The statistics of a solve, which a layer keeps in its state under `stats`."""

import diffrax
import jax
import jax.numpy as jnp


COUNTS = ("num_steps", "num_accepted_steps", "num_rejected_steps")


def initial_statistics() -> dict[str, jax.Array]:
    """Return the statistics of no solve: zeros."""
    return {name: jnp.zeros((), jnp.int32) for name in (*COUNTS, "num_evaluations", "result")}


def statistics_of(solver: diffrax.AbstractSolver, solution: diffrax.Solution) -> dict[str, jax.Array]:
    """Return the counts of a solve, and the code of diffrax's `RESULTS` as an integer.

    Of a batch of solves they are the largest counts, and the worst code.
    """
    (code,) = jax.tree.leaves(solution.result)
    counts = {name: jnp.max(solution.stats[name], initial=0) for name in COUNTS}
    found = counts | {"num_evaluations": evaluations(solver, solution), "result": _worst(code)}
    return {name: jnp.asarray(value, jnp.int32) for name, value in found.items()}


def evaluations(solver: diffrax.AbstractSolver, solution: diffrax.Solution) -> jax.Array | int:
    """Return how often the steps of an explicit Runge-Kutta method evaluated the field; -1 for other methods.

    Diffrax does not count them: these are the stages of all steps, less a first one that is the last of the
    step before. The few evaluations that choose the first step, or start it again, are not counted.
    """
    if not isinstance(solver, diffrax.AbstractERK):
        return -1
    tableau = solver.tableau
    if not isinstance(tableau, diffrax.ButcherTableau):  # one for each of several terms
        return -1
    reused = int(tableau.fsal)
    return jnp.max(solution.stats["num_steps"], initial=0) * (tableau.num_stages - reused) + reused


def _worst(code: jax.Array) -> jax.Array:
    """Return the largest code of a failure, else that of an event, else that of success, which is 0."""
    (event,) = jax.tree.leaves(diffrax.RESULTS.event_occurred)
    failures = jnp.max(jnp.where(code == event, 0, code), initial=0)
    return jnp.where(failures > 0, failures, jnp.max(code, initial=0))
