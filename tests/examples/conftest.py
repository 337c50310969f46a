"""Examples run as a user runs them: next to each other, with x64 off and JAX's own promotion."""

import jax
import pytest

from tests.examples.scripts import EXAMPLES


@pytest.fixture(autouse=True)
def _next_to_each_other(monkeypatch):
    """Examples import each other, as they do when they are run."""
    monkeypatch.syspath_prepend(str(EXAMPLES))


@pytest.fixture(autouse=True)
def _as_a_user_has_it():
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
