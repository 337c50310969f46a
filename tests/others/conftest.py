"""Other libraries mix integers, floats and ranks by themselves: here JAX's own rules of promotion hold."""

import jax
import pytest


@pytest.fixture(autouse=True)
def _promotion_of_the_other_libraries():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
