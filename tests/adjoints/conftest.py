"""What is recorded while a test of the adjoints runs."""

import pytest

import flatlayers as fl
from flatlayers.adjoints import _discrete, _plan


@pytest.fixture
def plans(monkeypatch):
    """A list of all plans of what to keep that are made, `None` for nothing."""
    found, of = [], _discrete.Plan.of

    def recorded(*arguments):
        found.append(of(*arguments))
        return found[-1]

    monkeypatch.setattr(_discrete.Plan, "of", recorded)
    return found


@pytest.fixture
def four(plans, monkeypatch):
    """An adjoint that keeps four steps of any solve that it is first used for in this test."""
    monkeypatch.setattr(_plan, "MOST", 4)
    yield fl.AdaptiveCheckpointAdjoint()
    assert {plan.size for plan in plans} == {4}
