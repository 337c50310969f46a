"""Batches of arrays against NumPy, and what data of `train_loop` may be."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flatlayers as fl
from tests.helpers import assert_same


PS = fl.ComponentVector.of({"a": [1.0, 2.0]}, dtype=float)
X = np.random.default_rng(0).normal(size=(6, 4, 2))


def loss(ps, st, x):
    return ((ps.a[None, :] - x) ** 2).mean(), st


def losses(data, steps=6, start=0, chunk=4, loss=loss):
    """The losses with a learning rate of 0: they tell which batch each step had."""
    optimizer = optax.sgd(0.0)
    return fl.train_loop(
        loss, PS, {}, optimizer, data, steps=steps, start=start, chunk=chunk, progress=False
    ).losses


def expected(batches):
    a = np.array([1.0, 2.0])
    return np.array([((a - batch) ** 2).mean() for batch in batches])


# `fl.batches`


def test_an_epoch_has_each_sample_once_and_each_epoch_its_own_order(key):
    batches = fl.batches({"i": np.arange(12), "x": np.arange(24.0).reshape(12, 2)}, 4, key=key)
    epochs = [np.concatenate([batches.at(3 * e + i)["i"] for i in range(3)]) for e in range(4)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(12))
    assert len({tuple(epoch) for epoch in epochs}) == 4
    # The order of an epoch is the permutation drawn with its number.
    for number, epoch in enumerate(epochs):
        assert_same(jnp.asarray(epoch), jax.random.permutation(jax.random.fold_in(key, number), 12))
    batch = batches.at(5)
    np.testing.assert_array_equal(batch["x"], np.arange(24.0).reshape(12, 2)[np.asarray(batch["i"])])
    # Iterating is going through the first epoch.
    np.testing.assert_array_equal(np.concatenate([b["i"] for b in batches]), epochs[0])


@pytest.mark.long
@pytest.mark.parametrize("legacy", [False, True])
def test_rows_do_not_depend_on_where_one_starts(legacy):
    key = jax.random.PRNGKey(3) if legacy else jax.random.key(3)
    batches = fl.batches(jnp.arange(10), 3, key=key)
    together = batches.rows(0, 20)
    for start, count in ((0, 1), (2, 9), (7, 13), (19, 1)):
        assert_same(batches.rows(start, count), together[start : start + count])


def test_what_does_not_fill_a_batch():
    arrays = np.arange(10)
    dropped = fl.batches(arrays, 4, shuffle=False)
    assert len(dropped) == 2
    assert [b.tolist() for b in dropped] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert dropped.at(2).tolist() == [0, 1, 2, 3]
    kept = fl.batches(arrays, 4, shuffle=False, drop_last=False)
    assert len(kept) == 3
    assert kept.at(2).tolist() == [8, 9, 0, 1]
    shuffled = fl.batches(arrays, 4, key=jax.random.key(1), drop_last=False)
    epoch = np.concatenate(list(shuffled))
    assert sorted(epoch[:10]) == list(range(10))
    assert epoch[10:].tolist() == epoch[:2].tolist()


@pytest.mark.long
@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_batches_in_the_loop(key, chunk):
    batches = fl.batches(X.reshape(24, 2), 5, key=key)
    seen = [np.asarray(batches.at(step)) for step in range(11)]
    np.testing.assert_allclose(losses(batches, 11, chunk=chunk), expected(seen), rtol=1e-12)
    np.testing.assert_allclose(losses(batches, 4, start=7, chunk=chunk), expected(seen[7:]), rtol=1e-12)


def test_wrong_batches(key):
    for arrays, size, error, message in (
        ((np.ones(3), np.ones(4)), 2, ValueError, r"same number of samples.*float64\[3\], float64\[4\]"),
        (np.ones(()), 2, ValueError, "same number of samples in front"),
        ((), 2, ValueError, "same number of samples in front"),
        (np.ones(3), 4, ValueError, "expected at least 4 samples for a batch, found 3"),
        (np.ones(3), 0, ValueError, "batches: size: expected an integer of at least 1, found 0"),
        ({"a": "text"}, 1, TypeError, r"batches: expected arrays, found 'text' at \['a'\]"),
    ):
        with pytest.raises(error, match=message):
            fl.batches(arrays, size, key=key)
    with pytest.raises(ValueError, match="expected a key to shuffle with, found none; shuffle=False"):
        fl.batches(np.ones(3), 2)
    with pytest.raises(TypeError, match="batches: shuffle: expected True or False"):
        fl.batches(np.ones(3), 2, key=key, shuffle=1)


# The kinds of data


class Loader:
    """Iterable and no iterator, as a DataLoader is."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


@pytest.mark.parametrize(
    "make", [list, iter, Loader, lambda x: (b for b in x), lambda x: [jnp.asarray(b) for b in x]]
)
def test_batches_one_after_another(make):
    np.testing.assert_allclose(losses(make(X)), expected(X), rtol=1e-12)


def test_iterables_are_gone_through_again_and_started_in_the_middle():
    for data in (list(X), Loader(X)):
        np.testing.assert_allclose(losses(data, 15), expected([*X, *X, *X[:3]]), rtol=1e-12)
        np.testing.assert_allclose(losses(data, 4, start=16), expected(X[[4, 5, 0, 1]]), rtol=1e-12)


def test_a_buffer_that_is_filled_again():
    def filled():
        buffer = np.zeros_like(X[0])
        for x in X:
            buffer[:] = x
            yield buffer

    assert_same(losses(filled()), losses(list(X)))


def test_an_iterator_is_at_its_place():
    np.testing.assert_allclose(losses(iter(X), 6, start=100), expected(X), rtol=1e-12)


def test_one_batch():
    for data, which in (
        (X[0], lambda x: x),
        ((X[0], 3.0), lambda x: x[0]),
        ({"x": X[0]}, lambda x: x["x"]),
        (fl.Record(x=X[0], flag=True), lambda x: x.x),
    ):
        found = losses(data, 2, loss=lambda ps, st, batch, which=which: loss(ps, st, which(batch)))
        np.testing.assert_allclose(found, expected([X[0]] * 2), rtol=1e-12)


def test_a_loader_of_pytorch():
    torch = pytest.importorskip("torch")
    data = torch.utils.data.TensorDataset(torch.tensor(X.reshape(24, 2)), torch.arange(24))
    loader = torch.utils.data.DataLoader(data, batch_size=4)

    def of_both(ps, st, batch):
        x, i = batch
        return loss(ps, st, x)[0] + 0 * i.sum().astype(float), st

    np.testing.assert_allclose(losses(loader, 9, loss=of_both), expected([*X, *X[:3]]), rtol=1e-12)
    np.testing.assert_allclose(losses(torch.tensor(X[0]), 2), expected([X[0]] * 2), rtol=1e-12)


def test_keys_as_batches(key):
    def noisy(ps, st, key):
        return jax.random.normal(key, dtype=float) ** 2 + 0 * ps.a[0], st

    keys = jax.random.split(key, 5)
    found = losses(iter(keys), 5, loss=noisy)
    np.testing.assert_allclose(found, [float(jax.random.normal(k, dtype=float) ** 2) for k in keys])


def test_the_next_batches_are_fetched_while_a_chunk_runs():
    events = []

    def batches():
        for number, batch in enumerate(X):
            events.append(number)
            yield batch

    fl.train_loop(
        loss,
        *(PS, {}, optax.sgd(0.1), batches()),
        steps=6,
        chunk=2,
        progress=False,
        callback=lambda step, *_: events.append(f"after {step}"),
    )
    assert events == [0, 1, 2, 3, "after 2", 4, 5, "after 4", "after 6"]


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ([], ValueError, "found none for step 0; data that can be gone through again were empty"),
        (iter([]), ValueError, "expected a batch for each step, found none for step 0"),
        ([1.0, 2.0], TypeError, "expected batches of arrays, found 1.0 for step 0. A list is"),
        (range(5), TypeError, "expected batches of arrays, found 0 for step 0. A list is"),
        (["a"], TypeError, "expected batches of arrays, found 'a' for step 0"),
        ([np.ma.array([1.0], mask=[True])], TypeError, "a batch of arrays for step 0, found"),
        ("text", TypeError, "expected data to be arrays, batches or None, found 'text'"),
        ({"x": object()}, TypeError, r"found object at \['x'\]"),
        ([{"x": print}], TypeError, "a batch of arrays for step 0, found builtin"),
        ([X[0], X[0, :3]], ValueError, r"found float64\[4,2\] and, for step 1, float64\[3,2\]"),
        ([X[0], X[0], X[0].astype(np.float32)], ValueError, r"and, for step 2, float32\[4,2\]"),
        ([(X[0],), {"x": X[0]}], ValueError, r"for step 1, {x: float64\[4,2\]}"),
    ],
)
def test_what_are_no_batches(data, error, message):
    with pytest.raises(error, match=message):
        losses(data)


def test_batches_differ_from_those_of_an_earlier_chunk():
    with pytest.raises(ValueError, match=re.escape("and, for step 5, float64[3,2]")) as info:
        losses([*X[:5], X[0, :3]], chunk=5)
    assert info.value.result.step == 5
