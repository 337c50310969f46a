import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flatlayers as fl
from tests.equilibria.test_deq import TIGHT, assert_slopes, mixed, problem


@pytest.mark.long
def test_several_scales():
    """`z_0 = tanh(W z_0 + x) + C z_1 / 2` and `z_1 = tanh(z_1 / 2) / 2 + D tanh(...)`, as one equation."""
    first = fl.Parallel(mixed, fl.Dense(4, 4), fl.Dense(3, 4))
    couplings = [[fl.NoOpLayer(), fl.Dense(2, 4)], [fl.Dense(4, 2), lambda y: 0.5 * y]]
    layer = fl.MultiScaleDeepEquilibriumNetwork(
        [first, lambda z: jnp.tanh(0.5 * z)], couplings, [jnp.tanh, fl.Dense(2, 2)], TIGHT, [4, (2,)]
    )
    ps, st, x = problem(layer)

    def loss(ps, x):
        zs, new = layer(x, ps, st)
        return sum(jnp.sum(z**2) for z in zs), (zs, new)

    compiled = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
    (_, ((a, b), new)), gradient = compiled(ps, x)
    assert new.stats.result == 0

    def dense(z, p):
        return z @ p.weight.T + p.bias[None]

    y = mixed(dense(a, ps.branches.layer_0.layer_0), dense(x, ps.branches.layer_0.layer_1))
    other = jnp.tanh(0.5 * b)
    np.testing.assert_allclose(a, jnp.tanh(y + dense(other, ps.couplings.layer_0.layer_1)), atol=1e-10)
    terms = dense(y, ps.couplings.layer_1.layer_0) + 0.5 * other
    np.testing.assert_allclose(b, dense(terms, ps.fusion.layer_1), atol=1e-10)
    assert_slopes(lambda ps, x: compiled(ps, x)[0][0], gradient, ps, x)
    joined = fl.MultiScaleDeepEquilibriumNetwork(
        [first, fl.Parallel(jnp.add, lambda z: 0.1 * z, fl.Dense(1, 2))],
        couplings,
        lambda *terms: 0.5 * sum(terms),
        TIGHT,
        [4, 2],
        fixed_depth=2,
    )
    ps, st, x = problem(joined, x=(jnp.ones((5, 3)), jnp.ones((5, 1))))
    assert jax.tree.map(jnp.shape, jax.eval_shape(joined, x, ps, st)[0]) == ((5, 4), (5, 2))
    with pytest.raises(ValueError, match=r"couplings\[1\] to have 2 parts, one for each scale, found 1"):
        fl.MultiScaleDeepEquilibriumNetwork([jnp.tanh] * 2, [[jnp.tanh] * 2, [jnp.tanh]], None, TIGHT, [4, 2])


class Counted(fl.Layer):
    """The identity, which counts its calls."""

    def states(self, key):
        return {"count": 0}

    def forward(self, z, ps, st):
        return 0.5 * z, st.replace(count=st.count + 1)


def test_the_state_is_that_of_one_evaluation():
    """Only the parts that have a state are in it; it has the names of the fields."""
    couplings = [[fl.NoOpLayer(), lambda y: 0.1 * y], [lambda y: 0.1 * y, fl.NoOpLayer()]]
    layer = fl.MultiScaleDeepEquilibriumNetwork(
        [lambda zx: 0.5 * zx[0] + zx[1], Counted()], couplings, None, TIGHT, [3, 3], jacobian_regularization=2
    )
    ps, st, x = problem(layer)
    assert list(st) == ["branches", "key", "stats"]
    (a, b), new = jax.jit(layer)(x, ps, st)
    assert new.branches.layer_1.count == 1
    assert new.stats.result == 0 < new.stats.num_steps
    assert jax.tree.structure(new) == jax.tree.structure(st)
    y, other = 0.5 * a + x, 0.5 * b
    np.testing.assert_allclose(a, y + 0.1 * other, atol=1e-10)
    np.testing.assert_allclose(b, 0.1 * y + other, atol=1e-10)


def test_an_output_of_another_shape_is_named_without_an_option_of_other_layers():
    def wider(zx):
        return jnp.concatenate(zx)

    layer = fl.MultiScaleDeepEquilibriumNetwork([wider], [[jnp.tanh]], None, TIGHT, [2])
    with pytest.raises(ValueError, match=r"like z, \(float64\[2\]\), found \(float64\[4\]\)\n"):
        layer(jnp.ones(2), *fl.setup(jax.random.key(0), layer, float))


def test_bad_scales_are_named():
    for scales, match in (([0], "found .0."), ([2.5], "found .2.5."), ([(3, -1)], "-1")):
        with pytest.raises(ValueError, match=f"MultiScaleDeepEquilibriumNetwork.scales: .*{match}"):
            fl.MultiScaleDeepEquilibriumNetwork([jnp.tanh], [[jnp.tanh]], None, TIGHT, scales)
    assert fl.MultiScaleDeepEquilibriumNetwork(
        [jnp.tanh], [[jnp.tanh]], None, TIGHT, [np.int64(2)], max_steps=np.int64(9)
    ).scales == ((2,),)
