"""Runs that are cut in two, saved and resumed: bit for bit the run without a break."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flatlayers as fl
from tests.helpers import assert_same


MODEL = fl.Chain(fl.Dense(2, 4, jnp.tanh), fl.BatchNorm(4), fl.Dropout(0.3), fl.Dense(4, 1))
X = np.random.default_rng(0).normal(size=(30, 2))
# One for all runs: those of equal programs compile them once.
OPTIMIZER = optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 0.1, 5, 20), weight_decay=0.01)


pytestmark = pytest.mark.usefixtures("_standard")


def loss(ps, st, x):
    y, st = MODEL(x, ps, st)
    value = jnp.mean((y[:, 0] - x[:, 0] * x[:, 1]) ** 2)
    return value, (st, {"largest": jnp.abs(y).max()})


def batches():
    return fl.batches(X, 7, key=jax.random.key(1))


def train(steps, data=None, opt=None, ps=None, st=None, **options):
    new = fl.setup(jax.random.key(0), MODEL, float)
    ps, st = (new[0] if ps is None else ps, new[1] if st is None else st)
    data = batches() if data is None else data
    options = {"chunk": 6, "progress": False, **options}
    return fl.train_loop(loss, ps, st, opt or OPTIMIZER, data, steps=steps, **options)


def same(a, b, losses=True):
    assert_same((a.ps, a.st, a.opt_state), (b.ps, b.st, b.opt_state))
    assert a.step == b.step
    if losses:
        np.testing.assert_array_equal(a.losses, b.losses)
        np.testing.assert_array_equal(a.metrics["largest"], b.metrics["largest"])


@pytest.mark.long
@pytest.mark.parametrize("chunk", [1, 3, 6, 100])
def test_ten_and_ten_are_twenty(tmp_path, chunk):
    whole = train(20)
    first = train(10, chunk=chunk)
    fl.save(tmp_path / "it", ps=first.ps, st=first.st, opt_state=first.opt_state, step=first.step)
    like = {"ps": first.ps, "st": first.st, "opt_state": OPTIMIZER.init(first.ps)}
    saved = fl.load(tmp_path / "it", **like)
    second = train(10, start=saved.pop("step"), **saved, chunk=chunk)
    same(second, whole, losses=False)
    np.testing.assert_array_equal(np.concatenate([first.losses, second.losses]), whole.losses)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["batches", "list", "iterator"])
def test_a_run_that_is_killed_and_run_again(tmp_path, kind):
    path = tmp_path / "run.safetensors"

    class Killed(BaseException):
        pass

    def killed(step, *_):
        if step > 10:
            raise Killed

    def data():
        every = [X[4 * i : 4 * i + 7] for i in range(5)]
        return {"batches": batches(), "list": every, "iterator": iter(every * 4)}[kind]

    def script(**options):
        validate = (loss, X, 4)
        return train(20, data=data(), validate=validate, **options)

    with pytest.raises(Killed):
        script(save=path, save_every=5, resume=path, callback=killed)
    assert fl.load(path)["step"] == 10
    resumed, whole = script(save=path, save_every=5, resume=path), script()
    same(resumed, whole)
    np.testing.assert_array_equal(resumed.validation.steps, whole.validation.steps)
    np.testing.assert_array_equal(resumed.validation.values, whole.validation.values)
    np.testing.assert_array_equal(resumed.validation.metrics["largest"], whole.validation.metrics["largest"])
    assert_same((resumed.best.ps, resumed.best.st), (whole.best.ps, whole.best.st))
    assert (resumed.best.step, resumed.best.value) == (whole.best.step, whole.best.value)
    # Nothing is left to do: it returns at once.
    at_once = script(resume=path, callback=killed)
    same(at_once, whole)
    same(script(resume=path), whole)


@pytest.mark.long
def test_the_end_is_saved_and_so_is_an_interrupted_run(tmp_path):
    path = tmp_path / "it"
    result = train(8, save=path)
    same(train(8, resume=path), result)

    def interrupt(step, *_):
        raise KeyboardInterrupt

    os.remove(path)
    with pytest.warns(UserWarning, match="interrupted after step 6 of 8"):
        train(8, save=path, callback=interrupt)
    assert fl.load(path)["step"] == 6
    same(train(8, resume=path), result)


@pytest.mark.long
def test_patience_goes_on_where_it_was(tmp_path):
    path = tmp_path / "it"
    rising = iter(range(100))

    def worse(ps, st, batch):
        return batch + 0.0 * ps.data[0], st

    class Data:
        def __iter__(self):
            return iter([np.asarray(float(next(rising)))])

    def script():
        return train(40, validate=(worse, Data(), 3), patience=4, save=path, resume=path)

    first = script()
    assert (first.step, first.stopped, first.best.step) == (15, "patience", 3)
    again = script()
    assert (again.step, again.stopped, again.best.step) == (15, "patience", 3)
    same(again, first)


@pytest.mark.long
def test_a_validation_that_an_interrupt_left_out_is_made_up_for(tmp_path):
    path = tmp_path / "it"

    class Interrupting:
        def __iter__(self):
            raise KeyboardInterrupt

    with pytest.warns(UserWarning, match="interrupted after step 6 of 12"):
        train(12, validate=(loss, Interrupting(), 6), save=path)
    assert fl.load(path)["validation"]["steps"].tolist() == []
    resumed, whole = (train(12, validate=(loss, X, 6), **more) for more in ({"resume": path}, {}))
    same(resumed, whole)
    np.testing.assert_array_equal(resumed.validation.values, whole.validation.values)
    assert resumed.best.step == whole.best.step


@pytest.mark.long
def test_another_file_is_written_though_nothing_is_left_to_do(tmp_path):
    result = train(6, save=tmp_path / "a")
    train(6, resume=tmp_path / "a", save=tmp_path / "b")
    assert_same(fl.load(tmp_path / "b")["ps"], result.ps)


@pytest.mark.long
def test_validations_stay_in_the_file_of_a_run_without_any(tmp_path):
    path = tmp_path / "it"
    first = train(6, validate=(loss, X, 3), save=path)
    train(12, save=path, resume=path)
    saved = fl.load(path)
    assert saved["validation"]["steps"].tolist() == [3, 6]
    assert saved["best"]["step"] == first.best.step


@pytest.mark.long
def test_a_run_of_other_metrics_is_not_gone_on_with(tmp_path):
    def without(ps, st, x):
        value, (st, _) = loss(ps, st, x)
        return value, st

    path = tmp_path / "it"
    train(6, save=path)
    ps, st = fl.setup(jax.random.key(0), MODEL, float)
    with pytest.raises(ValueError, match="the metrics largest of the run that is resumed, found no names"):
        fl.train_loop(without, ps, st, OPTIMIZER, batches(), steps=9, resume=path, progress=False)
    train(6, validate=(loss, X, 3), save=path)
    with pytest.raises(ValueError, match="expected the validation metrics largest of those before"):
        train(12, validate=(without, X, 3), resume=path)


def test_a_state_of_other_shapes_is_not_gone_on_with(tmp_path):
    def summed(ps, st, batch):
        return ps.a**2 + st.n.sum(), st

    def script(n, steps):
        ps = fl.ComponentVector.of({"a": 1.0}, dtype=float)
        return fl.train_loop(
            *(summed, ps, {"n": jnp.zeros(n)}, optax.sgd(0.1)),
            steps=steps,
            save=path,
            resume=path,
            progress=False,
        )

    path = tmp_path / "it"
    script(3, 2)
    with pytest.raises(ValueError, match=r"the state of this model after its first step.*n: .*5.*3"):
        script(5, 4)


def test_nothing_that_is_not_finite_is_saved(tmp_path):
    ps, path = fl.ComponentVector.of({"a": 1.0}, dtype=float), tmp_path / "it"
    with pytest.raises(fl.NonFiniteLossError, match="finite parameters|finite loss"):
        fl.train_loop(
            lambda ps, st, _: (jnp.where(ps.a < 0.95, jnp.nan, ps.a), st),
            *(ps, {}, optax.sgd(0.02)),
            steps=20,
            chunk=5,
            progress=False,
            save=path,
            save_every=1,
        )
    assert np.isfinite(fl.load(path)["ps"].a)
    assert fl.load(path)["step"] == 3


def test_a_state_that_changes_its_type_in_the_first_step(tmp_path):
    def counting(ps, st, batch):
        return ps.data.sum() ** 2, {"count": st.count + 0.5}

    def script(steps, **options):
        return fl.train_loop(
            counting, ps, {"count": 0}, optax.sgd(0.1), steps=steps, progress=False, chunk=2, **options
        )

    ps, path = fl.ComponentVector.of({"a": 1.0}, dtype=float), tmp_path / "it"
    script(5, save=path)
    assert_same(script(9, resume=path).st, script(9).st)


@pytest.mark.long
def test_what_cannot_be_resumed(tmp_path):
    path = tmp_path / "it"
    fl.save(path, ps=jnp.ones(3))
    with pytest.raises(ValueError, match="expected a file of train_loop to resume, found no "):
        train(3, resume=path)
    train(3, save=path)
    with pytest.raises(fl.LayoutMismatchError, match="opt_state"):
        train(3, resume=path, opt=optax.sgd(0.1))
    with pytest.raises(fl.LayoutMismatchError, match="ps"):
        fl.train_loop(loss, jnp.ones(3), {}, OPTIMIZER, steps=3, resume=path, progress=False)
    for options, message in (
        ({"resume": path, "start": 3}, "expected no start and no opt_state with resume"),
        ({"resume": path, "opt_state": 3}, "expected no start and no opt_state with resume"),
        ({"save_every": 3}, "expected save with save_every, found none"),
        ({"save": path, "save_every": 0}, "save_every: expected an integer of at least 1, found 0"),
        ({"patience": 3}, "expected validate with patience, found none"),
        ({"resume": path, "steps": 2}, "expected a file of at most 2 steps to resume, found one of 3"),
    ):
        with pytest.raises(ValueError, match=message):
            train(**{"steps": 3, **options})
    with pytest.raises(FileNotFoundError, match="expected a folder for the file to save, found none"):
        train(3, save=tmp_path / "none" / "it")


@pytest.mark.long
def test_the_state_of_another_optimiser():
    ps, _ = fl.setup(jax.random.key(0), MODEL, float)
    for opt_state in (optax.sgd(0.1).init(ps), optax.adam(0.1).init(ps.data), 3):
        with pytest.raises(ValueError, match="expected the opt_state of this optimiser and these parameters"):
            train(3, opt_state=opt_state)


SCRIPT = """
    import sys, time
    import jax, jax.numpy as jnp, numpy as np, optax
    import flatlayers as fl

    model = fl.Chain(fl.Dense(2, 4, jnp.tanh), fl.Dropout(0.3), fl.Dense(4, 1))
    x = np.random.default_rng(0).normal(size=(30, 2)).astype(np.float32)

    def loss(ps, st, x):
        y, st = model(x, ps, st)
        return jnp.mean((y[:, 0] - x[:, 0]) ** 2), st

    ps, st = fl.setup(jax.random.key(0), model)
    result = fl.train_loop(
        loss, ps, st, optax.adam(0.1), fl.batches(x, 5, key=jax.random.key(1)),
        steps=40, chunk=10, progress=False,
        callback=lambda step, *_: time.sleep(float(sys.argv[2])),
        save=sys.argv[1], save_every=10, resume=sys.argv[1],
    )
    print(result.step, result.losses.tobytes().hex(), np.asarray(result.ps.data).tobytes().hex())
"""


@pytest.mark.slow
def test_a_process_that_is_killed(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))

    def command(path, pause):
        return [sys.executable, str(script), str(tmp_path / path), str(pause)]

    root = os.path.dirname(os.path.dirname(fl.__file__))
    environment = {**os.environ, "PYTHONPATH": root}
    process = subprocess.Popen(command("a", 30), env=environment)
    while process.poll() is None and not (tmp_path / "a").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 0 < fl.describe_file(tmp_path / "a")["step"] < 40
    found = [
        subprocess.run(command(path, 0), env=environment, check=True, capture_output=True, text=True).stdout
        for path in ("a", "b")
    ]
    assert found[0] == found[1]
    assert found[0].startswith("40 ")
