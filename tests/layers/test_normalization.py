import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flatlayers as fl
from tests.helpers import assert_close, central_difference
from tests.layers.norms import inputs, over, started


def in_groups(x, groups):
    parts = np.split(np.asarray(x), groups, axis=-1)
    return np.concatenate([over(part, tuple(range(1, x.ndim))) for part in parts], axis=-1)


def rms(x, axes, epsilon=1e-5):
    x = np.asarray(x)
    return x / np.sqrt((x * x).mean(axes, keepdims=True) + epsilon)


# The layer, the shape of its input, and what it makes of it in training before scale and bias.
LAYERS = [
    (fl.BatchNorm(4), (6, 4), lambda x: over(x, (0,))),
    (fl.BatchNorm(4, epsilon=0.1), (2, 3, 5, 4), lambda x: over(x, (0, 1, 2), 0.1)),
    (fl.BatchNorm(4, affine=False, track_stats=False), (6, 4), lambda x: over(x, (0,))),
    (fl.GroupNorm(4, 2), (3, 5, 4), lambda x: in_groups(x, 2)),
    (fl.GroupNorm(6, 2, affine=False), (3, 6), lambda x: in_groups(x, 2)),
    (fl.GroupNorm(4, 1), (2, 3, 2, 4), lambda x: over(x, (1, 2, 3))),
    (fl.InstanceNorm(4), (3, 5, 4), lambda x: over(x, (1,))),
    (fl.InstanceNorm(2, affine=True, track_stats=True), (3, 5, 4, 2), lambda x: over(x, (1, 2))),
    (fl.LayerNorm(5), (5,), lambda x: over(x, (-1,))),
    (fl.LayerNorm(5, epsilon=0.1), (2, 3, 5), lambda x: over(x, (-1,), 0.1)),
    (fl.LayerNorm((3, 5)), (2, 3, 5), lambda x: over(x, (-2, -1))),
    (fl.LayerNorm((5,), affine=False), (2, 5), lambda x: over(x, (-1,))),
    (fl.RMSNorm(5), (5,), lambda x: rms(x, (-1,))),
    (fl.RMSNorm((3, 5), epsilon=0.1), (2, 3, 5), lambda x: rms(x, (-2, -1), 0.1)),
    (fl.RMSNorm(5, affine=False), (2, 5), lambda x: rms(x, (-1,))),
]
IDS = [repr(layer) for layer, *_ in LAYERS]
layers = pytest.mark.parametrize(("layer", "shape", "formula"), LAYERS, ids=IDS)


@layers
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_formula(layer, shape, formula, dtype):
    ps, st = started(layer, dtype)
    x = inputs(shape, dtype)
    y, new = jax.jit(layer)(x, ps, st)
    expected = formula(np.asarray(x, float))
    if layer.affine:
        expected = np.asarray(ps.scale) * expected + (np.asarray(ps.bias) if "bias" in ps.layout else 0)
    tolerance = 1e-5 if dtype == jnp.float32 else 1e-12
    np.testing.assert_allclose(y, expected, rtol=tolerance, atol=tolerance)
    assert y.dtype == dtype
    assert y.shape == shape == fl.output_shape(layer, x)
    assert jax.tree.map(jnp.result_type, new) == jax.tree.map(jnp.result_type, st)


@layers
def test_declared(layer, shape, formula):
    ps, st = fl.setup(jax.random.key(0), layer)
    features = layer.shape if hasattr(layer, "shape") else layer.channels
    names = ("scale",) if isinstance(layer, fl.RMSNorm) else ("scale", "bias")
    assert ps.layout == fl.Layout(dict.fromkeys(names, features) if layer.affine else {})
    assert ps.size == fl.parameter_length(layer)
    if layer.affine:
        assert (ps.scale == 1).all()
        assert "bias" not in ps.layout or (ps.bias == 0).all()
    tracked = getattr(layer, "track_stats", False)
    assert tuple(st) == (("running_mean", "running_var", "training") if tracked else ())
    assert fl.state_length(layer) == (2 * layer.channels + 1 if tracked else 0)
    assert fl.preserves_state_type(layer)
    assert eval(repr(layer), vars(fl)) == layer


@layers
@pytest.mark.parametrize("training", [True, False])
def test_gradient(layer, shape, formula, training):
    ps, st = started(layer)
    st = fl.trainmode(st) if training else fl.testmode(st)
    x, direction = inputs(shape), inputs(shape, seed=3)
    weight = inputs(shape, seed=4)

    def loss(x, ps):
        return jnp.sum(weight * layer(x, ps, st)[0])

    slope = jnp.vdot(jax.jit(jax.grad(loss))(x, ps), direction)
    difference = central_difference(lambda x: loss(x, ps), x, direction)
    np.testing.assert_allclose(slope, difference, rtol=1e-6, atol=1e-7)
    if ps.size:
        direction = ps.map(jnp.sin)
        slope = jax.grad(loss, argnums=1)(x, ps) @ direction
        np.testing.assert_allclose(
            slope, central_difference(lambda ps: loss(x, ps), ps, direction), rtol=1e-7, atol=1e-7
        )


@layers
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_computes_in_float32(layer, shape, formula, dtype):
    ps, st = fl.setup(jax.random.key(0), layer, dtype)
    # A mean so large that its square, and a variance such as mean(x²) - mean², are out of reach.
    x = (inputs(shape) + 500).astype(dtype)
    y, new = jax.jit(layer)(x, ps, st)
    assert y.dtype == dtype
    np.testing.assert_allclose(y.astype(float), formula(np.asarray(x, float)), rtol=1e-2, atol=1e-2)
    assert jax.tree.map(jnp.result_type, new) == jax.tree.map(jnp.result_type, st)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(st))


def test_activation():
    for layer in (
        fl.BatchNorm(3, jnp.tanh),
        fl.GroupNorm(3, 1, jnp.tanh),
        fl.InstanceNorm(3, jnp.tanh),
        fl.LayerNorm(3, jnp.tanh),
    ):
        plain = type(layer)(3, 1) if isinstance(layer, fl.GroupNorm) else type(layer)(3)
        ps, st = fl.setup(jax.random.key(0), layer, float)
        x = inputs((2, 5, 3))
        assert_close(layer(x, ps, st)[0], jnp.tanh(plain(x, ps, st)[0]))


@pytest.mark.parametrize("layer", [fl.GroupNorm(4, 2), fl.InstanceNorm(4), fl.LayerNorm(4), fl.RMSNorm(4)])
def test_samples_do_not_see_each_other(layer):
    ps, st = started(layer)
    x = inputs((3, 5, 4))
    y = layer(x, ps, st)[0]
    assert_close(y, jax.vmap(lambda x: layer(x[None], ps, st)[0][0])(x))
    assert_close(y[:1], layer(x[:1], ps, st)[0])


def test_groups_of_one_channel_are_instances():
    x = inputs((3, 5, 2, 4))
    group, instance = fl.GroupNorm(4, 4), fl.InstanceNorm(4, affine=True)
    ps, _ = started(group)
    assert_close(group(x, ps, {})[0], instance(x, ps, {})[0])


def test_running_values_of_instances_are_averages_over_the_batch():
    layer = fl.InstanceNorm(3, track_stats=True, momentum=0.2)
    ps, st = fl.setup(jax.random.key(0), layer, float)
    x = inputs((4, 5, 2, 3))
    _, new = layer(x, ps, st)
    np.testing.assert_allclose(new.running_mean, 0.2 * np.mean(x, (0, 1, 2)), rtol=1e-12)
    unbiased = np.var(x, (1, 2), ddof=1).mean(0)
    np.testing.assert_allclose(new.running_var, 0.8 + 0.2 * unbiased, rtol=1e-12)
    y, same = layer(x, ps, fl.testmode(new))
    assert same == fl.testmode(new)
    expected = (x - new.running_mean[None, None, None]) / jnp.sqrt(new.running_var + 1e-5)[None, None, None]
    assert_close(y, expected)


# normalize


@pytest.mark.parametrize("axis", [0, -1, (0, 2), (-1, 0)])
def test_normalize(axis):
    x = inputs((3, 4, 5))
    y = fl.normalize(x, axis=axis, epsilon=0.0)
    np.testing.assert_allclose(y, over(x, axis, 0.0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(np.mean(y, axis), 0.0, atol=1e-12)
    np.testing.assert_allclose(np.var(y, axis), 1.0, rtol=1e-12)
    assert fl.normalize(x.astype(jnp.float16), axis=axis, epsilon=0.0).dtype == jnp.float16


# Bad input


@pytest.mark.parametrize(
    ("layer", "shape", "message"),
    [
        (fl.BatchNorm(3), (5, 4), r"\(..., 3\), found shape \(5, 4\)"),
        (fl.BatchNorm(3), (3,), r"more than one value .* found 1 in x of shape \(3,\)"),
        (fl.BatchNorm(3), (1, 3), "more than one value"),
        (fl.BatchNorm(3), (0, 3), "more than one value .* found 0"),
        (fl.BatchNorm(3, track_stats=False), (1, 3), "more than one value"),
        (fl.GroupNorm(4, 2), (5, 6), r"\(batch, ..., 4\), found shape \(5, 6\)"),
        (fl.GroupNorm(4, 2), (4,), r"\(batch, ..., 4\), found shape \(4,\)"),
        (fl.GroupNorm(4, 4), (5, 4), "more than one value"),
        (fl.InstanceNorm(4), (5, 3, 6), r"\(batch, ..., 4\), found shape"),
        (fl.InstanceNorm(4), (5, 1, 4), "more than one value"),
        (fl.InstanceNorm(4), (5, 4), "more than one value"),
        (fl.LayerNorm((2, 3)), (2, 4), r"\(..., 2, 3\), found shape \(2, 4\)"),
        (fl.RMSNorm(3), (), r"\(..., 3\), found shape \(\)"),
    ],
)
def test_input_that_does_not_fit(layer, shape, message):
    ps, st = fl.setup(jax.random.key(0), layer, float)
    for call in (layer, jax.jit(layer)):
        with pytest.raises(ValueError, match=message):
            call(jnp.ones(shape), ps, st)


def test_what_is_refused():
    with pytest.raises(ValueError, match="divide 4 channels, found 3"):
        fl.GroupNorm(4, 3)
    with pytest.raises(ValueError, match=r"GroupNorm.groups: expected an integer of at least 1, found 0"):
        fl.GroupNorm(4, 0)
    for cls in (fl.LayerNorm, fl.RMSNorm):
        with pytest.raises(ValueError, match=r"at least one axis, found \(\)"):
            cls(())
    with pytest.raises(ValueError, match=r"axes \(2,\), found shape \(3, 4\)"):
        fl.normalize(jnp.ones((3, 4)), axis=2)
    for layer in (fl.BatchNorm(3), fl.GroupNorm(3, 1), fl.InstanceNorm(3), fl.LayerNorm(3), fl.RMSNorm(3)):
        ps, st = fl.setup(jax.random.key(0), layer, float)
        with pytest.raises(TypeError, match=r"floating x, found int64\[2, 5, 3\]"):
            layer(jnp.ones((2, 5, 3), int), ps, st)


# A mean that is large against the spread


FAR = [(1e4, 1e-2), (-3e5, 0.1), (70.0, 1e-4), (2e6, 1.0)]
far = pytest.mark.parametrize(("mean", "spread"), FAR)
KINDS = [
    (lambda: fl.BatchNorm(3, epsilon=1e-10), (64, 8, 8, 3), (0, 1, 2)),
    (lambda: fl.InstanceNorm(3, affine=True, track_stats=True, epsilon=1e-10), (4, 16, 16, 3), (1, 2)),
    (lambda: fl.GroupNorm(3, 3, epsilon=1e-10), (4, 16, 16, 3), (1, 2)),
    (lambda: fl.LayerNorm(64, epsilon=1e-10), (4, 64), (1,)),
]
kinds = pytest.mark.parametrize(("make", "shape", "axes"), KINDS, ids=["batch", "instance", "group", "layer"])


def far_away(mean, spread, shape):
    x = mean + spread * np.random.default_rng(0).normal(size=shape)
    return jnp.asarray(x, jnp.float32)


def weighted(layer, x, ps, st):
    """A sum of the outputs, with weights, and its gradient by the parameters and by `x`."""
    w = jnp.asarray(np.random.default_rng(1).normal(size=x.shape), jnp.float32)

    def loss(ps, x):
        return jnp.sum(w * layer(x, ps, st)[0])

    return np.asarray(w, float), jax.jit(jax.grad(loss, (0, 1)))(ps, x)


@far
@kinds
def test_a_mean_far_from_zero_in_training(mean, spread, make, shape, axes):
    """In float32, against NumPy in float64 on the same float32 numbers."""
    layer, x = make(), far_away(mean, spread, shape)
    ps, st = started(layer, jnp.float32)
    scale, bias = (np.asarray(p, float) for p in (ps.scale, ps.bias))
    z = over(np.asarray(x, float), axes, layer.epsilon)
    y, _ = jax.jit(layer)(x, ps, st)
    np.testing.assert_allclose(y, scale * z + bias, rtol=1e-5, atol=2e-5)
    w, (by_ps, by_x) = weighted(layer, x, ps, st)
    batch = tuple(range(x.ndim - 1))
    np.testing.assert_allclose(by_ps.bias, w.sum(batch), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(by_ps.scale, (w * z).sum(batch), rtol=1e-4, atol=1e-3)
    g = w * scale
    inner = g - g.mean(axes, keepdims=True) - z * (g * z).mean(axes, keepdims=True)
    slope = np.sqrt(np.asarray(x, float).var(axes, keepdims=True) + layer.epsilon)
    np.testing.assert_allclose(np.asarray(by_x) * slope, inner, rtol=1e-4, atol=1e-4)


@far
@pytest.mark.parametrize("kind", [0, 1])
def test_a_mean_far_from_zero_in_test_mode(mean, spread, kind):
    make, shape, _ = KINDS[kind]
    layer, x = make(), far_away(mean, spread, shape)
    ps, st = started(layer, jnp.float32)
    running = {
        "running_mean": jnp.full(3, mean, jnp.float32),
        "running_var": jnp.full(3, spread**2, jnp.float32),
    }
    st = fl.testmode(st.replace(**running))
    scale, bias, m, v = (np.asarray(p, float) for p in (ps.scale, ps.bias, *running.values()))
    z = (np.asarray(x, float) - m) / np.sqrt(v + layer.epsilon)
    np.testing.assert_allclose(jax.jit(layer)(x, ps, st)[0], scale * z + bias, rtol=1e-5, atol=1e-5)
    w, (by_ps, by_x) = weighted(layer, x, ps, st)
    np.testing.assert_allclose(by_ps.scale, (w * z).sum((0, 1, 2)), rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(np.asarray(by_x) * np.sqrt(v + layer.epsilon), w * scale, rtol=1e-5)


@pytest.mark.parametrize("constant", [0.0, 3.3, -1e7, 2e5])
def test_equal_numbers_give_the_bias(constant):
    """Their variance is zero, and not a little less by rounding."""
    for layer in (fl.BatchNorm(2), fl.LayerNorm((5, 7, 2)), fl.GroupNorm(2, 1)):
        ps, st = started(layer, jnp.float32)
        x = jnp.full((3, 5, 7, 2), constant, jnp.float32)
        y, new = jax.jit(layer)(x, ps, st)
        np.testing.assert_allclose(y, jnp.broadcast_to(ps.bias, y.shape), atol=1e-5)
        _, (_, slope) = weighted(layer, x, ps, st)
        assert jnp.isfinite(slope).all()
        if new:
            assert (new.running_var >= 0).all()


def test_second_derivatives_do_not_depend_on_where_the_mean_is():
    layer = fl.BatchNorm(1, epsilon=0.1)
    ps, st = started(layer)
    w = jnp.array([[1.0], [-2.0], [0.5]])

    def loss(x):
        return jnp.sum(w * layer(x, ps, st)[0] ** 3)

    x = jnp.array([[0.3], [1.1], [-0.4]])
    numeric = central_difference(jax.grad(loss), x, w, 1e-5)
    product = jax.jvp(jax.grad(loss), (x,), (w,))[1]
    np.testing.assert_allclose(product, numeric, rtol=1e-6)
    np.testing.assert_allclose(jax.jvp(jax.grad(loss), (x + 100,), (w,))[1], product, rtol=1e-9)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (fl.BatchNorm(3), (4, 3)),
        (fl.BatchNorm(3, affine=False), (4, 5, 3)),
        (fl.GroupNorm(3, 1), (4, 3)),
        (fl.InstanceNorm(3), (4, 5, 3)),
        (fl.LayerNorm(3), (4, 3)),
        (fl.RMSNorm(3), (4, 3)),
    ],
)
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_what_is_no_number_stays_none(layer, shape, bad):
    ps, st = started(layer)
    x = inputs(shape).at[1].set(bad)
    y, _ = layer(x, ps, st)
    assert jnp.isnan(y[1]).all()


@pytest.mark.parametrize("cls", [fl.BatchNorm, fl.InstanceNorm, fl.LayerNorm, fl.RMSNorm])
@pytest.mark.parametrize(
    ("field", "value", "error", "message"),
    [
        ("epsilon", -1.0, ValueError, "epsilon: expected a finite number of at least 0, found -1.0"),
        ("epsilon", float("nan"), ValueError, "epsilon: expected a finite number of at least 0, found nan"),
        ("epsilon", "a", TypeError, "epsilon: expected a finite number .* found 'a'"),
        ("momentum", 5.0, ValueError, "momentum: expected a probability from 0 to 1, found 5.0"),
        ("momentum", float("nan"), ValueError, "momentum: expected a probability from 0 to 1, found nan"),
        ("affine", 1, TypeError, "affine: expected True or False, found 1"),
        (
            "activation",
            fl.Dense,
            TypeError,
            "activation: expected an elementwise function or None, found <cl",
        ),
    ],
)
def test_options_are_checked(cls, field, value, error, message):
    if field not in cls.__dataclass_fields__:
        return
    with pytest.raises(error, match=f"{cls.__name__}.{message}"):
        cls(3, **{field: value})


@pytest.mark.parametrize("size", [0, -1, 2.5, float("nan"), "a", True, None])
@pytest.mark.parametrize(
    ("cls", "field"),
    [
        (fl.BatchNorm, "channels"),
        (fl.InstanceNorm, "channels"),
        (fl.LayerNorm, "shape"),
        (fl.RMSNorm, "shape"),
    ],
)
def test_sizes_are_checked(cls, field, size):
    with pytest.raises(
        (ValueError, TypeError), match=f"{cls.__name__}.{field}: expected an integer .* found"
    ):
        cls(size)
    assert cls(np.int64(3)) == cls(3)
