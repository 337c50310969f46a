import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flatlayers as fl
from tests.helpers import assert_close, assert_same, central_difference


# ReverseSequence


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


# PatchEmbedding


def patches(x, ps, rows, columns):
    """Patch by patch."""
    weight, places = np.asarray(ps.weight), []
    for i in range(0, x.shape[-3], rows):
        for j in range(0, x.shape[-2], columns):
            patch = x[..., i : i + rows, j : j + columns, :]
            places.append(np.einsum("...ijc,ijcd->...d", patch, weight))
    return np.stack(places, axis=-2) + (np.asarray(ps.bias) if "bias" in ps else 0)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("lead", [(), (5,), (2, 3)])
@pytest.mark.parametrize(
    ("layer", "rows", "columns"),
    [(fl.PatchEmbedding(2, 3, 4), 2, 2), (fl.PatchEmbedding((2, 3), 3, 4, use_bias=False), 2, 3)],
)
def test_patch_embedding(key, dtype, lead, layer, rows, columns):
    ps, st = fl.setup(key, layer, dtype)
    ps = ps + jax.random.normal(key, ps.shape, dtype)
    x = jax.random.normal(jax.random.key(1), (*lead, 4, 6, 3), dtype)
    y, new = jax.jit(layer)(x, ps, st)
    assert y.dtype == dtype
    assert new == st == {}
    rtol = 1e-5 if dtype == jnp.float32 else 1e-12
    np.testing.assert_allclose(y, patches(np.asarray(x), ps, rows, columns), rtol=rtol, atol=rtol)
    assert y.shape == fl.output_shape(layer, x) == (*lead, 24 // (rows * columns), 4)
    assert fl.parameter_length(layer) == ps.size == rows * columns * 12 + 4 * layer.use_bias
    assert eval(repr(layer), vars(fl)) == layer


def test_patch_embedding_gradient_and_vmap(key):
    layer = fl.PatchEmbedding(2, 3, 4)
    ps, st = fl.setup(key, layer, float)
    x = jax.random.normal(key, (5, 4, 6, 3))
    direction = fl.ComponentVector(jax.random.normal(jax.random.key(2), ps.shape), ps.layout)

    def loss(ps):
        return jnp.sum(jnp.sin(layer(x, ps, st)[0]))

    slope = jax.grad(loss)(ps) @ direction
    np.testing.assert_allclose(slope, central_difference(loss, ps, direction), rtol=1e-7)
    assert_close(layer(x, ps, st)[0], jax.vmap(lambda x: layer(x, ps, st)[0])(x))


def test_patch_embedding_is_drawn_as_a_dense_layer_of_a_patch(key):
    weight = fl.initial_parameters(key, fl.PatchEmbedding(8, 3, 16), float).weight
    bound = np.sqrt(6 / (8 * 8 * 3 + 16))
    assert 0.99 * bound < np.abs(weight).max() <= bound


@pytest.mark.parametrize("shape", [(5, 4, 6, 2), (5, 5, 6, 3), (5, 4, 5, 3), (6, 3)])
def test_patch_embedding_of_what_does_not_fit(key, shape):
    layer = fl.PatchEmbedding(2, 3, 4)
    ps, st = fl.setup(key, layer, float)
    message = r"shape \(..., height, width, 3\) that patches of 2 x 2 divide, found shape"
    with pytest.raises(ValueError, match=message):
        layer(jnp.ones(shape), ps, st)


@pytest.mark.parametrize("patch", [(2,), (2, 2, 2), 0, (2, -1)])
def test_a_patch_has_two_sizes(patch):
    with pytest.raises(
        ValueError, match="PatchEmbedding.patch: expected an integer of at least 1 or a tuple of 2.* found"
    ):
        fl.PatchEmbedding(patch, 3, 4)
