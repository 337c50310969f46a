"""The linear solver of implicit gradients, against dense solves."""

import functools

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest

from flatlayers.equilibria._krylov import Accuracy, gmres


RNG = np.random.default_rng(7)


TIGHT = Accuracy(1e-14, 1e-10, 2000)


@functools.partial(jax.jit, static_argnames="accuracy")
def solve(matrix, b, accuracy=TIGHT):
    return gmres(lambda v: matrix @ v, b, accuracy)


@pytest.mark.parametrize("n", [1, 2, 21, 140])
def test_any_regular_matrix_of_moderate_size(n):
    """Also where short cycles stand still: a permutation, an indefinite matrix."""
    b = RNG.normal(size=n)
    for matrix in (
        np.eye(n) + RNG.normal(size=(n, n)) / np.sqrt(n),
        np.roll(np.eye(n), 1, axis=0),
        np.diag(np.where(np.arange(n) % 2, -1.0, 1.0) * np.linspace(1, 3, n)),
    ):
        x, accepted, _ = solve(matrix, b)
        assert accepted
        np.testing.assert_allclose(x, np.linalg.solve(matrix, b), rtol=1e-8, atol=1e-8 * np.abs(x).max())


@pytest.mark.long
@pytest.mark.parametrize("rate", [0.4, 0.9])
def test_an_easy_system_takes_fewer_products_than_with_lineax(rate):
    """Which restarts after 20 steps and confirms by another cycle."""
    n = 64
    matrix, b = RNG.normal(size=(n, n)), RNG.normal(size=n)
    regular = np.eye(n) - rate * matrix / abs(np.linalg.eigvals(matrix)).max()
    b /= abs(b).max()
    for dtype, aim, tolerance in ((np.float32, 2.4e-7, 1e-5), (np.float64, 1e-7, 1e-7)):
        system, right = jnp.asarray(regular, dtype), jnp.asarray(b, dtype)
        _, accepted, products = solve(system, right, Accuracy(aim, 1e-2, 1000))
        peer = lx.GMRES(tolerance, tolerance, restart=20)
        cycles = lx.linear_solve(lx.MatrixLinearOperator(system), right, peer).stats["num_steps"]
        assert accepted
        assert products <= 21 * (cycles - 1) + 1


@pytest.mark.parametrize("size", [1e-36, 1e-25, 1e30])
def test_a_right_hand_side_of_any_size(size):
    b = np.float32([1, -2, 0.5]) * np.float32(size)
    x, accepted, _ = solve(0.5 * np.eye(3, dtype=np.float32), b, Accuracy(1e-6, 1e-3, 100))
    assert accepted
    np.testing.assert_allclose(x, 2 * b, rtol=1e-5)


def test_nothing_to_solve():
    for b in (np.zeros(4), np.zeros(0)):
        x, accepted, _ = solve(np.eye(len(b)), b)
        assert accepted
        np.testing.assert_array_equal(x, b)


@pytest.mark.long
def test_no_solution_is_told():
    b = RNG.normal(size=30)
    singular = np.diag(np.arange(30.0))
    ring = np.eye(30) - np.roll(np.eye(30), 1, axis=0)
    for matrix in (singular, ring, np.zeros((30, 30)), np.full((30, 30), np.nan)):
        assert not solve(matrix, b)[1]
    assert not solve(np.eye(30), np.where(b > 0, np.nan, b))[1]
    slow = np.eye(3000) - 0.9999 * np.roll(np.eye(3000), 1, axis=0)
    _, accepted, products = solve(slow, RNG.normal(size=3000), Accuracy(1e-10, 1e-3, 300))
    assert not accepted
    assert products < 400


@pytest.mark.parametrize("bits", [7, 10])
@pytest.mark.parametrize("rate", [0.5, 0.99, 0.999])
def test_rounding_in_the_product_counts_by_the_error_of_the_solution(bits, rate):
    """A product with fewer bits than its dtype, as on tensor cores."""
    n, slack = 100, 1e-2
    ring = (np.roll(np.eye(n), 1, axis=0) + np.roll(np.eye(n), -1, axis=0)) / 2
    ring = np.asarray(jax.lax.reduce_precision(rate * ring, 11, bits))
    b = RNG.normal(size=n)

    def product(v):
        return v - jnp.asarray(ring) @ jax.lax.reduce_precision(v, 11, bits)

    x, accepted, _ = jax.jit(lambda b: gmres(product, b, Accuracy(1e-7, slack, 1000)))(b)
    exact = np.linalg.solve(np.eye(n) - ring, b)
    error = np.linalg.norm(x - exact) / np.linalg.norm(exact)
    assert error < 3 * slack or not accepted
    assert accepted or rate > 0.9


def test_a_batch_of_systems_is_solved_one_by_one():
    matrices = np.stack([np.eye(25) - rate * np.roll(np.eye(25), 1, axis=0) for rate in (0.1, 0.9, 1.0)])
    b = RNG.normal(size=(3, 25))
    each = jax.vmap(lambda a, b: gmres(lambda v: a @ v, b, Accuracy(1e-12, 1e-8, 500)))
    x, accepted, products = jax.jit(each)(matrices, b)
    assert accepted.tolist() == [True, True, False]
    np.testing.assert_allclose(x[:2], np.linalg.solve(matrices[:2], b[:2, :, None])[..., 0], rtol=1e-8)
    assert products[0] < products[1]
