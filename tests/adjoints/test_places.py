"""Places in buffers, against NumPy."""

import equinox.internal as eqxi
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flatlayers.adjoints import _diffrax, _places
from tests.helpers import assert_same


BUFFER = np.arange(24.0).reshape(4, 3, 2)


@pytest.mark.parametrize("place", [(0,), (3,), (2, 1), (3, 2), (jnp.array(3), 0), (1, jnp.array(2), 1)])
def test_what_is_set_is_got_and_all_else_stays(place):
    where = tuple(int(i) for i in place)
    assert_same(jax.jit(_diffrax.get_at)(jnp.asarray(BUFFER), *place), BUFFER[where])
    expected = BUFFER.copy()
    expected[where] = -1
    found = jax.jit(_diffrax.set_at)(jnp.asarray(BUFFER), -jnp.ones(BUFFER[where].shape), *place)
    assert_same(found, expected)


def test_places_are_not_counted_from_the_end():
    """No comparison with zero is made, and none with the length."""
    buffer, i = jnp.asarray(BUFFER), jnp.array(1)
    for f in (lambda i: _diffrax.get_at(buffer, i, 0), lambda i: _diffrax.set_at(buffer, jnp.ones(2), i, 0)):
        names = {eqn.primitive.name for eqn in jax.make_jaxpr(f)(i).jaxpr.eqns}
        assert not names & {"lt", "add", "select_n", "clamp", "min", "max"}


@pytest.mark.parametrize("is_mapped", [False, True])
def test_a_buffer_in_a_loop_is_written_and_read_in_place(is_mapped):
    """Row `i` is row `i - 1` and one: of samples that are done no row changes."""

    def fill(count):
        def body(carry):
            i, rows = carry
            return i + 1, _diffrax.set_at(rows, _diffrax.get_at(rows, i - 1) + 1, i)

        init = jnp.array(1), jnp.zeros((5, 2))
        loop = eqxi.while_loop(
            lambda carry: carry[0] < count, body, init, buffers=lambda carry: carry[1], kind="lax"
        )
        return loop[1][:, 0]

    counts = [2, 5, 1]
    found = jax.vmap(fill)(jnp.array(counts)) if is_mapped else [jax.jit(fill)(count) for count in counts]
    for rows, count in zip(found, counts, strict=True):
        assert_same(rows, np.where(np.arange(5) < count, np.arange(5.0), 0.0))


def test_quotients_are_those_of_whole_numbers():
    for a in range(20):
        for b in (1, 3, 7):
            a_, b_ = jnp.array(a), jnp.array(b)
            found = [f(a_, b) for f in (_places.quotient, _places.remainder, _places.rounded_up)]
            assert found == [a // b, a % b, -(-a // b)]
            assert found == [f(a_, b_) for f in (_places.quotient, _places.remainder, _places.rounded_up)]
    assert _places.quotient(jnp.array(7, jnp.int32), 2).dtype == jnp.int32
