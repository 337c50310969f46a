"""How many steps are kept: from bytes, edges included."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import pytest

import flatlayers as fl
from flatlayers.adjoints._discrete import Plan
from flatlayers.adjoints._explicit import ExplicitMethod, TracedStages
from flatlayers.adjoints._plan import BUDGET


def method_of(size, hidden, solver=None, term=None):
    """A perceptron without biases, whose stages leave `size + hidden` numbers."""
    weights = jnp.ones((hidden, size)), jnp.ones((size, hidden))
    term = term or diffrax.ODETerm(lambda t, y, w: w[1] @ jnp.tanh(w[0] @ y))
    t0, y0 = jnp.array(0.0), jnp.ones(size)
    stages = TracedStages.of(solver or diffrax.Tsit5(), term, weights, t0, y0)
    return ExplicitMethod(stages, stages_perturbed(stages), t0, y0)


def stages_perturbed(stages):
    """All of the weights, and nothing of the control."""
    nothing = jax.tree.map(lambda _: False, stages)
    return eqx.tree_at(lambda s: s.field.consts, nothing, [True] * len(stages.field.consts))


def plan_of(keep, *, size=3, hidden=5, solver=None, saveat=None, max_steps=4096):
    saveat = saveat or diffrax.SaveAt(t1=True)
    return Plan.of(method_of(size, hidden, solver), saveat, max_steps, keep)


# Bytes of a step of Tsit5, which has six stages and for dense output seven.
STEP = 6 * 8 * (3 + 5)
DENSE = 7 * 8 * (3 + 5) + (7 + 2) * 8 * 3


@pytest.mark.parametrize(
    ("total", "size", "block"), [(5, 3, 1), (7, 5, 1), (8, 4, 2), (16, 8, 4), (60, 30, 15)]
)
def test_a_number_of_bytes_is_that_of_the_steps_and_two_blocks(total, size, block):
    assert size + 2 * block == total
    assert plan_of(total * STEP) == Plan(size, block, 6, True, False)
    assert plan_of(total * STEP + STEP - 1) == Plan(size, block, 6, True, False)
    assert plan_of(total * STEP - 1) != Plan(size, block, 6, True, False)


@pytest.mark.parametrize("total", [96, 97, 1000, 10**6])
def test_blocks_are_whole_and_no_more_than_48_steps_are_kept(total):
    assert plan_of(total * STEP) == Plan(48, 24, 6, True, False)
    assert plan_of(95 * STEP) == Plan(46, 23, 6, True, False)


def test_dense_output_is_kept_where_something_is_interpolated_or_saved_by_steps():
    some = {"u": diffrax.SubSaveAt(t1=True), "v": diffrax.SubSaveAt(ts=[0.5])}
    for saveat in (
        *(diffrax.SaveAt(ts=[0.5]), diffrax.SaveAt(steps=True), diffrax.SaveAt(dense=True)),
        *(diffrax.SaveAt(steps=3), diffrax.SaveAt(subs=some)),
    ):
        assert plan_of(8 * DENSE, saveat=saveat) == Plan(4, 2, 7, True, True)
    for saveat in (diffrax.SaveAt(t0=True, t1=True), diffrax.SaveAt(t1=True, fn=lambda t, y, args: y)):
        assert plan_of(8 * STEP, saveat=saveat) == Plan(4, 2, 6, True, False)


def test_nothing_is_kept_with_no_bytes_or_too_few():
    assert plan_of(0) is None
    assert plan_of(4 * STEP) is None
    assert plan_of(0, max_steps=1) is None
    # All of a short solve, however short, and an attempt that is rejected after it.
    assert plan_of(10**9, max_steps=5) == Plan(7, 7, 6, True, False)


def test_auto_is_so_many_bytes():
    assert plan_of("auto") == plan_of(BUDGET) == Plan(48, 24, 6, True, False)
    assert plan_of("auto", max_steps=3) == Plan(5, 5, 6, True, False)


@pytest.mark.parametrize("hidden", [2_000, 5_000, 10_000, 20_000, 40_000])
def test_auto_keeps_eight_steps_or_none(hidden):
    """The larger a step the shorter a block, of four steps at least."""
    step = 6 * 8 * (3 + hidden)
    block = max(4, min(24, 5 * 2**19 // step))
    steps = BUDGET // step - 2 * block
    expected = Plan(min(steps, 48) // block * block, block, 6, True, False)
    found = plan_of("auto", hidden=hidden)
    assert found == (expected if steps >= 8 else None)
    assert (found is None) == (hidden >= 40_000)
    if found is not None:
        assert (found.size + 2 * found.block) * step <= BUDGET


def test_a_step_begins_with_the_end_of_the_last_if_that_is_its_last_stage():
    assert plan_of("auto").is_chained
    assert not plan_of("auto", solver=diffrax.Heun()).is_chained


def test_stages_are_counted_by_the_method():
    for solver, plain, dense in ((diffrax.Heun(), 2, 2), (diffrax.Bosh3(), 3, 4), (diffrax.Dopri8(), 13, 14)):
        assert plan_of("auto", solver=solver).count == plain
        assert plan_of("auto", solver=solver, saveat=diffrax.SaveAt(ts=[0.5])).count == dense


@pytest.mark.parametrize("keep", [-1, 1.5, True, None, "all"])
def test_other_values_are_refused(keep):
    with pytest.raises(ValueError, match="expected `keep` to be 'auto' or a number of bytes, found"):
        fl.AdaptiveCheckpointAdjoint(keep=keep)
