import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flatlayers as fl
from tests.helpers import assert_close, assert_same, central_difference


# Embedding


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("shape", [(), (5,), (4, 5), (0,)])
@pytest.mark.parametrize("kind", [jnp.int32, jnp.int64, jnp.uint8])
def test_embedding_looks_rows_up(key, dtype, shape, kind):
    layer = fl.Embedding(6, 3)
    ps, st = fl.setup(key, layer, dtype)
    x = jax.random.randint(key, shape, 0, 6).astype(kind)
    y, new = jax.jit(layer)(x, ps, st)
    assert_same(y, jnp.asarray(np.asarray(ps.weight)[np.asarray(x)]))
    assert_same(layer(x, ps, st)[0], y)
    assert y.dtype == dtype
    assert new == st == {}
    assert y.shape == fl.output_shape(layer, x) == (*shape, 3)
    assert fl.parameter_length(layer) == ps.size == 18


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_one_hot_rows_give_the_same(key, dtype):
    layer = fl.Embedding(6, 3)
    ps, st = fl.setup(key, layer, dtype)
    x = jax.random.randint(key, (4, 5), 0, 6)
    rows = jax.nn.one_hot(x, 6, dtype=dtype)
    expected = layer(x, ps, st)[0]
    assert_same(layer(rows, ps, st)[0], expected)
    assert_same(layer(rows.astype(bool), ps, st)[0], expected)
    assert_same(layer(rows[0, 0], ps, st)[0], expected[0, 0])
    assert_same(layer(int(x[0, 0]), ps, st)[0], expected[0, 0])


@pytest.mark.parametrize("shape", [(), (5,), (4, 5)])
def test_a_tuple_of_indices(key, shape):
    layer = fl.Embedding((4, 6), 3)
    ps, st = fl.setup(key, layer, float)
    assert ps.weight.shape == (4, 6, 3)
    i, j = jax.random.randint(key, shape, 0, 4), jax.random.randint(jax.random.key(1), shape, 0, 6)
    expected = jnp.asarray(np.asarray(ps.weight)[np.asarray(i), np.asarray(j)])
    assert_same(jax.jit(layer)((i, j), ps, st)[0], expected)
    assert fl.output_shape(layer, (i, j)) == (*shape, 3)
    assert_same(fl.Embedding((4,), 3)((i,), {"weight": ps.weight[:, 0]}, {})[0], ps.weight[i, 0])


def test_embedding_gradient_and_vmap(key):
    layer = fl.Embedding(6, 3)
    ps, st = fl.setup(key, layer, float)
    x = jnp.array([[1, 1, 5], [0, 2, 1]])
    direction = fl.ComponentVector(jax.random.normal(jax.random.key(2), ps.shape), ps.layout)

    def loss(ps):
        return jnp.sum(layer(x, ps, st)[0] ** 3)

    slope = jax.grad(loss)(ps) @ direction
    np.testing.assert_allclose(slope, central_difference(loss, ps, direction), rtol=1e-7)
    counts = jax.grad(lambda ps: layer(x, ps, st)[0].sum())(ps).weight[:, 0]
    assert_same(counts, jnp.array([1.0, 3.0, 1.0, 0.0, 0.0, 1.0]))
    assert_same(layer(x, ps, st)[0], jax.vmap(lambda x: layer(x, ps, st)[0])(x))


def test_embedding_is_drawn_standard_normal(key):
    weight = np.asarray(fl.initial_parameters(key, fl.Embedding(200, 200), float).weight)
    np.testing.assert_allclose([weight.mean(), weight.std()], [0, 1], atol=0.02)


@pytest.mark.parametrize("index", [6, 100, -1, -100])
def test_indices_outside_are_an_error_where_they_are_known(key, index):
    """Where they are not, no row is right: there is NaN, and no gradient."""
    layer = fl.Embedding(6, 3)
    ps, st = fl.setup(key, layer, float)
    x = jnp.array([0, index])
    with pytest.raises(ValueError, match=f"expected indices from 0 to 5, found {index}") as error:
        fl.Chain(words=layer)(x, {"words": ps}, {"words": st})
    assert "in the layer words" in error.value.__notes__[0]
    with pytest.raises(ValueError, match="from 0 to 5"):
        jax.jit(lambda ps: layer(x, ps, st))(ps)
    y = jax.jit(layer)(x, ps, st)[0]
    assert_same(y[0], ps.weight[0])
    assert jnp.isnan(y[1]).all()
    slope = jax.jit(jax.grad(lambda ps, x: layer(x, ps, st)[0].sum()))(ps, x).weight
    assert_same(slope, jnp.zeros((6, 3)).at[0].set(1.0))


def test_indices_outside_of_a_table_with_several_axes(key):
    layer = fl.Embedding((4, 6), 3)
    ps, st = fl.setup(key, layer, float)
    y = jax.jit(layer)((jnp.array([3, 4, 0, -1]), jnp.array([5, 0, 6, 2])), ps, st)[0]
    assert_same(y[0], ps.weight[3, 5])
    assert jnp.isnan(y[1:]).all()


def test_a_nan_in_rows_stays_one(key):
    layer = fl.Embedding(6, 3)
    ps, st = fl.setup(key, layer, float)
    assert jnp.isnan(layer(jnp.ones(6).at[2].set(jnp.nan), ps, st)[0]).all()
    periodic = fl.PeriodicEmbedding((1,), (2.0,))(jnp.array([1.0, jnp.nan]), {}, {})[0]
    assert jnp.isnan(periodic).tolist() == [False, True, True]


@pytest.mark.parametrize(
    ("vocab", "x", "error", "message"),
    [
        (6, np.ones((2, 5)), ValueError, r"shape \(..., 6\), found shape \(2, 5\)"),
        (6, np.ones((2, 5), bool), ValueError, r"shape \(..., 6\), found shape \(2, 5\)"),
        (6, np.ones(6, complex), TypeError, r"integer indices, found complex128\[6\]"),
        ((4, 6), np.ones(2, int), TypeError, r"tuple of 2 index arrays, found int64\[2\]"),
        ((4, 6), (np.ones(2, int),) * 3, ValueError, "tuple of 2 inputs, .* found 3"),
        ((4, 6), (np.ones(2, int), np.ones(3, int)), ValueError, "arrays of one shape, found"),
        ((4, 6), (np.ones(2, int), np.ones(2)), TypeError, r"integer indices, found float64\[2\]"),
        ((4, 6), (np.full(2, 4), np.full(2, 4)), ValueError, "from 0 to 3, found 4"),
    ],
)
def test_embedding_of_wrong_input(key, vocab, x, error, message):
    layer = fl.Embedding(vocab, 3)
    ps, st = fl.setup(key, layer, float)
    with pytest.raises(error, match=message):
        layer(x, ps, st)


# PeriodicEmbedding


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("lead", [(), (5,), (4, 5)])
def test_periodic_embedding(key, dtype, lead):
    layer = fl.PeriodicEmbedding((1, -1), (3.0, 0.5))
    x = jax.random.normal(key, (*lead, 4), dtype)
    y, st = jax.jit(layer)(x, {}, {})
    assert y.dtype == dtype
    a, b, c, d = np.moveaxis(np.asarray(x, float), -1, 0)
    angles = [2 * np.pi * b / 3, 2 * np.pi * d / 0.5]
    expected = np.stack([a, c, *np.sin(angles), *np.cos(angles)], axis=-1)
    np.testing.assert_allclose(y, expected, atol=3e-6 if dtype == jnp.float32 else 1e-12)
    assert y.shape == fl.output_shape(layer, x) == (*lead, 6)
    assert (st, fl.parameter_length(layer), fl.state_length(layer)) == ({}, 0, 0)
    shifted = x + jnp.broadcast_to(jnp.array([0, 3.0, 0, -1.0], dtype), x.shape)
    np.testing.assert_allclose(layer(shifted, {}, {})[0], y, atol=1e-5 if dtype == jnp.float32 else 1e-12)
    assert eval(repr(layer), vars(fl)) == layer


def test_periodic_embedding_gradient_and_vmap(key):
    layer = fl.PeriodicEmbedding((1, 2), (3.0, 2.0))
    x, direction = jax.random.normal(key, (2, 5, 3))

    def loss(x):
        return jnp.sum(layer(x, {}, {})[0] ** 3)

    slope = jnp.sum(jax.grad(loss)(x) * direction)
    np.testing.assert_allclose(slope, central_difference(loss, x, direction), rtol=1e-7)
    assert_close(layer(x, {}, {})[0], jax.vmap(lambda x: layer(x, {}, {})[0])(x))


def test_periodic_embedding_of_all_of_none_and_of_integers():
    x = jnp.array([1, 2])
    y, _ = fl.PeriodicEmbedding([0, 1], np.array([4.0, 4.0]))(x, {}, {})
    assert_close(y, jnp.array([1.0, 0.0, 0.0, -1.0]))
    assert_same(fl.PeriodicEmbedding((), ())(x, {}, {})[0], jnp.array([1.0, 2.0]))


def test_periodic_embedding_of_what_does_not_fit():
    with pytest.raises(ValueError, match="expected 2 periods, one an index, found 1"):
        fl.PeriodicEmbedding((0, 1), (1.0,))
    with pytest.raises(ValueError, match="PeriodicEmbedding.periods: .* a finite number above 0, found"):
        fl.PeriodicEmbedding((0,), (0.0,))
    for indices, x in (((3,), jnp.ones((5, 3))), ((0, -3), jnp.ones(3)), ((0,), 1.0)):
        with pytest.raises(ValueError, match="expected x with different features .* found shape"):
            fl.PeriodicEmbedding(indices, [1.0] * len(indices))(x, {}, {})


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
