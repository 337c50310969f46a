"""What cannot be an argument of `train_loop` or `batches` is said where it is given."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flatlayers as fl
from tests.helpers import assert_same


PS = fl.ComponentVector.of({"a": [1.0, 2.0]}, dtype=float)


def loss(ps, st, batch):
    return jnp.sum(ps["a"] ** 2), st


def train(ps=PS, optimizer=optax.sgd(0.1), loss=loss, **options):  # noqa: B008
    return fl.train_loop(loss, ps, {}, optimizer, steps=2, progress=False, **options)


@pytest.mark.parametrize(
    ("ps", "found"),
    [
        (fl.ComponentVector(jnp.arange(2), PS.layout), r"int64\[2\] as ps;"),
        ({"a": 1.0, "b": {"c": jnp.arange(3)}}, r"int64\[3\] as ps\['b'\]\['c'\];"),
        ({"a": 1.0, "b": 2}, r"2 as ps\['b'\];"),
        ({"a": 1.0, "b": np.array(True)}, r"bool\[\] as ps\['b'\];"),
        ({"a": 1.0, "b": "text"}, r"'text' as ps\['b'\];"),
        ({"a": 1.0, "b": jax.random.key(0)}, r"key<fry>\[\] as ps\['b'\];"),
    ],
)
def test_parameters_that_are_not_floating(ps, found):
    with pytest.raises(TypeError, match=f"train_loop: expected floating parameters, found .*{found}"):
        train(ps)


def test_parameters_that_are():
    for ps in (PS, {"a": 1.0}, {"a": np.float32(1.0)}, {"a": jnp.ones(2, jnp.bfloat16)}):
        assert train(ps).step == 2


@pytest.mark.parametrize("optimizer", [0.1, optax.adam, None, optax.GradientTransformation])
def test_what_is_no_optimiser(optimizer):
    with pytest.raises(TypeError, match="train_loop: optimizer: expected an optimiser of optax, such as"):
        train(optimizer=optimizer)


def test_what_is_no_function():
    with pytest.raises(TypeError, match="train_loop: callback: expected a function or None, found 3"):
        train(callback=3)
    with pytest.raises(TypeError, match="train_loop: loss: expected a function, found 3"):
        train(loss=3)


@pytest.mark.parametrize(
    ("metrics", "found"),
    [
        (3.0, "3.0"),
        ({"kind": "text"}, "{kind: 'text'}"),
        ({"rate": None}, "{rate: None}"),
        ({"a": np.ones(2)}, r"{a: float64\[2\]}"),
        ({"a": {"b": 1.0}}, "{a: {b: 1.0}}"),
        ({"a": 1j}, "{a: 1j}"),
        ({0: 1.0}, "{0: 1.0}"),
        ({"key": jax.random.key(0)}, r"{key: key<fry>\[\]}"),
    ],
)
def test_metrics_that_are_no_numbers(metrics, found):
    match = f"train_loop: expected metrics as a mapping of numbers, found {found}"
    with pytest.raises(TypeError, match=match):
        train(loss=lambda ps, st, batch: (loss(ps, st, batch)[0], (st, metrics)))
    with pytest.raises(TypeError, match=match):
        train(validate=(lambda ps, st, batch: (loss(ps, st, batch)[0], (st, metrics)), None, 1))


def test_metrics_that_are():
    numbers = {"flag": True, "count": 3, "share": 0.5, "traced": None, "half": jnp.ones((), jnp.bfloat16)}

    def measured(ps, st, batch):
        value, st = loss(ps, st, batch)
        return value, (st, {**numbers, "traced": value})

    result = train(loss=measured)
    assert_same(jnp.asarray(result.metrics["traced"]), jnp.asarray(result.losses))
    assert result.metrics["count"].tolist() == [3, 3]
    assert result.metrics["flag"].tolist() == [True, True]


@pytest.mark.parametrize("key", [0, "key", np.arange(2.0), jax.random.split(jax.random.key(0)), 1.5])
def test_what_is_no_key(key):
    for shuffle in (True, False):
        with pytest.raises(TypeError, match=r"batches: key: expected a PRNG key such as jax.random.key\(0\)"):
            fl.batches(np.arange(6), 2, key=key, shuffle=shuffle)


def test_what_is_one():
    key = jax.random.key(3)
    for other in (jax.random.PRNGKey(3), np.asarray(jax.random.key_data(key))):
        rows = [fl.batches(np.arange(6), 2, key=key).rows(0, 5) for key in (key, other)]
        assert_same(*rows)
