import functools
import re

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flatlayers as fl
from tests.helpers import assert_close, assert_same, central_difference


class Linear(fl.Layer):
    """rate * (level - y), as a drift of an Ornstein-Uhlenbeck process."""

    rate: float
    level: float = 0.0

    def parameters(self):
        return {"rate": fl.Param((), fl.initializers.constant(self.rate))}

    def forward(self, y, ps, st):
        return ps.rate * (self.level - y), st


class Constant(fl.Layer):
    """The same numbers everywhere: (..., n)."""

    numbers: tuple[float, ...]

    def parameters(self):
        return {"sigma": fl.Param((len(self.numbers),), fl.initializers.from_array(np.array(self.numbers)))}

    def forward(self, y, ps, st):
        return jnp.broadcast_to(ps.sigma, (*y.shape[:-1], len(self.numbers))), st


DRIFT = fl.Chain(fl.Dense(2, 4, jnp.tanh), fl.Dense(4, 2))
DIFFUSION = fl.Chain(fl.Dense(2, 4, jnp.tanh), fl.Dense(4, 2, jax.nn.softplus))


def call(key, sde, y0, dtype=float):
    ps, st = fl.setup(key, sde, dtype)
    y, new = jax.jit(sde)(jnp.asarray(y0, dtype), ps, st)
    assert jax.tree.structure(new) == jax.tree.structure(st)
    assert new.stats.result == 0
    return y, st, new


# Closed forms


@pytest.mark.long
@pytest.mark.parametrize("noise", ["diagonal", "general"])
def test_the_moments_of_an_ornstein_uhlenbeck_process(key, noise):
    """Of Euler's steps of h: the mean is (1 - rate h)^k y0, the variance a geometric sum; exactly so."""
    rate, level, h, n, m = 1.5, 0.7, 0.05, 2, 3
    diagonal = noise == "diagonal"
    sigma = np.diag([0.4, 0.9]) if diagonal else np.array([[0.5, -0.2, 0.3], [0.1, 0.6, -0.4]])
    values = np.diag(sigma) if diagonal else sigma.ravel()
    sde = fl.NeuralSDE(
        Linear(rate, level),
        Constant(tuple(values)),
        dt0=h,
        noise=noise,
        noise_dims=None if diagonal else m,
        saveat=[0.25, 1.0],
    )
    y0 = np.array([2.0, -1.0])
    ys, _, new = call(key, sde, np.broadcast_to(y0, (100, 200, n)))
    assert ys.shape == (2, 100, 200, n)
    assert new.stats.num_steps == 20
    for y, t in zip(ys.reshape(2, -1, n), (0.25, 1.0), strict=True):
        k, decay = round(t / h), 1 - rate * h
        mean = level + decay**k * (y0 - level)
        covariance = sigma @ sigma.T * h * (1 - decay ** (2 * k)) / (1 - decay**2)
        np.testing.assert_allclose(y.mean(0), mean, atol=0.02)
        np.testing.assert_allclose(np.cov(y.T), covariance, atol=0.015)
        exact = sigma @ sigma.T * (1 - np.exp(-2 * rate * t)) / (2 * rate)
        np.testing.assert_allclose(np.cov(y.T), exact, rtol=0.15, atol=0.01)


@pytest.mark.long
@pytest.mark.parametrize(
    ("solver", "correction", "largest"),
    [(diffrax.Euler(), 0.5, 0.06), (diffrax.Heun(), 0.0, 0.01)],
    ids=["Ito", "Stratonovich"],
)
def test_a_geometric_brownian_motion_along_its_path(key, solver, correction, largest):
    """y = y0 exp((mu - sigma^2 / 2) t + sigma W) for Itô, without the sigma^2 / 2 for Stratonovich."""
    mu, sigma = 0.5, 0.8
    sde = fl.NeuralSDE(lambda y: mu * y, lambda y: sigma * y, dt0=2**-8, solver=solver)
    y, st, _ = call(key, sde, np.ones((20, 1)))
    w = sde.brownian_path(y, st).evaluate(1.0)
    exact = np.exp(mu - correction * sigma**2 + sigma * w)
    error = np.sqrt(np.mean((y - exact) ** 2) / np.mean(exact**2))
    assert error < largest  # the other one is off by a factor of exp(sigma^2 / 2) = 1.38


@pytest.mark.slow
def test_diagonal_noise_is_general_noise_with_a_diagonal_matrix(key):
    def matrix(y):
        return (jnp.cos(y)[..., None] * jnp.eye(2).reshape((1,) * (y.ndim - 1) + (2, 2))).reshape(
            *y.shape[:-1], 4
        )

    y0 = jax.random.normal(key, (3, 2))
    diagonal, *_ = call(key, fl.NeuralSDE(jnp.sin, jnp.cos, dt0=0.1), y0)
    general, *_ = call(key, fl.NeuralSDE(jnp.sin, matrix, dt0=0.1, noise="general", noise_dims=2), y0)
    assert_close(diagonal, general)


@pytest.mark.long
def test_equals_plain_diffrax(key):
    sde = fl.NeuralSDE(DRIFT, DIFFUSION, t0=0.5, t1=1.5, dt0=0.1)
    ps, st = fl.setup(key, sde, float)
    y0 = jnp.array([1.0, -1.0])
    f, g = (functools.partial(fl.stateless_apply, layer) for layer in (DRIFT, DIFFUSION))
    terms = diffrax.MultiTerm(
        diffrax.ODETerm(lambda t, y, ps: f(y, ps.drift)),
        diffrax.ControlTerm(lambda t, y, ps: jnp.diag(g(y, ps.diffusion)), sde.brownian_path(y0, st)),
    )
    plain = diffrax.diffeqsolve(terms, diffrax.Euler(), 0.5, 1.5, 0.1, y0, ps.unpack()).ys[-1]
    assert_close(jax.jit(sde)(y0, ps, st)[0], plain)


def test_the_path_is_what_the_solver_needs(key):
    def area(solver):
        sde = fl.NeuralSDE(jnp.sin, jnp.cos, solver=solver)
        return sde.brownian_path(jnp.ones(2), fl.initial_states(key, sde)).levy_area

    assert area(diffrax.Euler()) is area(diffrax.Heun()) is diffrax.BrownianIncrement
    assert area(diffrax.SPaRK()) is diffrax.SpaceTimeLevyArea


# Randomness and state


@pytest.mark.long
def test_the_same_state_gives_the_same_path(key):
    sde = fl.NeuralSDE(DRIFT, DIFFUSION, dt0=0.1)
    ps, st = fl.setup(key, sde, float)
    solve = jax.jit(sde)
    y0 = jnp.ones((3, 2))
    y, new = solve(y0, ps, st)
    assert_same((y, new), solve(y0, ps, st))
    again, newer = solve(y0, ps, new)
    assert list(st) == ["stats", "key"]
    assert jax.tree.structure(newer) == jax.tree.structure(st)
    assert len({tuple(jax.random.key_data(s.key).tolist()) for s in (st, new, newer)}) == 3
    assert jnp.abs(y - again).min() > 1e-3
    assert jnp.abs(y[0] - y[1]).min() > 1e-3  # one noise a sample
    assert jnp.abs(y[:, 0] - y[:, 1]).min() > 1e-3  # and an entry


@pytest.mark.long
def test_vmap_over_samples_and_keys(key):
    sde = fl.NeuralSDE(DRIFT, DIFFUSION, dt0=0.1)
    ps, st = fl.setup(key, sde, float)
    y0, keys = jnp.ones((3, 2)), jax.random.split(key, 3)
    each = jax.jit(jax.vmap(lambda y, key: sde(y, ps, st.replace(key=key))))
    same, _ = each(y0, keys[jnp.zeros(3, int)])
    assert_close(same, jnp.broadcast_to(same[0], (3, 2)))
    others, new = each(y0, keys)
    assert new.stats.num_steps.shape == (3,)
    assert_close(others[0], same[0])
    assert jnp.abs(others[0] - others[1]).min() > 1e-3


class Counted(fl.Layer):
    """y times a number that is drawn anew in each call."""

    def states(self, key):
        return {"count": 0, "key": key}

    def forward(self, y, ps, st):
        key, now = jax.random.split(st.key)
        return y * jax.random.uniform(now, (), y.dtype), st.replace(count=st.count + 1, key=key)


@pytest.mark.long
def test_both_states_are_frozen_during_the_solve(key):
    sde = fl.NeuralSDE(Counted(), Counted(), dt0=0.1)
    ps, st = fl.setup(key, sde, float)
    y, new = jax.jit(sde)(jnp.ones(1), ps, st)
    a, b = (
        jax.random.uniform(jax.random.split(st[name].key)[1], (), float) for name in ("drift", "diffusion")
    )
    path = sde.brownian_path(jnp.ones(1), st)
    w = jax.vmap(path.evaluate)(jnp.arange(11) / 10)
    expected = np.prod(1 + a * 0.1 + b * np.diff(w[:, 0]))
    np.testing.assert_allclose(y, [expected], rtol=1e-9)
    assert new.drift.count == new.diffusion.count == 1
    assert not np.array_equal(jax.random.key_data(new.drift.key), jax.random.key_data(st.drift.key))


@pytest.mark.long
def test_no_evaluation_is_spent_on_a_layer_without_state(key):
    calls = []

    def watch(y):
        calls.append(y)
        return y

    sde = fl.NeuralSDE(watch, Counted(), dt0=0.5)
    sde(jnp.ones(2), *fl.setup(key, sde, float))
    assert not [y for y in calls if not isinstance(y, jax.core.Tracer)]


# Differentiating


@pytest.mark.slow
def test_gradients_agree_with_central_differences(key):
    """At a fixed key, with dropout in the drift and a stateful diffusion, in a chain."""
    sde = fl.NeuralSDE(
        fl.Chain(fl.Dense(2, 8, jnp.tanh), fl.Dropout(0.5), fl.Dense(8, 2)),
        fl.Chain(fl.Dense(2, 6, jax.nn.softplus), Counted()),
        dt0=0.2,
        noise="general",
        noise_dims=3,
    )
    model = fl.Chain(fl.Dense(2, 2), sde, fl.Dense(2, 1))
    ps, st = fl.setup(key, model, float)
    x = jax.random.normal(key, (3, 2))
    loss = jax.jit(jax.value_and_grad(lambda ps, x: jnp.sum(model(x, ps, st)[0] ** 2), (0, 1)))
    _, (by_ps, by_x) = loss(ps, x)
    direction = fl.ComponentVector(jax.random.normal(jax.random.key(2), ps.shape), ps.layout)
    slope = central_difference(lambda ps: loss(ps, x)[0], ps, direction)
    np.testing.assert_allclose(by_ps @ direction, slope, rtol=1e-6)
    slope = central_difference(lambda x: loss(ps, x)[0], x, x)
    np.testing.assert_allclose(jnp.vdot(by_x, x), slope, rtol=1e-6)


@pytest.mark.parametrize("solver", [diffrax.Euler(), diffrax.SPaRK()], ids=["Euler", "SPaRK"])
def test_float32_stays_float32_with_x64_on(key, solver):
    sde = fl.NeuralSDE(DRIFT, DIFFUSION, solver=solver, saveat=[0.5, 1.0])
    ps, st = fl.setup(key, sde)
    ys, new = jax.eval_shape(sde, jnp.ones((2, 2), jnp.float32), ps, st)
    assert ys.dtype == jnp.float32
    assert jax.tree.map(lambda leaf: leaf.dtype, new) == jax.tree.map(lambda leaf: leaf.dtype, st)


# What it takes and what it gives


@pytest.mark.parametrize("noise_dims", [None, 2])
def test_a_vector_is_a_state(key, noise_dims):
    noise = "diagonal" if noise_dims is None else "general"
    sde = fl.NeuralSDE(
        lambda y: y.map(jnp.sin), fl.Dense(3, 3 * (noise_dims or 1)), noise=noise, noise_dims=noise_dims
    )
    ps, st = fl.setup(key, sde, float)
    y0 = fl.ComponentVector.of({"position": [1.0, 2.0], "velocity": 3.0})
    y, _ = jax.eval_shape(sde, y0, ps, st)
    assert y.layout == y0.layout


@pytest.mark.long
def test_time_and_dense_output_and_adaptive_steps(key):
    """dy = t dt + 0 dW."""
    sde = fl.NeuralSDE(
        lambda x: x[0] * jnp.ones_like(x[1]),
        lambda x: jnp.zeros_like(x[1]),
        t1=2.0,
        solver=diffrax.ReversibleHeun(),
        stepsize_controller=diffrax.PIDController(rtol=1e-3, atol=1e-3),
        with_time=True,
        saveat=diffrax.SaveAt(t1=True, dense=True),
    )
    ps, st = fl.setup(key, sde, float)
    solution, new = jax.jit(sde.solve)(jnp.ones(2), ps, st)
    assert_close(solution.ys[-1], 3.0 * np.ones(2), rtol=1e-6)
    assert_close(solution.evaluate(2.0), solution.ys[-1])
    assert 0 < new.stats.num_steps < 100


def test_equal_layers_are_equal():
    def sde(**options):
        return fl.NeuralSDE(DRIFT, DIFFUSION, **options)

    assert sde(saveat=jnp.linspace(0, 1, 3)) == sde(saveat=[0.0, 0.5, 1.0])
    assert hash(sde(solver=diffrax.Heun())) == hash(sde(solver=diffrax.Heun()))
    assert sde() != sde(dt0=0.1)
    assert sde().layout.names == ("drift", "diffusion")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise": "white"}, "NeuralSDE.noise: expected 'diagonal' or 'general', found 'white'"),
        ({"noise": "general"}, "noise_dims to be the number of noises .* found None"),
        (
            {"noise": "general", "noise_dims": 0},
            "NeuralSDE.noise_dims: expected an integer of at least 1 or None, found 0",
        ),
        ({"noise_dims": 2}, "no noise_dims with diagonal noise"),
        ({"t1": -1.0}, "t0 < t1, found t0=0.0 and t1=-1.0"),
        ({"saveat": [0.5, 2.0]}, "from t0=0.0 to t1=1.0, found 2.0"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        fl.NeuralSDE(DRIFT, DIFFUSION, **options)


def test_layers_that_do_not_fit_are_named_before_the_solve(key):
    def check(sde, y0, message):
        with pytest.raises(ValueError, match=re.escape(message)) as info:
            sde.solve(y0, *fl.setup(key, sde, float))
        assert "in the layer NeuralSDE: NeuralSDE(" in info.value.__notes__[0]

    y0 = jnp.ones((5, 2))
    wide = fl.Dense(2, 3)
    check(fl.NeuralSDE(wide, DIFFUSION), y0, "whose output is like y0, float64[5,2], found float64[5,3]")
    check(fl.NeuralSDE(DRIFT, wide), y0, "(..., n), here (5, 2), found float64[5,3]")
    general = fl.NeuralSDE(DRIFT, DIFFUSION, noise="general", noise_dims=3)
    check(general, y0, "(..., n * noise_dims), here (5, 6), found float64[5,2]")
    check(fl.NeuralSDE(jnp.sin, jnp.sin), jnp.ones(()), "shape (..., n), found float64[]")
    check(fl.NeuralSDE(jnp.sin, jnp.sin), jnp.full(2, jnp.nan), "initial state of finite numbers")


def test_a_failed_solve_leaves_its_code(key):
    sde = fl.NeuralSDE(jnp.sin, jnp.cos, max_steps=2, throw=False)
    _, new = jax.jit(sde)(jnp.ones(2), *fl.setup(key, sde, float))
    assert new.stats.result != 0
    assert new.stats.num_steps == 2
