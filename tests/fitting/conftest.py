"""What tests of fitting ask for by name."""

import jax
import pytest


@pytest.fixture
def mesh():
    return jax.make_mesh((8,), ("data",))


@pytest.fixture
def _standard():
    """Optimisers mix floats and integers."""
    with jax.numpy_dtype_promotion("standard"):
        yield
