"""A ring of residuals, against lists."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flatlayers.adjoints._ring import Ring, merged
from tests.helpers import assert_same


SHAPES = [jax.ShapeDtypeStruct((2,), float), jax.ShapeDtypeStruct((), jnp.int32)]


def numbered(size, count, steps):
    """A ring after so many steps: in rows `step + stage / 10` and `step`."""
    ring = Ring.empty(size, count, SHAPES)
    for i in range(steps):
        for k in range(count):
            slot = i % size
            rows = [
                ring.residuals[0].at[slot, k].set(i + k / 10),
                ring.residuals[1].at[slot, k].set(i),
            ]
            ring = ring.replace(rows)
    return ring


def test_an_empty_ring():
    ring = Ring.empty(4, 3, SHAPES, {"y0": jnp.ones(5), "k": jnp.ones((3, 5))})
    assert_same(ring.residuals, [np.zeros((4, 3, 2)), np.zeros((4, 3), np.int32)])
    assert_same(ring.dense[2], {"y0": np.zeros(5), "k": np.zeros((3, 5))})
    assert len(ring.buffers()) == 4
    assert Ring.empty(4, 3, SHAPES).dense[0] is None


@pytest.mark.parametrize(("first", "number"), [(6, 2), (4, 2), (8, 2), (6, 3), (3, 6), (0, 6)])
def test_the_calls_of_a_block_are_all_stages_of_its_steps(first, number):
    ring = numbered(6, 2, 10)
    values, steps = jax.jit(Ring.calls, static_argnums=2)(ring, jnp.array(first), number, number)
    assert values.shape == (number * 2, 2)
    # All slots are read in their own order: of step `i` is slot `i % 6`.
    last = {i % 6: i for i in range(10)}
    slots = range(6) if number == 6 else [(first + j) % 6 for j in range(number)]
    assert steps.tolist() == [last[slot] for slot in slots for _ in range(2)]
    np.testing.assert_allclose(values[:, 0], [last[slot] + k / 10 for slot in slots for k in range(2)])


@pytest.mark.parametrize("done", [0, 1, 2, 3])
def test_what_the_last_attempt_left_is_zero(done):
    """It is in the slot of the step that it would have been, and in the first row of the next."""
    ring = numbered(6, 2, 9)
    is_broken = jnp.arange(6) >= 3 + done
    rows = [jnp.where(is_broken[:, None, None], jnp.nan, ring.residuals[0]), ring.residuals[1]]
    found = jax.jit(Ring.calls, static_argnums=2)(ring.replace(rows), jnp.array(9), 3, jnp.array(done))
    whole = Ring.calls(ring, 9, 3, 3)
    for x, expected in zip(found, whole, strict=True):
        assert_same(x[: 2 * done], expected[: 2 * done])
        assert not x[2 * done :].any()


def test_dense_output_is_of_the_last_step_in_its_slot():
    ring = Ring.empty(3, 1, [], {"y1": jnp.zeros(2)})
    for i in range(5):
        ring = ring.set_dense(jnp.array(i), {"y1": jnp.full(2, float(i))})
    assert [float(ring.dense[slot]["y1"][0]) for slot in range(3)] == [3, 4, 2]
    assert ring.set_dense(jnp.array(5), {"y1": jnp.ones(2)}).residuals == []


def test_two_axes_become_one():
    assert_same(merged(jnp.arange(24).reshape(2, 3, 4)), np.arange(24).reshape(6, 4))
