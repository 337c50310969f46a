import os

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from .processes import outcomes, run_processes


def places_and_sum():
    """Where this process is, and the sum of 0 to 3, one number on each device."""
    assert jax.config.jax_enable_x64
    mesh = jax.make_mesh((4,), ("data",))
    numbers = jax.make_array_from_callback(
        (4,), NamedSharding(mesh, PartitionSpec("data")), lambda index: jnp.arange(4.0)[index]
    )
    total = jax.jit(jnp.sum, out_shardings=NamedSharding(mesh, PartitionSpec()))(numbers)
    return jax.process_index(), jax.device_count(), jax.local_device_count(), float(total)


def fail_in_the_second():
    if jax.process_index() == 1:
        raise ValueError("no luck here")


def end_at_once():
    if jax.process_index() == 1:
        os._exit(7)


@pytest.mark.long
def test_processes_see_each_other():
    assert run_processes(places_and_sum) == [(0, 4, 2, 6.0), (1, 4, 2, 6.0)]


@pytest.mark.long
def test_an_error_in_one_of_them_is_shown():
    with pytest.raises(AssertionError, match="no luck here"):
        run_processes(fail_in_the_second)


def test_the_exit_code_is_told():
    first, second = outcomes(end_at_once, patience=0)
    assert (first.code, second.code) == (None, 7)
