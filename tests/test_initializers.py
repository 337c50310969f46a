import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import flatlayers as fl
from flatlayers import initializers as init


PLAIN = ["zeros", "ones", "glorot_uniform", "glorot_normal", "kaiming_uniform", "kaiming_normal"]
PLAIN += ["uniform", "identity", "constant", "normal", "truncated_normal", "orthogonal", "sparse"]


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64, jnp.bfloat16])
def test_shape_dtype_and_determinism(key, name, dtype):
    initializer = getattr(init, name)
    value = initializer(key, (6, 4), dtype)
    assert (value.shape, value.dtype) == ((6, 4), dtype)
    np.testing.assert_array_equal(value, initializer(key, (6, 4), dtype))
    compiled = jax.jit(initializer, static_argnums=(1, 2))(key, (6, 4), dtype)
    np.testing.assert_allclose(compiled.astype(float), value.astype(float), rtol=1e-5)
    assert repr(initializer) == name
    assert hash(initializer) == hash(pickle.loads(pickle.dumps(initializer)))
    assert pickle.loads(pickle.dumps(initializer)) == initializer


@pytest.mark.parametrize(
    ("shape", "fans"),
    [((7, 5), (5, 7)), ((), (1, 1)), ((9,), (1, 9)), ((3, 5, 7), (15, 21)), ((3, 3, 5, 7), (45, 63))],
)
def test_fans(shape, fans):
    assert init.fans(shape) == fans


# The spread of a large draw against its closed form.
SPREADS = {
    "glorot_uniform": lambda fi, fo: np.sqrt(2 / (fi + fo)),
    "glorot_normal": lambda fi, fo: np.sqrt(2 / (fi + fo)),
    "kaiming_uniform": lambda fi, fo: np.sqrt(2 / fi),
    "kaiming_normal": lambda fi, fo: np.sqrt(2 / fi),
}


@pytest.mark.long
@pytest.mark.parametrize("name", SPREADS)
@pytest.mark.parametrize("shape", [(200, 100), (3, 3, 40, 60)])
def test_spread(key, name, shape):
    value = getattr(init, name)(key, shape, jnp.float64)
    expected = SPREADS[name](*init.fans(shape))
    np.testing.assert_allclose(jnp.std(value), expected, rtol=0.03)
    np.testing.assert_allclose(jnp.mean(value), 0, atol=0.03 * expected)
    if name.endswith("uniform"):
        assert jnp.max(jnp.abs(value)) <= np.sqrt(3) * expected


@pytest.mark.long
def test_agrees_with_jax(key):
    """Our matrices are `(out, in)`, those of `jax.nn.initializers` are `(in, out)`."""
    ours = init.glorot_uniform(key, (5, 9), jnp.float64)
    theirs = jax.nn.initializers.glorot_uniform(in_axis=-1, out_axis=-2)(key, (5, 9), jnp.float64)
    np.testing.assert_allclose(ours, theirs, rtol=1e-12)
    ours = init.kaiming_normal(gain=1.0)(key, (3, 3, 4, 6), jnp.float64)
    theirs = jax.nn.initializers.variance_scaling(1.0, "fan_in", "normal")(key, (3, 3, 4, 6), jnp.float64)
    np.testing.assert_allclose(ours, theirs, rtol=1e-12)


def test_fans_of_a_param(key):
    wide = fl.Param((50, 40, 30), init.glorot_uniform, fan_in=2, fan_out=4).initial(key, jnp.float64)
    np.testing.assert_allclose(jnp.std(wide), np.sqrt(2 / 6), rtol=0.02)
    plain = fl.Param((2,), lambda key, shape, dtype: jnp.zeros(shape, dtype), fan_in=2, fan_out=4)
    assert plain.initial(key, jnp.float32).dtype == jnp.float32


def test_one_fan_of_a_param(key):
    draw = fl.Param((4, 3), init.kaiming_uniform, fan_in=10_000).initial(key, jnp.float64)
    assert jnp.abs(draw).max() <= np.sqrt(6 / 10_000)


def test_from_array_in_another_byte_order(key):
    given = init.from_array(np.array([1.0, 2.0], ">f8"))
    np.testing.assert_array_equal(given(key, (2,), jnp.float32), [1.0, 2.0])


def test_options(key):
    assert (init.constant(3.0)(key, (2,), jnp.float32) == 3).all()
    np.testing.assert_allclose(jnp.std(init.normal(stddev=0.1)(key, (10_000,), float)), 0.1, rtol=0.05)
    np.testing.assert_allclose(jnp.std(init.normal()(key, (10_000,), float)), 1.0, rtol=0.05)
    assert jnp.abs(init.uniform(scale=0.5)(key, (1000,), float)).max() <= 0.5
    cut = init.truncated_normal(stddev=2.0, lower=-1.0, upper=1.5)(key, (20_000,), float)
    np.testing.assert_allclose(jnp.std(cut), 2 * scipy.stats.truncnorm(-1.0, 1.5).std(), rtol=0.02)
    assert init.glorot_uniform(gain=2.0) == init.glorot_uniform(gain=2.0) != init.glorot_uniform
    assert repr(init.normal(stddev=0.1)) == "normal(stddev=0.1)"
    twice = init.glorot_normal(gain=2.0)(key, (5, 4), float)
    np.testing.assert_allclose(twice, 2 * init.glorot_normal(key, (5, 4), float))
    with pytest.raises(TypeError, match="no option 'std'; there are: stddev"):
        init.normal(std=1.0)
    with pytest.raises(TypeError, match="key, shape, dtype"):
        init.normal(1.0, 2.0, 3.0)


def test_orthogonal(key):
    for shape in [(6, 4), (4, 6)]:
        q = init.orthogonal(gain=2.0)(key, shape, float)
        small = q.T @ q if shape[0] > shape[1] else q @ q.T
        np.testing.assert_allclose(small, 4 * jnp.eye(4), atol=1e-12)


def test_identity(key):
    np.testing.assert_array_equal(init.identity(key, (3, 5), float), jnp.eye(3, 5))
    kernel = init.identity(gain=2.0)(key, (3, 3, 4, 4), float)
    np.testing.assert_array_equal(kernel[1, 1], 2 * jnp.eye(4))
    assert kernel.sum() == 8
    with pytest.raises(ValueError, match="two axes"):
        init.identity(key, (3,), float)


def test_sparse(key):
    value = init.sparse(sparsity=0.75)(key, (8, 5), float)
    np.testing.assert_array_equal((value == 0).sum(0), 6)
    with pytest.raises(ValueError, match="matrix"):
        init.sparse(sparsity=0.5)(key, (3,), float)


def test_from_array(key):
    given = np.arange(6.0).reshape(2, 3)
    one, two = init.from_array(given), init.from_array(jnp.asarray(given))
    assert one == two
    assert hash(one) == hash(two)
    assert one != init.from_array(given + 1)
    layer = fl.Dense(3, 2, init_weight=one, use_bias=False)
    assert hash(layer) == hash(fl.Dense(3, 2, init_weight=two, use_bias=False))
    ps = fl.initial_parameters(key, layer)
    np.testing.assert_array_equal(ps.weight, given)
    assert ps.dtype == jnp.float32
    with pytest.raises(ValueError, match=r"\(3, 2\), found \(2, 3\)"):
        fl.setup(key, fl.Dense(2, 3, init_weight=one))


# Complex numbers


# The mean of |w|², which is that of real numbers.
SQUARES = {
    "uniform": lambda fi, fo: 1 / 3,
    "normal": lambda fi, fo: 1.0,
    "truncated_normal": lambda fi, fo: scipy.stats.truncnorm(-2.0, 2.0).var(),
    "glorot_uniform": lambda fi, fo: 2 / (fi + fo),
    "glorot_normal": lambda fi, fo: 2 / (fi + fo),
    "kaiming_uniform": lambda fi, fo: 2 / fi,
    "kaiming_normal": lambda fi, fo: 2 / fi,
}


@pytest.mark.long
@pytest.mark.parametrize("dtype", [jnp.complex64, jnp.complex128])
@pytest.mark.parametrize("name", SQUARES)
@pytest.mark.parametrize("shape", [(200, 150), (3, 3, 50, 60)])
def test_the_spread_of_complex_numbers(key, dtype, name, shape):
    w = np.asarray(getattr(init, name)(key, shape, dtype))
    assert w.dtype == dtype
    size, square = np.sqrt(w.size), SQUARES[name](*init.fans(shape))
    np.testing.assert_allclose(np.mean(np.abs(w) ** 2), square, rtol=5 / size)
    # Neither part is preferred, and they do not depend on each other.
    np.testing.assert_allclose([np.mean(w.real**2), np.mean(w.imag**2)], square / 2, rtol=8 / size)
    np.testing.assert_allclose(np.mean(w), 0, atol=5 * np.sqrt(square) / size)
    np.testing.assert_allclose(np.mean(w.real * w.imag), 0, atol=5 * square / size)
    real = np.asarray(getattr(init, name)(key, shape, jnp.float64))
    np.testing.assert_allclose(np.mean(real**2), np.mean(np.abs(w) ** 2), rtol=10 / size)
    if name.endswith("uniform"):
        assert np.abs(w).max() <= np.sqrt(3 * square)


@pytest.mark.parametrize("dtype", [jnp.complex64, jnp.complex128])
@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5), (2, 3, 4)])
def test_complex_orthogonal_is_unitary(key, dtype, shape):
    w = np.asarray(init.orthogonal(gain=2.0)(key, shape, dtype)).reshape(-1, shape[-1])
    small = w.conj().T @ w if w.shape[0] >= w.shape[1] else w @ w.conj().T
    np.testing.assert_allclose(small, 4 * np.eye(len(small)), atol=1e-5 if dtype == jnp.complex64 else 1e-12)
    assert np.abs(w.imag).max() > 0.1


@pytest.mark.long
@pytest.mark.parametrize("dtype", [jnp.complex64, jnp.complex128])
def test_the_others_in_complex_numbers(key, dtype):
    for name in ("zeros", "ones", "identity"):
        initializer = getattr(init, name)
        np.testing.assert_array_equal(initializer(key, (3, 5), dtype), initializer(key, (3, 5), float))
        assert initializer(key, (3, 5), dtype).dtype == dtype
    assert (init.constant(1 + 2j)(key, (2,), dtype) == 1 + 2j).all()
    value = init.sparse(sparsity=0.75, stddev=2.0)(key, (400, 50), dtype)
    np.testing.assert_array_equal((value == 0).sum(0), 300)
    np.testing.assert_allclose(jnp.sum(jnp.abs(value) ** 2) / 5000, 4.0, rtol=0.1)
    given = init.from_array([1.0 + 1j, 2.0])
    assert given(key, (2,), dtype).dtype == dtype
    cut = init.truncated_normal(stddev=2.0, lower=-1.0, upper=1.5)(key, (20_000,), dtype)
    expected = 4 * scipy.stats.truncnorm(-1.0, 1.5).moment(2)
    np.testing.assert_allclose(jnp.mean(jnp.abs(cut) ** 2), expected, rtol=0.03)


def test_no_imaginary_part_is_discarded(key):
    with pytest.raises(TypeError, match="constant: expected real values for a parameter of dtype float32"):
        init.constant(1j)(key, (2,), jnp.float32)
    layer = fl.Dense(1, 2, init_weight=init.from_array([[1.0], [1j]]))
    with pytest.raises(TypeError, match="from_array: expected real values for a parameter of dtype float64"):
        fl.setup(key, layer, jnp.float64)
    assert fl.setup(key, layer, complex)[0].weight[1, 0] == 1j


def test_a_complex_model_is_that_of_numpy(key):
    model = fl.Dense(3, 2, jnp.tanh)
    ps, st = fl.setup(key, model, jnp.complex64)
    x = np.array([1.0 + 1j, -2j, 0.5], np.complex64)
    z = np.asarray(ps.weight) @ x + np.asarray(ps.bias)
    np.testing.assert_allclose(model(x, ps, st)[0], np.tanh(z), rtol=1e-5)


# Options


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), "a", None, True, jnp.ones(2)])
@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("uniform", "scale"),
        ("normal", "stddev"),
        ("truncated_normal", "upper"),
        ("glorot_uniform", "gain"),
        ("kaiming_normal", "gain"),
        ("orthogonal", "gain"),
        ("identity", "gain"),
        ("sparse", "sparsity"),
    ],
)
def test_options_are_numbers(name, option, bad):
    with pytest.raises((TypeError, ValueError), match=f"{name}: {option}: expected a finite number.*, found"):
        getattr(init, name)(**{option: bad})


def test_options_in_range():
    with pytest.raises(ValueError, match="normal: stddev: expected a finite number of at least 0, found -1"):
        init.normal(stddev=-1)
    with pytest.raises(ValueError, match="sparse: sparsity: .* at least 0 and of at most 1, found 1.5"):
        init.sparse(sparsity=1.5)
    with pytest.raises(ValueError, match=r"lower under upper, found 2.0 and 1.0"):
        init.truncated_normal(lower=2.0, upper=1.0)(jax.random.key(0), (2,), float)
    assert init.normal(stddev=np.float32(0.5)) == init.normal(stddev=0.5)
    assert isinstance(dict(init.orthogonal(gain=2).options)["gain"], float)


def test_options_are_given_by_name_and_what_draws_by_place(key):
    for wrong in ((key,), (0.1,), (0.1, (2,), float), (key, (2,), float, 1)):
        with pytest.raises(
            TypeError, match=r"normal: expected \(key, shape, dtype\) to draw, or .*\(stddev\)"
        ):
            init.normal(*wrong)
    with pytest.raises(TypeError, match="to draw, or options by name"):
        init.normal(key, (2,), stddev=2.0)
    with pytest.raises(TypeError, match="no option 'key'"):
        init.normal(key=key, shape=(2,))
    with pytest.raises(TypeError, match=r"zeros: expected .*\(there are none\)"):
        init.zeros(3.0)
    assert init.constant(2) == init.constant(value=2)
    for wrong in (key, "a", jnp.ones(2)):
        with pytest.raises(TypeError, match="constant: value: expected a number, found"):
            init.constant(wrong)
