import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flatlayers.core.counters import counts, from_number
from tests.helpers import assert_same


SIZE = 1000


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "uint64"])
@pytest.mark.parametrize(("start", "stop"), [(0, 10), (7, 200), (990, SIZE)])
def test_the_bits_are_those_of_the_whole(key, dtype, start, stop):
    whole = jax.random.bits(key, (10, SIZE // 10), dtype).ravel()
    assert_same(jax.random.bits(from_number(key, start), (stop - start,), dtype), whole[start:stop])


@pytest.mark.parametrize("draw", [jax.random.normal, jax.random.uniform, jax.random.laplace])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.float64])
def test_numbers_are_those_of_the_whole(key, draw, dtype):
    whole = draw(key, (SIZE,), dtype)
    assert_same(draw(from_number(key, 123), (456,), dtype), whole[123 : 123 + 456])
    assert_same(jax.jit(lambda key: draw(from_number(key, 123), (456,), dtype))(key), whole[123 : 123 + 456])


def test_keys_that_are_made_of_it_start_there_too(key):
    _, one = jax.random.split(from_number(key, 5))
    assert_same(jax.random.bits(one, (3,)), jax.random.bits(jax.random.split(key)[1], (8,))[5:])
    many = jax.random.split(from_number(key, 5), (2, 3))
    assert many.shape == (2, 3)
    assert_same(
        jax.random.bits(many[1, 2], (3,)), jax.random.bits(jax.random.split(key, (2, 3))[1, 2], (8,))[5:]
    )
    folded = jax.random.fold_in(from_number(key, 5), 7)
    assert_same(jax.random.bits(folded, (3,)), jax.random.bits(jax.random.fold_in(key, 7), (8,))[5:])


def test_a_start_beyond_32_bits():
    """The counter of a number is its 64-bit place: a draw that begins just below 2**32 goes on behind it."""
    key = jax.random.key(1)
    before, behind = from_number(key, 2**32 - 2), from_number(key, 2**32)
    assert_same(jax.random.bits(before, (5,))[2:], jax.random.bits(behind, (3,)))
    assert not np.array_equal(jax.random.bits(behind, (3,)), jax.random.bits(key, (3,)))


def test_generators_without_counters(key):
    assert counts(key)
    assert not counts(jax.random.key(0, impl="rbg"))
    with jax.threefry_partitionable(False):
        assert not counts(key)
