"""Sums of a large vector's numbers with signs, by the matrix that takes them."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flatlayers.adjoints._sketch import SUMS, Sketch
from tests.helpers import assert_close


# A number of real numbers, and a tree that is made of them.
TREES = {
    "few": (7, lambda v: {"a": v[:6].reshape(2, 3), "b": v[6]}),
    "one row": (SUMS, lambda v: v),
    "not in rows": (41, lambda v: (v[:35].reshape(5, 7), v[35:])),
    "complex": (54, lambda v: [jax.lax.complex(v[:25], v[25:50]).reshape(5, 5), v[50:]]),
}


@pytest.mark.parametrize("name", TREES)
def test_each_number_is_in_one_sum_with_a_sign(name):
    """Thus an error in any of them shows, and of a few numbers the sketch is as large as they are."""
    count, tree = TREES[name]
    v = jnp.sin(jnp.arange(1.0, 1 + count))
    sketch = Sketch.of(tree(v), jnp.float64)
    matrix = np.asarray(jax.jacfwd(lambda v: sketch(tree(v)))(v))
    assert sketch.zeros().shape == (min(SUMS, count),)
    assert matrix.shape == (min(SUMS, count), count)
    assert_close(sketch(tree(v)), matrix @ v)
    assert set(np.unique(matrix)) == {-1.0, 0.0, 1.0}
    np.testing.assert_array_equal(np.abs(matrix).sum(0), 1)
    assert np.ptp(np.abs(matrix).sum(1)) <= 1


def test_neighbours_along_each_axis_are_in_different_sums():
    shape = (4, 8, 16)
    sketch = Sketch.of(jnp.zeros(shape), jnp.float64)
    matrix = jax.jacfwd(lambda v: sketch(v.reshape(shape)))(jnp.zeros(512))
    sums = np.abs(np.asarray(matrix)).argmax(0).reshape(shape)
    assert all((np.diff(sums, axis=axis) != 0).all() for axis in range(3))


def test_the_expected_square_of_its_size_is_that_of_the_tree():
    """Over all signs of four numbers that come into one sum."""
    places = SUMS * np.arange(4)
    v = jnp.zeros(4 * SUMS).at[places].set(jnp.array([0.3, -1.0, 2.0, 0.5]))
    squares = []
    for signs in itertools.product([-1, 1], repeat=4):
        every = jnp.ones(v.size, jnp.int8).at[places].set(jnp.array(signs, jnp.int8))
        squares.append(jnp.sum(Sketch([every], jnp.float64)(v) ** 2))
    assert len({round(float(square), 6) for square in squares}) > 4
    assert_close(np.mean(squares), jnp.sum(v**2))


def test_sums_of_half_precision_are_in_the_dtype_of_the_sketch():
    v = (1 + jnp.sin(jnp.arange(10_000.0)) / 3).astype(jnp.bfloat16)
    found, expected = Sketch.of(v, jnp.float32)(v), Sketch.of(v, jnp.float64)(v.astype(jnp.float64))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)
