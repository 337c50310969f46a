import sys
from types import SimpleNamespace

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flatlayers as fl


pd = pytest.importorskip("pandas")

TIMES = jnp.linspace(0.0, 2.0, 5)
Y0 = fl.ComponentVector.of({"prey": 4.0, "hunters": {"young": [1.0, 2.0], "old": 3.0}})
NAMES = ["prey", "hunters.young[0]", "hunters.young[1]", "hunters.old"]


def solve(y0, saveat=None, rate=0.5):
    term = diffrax.ODETerm(lambda t, y, args: jax.tree.map(lambda y: -args * y, y))
    return diffrax.diffeqsolve(
        term,
        diffrax.Tsit5(),
        0.0,
        2.0,
        0.1,
        y0,
        rate,
        saveat=saveat or diffrax.SaveAt(ts=TIMES),
        stepsize_controller=diffrax.PIDController(rtol=1e-9, atol=1e-9),
    )


def test_a_row_for_each_time_and_a_column_for_each_name():
    frame = fl.solution_frame(solve(Y0))
    assert list(frame.columns) == NAMES
    assert frame.index.name == "t"
    np.testing.assert_array_equal(frame.index, TIMES)
    expected = np.exp(-0.5 * np.asarray(TIMES))[:, None] * np.asarray(Y0)
    np.testing.assert_allclose(frame, expected, rtol=1e-6)
    np.testing.assert_allclose(frame.loc[1.0, "hunters.old"], 3 * np.exp(-0.5), rtol=1e-6)


def test_rows_that_no_step_filled_are_left_out():
    solution = solve(Y0, diffrax.SaveAt(t0=True, steps=True))
    frame = fl.solution_frame(solution)
    assert len(frame) == int(solution.stats["num_accepted_steps"]) + 1 < len(solution.ts)
    np.testing.assert_allclose(frame["prey"], 4 * np.exp(-0.5 * frame.index.to_numpy()), rtol=1e-6)


def decayed(y0, times, rates):
    """The solution of `dy/dt = -rate y` in closed form, as `jax.vmap` over rates gives it."""
    decay = jnp.exp(-jnp.tensordot(rates, times, 0))
    ys = jax.tree.map(lambda y: jnp.tensordot(decay, y, 0), y0)
    return SimpleNamespace(ts=jnp.broadcast_to(times, decay.shape), ys=ys)


@pytest.mark.long
def test_mappings_and_arrays_have_names_too():
    record = fl.Record(q=jnp.ones(2), inner={"p": jnp.array(3.0)})
    frame = fl.solution_frame(solve(record))
    assert list(frame.columns) == ["q[0]", "q[1]", "inner.p"]
    np.testing.assert_allclose(frame["inner.p"], 3 * np.exp(-0.5 * TIMES), rtol=1e-6)
    named = fl.solution_frame(decayed({"first": Y0, "second": 2 * Y0}, TIMES, 0.5))
    assert list(named.columns) == [f"{name}.{label}" for name in ("first", "second") for label in NAMES]
    np.testing.assert_allclose(named["second.prey"], 2 * named["first.prey"], rtol=1e-12)
    assert list(fl.solution_frame(decayed(jnp.ones(2), TIMES, 0.5)).columns) == ["y[0]", "y[1]"]
    assert list(fl.solution_frame(decayed(jnp.array(1.0), TIMES, 0.5)).columns) == ["y"]


def test_several_solutions_are_levels():
    rates = jnp.array([0.5, 1.0])
    solutions = decayed(Y0, TIMES, rates)
    frame = fl.solution_frame(solutions)
    assert frame.index.names == [None, "t"]
    np.testing.assert_allclose(frame.loc[(1, 2.0), "prey"], 4 * np.exp(-2.0), rtol=1e-6)
    named = fl.solution_frame(solutions, dims=("rate", "t"))
    np.testing.assert_allclose(named["prey"].unstack("rate"), solutions.ys.prey.T, rtol=1e-12)
    solutions.ts = solutions.ts.at[0, 3:].set(jnp.inf)
    assert list(fl.solution_frame(solutions, dims=("rate", "t")).groupby("rate").size()) == [3, 5]


@pytest.mark.slow
def test_solves_under_vmap():
    rates = jnp.array([0.5, 1.0])
    steps = jax.vmap(lambda rate: solve(Y0, diffrax.SaveAt(steps=True), rate))(rates)
    frame = fl.solution_frame(steps, dims=("rate", "t"))
    assert list(frame.groupby("rate").size()) == list(steps.stats["num_accepted_steps"])
    for i, rate in enumerate(rates):
        one = frame.loc[i]
        np.testing.assert_allclose(one["prey"], 4 * np.exp(-rate * one.index.to_numpy()), rtol=1e-6)


def test_a_batch_that_is_solved_as_one_system():
    batch = fl.ComponentVector(jnp.stack([Y0.data, 2 * Y0.data, 3 * Y0.data]), Y0.layout)
    frame = fl.solution_frame(decayed(batch, TIMES, 0.5), dims=("t", "sample"))
    assert len(frame) == 15
    third = frame.xs(2, level="sample")
    np.testing.assert_allclose(third["hunters.old"], 9 * np.exp(-0.5 * TIMES), rtol=1e-6)


@pytest.mark.parametrize(
    ("solution", "error", "message"),
    [
        (jnp.ones(3), TypeError, r"expected a solution with `ts` and `ys`, found float\d+\[3\]"),
        (SimpleNamespace(ts=None, ys=None), ValueError, "expected times and states, found None and None"),
        (SimpleNamespace(ts={"a": 1}, ys={}), ValueError, "expected times"),
        (
            SimpleNamespace(ts=jnp.ones(3), ys=Y0),
            ValueError,
            r"shape \(\*\(3,\), ...\), times first, found \(4,\)",
        ),
        (SimpleNamespace(ts=jnp.ones(3), ys=(jnp.ones(3), jnp.ones(3))), TypeError, "a mapping or an array"),
        (SimpleNamespace(ts=jnp.ones(3), ys=jnp.ones((4, 2))), ValueError, r"found \(4, 2\)"),
    ],
)
def test_errors(solution, error, message):
    with pytest.raises(error, match=message):
        fl.solution_frame(solution)


def test_without_pandas_it_is_named(monkeypatch):
    solution = solve(Y0)
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="solution_frame needs pandas"):
        fl.solution_frame(solution)
