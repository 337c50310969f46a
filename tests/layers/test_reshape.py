import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flatlayers as fl
from tests.helpers import assert_same


X = np.arange(60.0).reshape(5, 3, 4)


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (fl.NoOpLayer(), X),
        (fl.ReshapeLayer((4, 3)), X.reshape(5, 4, 3)),
        (fl.ReshapeLayer((-1, 2)), X.reshape(5, 6, 2)),
        (fl.FlattenLayer(), X.reshape(5, 12)),
        (fl.FlattenLayer(2), X),
        (fl.FlattenLayer(keep=0), X.reshape(60)),
        (fl.SelectDim(1, 2), X[:, 2]),
        (fl.SelectDim(-1, -1), X[..., -1]),
    ],
    ids=repr,
)
def test_shapes(layer, expected):
    y, st = jax.jit(layer)(jnp.asarray(X), {}, {})
    assert_same(y, jnp.asarray(expected))
    assert fl.output_shape(layer, jnp.asarray(X)) == expected.shape
    assert (st, fl.parameter_length(layer), fl.state_length(layer)) == ({}, 0, 0)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (fl.ReshapeLayer((5, 3)), r"fit \(5, 3\), found shape \(5, 3, 4\)"),
        (fl.FlattenLayer(4), "at least 4 axes, found shape"),
        (fl.SelectDim(3, 0), "axis 3, found shape"),
        (fl.SelectDim(1, 3), "index 3 along axis 1, found shape"),
    ],
    ids=repr,
)
def test_input_that_does_not_fit(layer, message):
    with pytest.raises(ValueError, match=message):
        layer(jnp.asarray(X), {}, {})


def test_flatten():
    assert_same(fl.flatten(jnp.asarray(X)), jnp.asarray(X.reshape(5, 12)))
    assert fl.flatten(jnp.ones(5)).shape == (5, 1)
    assert fl.flatten(jnp.ones((0, 2, 3))).shape == (0, 6)
    with pytest.raises(ValueError, match=r"at least 1 axes, found shape \(\)"):
        fl.flatten(1.0)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize(
    ("layer", "shape", "expected"),
    [
        (fl.ReverseSequence(), (5, 3, 4), lambda x: x[:, ::-1]),
        (fl.ReverseSequence(), (3, 4), lambda x: x[::-1]),
        (fl.ReverseSequence(0), (3,), lambda x: x[::-1]),
        (fl.ReverseSequence(-1), (3, 4), lambda x: x[:, ::-1]),
        (fl.ReverseSequence(axis=1), (2, 3, 4), lambda x: x[:, ::-1]),
    ],
)
def test_reverse_sequence(dtype, layer, shape, expected):
    x = jnp.arange(np.prod(shape), dtype=dtype).reshape(shape)
    y, st = jax.jit(layer)(x, {}, {})
    assert_same(y, expected(x))
    assert_same(layer(y, {}, {})[0], x)
    assert fl.output_shape(layer, x) == shape
    assert (st, fl.parameter_length(layer), fl.state_length(layer)) == ({}, 0, 0)
    assert eval(repr(layer), vars(fl)) == layer


def test_reverse_sequence_in_transformations(key):
    layer = fl.ReverseSequence(0)
    x, weight = jax.random.normal(key, (5, 3, 4)), jnp.arange(12.0).reshape(3, 4)
    assert_same(jax.vmap(lambda x: layer(x, {}, {})[0])(x), x[:, ::-1])
    assert_same(jax.grad(lambda x: (weight * layer(x, {}, {})[0]).sum())(x[0]), weight[::-1])


@pytest.mark.parametrize(("axis", "shape"), [(2, (3, 4)), (-2, (3,)), (0, ())])
def test_reverse_sequence_without_the_axis(axis, shape):
    with pytest.raises(ValueError, match=f"expected x with an axis {axis}, found shape"):
        fl.ReverseSequence(axis)(jnp.ones(shape), {}, {})
