"""The loop against the same steps written out."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flatlayers as fl
from tests.helpers import assert_close, assert_same, equations


MODEL = fl.Chain(fl.Dense(2, 4, jnp.tanh), fl.Dropout(0.3), fl.Dense(4, 1))
OPTIMIZER = optax.sgd(0.1, momentum=0.9)
BATCHES = np.random.default_rng(0).normal(size=(7, 5, 2))


def loss(ps, st, x):
    y, st = MODEL(x, ps, st)
    return jnp.mean((y[:, 0] - x[:, 0] * x[:, 1]) ** 2), st


def written_out(ps, st, batches):
    opt_state, losses = OPTIMIZER.init(ps), []
    for batch in batches:
        (value, st), gradient = jax.value_and_grad(loss, has_aux=True)(ps, st, batch)
        updates, opt_state = OPTIMIZER.update(gradient, opt_state, ps)
        ps = optax.apply_updates(ps, updates)
        losses.append(value)
    return ps, st, opt_state, np.array(losses)


@pytest.mark.long
@pytest.mark.parametrize("chunk", [3, 7, 100])
def test_batches_from_an_iterator(key, chunk):
    ps, st = fl.setup(key, MODEL, float)
    result = fl.train_loop(loss, ps, st, OPTIMIZER, iter(BATCHES), steps=7, chunk=chunk, progress=False)
    expected = written_out(ps, st, BATCHES)
    assert_close((result.ps.data, result.losses), (expected[0].data, expected[3]))
    assert_same(result.st, expected[1])
    assert_close(result.opt_state, expected[2])
    assert isinstance(result.ps, fl.ComponentVector)
    assert result.losses.shape == (7,)
    # The arguments are not donated: they can be used again.
    assert jnp.isfinite(ps.data).all()
    assert st.layer_1.training


def test_one_batch_and_none(key):
    ps, st = fl.setup(key, MODEL, float)
    result = fl.train_loop(loss, ps, st, OPTIMIZER, BATCHES[0], steps=4, progress=False)
    expected = written_out(ps, st, [BATCHES[0]] * 4)
    assert_close(result.ps.data, expected[0].data)
    closed = fl.train_loop(
        lambda ps, st, batch: loss(ps, st, BATCHES[0]) if batch is None else None,
        *(ps, st, OPTIMIZER),
        steps=4,
        progress=False,
    )
    assert_close(closed.losses, result.losses)


def test_a_chunk_is_compiled_once(key):
    traced = []

    def counted(ps, st, x):
        traced.append(None)
        return loss(ps, st, x)

    ps, st = fl.setup(key, MODEL, float)
    for steps in (12, 4, 10):
        fl.train_loop(counted, ps, st, OPTIMIZER, BATCHES[0], steps=steps, chunk=4, progress=False)
    assert len(traced) == 1
    # Chunks of other lengths are the same program.
    fl.train_loop(
        *(counted, ps, st, OPTIMIZER, BATCHES[0]),
        steps=15,
        chunk=4,
        progress=False,
        validate=(loss, BATCHES[0], 3),
    )
    assert len(traced) == 1


def test_a_second_call_compiles_nothing(key, caplog):
    ps, st = fl.setup(key, MODEL, float)

    def train():
        fl.train_loop(
            *(loss, ps, st, OPTIMIZER, fl.batches(BATCHES[0], 2, key=key)),
            steps=7,
            chunk=3,
            progress=False,
            validate=(loss, BATCHES[0], 2),
        )

    train()
    with jax.log_compiles(), caplog.at_level("WARNING"):
        train()
    assert [record.message for record in caplog.records if "ompil" in record.message] == []


def test_a_loss_and_an_optimiser_that_cannot_be_hashed(key):
    class Loss(dict):
        def __call__(self, ps, st, x):
            return loss(ps, st, x)

    class Optimizer(dict):
        init = staticmethod(OPTIMIZER.init)

        def update(self, updates, state, params=None):
            return OPTIMIZER.update(updates, state, params)

    ps, st = fl.setup(key, MODEL, float)
    options = {"steps": 3, "progress": False}
    found = fl.train_loop(
        Loss(), ps, st, Optimizer(), BATCHES[0], **options, validate=(Loss(), BATCHES[0], 3)
    )
    assert_same(found.ps, fl.train_loop(loss, ps, st, OPTIMIZER, BATCHES[0], **options).ps)


def test_going_on_and_stopping_early(key):
    ps, st = fl.setup(key, MODEL, float)
    seen = []

    def callback(step, value, ps, st):
        seen.append((step, value, ps.size, st.layer_1.training))
        return step >= 4

    result = fl.train_loop(
        loss, ps, st, OPTIMIZER, BATCHES[0], steps=10, chunk=2, progress=False, callback=callback
    )
    assert [step for step, *_ in seen] == [2, 4]
    assert seen[1][1:] == (float(result.losses[-1]), ps.size, True)
    assert result.losses.shape == (4,)


@pytest.mark.parametrize("chunk", [1, 2, 5, 100])
def test_a_loss_that_is_not_finite(chunk):
    # Each step takes 1 from the parameter; the loss is not a number below 0.
    def falling(ps, st, batch):
        return jnp.where(ps.a < 0, jnp.nan, ps.a), {"count": st.count + 1}

    ps, st = fl.ComponentVector.of({"a": 3.5}), fl.Record(count=0)
    with pytest.raises(fl.NonFiniteLossError, match="expected a finite loss, found nan in step 4") as info:
        fl.train_loop(falling, ps, st, optax.sgd(1.0), steps=10, chunk=chunk, progress=False)
    assert info.value.step == 4
    assert_close(info.value.ps.a, 0.5)
    assert info.value.st.count == 3
    assert_close(info.value.losses, np.array([3.5, 2.5, 1.5, 0.5]))


def test_not_finite_from_the_start():
    ps = fl.ComponentVector.of({"a": -1.0})
    with pytest.raises(fl.NonFiniteLossError, match="found nan in step 0") as info:
        fl.train_loop(
            lambda ps, st, batch: (jnp.log(ps.a), st), ps, {}, optax.sgd(1.0), steps=3, progress=False
        )
    assert_same(info.value.ps, ps)


def test_bad_input(key):
    ps, st = fl.setup(key, MODEL, float)
    with pytest.raises(ValueError, match="expected a batch for each step, found none for step 7"):
        fl.train_loop(loss, ps, st, OPTIMIZER, iter(BATCHES), steps=8, chunk=4, progress=False)
    with pytest.raises(
        ValueError, match=r"batches of the same shapes, found float64\[5,2\] and, for step 1, float64\[3,2\]"
    ):
        fl.train_loop(loss, ps, st, OPTIMIZER, iter([BATCHES[0], BATCHES[0, :3]]), steps=2, progress=False)
    for options in ({"steps": 0}, {"steps": 3, "chunk": 0}, {"steps": 2.0}):
        with pytest.raises(ValueError, match="train_loop: (steps|chunk): expected an integer of at least 1"):
            fl.train_loop(loss, ps, st, OPTIMIZER, BATCHES[0], progress=False, **options)
    with pytest.raises(TypeError, match="train_loop: steps: expected an integer of at least 1, found True"):
        fl.train_loop(loss, ps, st, OPTIMIZER, BATCHES[0], progress=False, steps=True)
    with pytest.raises(ValueError, match="train_loop: start: expected an integer of at least 0, found -1"):
        fl.train_loop(loss, ps, st, OPTIMIZER, BATCHES[0], progress=False, steps=1, start=-1)
    assert fl.train_loop(loss, ps, st, OPTIMIZER, BATCHES[0], progress=False, steps=np.int64(2)).step == 2


def test_there_is_a_bar(key, capsys):
    ps, st = fl.setup(key, MODEL, float)
    fl.train_loop(loss, ps, st, OPTIMIZER, itertools.cycle(BATCHES), steps=3, chunk=2)
    shown = capsys.readouterr().err
    assert "3/3" in shown
    assert "compiling" in shown
    assert "loss=" in shown
    # Not a terminal: lines, of which none goes back to its start.
    assert "\r" not in shown
    assert 2 <= len(shown.splitlines()) < 10
    fl.train_loop(loss, ps, st, OPTIMIZER, itertools.cycle(BATCHES), steps=3, chunk=2)
    assert "compiling" not in capsys.readouterr().err
    # A line at the start and one at the end, however many chunks there are in ten seconds.
    fl.train_loop(loss, ps, st, OPTIMIZER, itertools.cycle(BATCHES), steps=40, chunk=2)
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_the_vector_is_whole_in_the_loop(key):
    # The optimiser sees one vector: the loop's carry has as many arrays as there are vectors.
    ps, st = fl.setup(key, MODEL, float)
    result = fl.train_loop(loss, ps, st, OPTIMIZER, BATCHES[0], steps=1, progress=False)
    assert [leaf.shape for leaf in jax.tree.leaves(result.opt_state)] == [(ps.size,)]
    splits = [
        eqn
        for eqn in equations(jax.make_jaxpr(jax.grad(lambda ps: loss(ps, st, BATCHES[0])[0]))(ps).jaxpr)
        if eqn.primitive.name == "split"
    ]
    assert len(splits) == 1
