"""The parameter integral of `GaussAdjoint` over a forcing that is piecewise in time."""

import itertools

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flatlayers as fl
from flatlayers.adjoints._division import is_piecewise
from tests.adjoints.helpers import pid
from tests.helpers import equations


def solve(field, y0, args, t1=1.0, *, tolerance=1e-6, adjoint=None, **options):
    controller = options.pop("controller", pid(tolerance))
    adjoint = adjoint or fl.GaussAdjoint()
    term, solver, dt0 = diffrax.ODETerm(field), diffrax.Tsit5(), options.pop("dt0", None)
    return diffrax.diffeqsolve(
        term, solver, 0.0, t1, dt0, y0, args, stepsize_controller=controller, adjoint=adjoint, **options
    )


def pieces(kind, ts, values, t):
    if kind == "linear":
        return diffrax.LinearInterpolation(ts, values).evaluate(t)
    if kind == "cubic":
        return diffrax.CubicInterpolation(ts, diffrax.backward_hermite_coefficients(ts, values)).evaluate(t)
    if kind == "interp":
        return jnp.interp(t, ts, values)
    if kind == "ramps":
        return jnp.sum(values * jnp.maximum(t - ts, 0))
    return values[jnp.clip(jnp.searchsorted(ts, t, side="right") - 1, 0, ts.size - 1)]


PIECEWISE = [
    ("linear", jnp.linspace(0, 2, 9), 1e-4),
    ("linear", jnp.array([0.0, 0.05, 0.9, 0.93, 1.4, 2.0]), 1e-6),
    ("cubic", jnp.array([0.0, 0.3, 0.31, 1.1, 1.7, 2.0]), 1e-5),
    ("interp", jnp.linspace(0, 2, 31), 1e-3),
    ("ramps", jnp.array([0.11, 0.77, 1.234]), 1e-7),
    ("steps", jnp.array([0.0, 0.21, 0.8, 1.9]), 1e-5),
    ("steps", jnp.linspace(0, 1.9, 14), 1e-7),
]


@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "ts", "tolerance", "amplitude"),
    [
        ("linear", jnp.array([0.0, 0.05, 0.9, 0.93, 1.4, 2.0]), 1e-6, 1.0),
        ("steps", jnp.array([0.0, 0.21, 0.8, 1.9]), 1e-5, 0.0),
        *(
            pytest.param(*case, amplitude, marks=pytest.mark.slow)
            for case in PIECEWISE
            for amplitude in (1.0, 0.0)
        ),
    ],
)
def test_the_integral_over_a_piecewise_forcing(kind, ts, tolerance, amplitude):
    """`y' = u(t) - 1.5 y` has `y(T) = exp(-1.5 T) y0 + int u exp(1.5 (t - T))`: linear in what makes `u`.

    With zeros for it the solver sees nothing of the forcing.
    """
    values = amplitude * jnp.cos(jnp.arange(ts.size, dtype=float))
    saved = jnp.array([0.9, 2.0])

    @jax.jit
    @jax.grad
    def found(values):
        def forced(t, y, values):
            return pieces(kind, ts, values, t) - 1.5 * y

        ys = solve(forced, 0.3, values, 2.0, tolerance=tolerance, saveat=diffrax.SaveAt(ts=saved)).ys
        return jnp.sum(ys)

    expected = np.zeros(ts.size)
    edges = np.unique(np.concatenate([[0.0], np.asarray(ts), np.asarray(saved)]))
    points, weights = np.polynomial.legendre.leggauss(12)
    forcing = jax.jit(jax.vmap(jax.jacfwd(lambda values, t: pieces(kind, ts, values, t)), (None, 0)))
    for a, b in itertools.pairwise(edges):
        t = 0.5 * (a + b) + 0.5 * (b - a) * points
        past = np.where(t[:, None] < np.asarray(saved), np.exp(1.5 * (t[:, None] - np.asarray(saved))), 0)
        expected += 0.5 * (b - a) * (weights * past.sum(1)) @ np.asarray(forcing(values, t))
    error = np.abs(np.asarray(found(values)) - expected).max() / np.abs(expected).max()
    assert error < 5 * tolerance


@pytest.mark.slow
def test_a_network_of_a_piecewise_forcing_under_vmap():
    """Many parameters, a forcing with corners: stepped to, and not, where the solution itself is off."""
    model, ts = fl.MLP(3, (16,), 2), jnp.array([0.0, 0.37, 0.9, 1.0])
    ps, st = fl.setup(jax.random.key(0), model, float)
    y0 = jnp.array([[1.0, -0.5], [0.2, 3.0]])

    def gradient(adjoint, controller):
        def loss(ps, y0):
            def forced(t, y, ps):
                forcing = jnp.interp(t, ts, jnp.array([0.0, 2.0, -1.0, 0.5]))
                return model(jnp.append(y, forcing), ps, st)[0]

            return jnp.sum(solve(forced, y0, ps, adjoint=adjoint, controller=controller).ys ** 2)

        return jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(ps, y0).data

    def stepping(controller):
        return diffrax.ClipStepSizeController(controller, jump_ts=ts[1:-1])

    default = diffrax.RecursiveCheckpointAdjoint()
    expected = gradient(default, stepping(pid(1e-10)))

    def error(adjoint, controller):
        return jnp.abs(gradient(adjoint, controller) - expected).max() / jnp.abs(expected).max()

    assert error(fl.GaussAdjoint(), stepping(pid(1e-6))) < 5e-6
    assert error(fl.GaussAdjoint(), pid(1e-6)) < error(default, pid(1e-6))


@pytest.mark.parametrize(
    ("f", "expected"),
    [
        (lambda t, y, p: jnp.tanh(p * y) * jnp.exp(-t) + t**2, False),
        (lambda t, y, p: jnp.maximum(y, 0) * p + jnp.sin(t), False),
        (lambda t, y, p: jnp.where(y > 1, y, p) * t, False),
        (lambda t, y, p: jnp.append(y, t)[jnp.array([1])] * p, False),
        (lambda t, y, p: p * jnp.abs(t - 0.5), True),
        (lambda t, y, p: jnp.where(t > 0.5, p, y), True),
        (lambda t, y, p: p * jnp.floor(4 * t), True),
        (lambda t, y, p: jax.jit(lambda s: jnp.clip(s, 0.1, 0.2))(2 * t) * y, True),
        (lambda t, y, p: jax.lax.cond(t + 1 > 1.5, lambda: y, lambda: p), True),
        (lambda t, y, p: jax.nn.relu(t - 0.5) * y, True),
    ],
)
def test_what_is_piecewise_in_time(f, expected):
    jaxpr = jax.make_jaxpr(f)(jnp.array(0.3), jnp.array(0.7), jnp.array(1.1)).jaxpr
    assert is_piecewise(jaxpr) == expected


@pytest.mark.long
def test_a_smooth_field_has_no_division():
    """The nodes of a step are evaluated once: a control of the integral is for piecewise fields alone."""

    def loops(f):
        jaxpr = jax.make_jaxpr(jax.grad(lambda p: solve(f, 1.0, p).ys[0]))(2.0).jaxpr
        return sum(eqn.primitive.name == "while" for eqn in equations(jaxpr))

    smooth = loops(lambda t, y, p: -p * y * jnp.sin(t))
    assert loops(lambda t, y, p: -p * y * jnp.abs(jnp.sin(t))) > smooth == loops(lambda t, y, p: -p * y)


def test_a_forcing_of_noise_is_not_divided_for_ever():
    def noise(t, y, p):
        return p * jnp.sin(1e9 * jnp.floor(1e9 * t)) - y

    with pytest.raises(RuntimeError, match="maximum number of solver steps"):
        jax.grad(lambda p: solve(noise, 1.0, p, max_steps=16, dt0=0.1, tolerance=1e-2).ys[0])(0.0)


@pytest.mark.long
def test_a_part_that_is_wrong_and_cannot_be_divided_fails():
    """There are 32 times in a quarter this late, each with its own forcing."""

    def gradient(throw):
        def noise(t, y, p):
            return p * jnp.abs(jnp.sin(1e3 * t)) - y

        def end(p):
            term, controller = diffrax.ODETerm(noise), pid(1e-4)
            options = {"stepsize_controller": controller, "adjoint": fl.GaussAdjoint(), "throw": throw}
            start = 2.0**45
            return diffrax.diffeqsolve(
                term, diffrax.Tsit5(), start, start + 1, 0.25, 1.0, p, max_steps=64, **options
            ).ys[0]

        return jax.grad(end)(0.0)

    with pytest.raises(RuntimeError, match="minimum step size was reached"):
        gradient(True)
    assert np.isnan(gradient(False))


def test_a_jump_at_the_end_cannot_be_divided_and_is_right():
    """What the forcing is from the end on has no part in the solution, but is seen at the end itself."""
    ts = jnp.array([0.0, 0.4, 1.0])

    def end(values):
        return solve(lambda t, y, values: pieces("steps", ts, values, t) - y, 0.3, values).ys[0]

    found = jax.jit(jax.grad(end))(jnp.array([0.5, -1.0, 30.0]))
    expected = [np.exp(-0.6) - np.exp(-1), 1 - np.exp(-0.6), 0.0]
    np.testing.assert_allclose(found, expected, atol=5e-6)
