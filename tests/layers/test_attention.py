from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flatlayers as fl
from tests.helpers import assert_close, assert_same, central_difference


@partial(jax.jit, static_argnums=0)
def run(layer, x, ps, st):
    return layer(x, ps, st)


def formula(ps, q, k, v, heads, keep=None):
    """softmax(q k' / sqrt(d)) v, head by head and query by query."""
    q, k, v = (np.asarray(x, float) @ np.asarray(ps[f"{name}_proj"].weight, float).T
               for name, x in (("q", q), ("k", k), ("v", v)))  # fmt: skip
    keep = np.ones(shape(q, k, heads), bool) if keep is None else np.broadcast_to(keep, shape(q, k, heads))
    parts = [np.split(x, heads, axis=-1) for x in (q, k, v)]
    ys = [np.zeros((*q.shape[:-1], v.shape[-1] // heads)) for _ in range(heads)]
    for head, (qh, kh, vh) in enumerate(zip(*parts, strict=True)):
        for at in np.ndindex(q.shape[:-1]):
            batch, seen = at[:-1], keep[(*at[:-1], head, at[-1])]
            scores = np.exp(kh[batch][seen] @ qh[at] / np.sqrt(qh.shape[-1]))
            ys[head][at] = (scores / scores.sum()) @ vh[batch][seen] if seen.any() else 0.0
    return np.concatenate(ys, -1) @ np.asarray(ps.out_proj.weight, float).T


def shape(q, k, heads):
    return (*q.shape[:-2], heads, q.shape[-2], k.shape[-2])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("lead", [(), (2, 3)])
@pytest.mark.parametrize("causal", [False, True])
def test_formula(key, dtype, lead, causal):
    layer = fl.MultiHeadAttention(6, heads=2, causal=causal)
    ps, st = fl.setup(key, layer, dtype)
    q, kv = (jax.random.normal(key, (*lead, n, 6), dtype) for n in (4, 5))
    rtol = 2e-5 if dtype == jnp.float32 else 1e-12
    for x, (a, b) in ((q, (q, q)), ((q, kv), (q, kv))):
        y, new = run(layer, x, ps, st)
        keep = np.tril(np.ones((a.shape[-2], b.shape[-2]), bool)) if causal else None
        assert y.dtype == dtype
        np.testing.assert_allclose(y, formula(ps, a, b, b, 2, keep), rtol=rtol, atol=rtol)
        assert y.shape == fl.output_shape(layer, x)
        assert new == st
    assert (fl.parameter_length(layer), ps.size, fl.state_length(layer)) == (4 * 36, 4 * 36, 0)


@pytest.mark.long
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("sizes", [{}, {"qk_dims": 8}, {"qk_dims": 4, "v_dims": 4, "out_dims": 7}])
def test_sizes(key, dtype, sizes):
    layer = fl.MultiHeadAttention((6, 3, 5), heads=2, **sizes)
    ps, st = fl.setup(key, layer, dtype)
    qk, v, out = (sizes.get(name, 6) for name in ("qk_dims", "v_dims", "out_dims"))
    assert {name: slot.shape for name, slot in layer.layout.slots()} == {
        "q_proj.weight": (qk, 6),
        "k_proj.weight": (qk, 3),
        "v_proj.weight": (v, 5),
        "out_proj.weight": (out, v),
    }
    parts = tuple(jax.random.normal(key, (2, n, f), dtype) for n, f in ((4, 6), (5, 3), (5, 5)))
    y, _ = run(layer, parts, ps, st)
    rtol = 2e-5 if dtype == jnp.float32 else 1e-12
    np.testing.assert_allclose(y, formula(ps, *parts, 2), rtol=rtol, atol=rtol)
    assert_same(run(layer, (*parts, None), ps, st)[0], y)
    assert fl.parameter_length(layer) == ps.size
    assert eval(repr(layer), vars(fl)) == layer


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_causal_is_the_explicit_triangle(key, dtype):
    layer, causal = (fl.MultiHeadAttention(6, heads=2, causal=causal) for causal in (False, True))
    ps, st = fl.setup(key, layer, dtype)
    x = jax.random.normal(key, (3, 5, 6), dtype)
    triangle = jnp.tril(jnp.ones((5, 5), bool))
    rtol = 1e-6 if dtype == jnp.float32 else 1e-13
    assert_close(
        run(causal, x, ps, st)[0], run(layer, (x, x, x, triangle[None, None]), ps, st)[0], rtol, rtol
    )
    # What comes later has no influence on what comes before.
    later = run(causal, x.at[:, 3:].set(7.0), ps, st)[0]
    assert_close(run(causal, x, ps, st)[0][:, :3], later[:, :3], rtol, rtol)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mask_shape", [(3, 2, 4, 5), (3, 1, 1, 5), (1, 1, 4, 1), (1, 2, 1, 5), ()])
def test_masks_broadcast_and_intersect(key, dtype, causal, mask_shape):
    layer = fl.MultiHeadAttention(6, heads=2, causal=causal)
    ps, st = fl.setup(key, layer, dtype)
    q, kv = (jax.random.normal(key, (3, n, 6), dtype) for n in (4, 5))
    mask = jax.random.bernoulli(jax.random.key(1), 0.5, mask_shape)
    y, _ = run(layer, (q, kv, kv, mask), ps, st)
    keep = np.asarray(mask) & (np.tril(np.ones((4, 5), bool)) if causal else True)
    rtol = 2e-5 if dtype == jnp.float32 else 1e-12
    np.testing.assert_allclose(y, formula(ps, q, kv, kv, 2, keep), rtol=rtol, atol=rtol)


@pytest.mark.long
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_query_without_a_key_gets_zeros(key, dtype, dropout):
    layer = fl.MultiHeadAttention(6, heads=2, dropout=dropout)
    ps, st = fl.setup(key, layer, dtype)
    x = jax.random.normal(key, (4, 6), dtype)
    mask = jnp.ones((4, 4), bool).at[2].set(False)
    y, _ = run(layer, (x, x, x, mask), ps, st)
    assert (y[2] == 0).all()
    assert (y[0] != 0).any()
    g = jax.jit(jax.grad(lambda x, kv: layer((x, kv, kv, mask), ps, st)[0].sum(), (0, 1)))(x, x)
    assert all(jnp.isfinite(part).all() for part in g)
    assert (g[0][2] == 0).all()
    nothing = run(layer, (x, x[:0]), ps, st)[0]
    assert_same(nothing, jnp.zeros((4, 6), dtype))


@pytest.mark.long
def test_dropout_acts_on_the_weights(key):
    layer = fl.MultiHeadAttention(6, heads=2, dropout=0.5, causal=True)
    ps, st = fl.setup(key, layer, float)
    assert list(st) == ["q_proj", "k_proj", "v_proj", "out_proj", "dropout"]
    assert fl.state_length(layer) == 2
    assert eval(repr(layer), vars(fl)) == layer
    x = jax.random.normal(key, (3, 4, 6))
    y, new = run(layer, x, ps, st)
    assert jax.tree.structure(new) == jax.tree.structure(st)
    assert_same(run(layer, x, ps, st)[0], y)
    assert (run(layer, x, ps, new)[0] != y).any()
    plain = run(fl.MultiHeadAttention(6, heads=2, causal=True), x, ps, fl.initial_states(key, layer))[0]
    quiet, same = run(layer, x, ps, fl.testmode(st))
    assert_close(quiet, plain)
    assert same == fl.testmode(st)
    # The first token sees itself alone: each head is its value, doubled or dropped.
    value = (ps.v_proj.weight @ x[0, 0]).reshape(2, 3)
    scales = [jnp.array([[a], [b]]) for a in (0.0, 2.0) for b in (0.0, 2.0)]
    candidates = [ps.out_proj.weight @ (scale * value).ravel() for scale in scales]
    assert min(float(jnp.abs(y[0, 0] - c).max()) for c in candidates) < 1e-12
    # The mean over many masks is what there is without dropout.
    states = jax.vmap(lambda key: st.replace(dropout=st.dropout.replace(key=key)))(
        jax.random.split(key, 4000)
    )
    ys = jax.jit(jax.vmap(lambda st: layer(x[0], ps, st)[0]))(states)
    np.testing.assert_allclose(ys.mean(0), plain[0], atol=0.05)


def test_dropout_of_all_weights_gives_zeros(key):
    layer = fl.MultiHeadAttention(4, heads=1, dropout=1.0)
    ps, st = fl.setup(key, layer)
    assert (run(layer, jnp.ones((3, 4), jnp.float32), ps, st)[0] == 0).all()


def test_in_float64_the_softmax_has_all_digits(key):
    """Scores that differ by less than float32 can tell."""
    one = fl.MultiHeadAttention(1, heads=1)
    ps, st = fl.setup(key, one, float)
    ps = ps.map(jnp.ones_like)
    q, k, v = jnp.array([[1.0]]), jnp.array([[1.0], [1.0 + 1e-10]]), jnp.array([[0.0], [1.0]])
    difference = one((q, k, v), ps, st)[0][0, 0] - 0.5
    np.testing.assert_allclose(difference, 1e-10 / 4, rtol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("options", [{"causal": True}, {"dropout": 0.3}, {"v_dims": 4}])
def test_gradient(key, options):
    layer = fl.MultiHeadAttention(6, heads=2, **options)
    ps, st = fl.setup(key, layer, float)
    x = jax.random.normal(key, (2, 4, 6))

    @jax.jit
    def loss(ps, x):
        return jnp.sum(layer(x, ps, st)[0] ** 2)

    slope_ps, slope_x = jax.jit(jax.grad(loss, (0, 1)))(ps, x)
    direction = fl.ComponentVector(jax.random.normal(jax.random.key(2), ps.shape), ps.layout)
    numeric = central_difference(lambda ps: loss(ps, x), ps, direction)
    np.testing.assert_allclose(slope_ps @ direction, numeric, rtol=1e-6)
    direction = jax.random.normal(jax.random.key(3), x.shape)
    numeric = central_difference(lambda x: loss(ps, x), x, direction)
    np.testing.assert_allclose(jnp.vdot(slope_x, direction), numeric, rtol=1e-6)


def test_batched_equals_vmap_and_the_order_of_keys_does_not_matter(key):
    layer = fl.MultiHeadAttention(6, heads=3)
    ps, st = fl.setup(key, layer, float)
    x = jax.random.normal(key, (5, 4, 6))
    y = run(layer, x, ps, st)[0]
    assert_close(y, jax.jit(jax.vmap(lambda x: layer(x, ps, st)[0]))(x))
    order = jnp.array([2, 0, 3, 1])
    assert_close(run(layer, x[:, order], ps, st)[0], y[:, order])
    with jax.numpy_dtype_promotion("standard"):
        assert jax.eval_shape(layer, (x.astype(jnp.float32), x), ps, st)[0].dtype == jnp.float64


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_half_precision(key, dropout):
    layer = fl.MultiHeadAttention(6, heads=2, dropout=dropout, causal=True)
    ps, st = fl.setup(key, layer, jnp.bfloat16)
    y, _ = run(layer, jnp.ones((4, 6), jnp.bfloat16), ps, st)
    assert y.dtype == jnp.bfloat16
    assert jnp.isfinite(y).all()


@pytest.mark.parametrize(
    ("dims", "options", "message"),
    [
        (6, {"heads": 4}, "number of heads that divides 6, found 4"),
        (6, {"heads": 0}, "heads: expected an integer of at least 1, found 0"),
        (6, {"heads": 2, "v_dims": 5}, "number of heads that divides 5, found 2"),
        ((6, 5), {"heads": 2}, r"dims: expected .* a tuple of 3, .* found \(6, 5\)"),
        (6, {"heads": 2, "dropout": 1.5}, "MultiHeadAttention.dropout: .* from 0 to 1, found 1.5"),
        (6, {"heads": 2, "dropout": float("nan")}, "MultiHeadAttention.dropout: .* from 0 to 1, found nan"),
        (6, {"heads": 2, "qk_dims": 0}, "MultiHeadAttention.qk_dims: expected .* found 0"),
        (6, {"heads": 2.0}, "MultiHeadAttention.heads: expected an integer of at least 1, found 2.0"),
        (-6, {"heads": 2}, "MultiHeadAttention.dims: expected an integer of at least 1 .* found -6"),
    ],
)
def test_numbers_that_do_not_fit(dims, options, message):
    with pytest.raises(ValueError, match=message):
        fl.MultiHeadAttention(dims, **options)


def test_input_that_does_not_fit(key):
    model = fl.Chain(attention=fl.MultiHeadAttention((6, 5, 5), heads=2))
    ps, st = fl.setup(key, model, float)
    q, kv = jnp.ones((3, 4, 6)), jnp.ones((3, 7, 5))
    with pytest.raises(ValueError, match=r"\(..., 5\), found shape \(3, 4, 6\)") as info:
        model(q, ps, st)
    assert "in the layer attention.k_proj" in info.value.__notes__[0]
    for x in ((q, kv[:2]), (q[0], kv), (q, kv, kv[:, :6]), (q[0, 0], kv[0, 0])):
        with pytest.raises(ValueError, match=r"expected q of shape \(\*batch, queries, features\), .* found"):
            model(x, ps, st)
    with pytest.raises(ValueError, match="found a tuple of 5"):
        model((q,) * 5, ps, st)
    with pytest.raises(TypeError, match="a mask of bools, found float64"):
        model((q, kv, kv, jnp.ones((4, 7))), ps, st)
    for shape in ((3, 2, 7, 4), (2, 3, 2, 4, 7)):
        with pytest.raises(ValueError, match=r"keys\) = \(3, 2, 4, 7\), found shape"):
            model((q, kv, kv, jnp.ones(shape, bool)), ps, st)


@pytest.mark.parametrize("lead", [(), (3,), (5,), (2,), (2, 3), (5, 2)])
@pytest.mark.parametrize("causal", [False, True])
def test_masks_with_all_axes_mean_what_they_say(key, lead, causal):
    """With as many samples as queries, keys or heads: one with fewer axes could be taken for another."""
    layer = fl.MultiHeadAttention(6, heads=2, causal=causal)
    ps, st = fl.setup(key, layer, float)
    q, kv = (jax.random.normal(key, (*lead, n, 6)) for n in (3, 5))
    triangle = np.tril(np.ones((3, 5), bool)) if causal else True
    keys = jax.random.bernoulli(jax.random.key(1), 0.6, (*lead, 5))
    pairs = jax.random.bernoulli(jax.random.key(2), 0.6, (3, 5))
    for mask in (
        keys[..., None, None, :],
        pairs.reshape((1,) * (len(lead) + 1) + (3, 5)),
        *[pairs] * (not lead),
    ):
        y, _ = run(layer, (q, kv, kv, mask), ps, st)
        keep = np.broadcast_to(np.asarray(mask), shape(q, kv, 2)) & triangle
        np.testing.assert_allclose(y, formula(ps, q, kv, kv, 2, keep), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("lead", [(3,), (5,), (2,), (4,), (2, 3)])
def test_a_mask_with_fewer_axes_is_refused(key, lead):
    layer = fl.MultiHeadAttention(6, heads=2)
    ps, st = fl.setup(key, layer, float)
    q, kv = (jax.random.normal(key, (*lead, n, 6)) for n in (3, 5))
    found = [(5,), (3, 5), (3, 1), (*lead, 5), (*lead, 3, 5)]
    for axes in found:
        if len(axes) < len(lead) + 3:
            for call in (layer, run):
                args = ((q, kv, kv, jnp.ones(axes, bool)), ps, st)
                with pytest.raises(ValueError, match="expected a mask with all axes of") as info:
                    call(*args) if call is layer else call(layer, *args)
                message = str(info.value)
                assert f"found shape {axes} with {len(lead)} batch" in message
                assert f"`mask[{'None, ' * (len(lead) + 1)}:, :]`" in message
                assert "`mask[..., None, None, :]`" in message


@pytest.mark.long
def test_the_ways_out_of_the_message_are_right(key):
    """What it says of `(queries, keys)` and `(batch, keys)` is what these mean, with 4 of everything."""
    layer = fl.MultiHeadAttention(4, heads=4)
    ps, st = fl.setup(key, layer, float)
    x = jax.random.normal(key, (4, 4, 4))
    mask = jnp.arange(4)[None, :] < jnp.array([1, 2, 3, 4])[:, None]
    one_by_one = [layer((x[i], x[i], x[i], jnp.tile(mask[i], (4, 1))), ps, st)[0] for i in range(4)]
    assert_close(run(layer, (x, x, x, mask[..., None, None, :]), ps, st)[0], jnp.stack(one_by_one))
    for_all = [layer((x[i], x[i], x[i], mask), ps, st)[0] for i in range(4)]
    assert_close(run(layer, (x, x, x, mask[None, None, :, :]), ps, st)[0], jnp.stack(for_all))
    per_sample = jax.vmap(lambda x, keys: layer((x, x, x, keys[None, :] & mask), ps, st)[0])(x, mask)
    assert_close(per_sample, run(layer, (x, x, x, mask[:, None, None, :] & mask[None, None]), ps, st)[0])


def test_complex_numbers_are_refused(key):
    layer = fl.MultiHeadAttention(4, heads=2)
    ps, st = fl.setup(key, layer, complex)
    with pytest.raises(TypeError, match="expected floating x, found complex128"):
        layer(jnp.ones((3, 4), complex), ps, st)
