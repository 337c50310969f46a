"""Training in two processes against one, and the death of a process."""

import functools
import os
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import flatlayers as fl

from .processes import outcomes, run_processes


pytestmark = pytest.mark.long


X = np.random.default_rng(0).normal(size=(24, 3))
Y = np.sin(X[:, :2])
MODEL = fl.Chain(fl.Dense(3, 16, jnp.tanh), fl.BatchNorm(16, axis_name="data"), fl.Dense(16, 2))
OPTIMIZER = optax.chain(optax.clip_by_global_norm(0.05), optax.adamw(1e-2))


def loss(ps, st, batch):
    out, st = MODEL(batch[0], ps, st)
    return jnp.mean((out - batch[1]) ** 2), st


def the_run(seed=0):
    """The vector, the states and one step of it, on all devices there are."""
    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    value_and_grad = fl.sharded_value_and_grad(loss, mesh)

    @functools.partial(jax.jit, donate_argnums=(0, 2))
    def step(ps, st, state, batch):
        (value, st), gradient = value_and_grad(ps, st, batch)
        updates, state = OPTIMIZER.update(gradient, state, ps)
        return value, optax.apply_updates(ps, updates), st, state

    ps, st = fl.setup(jax.random.key(seed), MODEL, jnp.float64)
    ps = fl.shard(ps, mesh)
    placed = NamedSharding(ps.mesh, PartitionSpec("data"))
    count, mine = len(X) // jax.process_count(), jax.process_index()
    # Each process has its part of the samples alone.
    own = slice(mine * count, (mine + 1) * count)
    batch = tuple(jax.make_array_from_process_local_data(placed, x[own]) for x in (X, Y))
    return ps, st, fl.optimizer_state(OPTIMIZER, ps), batch, step


@jax.numpy_dtype_promotion("standard")  # as optax needs it
def losses_of_fifty_steps(folder):
    ps, st, state, batch, step = the_run()
    values = []
    for number in range(50):
        if number == 25:
            # To a file and back, which is as if nothing had been.
            fl.save(folder / "run", ps=ps, st=st, state=state)
            again = fl.load(folder / "run", ps=ps, st=st, state=state)
            assert jax.tree.structure(again["state"]) == jax.tree.structure(state)
            ps, st, state = again["ps"], again["st"], again["state"]
        value, ps, st, state = step(ps, st, state, batch)
        values.append(float(value))
    fl.check_synchronized(st)
    return values, np.asarray(ps.gather().data), np.asarray(st.layer_1.running_mean)


def test_two_processes_are_as_one(tmp_path):
    (alone,) = run_processes(losses_of_fifty_steps, tmp_path, processes=1, devices=1)
    first, second = run_processes(losses_of_fifty_steps, tmp_path)
    assert alone[0][-1] < 0.8 * alone[0][0]
    for one in (first, second):
        np.testing.assert_allclose(one[0], alone[0], rtol=1e-12)
        np.testing.assert_allclose(one[1], alone[1], rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(one[2], alone[2], rtol=1e-10, atol=1e-12)
    for x, y in zip(first, second, strict=True):
        np.testing.assert_array_equal(x, y)


@jax.numpy_dtype_promotion("standard")
def train_and_die(folder, way):
    """Save each step; the second process dies in the fifth."""
    ps, st, state, batch, step = the_run()
    for number in range(1000):
        if number == 5 and jax.process_index() == 1:
            if way == "exit":
                os._exit(3)
            os.kill(os.getpid(), signal.SIGKILL)
        value, ps, st, state = step(ps, st, state, batch)
        fl.save(folder / "run", ps=ps, step=number)
        if jax.process_index() == 0:
            (folder / "last").write_text(str(number))
    return float(value)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["exit", "kill"])
def test_a_process_that_dies_ends_the_other_and_leaves_the_last_file(way, tmp_path):
    first, second = outcomes(train_and_die, tmp_path, way, heartbeat=10, timeout=120)
    assert second.code == {"exit": 3, "kill": -signal.SIGKILL}[way]
    assert first.code not in (None, 0), first.output
    assert first.seconds - second.seconds < 40
    saved = fl.load(tmp_path / "run")
    assert saved["step"] in (4, int((tmp_path / "last").read_text()))
    assert saved["ps"].layout == MODEL.layout
    assert np.isfinite(saved["ps"].data).all()


def wait_for_a_dead_one():
    if jax.process_index() == 1:
        os._exit(3)
    time.sleep(600)


@pytest.mark.slow
def test_a_process_that_only_computes_is_ended_too():
    """Nothing is exchanged, so it is JAX that finds out."""
    first, second = outcomes(wait_for_a_dead_one, heartbeat=10, timeout=120)
    assert second.code == 3
    assert first.code not in (None, 0), first.output
