import functools

import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest

import flatlayers as fl
from flatlayers.equilibria import implicit


pytestmark = pytest.mark.long


TIGHT = fl.Anderson(1e-12, 1e-12)


def test_phantom_gradients_are_a_series():
    """Of `y = a y + b`: `tau (1 + (1 - tau + tau a) + ...)` with `k` terms."""

    def solve(b):
        solver, adjoint = fl.Anderson(1e-12, 1e-12), fl.PhantomAdjoint(3, 0.5)
        return optx.fixed_point(lambda y, b: 0.6 * y + b, solver, jnp.zeros(()), b, adjoint=adjoint).value

    value, gradient = jax.value_and_grad(solve)(jnp.array(1.0))
    np.testing.assert_allclose(value, 2.5, rtol=1e-12)
    np.testing.assert_allclose(gradient, 0.5 * (1 + 0.8 + 0.8**2), rtol=1e-12)
    for bad in ({"k": 0}, {"k": 1.5}, {"tau": 0.0}, {"tau": 1.5}, {"tau": np.nan}):
        with pytest.raises(ValueError, match=r"PhantomAdjoint.(k|tau): expected .*, found"):
            fl.PhantomAdjoint(**bad)
    with pytest.raises(TypeError, match="PhantomAdjoint.k: expected an integer of at least 1, found True"):
        fl.PhantomAdjoint(True)
    assert fl.PhantomAdjoint(np.int64(3), np.float32(0.5)) == fl.PhantomAdjoint(3, 0.5)


def test_versions_of_optimistix(monkeypatch):
    """Another version than the tested ones is refused with a way out; the default falls back to it."""
    for version in ("0.1.0", "0.1.7"):
        implicit.check_version(version)
    for version in ("0.0.11", "0.2.0", "1.0"):
        with pytest.raises(
            ImportError, match=rf"optimistix >= 0.1 and < 0.2, .* found {version}; .*Implicit"
        ):
            implicit.check_version(version)
    solver = fl.Anderson(1e-4, 1e-4)
    assert isinstance(implicit.as_adjoint(None, solver, 9, False), implicit.ImplicitAdjoint)
    monkeypatch.setattr(implicit, "is_tested", lambda version=None: False)
    assert isinstance(implicit.as_adjoint(None, solver, 9, False), optx.ImplicitAdjoint)
    with pytest.raises(ImportError, match="expected optimistix"):
        fl.PhantomAdjoint()


# Gradients where the model hardly contracts


def averaged(z):
    """Over the neighbours in a path."""
    return jnp.convolve(z, jnp.array([0.5, 0.0, 0.5], z.dtype), mode="same")


def delayed(z):
    kernel = jnp.exp(-jnp.arange(60.0) / 20).astype(z.dtype)
    return jnp.convolve(z, kernel / kernel.sum())[: len(z)]


def turned(z):
    q, _ = np.linalg.qr(np.random.default_rng(5).normal(size=(len(z), len(z))))
    return jnp.asarray(q, z.dtype) @ z


def sheared(z):
    return (0.9 * z + 0.1 * jnp.roll(z, -1).at[-1].set(0)).astype(z.dtype)


def carried(z):
    return jnp.roll(z, 1).at[0].set(0)


class Damped(fl.Layer):
    """`z = rate gain operator(z) + x`."""

    operator: object
    size: int
    rate: float

    def parameters(self):
        return {"gain": fl.Param((self.size,), fl.initializers.ones)}

    def forward(self, zx, ps, st):
        z, x = zx
        return self.rate * ps.gain * self.operator(z) + x, st


@pytest.mark.parametrize(
    ("operator", "n", "rate", "dtype"),
    [
        (averaged, 250, 0.999, jnp.float32),
        (delayed, 200, 0.99, jnp.float32),
        (turned, 90, 0.995, jnp.float64),
        (sheared, 50, 0.97, jnp.float32),
        (carried, 130, 0.999, jnp.float64),
        (carried, 1500, 0.98, jnp.float32),
    ],
)
def test_gradients_of_slow_contractions_are_those_of_a_dense_solve(operator, n, rate, dtype):
    """`u = (I - J)^-T w` for `x`, and `u rate operator(z)` for the gain."""
    layer = fl.DeepEquilibriumNetwork(
        Damped(operator, n, rate), optx.FixedPointIteration(1e-6, 1e-6), max_steps=20_000
    )
    ps, st = fl.setup(jax.random.key(0), layer, dtype)
    x, w = jax.random.normal(jax.random.key(1), (2, n), dtype)

    def loss(ps, x):
        z, new = layer(x, ps, st)
        return jnp.sum(w * z), new.stats.result

    by_ps, by_x = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(ps, x)[0]
    matrix = rate * np.asarray(jax.jit(jax.vmap(operator))(jnp.eye(n))).T
    z = np.linalg.solve(np.eye(n) - matrix, x.astype(float))
    u = np.linalg.solve((np.eye(n) - matrix).T, w.astype(float))
    for found, exact in ((by_x, u), (by_ps.model.gain, u * (matrix @ z))):
        assert np.linalg.norm(np.asarray(found, float) - exact) < 1e-3 * np.linalg.norm(exact)


def test_gradients_of_a_stiff_batch_and_of_scales():
    """Nonlinear, with samples of their own rates; a tree of two scales, by the dense Jacobian."""

    def cell(zx):
        z, (x, rate) = zx
        return {"a": rate * jnp.tanh(jnp.roll(z["b"], 1, -1) + x), "b": rate * jnp.sin(z["a"]) + x}

    zeros = fl.WrappedFunction(lambda xr: {"a": 0 * xr[0], "b": 0 * xr[0]})
    layer = fl.DeepEquilibriumNetwork(cell, fl.Anderson(1e-6, 1e-6), init=zeros, max_steps=3000)
    ps, st = fl.setup(jax.random.key(0), layer)
    rate = jnp.array([[0.3], [0.99], [-0.999]], jnp.float32)
    x, w = 0.1 * jax.random.normal(jax.random.key(1), (2, 3, 40), jnp.float32)

    def loss(x, layer=layer, dtype=jnp.float32):
        z = layer((x, rate.astype(dtype)), ps, st)[0]
        return jnp.sum(w.astype(dtype) * z["a"] * z["b"])

    found = jax.jit(jax.grad(loss))(x)
    dense = fl.DeepEquilibriumNetwork(
        cell, optx.Newton(1e-12, 1e-12), init=zeros, adjoint=optx.ImplicitAdjoint()
    )
    exact = jax.jit(jax.grad(functools.partial(loss, layer=dense, dtype=float)))(x.astype(float))
    assert jnp.linalg.norm(found.astype(float) - exact) < 1e-3 * jnp.linalg.norm(exact)


@pytest.mark.slow
def test_derivatives_of_any_order_and_mode():
    """Against optimistix's own adjoint, which builds the matrix."""

    def loss(adjoint, throw=False):
        model = fl.WrappedFunction(lambda zx: jnp.tanh(0.5 * zx[0]) + 0.1 * jnp.roll(zx[0], 1) ** 2 + zx[1])
        layer = fl.DeepEquilibriumNetwork(model, TIGHT, adjoint=adjoint, throw=throw)
        ps, st = fl.setup(jax.random.key(0), layer, float)
        return lambda x: jnp.sum(layer(x, ps, st)[0] ** 2)

    x = jnp.array([0.1, 0.2, 0.3])
    for derivative in (
        lambda f: lambda x: jax.jvp(f, (x,), (x[::-1],))[1],
        lambda f: jax.hessian(f),
        lambda f: jax.jacrev(jax.jacrev(f)),
        lambda f: jax.jacfwd(jax.hessian(f)),
        lambda f: lambda x: jax.vmap(jax.grad(f))(jnp.stack([x, 2 * x])),
    ):
        exact = jax.jit(derivative(loss(optx.ImplicitAdjoint())))(x)
        for throw in (False, True):
            np.testing.assert_allclose(
                jax.jit(derivative(loss(None, throw)))(x), exact, rtol=1e-8, atol=1e-10
            )


def test_a_gradient_that_there_is_not_is_nan_or_an_error():
    """`I - J` is singular, indefinite and large, or not finite; a sample of a batch alone."""

    def gradient(model, throw=False, n=3):
        layer = fl.DeepEquilibriumNetwork(model, fl.Anderson(1e-6, 1e-6), max_steps=5, throw=throw)
        ps, st = fl.setup(jax.random.key(0), layer, float)
        weight = jax.random.normal(jax.random.key(1), (n,))
        return jax.jit(jax.grad(lambda x: jnp.sum(weight * layer(x, ps, st)[0])))(jnp.zeros(n))

    for model, n in (
        (lambda zx: zx[0] + 0 * zx[1], 3),
        (lambda zx: 1.2 * jnp.roll(zx[0], 3) + zx[1], 20_000),
        (lambda zx: zx[1] + 0 * jnp.sqrt(jnp.abs(zx[0])), 4),
    ):
        assert jnp.isnan(gradient(model, n=n)).all()
        with pytest.raises(Exception, match="linear system of the implicit gradient.*'phantom'"):
            gradient(model, throw=True, n=n)
    layer = fl.DeepEquilibriumNetwork(lambda zx: zx[1][1] * jnp.ones(2) * zx[0] + zx[1][0], max_steps=200)
    ps, st = fl.setup(jax.random.key(0), layer, float)
    each = jax.vmap(jax.grad(lambda x, rate: layer((x, rate), ps, st)[0].sum()), (None, 0))
    rates = jnp.array([0.5, 1.0, -3.0])
    np.testing.assert_allclose(
        jax.jit(each)(jnp.zeros(2), rates), [[2, 2], [np.nan] * 2, [0.25] * 2], rtol=1e-6
    )
