"""Training in two real processes, with two devices each, against the same training in one."""

import contextlib
import io
import os
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flatlayers as fl
from tests.parallel.processes import outcomes, run_processes


X = np.random.default_rng(0).normal(size=(96, 3))
Y = np.sin(X[:, :1]) + X[:, 1:2] * X[:, 2:]
OPTIMIZER = optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(1e-2, weight_decay=1e-3))
MODELS = {
    "alone": fl.Chain(fl.Dense(3, 9, jnp.tanh), fl.BatchNorm(9), fl.Dense(9, 1)),
    "per device": fl.Chain(fl.Dense(3, 9, jnp.tanh), fl.BatchNorm(9, axis_name="data"), fl.Dense(9, 1)),
}


def loss_of(model):
    def loss(ps, st, batch):
        x, y = batch
        found, st = model(x, ps, st)
        return jnp.mean((found - y) ** 2), (st, {"size": jnp.abs(found).mean()})

    return loss


def data(kind, part):
    """The data of this process, the part of so many with a number."""
    if kind == "batches":
        return fl.batches((X, Y), 32, key=jax.random.key(1))
    number, count = part
    every = [(x, y) for x, y in zip(X.reshape(3, 32, 3), Y.reshape(3, 32, 1), strict=True)]
    own = [tuple(np.split(leaf, count)[number] for leaf in batch) for batch in every]
    return own[0] if kind == "one" else own


def train(kind, mode, part=(0, 1), seed=0, steps=50, **options):
    with jax.numpy_dtype_promotion("standard"):
        model = MODELS["per device" if mode == "per device" else "alone"]
        ps, st = fl.setup(jax.random.key(seed), model, float)
        loss = loss_of(model)
        if mode != "alone":
            options |= {"mesh": jax.make_mesh((4,), ("data",)), "per_device": mode == "per device"}
        options = {"progress": False, "chunk": 20, **options}
        validate = (loss, (X[:32], Y[:32]), 20) if mode == "alone" else None
        if mode != "alone":
            number, count = part
            validate = (loss, tuple(np.split(leaf[:32], count)[number] for leaf in (X, Y)), 20)
        return fl.train_loop(
            *(loss, ps, st, OPTIMIZER, data(kind, part)), steps=steps, validate=validate, **options
        )


def numbers_of(result):
    return {
        "losses": result.losses,
        "ps": np.asarray(result.ps.data),
        "mu": np.asarray(result.opt_state[1][0].mu.data),
        "st": [np.asarray(x) for x in jax.tree.leaves(result.st)],
        "size": result.metrics["size"],
        "validation": result.validation.values,
        "best": np.asarray(result.best.ps.data),
    }


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        for a, b in zip(jax.tree.leaves(found[name]), jax.tree.leaves(expected[name]), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12 if name == "losses" else 1e-8, atol=1e-12)


KINDS = ["one", "list", "batches"]


def in_all_ways(folder):
    """Train in each way; save, and resume the last run. Return numbers and what is shown."""
    part, found = (jax.process_index(), 2), {}
    for mode in ("global", "per device"):
        for kind in KINDS:
            found[mode, kind] = numbers_of(train(kind, mode, part))
    path = f"{folder}/run.safetensors"
    shown = io.StringIO()
    with contextlib.redirect_stderr(shown):
        train("batches", "global", part, steps=20, save=path, save_every=10, progress=True)
    found["resumed"] = numbers_of(train("batches", "global", part, resume=path))
    ps = train("batches", "global", part, steps=20).ps
    # Each process can use the result by itself.
    own = float(MODELS["alone"](X[:4], ps, fl.testmode(train("one", "global", part, steps=1).st))[0].sum())
    return found, shown.getvalue(), own


@pytest.mark.slow
def test_two_processes_are_as_one(tmp_path):
    (first, shown, own), (second, nothing, other) = run_processes(in_all_ways, tmp_path)
    for mode, kind in [key for key in first if key != "resumed"]:
        expected = numbers_of(train(kind, "alone"))
        assert_equal(first[mode, kind], expected)
        assert_equal(second[mode, kind], first[mode, kind])
    assert_equal(first["resumed"], numbers_of(train("batches", "alone")))
    assert "20/20" in shown
    assert nothing == ""
    assert own == other
    # The file that two processes wrote is one that one goes on from.
    again = train("batches", "alone", resume=tmp_path / "run.safetensors")
    assert_equal(numbers_of(again), first["resumed"])


def from_other_seeds(folder):
    messages = []
    kinds = ("batches", "undivided", "uneven", "steps", "save_every")
    for seeds, kind in zip([(0, 1), *[(0, 0)] * 4], kinds, strict=True):
        try:
            if kind == "undivided":
                train("one", "global", (0, 32))
            elif kind == "uneven":
                train("one", "global", (0, 2 + 2 * jax.process_index()))
            elif kind == "steps":
                train("one", "global", (0, 2), steps=50 + jax.process_index())
            elif kind == "save_every":
                options = {"save": f"{folder}/run", "save_every": 10} if jax.process_index() else {}
                train("one", "global", (0, 2), **options)
            else:
                train(kind, "global", (jax.process_index(), 2), seed=seeds[jax.process_index()])
        except ValueError as error:
            messages.append(str(error))
    return messages


def stops_where_one_wants_to():
    number = jax.process_index()
    result = train("batches", "global", (number, 2), callback=lambda step, *_: number == 1 and step >= 20)
    return result.step, result.stopped


def both(folder):
    return from_other_seeds(folder), stops_where_one_wants_to()


@pytest.mark.slow
def test_other_seeds_raise_and_one_process_stops_all(tmp_path):
    for (seeds, undivided, uneven, steps, save_every), stopped in run_processes(both, tmp_path):
        assert "expected the same numbers in all processes" in seeds
        assert undivided.startswith("train_loop: expected a batch whose number of samples 2 devices of this")
        assert uneven.startswith("train_loop: expected batches of the same shape in all processes, found (")
        same = "train_loop: expected the same {} in all processes, found {} in process 0, {} in process 1"
        assert steps == same.format("steps", 50, 51)
        assert save_every == same.format("save_every", "none", 10)
        assert stopped == (20, "callback")


def until_the_other_is_killed(folder):
    number = jax.process_index()

    def callback(step, *_):
        if number == 1 and step >= 60:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.01)

    train(
        *("batches", "global", (number, 2)),
        steps=100_000,
        callback=callback,
        save=f"{folder}/run.safetensors",
        save_every=20,
    )


@pytest.mark.slow
def test_a_process_that_is_killed_ends_the_other(tmp_path):
    first, second = outcomes(until_the_other_is_killed, tmp_path, heartbeat=10, timeout=120)
    assert second.code == -signal.SIGKILL
    assert first.code not in (None, 0), first.output
    assert first.seconds < second.seconds + 60
    saved = fl.load(tmp_path / "run.safetensors")
    assert saved["step"] in (40, 60)
    expected = train("batches", "alone", steps=saved["step"])
    np.testing.assert_allclose(saved["losses"], expected.losses, rtol=1e-12)
    np.testing.assert_allclose(saved["ps"].data, expected.ps.data, rtol=1e-9)
