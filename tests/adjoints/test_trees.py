"""Arithmetic on pytrees."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flatlayers as fl
from flatlayers.adjoints import _trees
from tests.adjoints.helpers import ADJOINT
from tests.helpers import assert_same


pytestmark = pytest.mark.long


def test_sums_have_half_precisions_in_float32():
    tree = {
        "half": [jnp.ones(2, jnp.bfloat16), jnp.ones((1, 3), jnp.float16)],
        "full": (jnp.ones(2, jnp.float32), jnp.ones((), jnp.float64), jnp.ones(1, jnp.complex64)),
        "none": None,
    }
    found = _trees.wide_zeros(tree)
    assert jax.tree.structure(found) == jax.tree.structure(tree)
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, tree)
    assert not any(x.any() for x in jax.tree.leaves(found))
    assert [x.dtype for x in found["half"]] == [jnp.float32, jnp.float32]
    assert [x.dtype for x in found["full"]] == [jnp.float32, jnp.float64, jnp.complex64]


def test_many_small_numbers_are_added_up():
    """In bfloat16 the sum of 0.01 stays at 4, from where on it is too small to change it."""
    x = {"a": jnp.full(3, 0.01, jnp.bfloat16), "b": None}

    @jax.jit
    def total(start):
        return jax.lax.fori_loop(0, 1000, lambda _, total: _trees.add_to(total, x), start)

    found = total(_trees.wide_zeros(x))["a"]
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, 1000 * np.asarray(x["a"], np.float64), rtol=1e-4)
    assert (total(_trees.zeros(x))["a"] == 4).all()
    back = _trees.cast_like({"a": found, "b": None}, x)["a"]
    assert back.dtype == jnp.bfloat16
    np.testing.assert_allclose(back.astype(float), found.astype(float), rtol=2.0**-8)


def test_a_cotangent_that_is_missing_is_zero():
    like = jnp.ones((2, 1), jnp.float32)
    assert_same(_trees.zero_if_none(like, None), np.zeros((2, 1), np.float32))
    assert _trees.zero_if_none(like, like) is like


def test_a_row_is_set_and_the_others_stay():
    tree = (jnp.array([1.0, 2.0]), {"flag": jnp.array(True), "none": None})
    buffers = _trees.rows_of(3, tree)
    assert_same(buffers, (np.zeros((3, 2)), np.zeros(3, bool)))
    buffers = _trees.set_row(buffers, 2, tree)
    buffers = jax.jit(_trees.set_row)(buffers, 0, jax.tree.map(lambda x: x + x, tree))
    assert_same(buffers, (np.array([[2.0, 4.0], [0.0, 0.0], [1.0, 2.0]]), np.array([True, False, True])))
    assert buffers[1]["none"] is None


def test_sums_are_leaf_by_leaf():
    a, b = {"x": jnp.array([1.0, 2.0]), "y": None}, {"x": jnp.array([0.5, -4.0]), "y": None}
    assert_same(_trees.add(a, b), {"x": np.array([1.5, -2.0]), "y": None})


@pytest.mark.parametrize(
    ("solver", "adjoint", "dtype"),
    [
        (diffrax.Euler(), ADJOINT, jnp.bfloat16),
        (diffrax.Euler(), ADJOINT, jnp.float16),
        (diffrax.ReversibleHeun(), ADJOINT, jnp.bfloat16),
        (diffrax.Euler(), fl.GaussAdjoint(), jnp.bfloat16),
        (diffrax.Heun(), ADJOINT, jnp.bfloat16),
    ],
    ids=["traced", "float16", "carried", "gauss", "explicit"],
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
