"""Keys whose random numbers start further on: some of the numbers of a large draw, without the others.

The bits of number `i` of a draw by JAX's default generator are those of the counter `i`, in row-major order.
So numbers that are drawn one by one from their bits can be drawn in parts.
"""

import math

import jax
import jax.extend.random
import jax.numpy as jnp

from ..types import Array, Key, Shape


def counts(key: Key) -> bool:
    """Tell whether the bits of each number of a draw come from a counter of its own."""
    by_counter: bool = jax.config.jax_threefry_partitionable  # pyright: ignore[reportAttributeAccessIssue]
    return by_counter and str(jax.random.key_impl(key)) == "threefry2x32"


def from_number(key: Key, start: int) -> Key:
    """Return a key that draws, in a shape `(n,)`, the numbers `start` to `start + n` of what `key` draws."""
    words = jnp.asarray([start >> 32, start & 0xFFFFFFFF], jnp.uint32)
    return jax.random.wrap_key_data(jnp.concatenate([jax.random.key_data(key), words]), impl=_COUNTING)


# The functions of a generator see the data of a key: its two words and the two of the start.


def _split(data: Array, shape: Shape) -> Array:
    parts = jax.random.key_data(jax.random.split(_plain(data), shape))
    return jnp.concatenate([parts, jnp.broadcast_to(data[2:], (*shape, 2))], -1)


def _fold_in(data: Array, number: int) -> Array:
    return jnp.concatenate([jax.random.key_data(jax.random.fold_in(_plain(data), number)), data[2:]])


def _seed(seed: Array) -> Array:
    key = jax.random.key(seed, impl="threefry2x32")
    return jnp.concatenate([jax.random.key_data(key), jnp.zeros(2, jnp.uint32)])


def _plain(data: Array) -> Key:
    return jax.random.wrap_key_data(data[:2], impl="threefry2x32")


def _random_bits(data: Array, bit_width: int, shape: Shape) -> Array:
    low = data[3] + jax.lax.iota(jnp.uint32, math.prod(shape)).reshape(shape)
    high = data[2] + (low < data[3]).astype(jnp.uint32)
    first, second = jax.extend.random.threefry2x32_p.bind(data[0], data[1], high, low)
    dtype = jnp.dtype(f"uint{bit_width}")
    if bit_width == 64:
        return (first.astype(dtype) << jnp.asarray(32, dtype)) | second.astype(dtype)
    return (first ^ second).astype(dtype)


_COUNTING = jax.extend.random.define_prng_impl(
    key_shape=(4,),
    seed=_seed,
    split=_split,
    random_bits=_random_bits,
    fold_in=_fold_in,
    name="threefry2x32_from",
    tag="from",
)
