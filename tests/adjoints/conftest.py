"""What is recorded while a test of the adjoints runs."""

import pytest

from flatlayers.adjoints import _discrete


@pytest.fixture
def plans(monkeypatch):
    """A list of all plans of what to keep that are made, `None` for nothing."""
    found, of = [], _discrete.Plan.of

    def recorded(*arguments):
        found.append(of(*arguments))
        return found[-1]

    monkeypatch.setattr(_discrete.Plan, "of", recorded)
    return found
