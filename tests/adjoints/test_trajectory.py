"""The solution of a forward solve, segment by segment."""

import diffrax
import jax
import jax.numpy as jnp
import pytest

from flatlayers.adjoints import _diffrax
from flatlayers.adjoints._diffrax import LoopState
from flatlayers.adjoints._trajectory import SampledSolver, Trajectory
from tests.adjoints.helpers import DEFAULT, solve
from tests.helpers import assert_close


def lotka_volterra(t, u, p):
    return jnp.stack([p[0] * u[0] - p[1] * u[0] * u[1] * t, -p[2] * u[1] + t * p[3] * u[0] * u[1]])


@pytest.mark.slow
@pytest.mark.parametrize("solver", [diffrax.Dopri8(), diffrax.Heun()])
def test_the_trajectory_is_the_dense_output(solver):
    """Each segment, solved again, against `SaveAt(dense=True)`."""
    u0, p, t1, steps = jnp.ones(2), jnp.ones(4), 1.7, 200
    ts = jnp.stack([jnp.linspace(a, b, 40) for a, b in [(0.0, 0.64), (0.64, 1.28), (1.28, t1)]])

    class Look(diffrax.AbstractAdjoint):
        """Solve with a trajectory, and give out what it has at `ts`."""

        def loop(self, *, args, terms, solver, saveat, init_state, event, **options):
            for name in ("passed_solver_state", "passed_controller_state", "throw"):
                del options[name]
            traced = _diffrax.TracedSolver.of(solver, terms, args, init_state)
            sampled = SampledSolver.of(traced, solver.order(terms))
            inner = jax.tree.map(jnp.asarray, LoopState.of(init_state).solver_state)
            state = _diffrax.replace_state(
                init_state, solver_state=sampled.initial_state(inner, init_state.y)
            )
            trajectory = Trajectory.empty(LoopState.of(state), steps)
            options = _diffrax.LoopOptions(**options)
            final, _, trajectory = _diffrax.run(sampled, saveat, state, options, trajectory)
            trajectory = trajectory.finished(LoopState.of(final))
            found = []
            for k in range(3):
                segment = trajectory.with_segment(jnp.array(k), sampled, k != 2)
                found.append(jax.vmap(segment.path(k, sampled.points).evaluate)(ts[k]))
            return _diffrax.replace_state(final, solver_state=inner), {"found": jnp.stack(found)}

    def run(adjoint, saveat):
        term, options = diffrax.ODETerm(lotka_volterra), {"adjoint": adjoint, "saveat": saveat}
        return diffrax.diffeqsolve(term, solver, 0.0, t1, 0.01, u0, p, max_steps=steps, **options)

    dense = run(DEFAULT, diffrax.SaveAt(t1=True, dense=True))
    found = run(Look(), diffrax.SaveAt(t1=True)).stats["found"]
    assert_close(found, jax.vmap(jax.vmap(dense.evaluate))(ts), 1e-12)


@pytest.mark.slow
def test_lotka_volterra_with_more_steps_than_are_kept():
    def loss(u0, p):
        saveat = diffrax.SaveAt(ts=jnp.arange(0, 10.25, 0.5))
        solution = solve(lotka_volterra, u0, p, 10.0, tolerance=1e-10, saveat=saveat)
        return 0.5 * jnp.sum((2 - solution.ys) ** 2), solution.stats["num_accepted_steps"]

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
    (du0, dp), steps = gradient(jnp.ones(2), jnp.array([1.5, 1.0, 3.0, 1.0]))
    assert steps > 5 * 64
    assert_close(du0, jnp.array([0.211965670, -17.191005071]), 1e-8, 3e-8)
    assert_close(dp, jnp.array([13.156719527, -16.810514044, 7.702708131, -25.639475860]), 1e-8, 3e-8)
