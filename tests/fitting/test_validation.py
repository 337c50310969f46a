"""Validation in test mode, the best parameters and early stopping."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flatlayers as fl
from tests.helpers import assert_close


def falling(ps, st, batch):
    """Each step of `optax.sgd(1.0)` takes 1 from the parameter."""
    return ps.a, st


def distance(ps, st, batch):
    return (ps.a - batch) ** 2, (st, {"side": ps.a > batch})


def train(validate, steps=12, **options):
    ps = fl.ComponentVector.of({"a": 10.0}, dtype=float)
    options = {"chunk": 5, "progress": False, **options}
    return fl.train_loop(falling, ps, {"count": 0}, optax.sgd(1.0), steps=steps, validate=validate, **options)


def test_the_best_parameters_are_those_of_the_lowest_value():
    result = train((distance, 4.4, 2))
    assert result.validation.steps.tolist() == [2, 4, 6, 8, 10, 12]
    assert_close(result.validation.values, (10.0 - result.validation.steps - 4.4) ** 2)
    assert result.validation.metrics["side"].tolist() == [1, 1, 0, 0, 0, 0]
    best = result.best
    assert (best.step, float(best.ps.a)) == (6, 4.0)
    assert_close(best.value, 0.16)
    assert float(result.ps.a) == -2.0


def test_chunks_end_where_a_validation_is():
    steps = []
    train((distance, 4.0, 3), callback=lambda step, *_: steps.append(step))
    assert steps == [3, 6, 9, 12]
    steps.clear()
    train((distance, 4.0, 7), callback=lambda step, *_: steps.append(step))
    assert steps == [5, 7, 12]
    steps.clear()
    result = train((distance, 4.0, 7), start=5, callback=lambda step, *_: steps.append(step))
    assert steps == [7, 12, 14, 17]
    assert result.validation.steps.tolist() == [7, 14]


@pytest.mark.parametrize("kind", ["list", "batches", "loader"])
def test_the_mean_over_all_batches(kind):
    numbers = np.arange(6.0)

    class Loader:
        def __iter__(self):
            return iter(np.split(numbers, 3))

    data = {
        "list": np.split(numbers, 3),
        "batches": fl.batches(numbers, 2, shuffle=False),
        "loader": Loader(),
    }[kind]
    result = train((lambda ps, st, x: (((ps.a - x) ** 2).mean(), st), data, 6))
    assert_close(result.validation.values, np.array([np.mean((a - numbers) ** 2) for a in (4.0, -2.0)]))


@pytest.mark.long
def test_it_runs_in_test_mode_and_leaves_the_state_alone(key):
    model = fl.Chain(fl.Dropout(0.5), fl.BatchNorm(3))
    ps, st = fl.setup(key, model, float)
    x = np.random.default_rng(0).normal(size=(8, 3))
    modes = []

    def loss(ps, st, x):
        modes.append(st.layer_0.training)
        y, st = model(x, ps, st)
        return (y**2).mean(), st

    options = {"steps": 6, "chunk": 3, "progress": False}
    plain = fl.train_loop(loss, ps, st, optax.sgd(0.1), x, **options)
    modes.clear()
    result = fl.train_loop(loss, ps, st, optax.sgd(0.1), x, **options, validate=(loss, x, 3))
    assert False in modes
    np.testing.assert_array_equal(result.losses, plain.losses)
    assert result.st.layer_0.training
    assert result.best.st.layer_0.training
    y, _ = model(x, result.ps, fl.testmode(result.st))
    assert_close(result.validation.values[-1], (y**2).mean())


@pytest.mark.parametrize(("patience", "step"), [(1, 8), (2, 10), (3, 12), (9, 12)])
def test_early_stopping(patience, step):
    # The best is after 6 steps.
    result = train((distance, 4.0, 2), patience=patience)
    assert (result.step, result.best.step) == (step, 6)
    assert result.stopped == ("patience" if step < 12 or patience == 3 else "steps")


def test_validations_that_are_not_finite_are_never_the_best():
    def loss(ps, st, batch):
        return jnp.where(ps.a > 6, jnp.nan, ps.a), st

    result = train((loss, None, 2), steps=6)
    np.testing.assert_array_equal(result.validation.values, [np.nan, 6.0, 4.0])
    assert result.best.step == 6
    none = train((loss, None, 2), patience=1)
    assert (none.step, none.best, none.stopped) == (2, None, "patience")


def test_without_validation():
    result = train(None)
    assert result.validation is None
    assert result.best is None


def test_a_second_run_compiles_nothing():
    traced = []

    def loss(ps, st, batch):
        traced.append(None)
        return distance(ps, st, batch)

    train((loss, 4.0, 2))
    once = len(traced)
    train((loss, 4.0, 3))
    assert len(traced) == once == 1


def test_wrong_validation():
    with pytest.raises(TypeError, match=r"expected validate=\(loss, data, every\)"):
        train((distance, 4.0))
    with pytest.raises(TypeError, match="again and again, found an iterator, list_iterator; a list"):
        train((distance, iter([4.0]), 2))
    with pytest.raises(ValueError, match="every, the third of validate: expected an integer of at least 1"):
        train((distance, 4.0, 0))
    with pytest.raises(ValueError, match="at least one batch to validate with, found none") as info:
        train((distance, [], 2))
    assert info.value.result.step == 2
    with pytest.raises(TypeError, match="validation data to be arrays or batches, found 'text'"):
        train((distance, "text", 2))
    with pytest.raises(TypeError, match="validation batch of arrays, found 'text'"):
        train((distance, ["text"], 2))
    filled = fl.batches(jnp.arange(5.0), 2, shuffle=False, drop_last=False)
    with pytest.raises(ValueError, match="divides the 5 samples, or drop_last=True, found 2"):
        train((distance, filled, 2))


def test_a_metric_without_a_name_is_not_the_value():
    def named(ps, st, batch):
        value, st = distance(ps, st, batch)
        return value, (st, {"": 0.0 * value})

    np.testing.assert_array_equal(
        train((named, 4.4, 2)).validation.values, train((distance, 4.4, 2)).validation.values
    )
