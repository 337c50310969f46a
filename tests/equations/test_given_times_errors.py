"""Times as data that a layer refuses: out of order, of another kind or shape, in another place."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flatlayers as fl


@pytest.mark.parametrize(
    ("times", "message"),
    [
        (([0.5, 0.2],), r"expected finite times in order.*, found \[0\. +0\.5 0\.2 0\.2\]"),
        (([-0.5, 0.2],), "in order"),
        (([0.5, np.nan],), "expected finite times"),
        (([0.5, np.inf],), "expected finite times"),
    ],
)
def test_times_out_of_order(key, times, message):
    node = fl.NeuralODE(lambda y: -y)
    ps, st = fl.setup(key, node, float)
    with pytest.raises(ValueError, match=message) as info:
        node((jnp.ones(1), fl.SolveTimes(*times)), ps, st)
    assert "in the layer NeuralODE" in info.value.__notes__[0]
    with pytest.raises(Exception, match="expected finite times in order"):
        jax.jit(node)((jnp.ones(1), fl.SolveTimes(jnp.array(*times))), ps, st)


def test_other_ends_out_of_order(key):
    node = fl.NeuralODE(lambda y: -y)
    ps, st = fl.setup(key, node, float)
    for times in (
        fl.SolveTimes([0.5, 1.5], t1=1.0),
        fl.SolveTimes([0.5, 0.9], t0=0.7),
        fl.SolveTimes(t1=np.nan),
        fl.SolveTimes(t0=np.inf),
    ):
        with pytest.raises(ValueError, match="expected finite times in order"):
            node((jnp.ones(1), times), ps, st)


def test_what_does_not_go_with_the_fields_of_the_layer(key):
    field = fl.NeuralODE(lambda y: -y, saveat=(0.5, 1.0), dt0=0.1)
    ps, st = fl.setup(key, field, float)
    with pytest.raises(ValueError, match="expected times that reach to saveat=1.0, found t0=0.0 and t1=0.7"):
        field((jnp.ones(1), fl.SolveTimes(t1=0.7)), ps, st)
    with pytest.raises(ValueError, match="expected times that reach to saveat=0.5, found t0=0.6 and t1=1.0"):
        field((jnp.ones(1), fl.SolveTimes(t0=0.6)), ps, st)
    with pytest.raises(ValueError, match="expected times in the direction of dt0=0.1, found t0=0.0"):
        field((jnp.ones(1), fl.SolveTimes([-0.5, -1.0])), ps, st)


@pytest.mark.parametrize("ts", [np.array([0.5, 1j]), np.array([False, True]), ["0.5"], jnp.array([1j])])
def test_times_that_are_no_real_numbers(key, ts):
    node = fl.NeuralODE(lambda y: -y)
    with pytest.raises(TypeError, match="expected times that are real numbers, found SolveTimes"):
        node((jnp.ones(1), fl.SolveTimes(ts)), *fl.setup(key, node, float))


@pytest.mark.parametrize(
    "x",
    [
        lambda y, times: [y, times],
        lambda y, times: (times, y),
        lambda y, times: (y, times, 1.0),
        lambda y, times: times,
        lambda y, times: ((y, times), times),
    ],
)
def test_times_in_another_place_than_the_second_of_a_pair(key, x):
    node = fl.NeuralODE(lambda y: -y)
    with pytest.raises(TypeError, match=r"expected a pair \(x, fl.SolveTimes\(...\)\), with times once"):
        node(x(jnp.ones(1), fl.SolveTimes([1.0])), *fl.setup(key, node, float))


@pytest.mark.parametrize(
    ("batching", "times", "message"),
    [
        (
            "shared",
            {"ts": np.ones((2, 3))},
            r'found SolveTimes\(ts: float64\[2,3\].*batching="each" or jax.vmap',
        ),
        ("shared", {"ts": 1.0}, r"expected ts of shape \(times,\)"),
        ("shared", {"ts": []}, "not empty"),
        ("shared", {"t1": np.ones(2)}, r"t0 and t1 of shape \(\), found"),
        ("each", {"ts": np.ones((3, 2))}, r"or \(2, times\) and \(2,\) for each sample, found"),
        ("each", {"t0": np.ones(3)}, r"or \(2, times\) and \(2,\) for each sample, found"),
        ("each", {"ts": [1.0, 2.0], "mask": [True]}, "expected a mask of the shape of ts"),
        ("shared", {"mask": [True]}, "expected a mask of the shape of ts"),
    ],
)
def test_wrong_shapes(key, batching, times, message):
    node = fl.NeuralODE(lambda y: -y, batching=batching)
    with pytest.raises(ValueError, match=message):
        node((jnp.ones((2, 1)), fl.SolveTimes(**times)), *fl.setup(key, node, float))
