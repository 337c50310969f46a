"""`minimize` against closed forms and SciPy itself."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

import flatlayers as fl

from ..helpers import assert_close, assert_same


@pytest.fixture(autouse=True)
def _as_a_loss_is_written():
    with jax.numpy_dtype_promotion("standard"):
        yield


LAYOUT = fl.Layout({"a": (), "rates": (3,), "net": {"weight": (2, 2)}})
BY_BOUNDS = ["L-BFGS-B", "TNC", "SLSQP", "trust-constr", "Nelder-Mead", "Powell", "COBYLA", "COBYQA"]
BY_GRADIENT = ["L-BFGS-B", "BFGS", "CG", "TNC", "SLSQP"]
BY_HESSIAN = ["Newton-CG", "trust-ncg", "trust-krylov", "trust-exact", "dogleg", "trust-constr"]


def start(dtype=float):
    return fl.ComponentVector(jnp.linspace(0.5, 1.5, 8).astype(dtype), LAYOUT)


def quadratic(ps, target):
    scale = jnp.arange(1.0, 9.0).astype(ps.dtype)
    return jnp.sum(scale * (ps.data - target) ** 2)


def rosenbrock(ps):
    x = ps.data
    return jnp.sum(100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2)


TARGET = np.linspace(-1.0, 2.0, 8)


@pytest.mark.parametrize("method", BY_GRADIENT + BY_HESSIAN)
def test_methods_find_the_minimum(method):
    options = {"gtol": 1e-9, "xtol": 1e-12} if method == "trust-constr" else {}
    result = fl.minimize(quadratic, start(), jnp.asarray(TARGET), method=method, options=options)
    assert result.x.layout == LAYOUT
    assert_close(result.x.data, TARGET, atol=1e-5)
    assert_close(result.fun, 0.0, atol=1e-9)
    assert_close(result.jac.data, jax.grad(quadratic)(result.x, TARGET).data)
    assert result.jac.net.weight.shape == (2, 2)


def test_the_steps_are_those_of_scipy():
    def f(x):
        return scipy.optimize.rosen(x), scipy.optimize.rosen_der(x)

    expected = scipy.optimize.minimize(f, np.asarray(start().data), jac=True, method="L-BFGS-B", tol=1e-12)
    result = fl.minimize(rosenbrock, start(), tol=1e-12)
    assert_close(result.x.data, expected.x, rtol=1e-6)
    assert abs(result.nit - expected.nit) <= 2


def test_products_with_the_hessian_are_those_of_scipy():
    expected = scipy.optimize.minimize(
        scipy.optimize.rosen,
        np.asarray(start().data),
        jac=scipy.optimize.rosen_der,
        hessp=scipy.optimize.rosen_hess_prod,
        method="trust-ncg",
    )
    result = fl.minimize(rosenbrock, start(), method="trust-ncg")
    assert_close(result.x.data, expected.x, rtol=1e-6)
    assert result.nit == expected.nit


@pytest.mark.parametrize("x64", [True, False])
@pytest.mark.parametrize("method", BY_BOUNDS)
def test_ends_are_inside_of_the_bounds(method, x64):
    with jax.enable_x64(x64), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        ps = start(jnp.float64 if x64 else jnp.float32)
        target = jnp.asarray(TARGET, ps.dtype)
        bounds = {"a": (0.1, None), "rates": (0.3, 0.7), "net": (None, 0.9)}
        inside = ps.data.clip(0.31, 0.69).at[0].set(0.5)
        options = {"options": {"maxiter": 4000}} if method in ("Nelder-Mead", "COBYLA") else {}
        result = fl.minimize(
            quadratic, fl.ComponentVector(inside, LAYOUT), target, method=method, bounds=bounds, **options
        )
        assert result.x.dtype == ps.dtype
        assert float(result.x.a) >= 0.1
        assert (np.asarray(result.x.rates, float) >= 0.3).all()
        assert (np.asarray(result.x.rates, float) <= 0.7).all()
        assert (np.asarray(result.x.net.weight, float) <= 0.9).all()
        low = np.array([0.1, 0.3, 0.3, 0.3, -np.inf, -np.inf, -np.inf, -np.inf])
        high = np.array([np.inf, 0.7, 0.7, 0.7, 0.9, 0.9, 0.9, 0.9])
        exact = method in ("L-BFGS-B", "TNC", "SLSQP")
        assert_close(result.x.data, TARGET.clip(low, high), atol=1e-3 if exact else 2e-2)
        assert_close(result.fun, quadratic(result.x, target), rtol=1e-6)


def test_bounds_as_vectors():
    by_name = fl.minimize(quadratic, start(), TARGET, bounds={"a": (0.1, None)})
    vectors = fl.bounds(LAYOUT, {"a": (0.1, None)})
    assert_same(fl.minimize(quadratic, start(), TARGET, bounds=vectors).x, by_name.x)
    assert_close(by_name.x.a, 0.1)


def test_a_start_on_a_bound_that_the_dtype_does_not_have():
    ps = fl.ComponentVector.of({"a": 0.3}, dtype=jnp.float32)  # above 0.3
    result = fl.minimize(lambda ps: -ps.a, ps, bounds={"a": (0, 0.3)})
    assert float(result.x.a) <= 0.3
    with pytest.raises(ValueError, match=r"expected 'a' to start in \(0, 0.2\), found 0.3"):
        fl.minimize(lambda ps: -ps.a, ps, bounds={"a": (0, 0.2)})


@pytest.mark.parametrize("method", BY_BOUNDS)
def test_numbers_fixed_by_equal_bounds(method):
    bounds = {"a": (0.5, 0.5), "rates": (None, 2.0)}
    options = {"options": {"maxiter": 4000}} if method in ("Nelder-Mead", "COBYLA") else {}
    result = fl.minimize(quadratic, start(), TARGET, method=method, bounds=bounds, **options)
    expected = TARGET.copy()
    expected[0] = 0.5
    assert_close(result.x.data, expected, atol=1e-2)
    assert float(result.x.a) == 0.5


def test_fixed_numbers_and_cobyla():
    seen, constraint = [], {"type": "ineq", "fun": lambda x: 0.7 - x[1]}  # of 8 numbers
    given = [{"callback": seen.append}, {"constraints": constraint}]
    for options in given:
        fl.minimize(quadratic, start(), TARGET, method="COBYQA", bounds={"a": (0.5, 0.5)}, **options)
        with pytest.raises(ValueError, match=r"equal bounds fix, found 1 of 8: COBYLA .* COBYQA takes them"):
            fl.minimize(quadratic, start(), TARGET, method="COBYLA", bounds={"a": (0.5, 0.5)}, **options)
    assert all(ps.layout == LAYOUT for ps in seen)
    with pytest.raises(ValueError, match="found 8 of 8"):
        fl.minimize(quadratic, start(), TARGET, method="COBYLA", bounds=(start(), start()))


def test_numbers_between_float64_and_the_dtype_of_the_vector():
    seen = []

    def loss(ps):
        seen.append(ps)
        return (ps.a - 1) ** 2

    with jax.enable_x64(False):
        result = fl.minimize(loss, fl.ComponentVector.of({"a": 3.0}))
        assert result.x.dtype == result.jac.dtype == jnp.float32
        assert isinstance(result.fun, float)
    assert all(ps.dtype == jnp.float32 for ps in seen)
    half = fl.ComponentVector.of({"a": 3.0}, dtype=jnp.bfloat16)
    assert fl.minimize(loss, half).x.dtype == jnp.bfloat16


def test_a_loss_is_compiled_once():
    traced = []

    def loss(ps, y):
        traced.append(None)
        return jnp.sum((ps.data - y) ** 2)

    fl.minimize(loss, start(), 1.0)
    first = len(traced)
    fl.minimize(loss, start() + 1.0, 2.0)
    assert len(traced) == first == 1


def test_a_layer_among_the_arguments(key):
    model = fl.Dense(2, 1)
    ps, st = fl.setup(key, model, float)
    x = np.random.default_rng(0).normal(size=(30, 2))
    y = x @ np.array([1.0, -2.0]) + 0.5

    def loss(ps, model, st, x, y):
        return jnp.mean((model(x, ps, st)[0][:, 0] - y) ** 2)

    result = fl.minimize(loss, ps, model, st, x, y, tol=1e-14)
    assert_close(result.x.weight, np.array([[1.0, -2.0]]), rtol=1e-5)
    assert_close(result.x.bias, np.array([0.5]), rtol=1e-5)


def test_callback_and_options():
    seen = []
    with pytest.warns(RuntimeWarning, match="L-BFGS-B did not succeed: .*LIMIT"):
        result = fl.minimize(rosenbrock, start(), callback=seen.append, options={"maxiter": 3})
    assert result.nit == len(seen) == 3
    assert_same(seen[-1], result.x)

    def stop(ps):
        raise StopIteration

    with pytest.warns(RuntimeWarning, match="did not succeed"):
        assert fl.minimize(rosenbrock, start(), callback=stop).nit == 1


@pytest.mark.parametrize("method", ["L-BFGS-B", "BFGS", "TNC", "SLSQP", "trust-constr", "Nelder-Mead", "CG"])
def test_trials_that_are_not_finite_are_stepped_back_from(method):
    # log is NaN below 0, and the first steps lead there: the minimum is at 1e-3.
    def loss(ps):
        return jnp.sum(ps.data - 1e-3 * jnp.log(ps.data))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        result = fl.minimize(loss, fl.ComponentVector.of({"a": 0.5}, dtype=float), method=method)
    assert np.isfinite(result.fun)
    assert_close(result.fun, loss(result.x))
    assert result.fun <= float(loss(fl.ComponentVector.of({"a": 0.5})))


def test_what_is_not_finite():
    ps = fl.ComponentVector.of({"a": -1.0})
    with pytest.raises(fl.NonFiniteError, match="the loss and its gradient at the start") as raised:
        fl.minimize(lambda ps: jnp.log(ps.a), ps)
    assert_same(raised.value.x, ps)
    with pytest.raises(fl.NonFiniteError, match="at the start"):
        fl.minimize(lambda ps: jnp.sqrt(ps.a), ps * 0.0)
    # A curvature that is not finite, of a value and a gradient that are.
    with pytest.raises(fl.NonFiniteError, match="product with the Hessian"):
        fl.minimize(lambda ps: jnp.abs(ps.a) ** 1.5 + ps.a, ps * 0.0, method="trust-ncg")


def test_bad_input():
    with pytest.raises(TypeError, match="expected a ComponentVector, found"):
        fl.minimize(quadratic, {"a": 1.0}, 1.0)
    with pytest.raises(TypeError, match="without leading axes"):
        fl.minimize(quadratic, fl.ComponentVector(jnp.ones((2, 8)), LAYOUT), 1.0)
    with pytest.raises(TypeError, match=r"returns a real number, found float64\[8\]"):
        fl.minimize(lambda ps: ps.data, start())
    with pytest.raises(ValueError, match="BFGS has no bounds"):
        fl.minimize(quadratic, start(), 1.0, method="BFGS", bounds={"a": (0, 1)})
    with pytest.raises(TypeError, match="bounds as a mapping or two vectors, found 3"):
        fl.minimize(quadratic, start(), 1.0, bounds=3)
    with pytest.raises(TypeError, match="the name of a method"):
        fl.minimize(quadratic, start(), 1.0, method=max)
    others = fl.bounds(fl.Layout({"b": (8,)}), {})
    with pytest.raises(TypeError, match="expected the same layout"):
        fl.minimize(quadratic, start(), 1.0, bounds=others)
    low, high = fl.bounds(LAYOUT, {"a": (0, 1)})
    with pytest.raises(ValueError, match="low <= high for 'a'"):
        fl.minimize(quadratic, start(), 1.0, bounds=(high, low))
