"""What tests of kept residuals share: a small network with all that a field can have, and its solves."""

import diffrax
import jax
import jax.numpy as jnp

import flatlayers as fl
from tests.adjoints.helpers import DEFAULT, sum_of_squares


WEIGHTS = {
    "W1": jnp.array([[0.3, -1.0], [0.8, 0.4], [-0.5, 1.2]]),
    "b1": jnp.array([0.1, -0.2, 0.3]),
    "W2": jnp.array([[1.0, -0.4, 0.3], [0.2, 0.9, -0.7]]),
    "b2": jnp.array([0.05, -0.1]),
    "c": jnp.array(0.7),
}

START = jnp.array([0.3, -0.2])


def network(t, y, p):
    """Products with and without more than a bias to be added, and a weight used by itself."""
    hidden = jnp.tanh(p["W1"] @ y + p["b1"] + p["c"] * jnp.sin(3 * t))
    return p["W2"] @ hidden + p["b2"]


def written_out(solver, field, y0, p, h, steps):
    """All states of a solve, `(steps + 1, n)`: the method from its tableau, stage by stage."""
    tableau = solver.tableau

    def step(y, n):
        ks = []
        for row, c in zip([[], *tableau.a_lower], [tableau.c1, *tableau.c], strict=True):
            inside = sum((a * k for a, k in zip(map(float, row), ks, strict=True)), start=y)
            ks.append(h * field((n + float(c)) * h, inside, p))
        y1 = sum((b * k for b, k in zip(map(float, tableau.b_sol), ks, strict=True)), start=y)
        return y1, y1

    return jnp.concatenate([y0[None], jax.lax.scan(step, y0, jnp.arange(float(steps)))[1]])


def network_solve(adjoint, y0, p, *, solver=None, field=network, t1=1.5, dt0=0.1, **options):
    """Solve with a function of its own, so that no program is taken for that of another plan."""
    term = diffrax.ODETerm(lambda t, y, p: field(t, y, p))
    return diffrax.diffeqsolve(
        term, solver or diffrax.Tsit5(), 0.0, t1, dt0, y0, p, adjoint=adjoint, **options
    )


def outcome(solution):
    """The saved values, and the dense output where there is one."""
    times = jnp.array([0.31, 0.77, 1.49])
    dense = None if solution.interpolation is None else jax.vmap(solution.evaluate)(times)
    return solution.ys, dense


def gradients(adjoint, *inputs, of=network_solve, **options):
    """The gradients with respect to all inputs, and the statistics."""

    def loss(inputs):
        solution = of(adjoint, *inputs, **options)
        return sum_of_squares(outcome(solution)), solution.stats

    return jax.jit(jax.grad(loss, has_aux=True))(inputs)


def assert_equal_gradients(found, expected, rtol=1e-12):
    """To `rtol` of the norm of each array; the least norm is one that says something."""
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        assert jnp.linalg.norm(b) > 1e-6
        assert jnp.linalg.norm(a - b) <= rtol * jnp.linalg.norm(b)


def assert_equal_to_default(adjoints, *inputs, rtol=1e-12, **options):
    """Compare gradients with those of diffrax's default; return the statistics."""
    expected, stats = gradients(DEFAULT, *inputs, **options)
    for adjoint in adjoints:
        assert_equal_gradients(gradients(adjoint, *inputs, **options)[0], expected, rtol)
    return stats


def keeping(steps, solver, is_dense=False):
    """An adjoint that keeps so many steps of `network`: an even number, or one that is 5 at most.

    Besides its bytes are counted those of two blocks, of half as many steps or of one. A stage leaves its two
    factors and the sine; a method without FSAL the length of the step as well.
    """
    tableau = solver.tableau
    stage = 8 * (2 + 3 + 1 + (not tableau.fsal))
    stages = tableau.num_stages - (tableau.fsal and not is_dense)
    dense = 8 * 2 * (tableau.num_stages + 2) if is_dense else 0
    total = steps + 2 if steps <= 5 else 2 * steps
    return fl.AdaptiveCheckpointAdjoint(keep=total * (stages * stage + dense))
