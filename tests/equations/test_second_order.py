import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flatlayers as fl
from tests.solve.test_ode import TIGHT


class Spring(fl.Layer):
    """d2q/dt2 = -stiffness q, or t with time."""

    with_time: bool = False

    def parameters(self):
        return {"stiffness": fl.Param((), fl.initializers.constant(4.0))}

    def forward(self, x, ps, st):
        if self.with_time:
            t, state = x
            return t * jnp.ones_like(state[..., :1]), st
        return -ps.stiffness * x[..., : x.shape[-1] // 2], st


Q, V = np.array([[1.0, 0.5], [0.0, 2.0]]), np.array([[0.0, 1.0], [-1.0, 0.0]])


@pytest.mark.parametrize("batching", ["shared", "each"])
def test_a_spring(key, batching):
    times = np.array([0.5, 2.0])
    node = fl.SecondOrderNeuralODE(
        Spring(), t1=2.0, saveat=times, stepsize_controller=TIGHT, batching=batching
    )
    ps, st = fl.setup(key, node, float)
    assert ps.layout == Spring().layout
    (q, v), new = jax.jit(node)((Q, V), ps, st)
    c, s = (f(2 * times)[:, None, None] for f in (np.cos, np.sin))
    np.testing.assert_allclose(q, c * Q + s * V / 2, atol=1e-7)
    np.testing.assert_allclose(v, -2 * s * Q + c * V, atol=1e-7)
    assert jax.tree.map(jnp.shape, new) == jax.tree.map(jnp.shape, st)


def test_time_and_the_solution(key):
    node = fl.SecondOrderNeuralODE(Spring(with_time=True), t1=3.0, with_time=True)
    ps, st = fl.setup(key, node, float)
    solution, _ = jax.jit(node.solve)((jnp.ones(1), jnp.ones(1)), ps, st)
    np.testing.assert_allclose(solution.ys[0], 1 + 3.0 + 27 / 6, rtol=1e-4)
    np.testing.assert_allclose(solution.ys[1], 1 + 9 / 2, rtol=1e-4)


def test_wrong_inputs(key):
    node = fl.SecondOrderNeuralODE(Spring())
    ps, st = fl.setup(key, node, float)
    for x in (Q, (Q, V[0]), (Q, V, V), (1.0, 2.0)):
        with pytest.raises(ValueError, match=r"\(position, velocity\), arrays of the same shape .* found"):
            node(x, ps, st)
    wrong = fl.SecondOrderNeuralODE(fl.Dense(4, 4))
    with pytest.raises(ValueError, match=r"the acceleration, float64\[2,2\] .* found float64\[2,4\]") as info:
        wrong((Q, V), *fl.setup(key, wrong, float))
    assert "in the layer SecondOrderNeuralODE" in "".join(info.value.__notes__)
