"""The base of solver layers: what a new layer gets from it, and what all layers can do."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest

import flatlayers as fl
from tests.equations.test_model_states import Noisy
from tests.equations.test_ode import MODEL, TIGHT, Rotation, Scaled
from tests.helpers import assert_close, central_difference


# A new layer


class ReactionDiffusion(fl.SolverLayer, fl.Container):
    """dy/dt = rate (y_left - 2 y + y_right) + model(y) on a ring of points, y of shape (..., points)."""

    model: fl.Layer

    def parameters(self):
        return {**super().parameters(), "rate": fl.Param((), fl.initializers.constant(0.7))}

    def field(self, t, y, ps, st):
        reaction, model = self.model(self.at(t, y), ps.model, st.model)
        neighbours = jnp.roll(y, 1, -1) + jnp.roll(y, -1, -1)
        return ps.rate * (neighbours - 2 * y) + reaction, st.replace(model=model)


POINTS = 8
WAVE = np.cos(2 * np.pi * 3 * np.arange(POINTS) / POINTS)


def waves(rate, decay, t):
    """A wave keeps its form: it is an eigenvector of the diffusion."""
    return np.exp((rate * (2 * np.cos(2 * np.pi * 3 / POINTS) - 2) - decay) * np.asarray(t))[..., None] * WAVE


def test_a_new_layer_against_its_closed_form(key):
    layer = ReactionDiffusion(Scaled(), t1=1.0, saveat=[0.25, 1.0], stepsize_controller=TIGHT)
    ps, st = fl.setup(key, layer, float)
    assert list(st) == ["stats"]
    assert ps.layout.names == ("model", "rate")
    ys, new = jax.jit(layer)(WAVE, ps, st)
    np.testing.assert_allclose(ys, waves(0.7, 0.5, [0.25, 1.0]), atol=1e-8)
    stats = new.stats
    assert stats.num_steps == stats.num_accepted_steps + stats.num_rejected_steps > 0
    assert stats.num_evaluations == 6 * stats.num_steps + 1
    assert stats.result == 0
    assert jax.tree.structure(new) == jax.tree.structure(st)
    assert jax.tree.map(jnp.result_type, new) == jax.tree.map(jnp.result_type, st)


def test_the_gradient_of_a_new_layer(key):
    layer = ReactionDiffusion(Scaled(), stepsize_controller=TIGHT)
    ps, st = fl.setup(key, layer, float)
    loss = jax.jit(jax.value_and_grad(lambda ps, x: jnp.sum(layer(x, ps, st)[0] ** 3), (0, 1)))
    x = jax.random.normal(key, (3, POINTS))
    _, (by_ps, by_x) = loss(ps, x)
    for name in ("model.rate", "rate"):
        along = (0 * ps).at[name].set(1.0)
        slope = central_difference(lambda p: loss(p, x)[0], ps, along)
        np.testing.assert_allclose(by_ps @ along, slope, rtol=1e-6)
    slope = central_difference(lambda x: loss(ps, x)[0], x, x[::-1])
    np.testing.assert_allclose(jnp.vdot(by_x, x[::-1]), slope, rtol=1e-6)


def test_the_states_of_a_new_layer_are_frozen(key):
    layer = ReactionDiffusion(Noisy(), stepsize_controller=TIGHT, batching="each")
    ps, st = fl.setup(key, layer, float)
    assert list(st) == ["stats", "model"]
    ps = ps.replace(rate=0.0)
    y, new = jax.jit(layer)(jnp.ones((2, POINTS)), ps, st)
    draw = jax.random.uniform(jax.random.split(st.model.key)[1], (POINTS,), float)
    np.testing.assert_allclose(y, np.stack([np.exp(-draw)] * 2), rtol=1e-8)
    assert new.model.count == 1
    assert jax.tree.structure(new) == jax.tree.structure(st)


@pytest.mark.long
def test_what_a_new_layer_has_for_free(key):
    event = diffrax.Event(lambda t, y, args, **_: y[0] - args[0].rate, optx.Newton(1e-10, 1e-10))
    dense = diffrax.SaveAt(t1=True, dense=True)
    layer = ReactionDiffusion(Scaled(), t1=jnp.inf, event=event, saveat=dense, stepsize_controller=TIGHT)
    ps, st = fl.setup(key, layer, float)
    solution, new = jax.jit(layer.solve)(WAVE, ps, st)
    end = np.log(0.7) / np.log(waves(0.7, 0.5, 1.0)[0])
    np.testing.assert_allclose(solution.ts, [end], rtol=1e-7)
    np.testing.assert_allclose(solution.evaluate(end / 2), waves(0.7, 0.5, end / 2), atol=1e-7)
    assert new.stats.result == jax.tree.leaves(diffrax.RESULTS.event_occurred)[0]
    each = ReactionDiffusion(Scaled(), saveat=[0.5, 1.0], batching="each", max_steps=64)
    ys, new = jax.jit(each)(np.stack([WAVE, 100 * WAVE]), ps, st)
    assert ys.shape == (2, 2, POINTS)
    np.testing.assert_allclose(ys[:, 0], waves(0.7, 0.5, [0.5, 1.0]), atol=1e-3)
    timed = ReactionDiffusion(Scaled(with_time=True), t1=2.0, with_time=True, stepsize_controller=TIGHT)
    np.testing.assert_allclose(jax.jit(timed)(np.ones(POINTS), ps, st)[0], 0.0, atol=1e-8)
    y0 = fl.ComponentVector.of({"a": WAVE[:3], "b": WAVE[3:]})
    assert jax.eval_shape(ReactionDiffusion(Scaled()), y0, ps, st)[0].layout == y0.layout


def test_errors_of_a_new_layer(key):
    class Short(ReactionDiffusion):
        def field(self, t, y, ps, st):
            return y[:1], st

    layer = Short(Scaled())
    with pytest.raises(ValueError, match="is like y0") as info:
        layer.solve(WAVE, *fl.setup(key, layer, float))
    assert "in the layer Short: Short(Scaled()" in info.value.__notes__[0]
    fine = ReactionDiffusion(Scaled())
    with pytest.raises(ValueError, match="initial state of finite numbers"):
        fine(np.nan * WAVE, *fl.setup(key, fine, float))
    for kind, message, options in (
        (TypeError, r"\.solver: expected a solver of diffrax, .* found .*Tsit5", {"solver": diffrax.Tsit5}),
        (TypeError, r"\.solver: expected a solver of diffrax, .* found None", {"solver": None}),
        (TypeError, r"\.stepsize_controller: expected a step size controller", {"stepsize_controller": 1e-3}),
        (TypeError, r"\.adjoint: expected an adjoint of diffrax, .* or None", {"adjoint": "backsolve"}),
        (TypeError, r"\.event: expected an event of diffrax, .* or None", {"event": lambda t, y, args: y}),
        (ValueError, r"\.t1: expected a finite number without an event, found inf", {"t1": np.inf}),
        (ValueError, "from t0=0.0 to t1=1.0, found 2.0", {"saveat": [2.0]}),
    ):
        with pytest.raises(kind, match=message):
            ReactionDiffusion(Scaled(), **options)
    missing = fl.SolverLayer()
    with pytest.raises(TypeError, match="SolverLayer does not define `field"):
        missing(WAVE, *fl.setup(key, missing, float))


def test_a_new_layer_is_a_value(key):
    layer = ReactionDiffusion(Scaled(), saveat=jnp.array([0.5]), solver=diffrax.Heun())
    assert layer == ReactionDiffusion(Scaled(), saveat=[0.5], solver=diffrax.Heun())
    assert hash(layer) == hash(ReactionDiffusion(Scaled(), saveat=[0.5], solver=diffrax.Heun()))
    assert layer != ReactionDiffusion(Scaled(), saveat=[0.5])
    assert ReactionDiffusion(Scaled()) == ReactionDiffusion(Scaled(), solver=diffrax.Tsit5())
    assert repr(ReactionDiffusion(Scaled(), t1=2.0)) == "ReactionDiffusion(Scaled(), t1=2.0)"


class Leaping(fl.SolverLayer, fl.Wrapper):
    """dq/dt = p and dp/dt = gain model(q), half by half, of `((q, p), gain)`; gives `2 q`."""

    model: fl.Layer

    def inputs(self, x, ps, st):
        y0, gain = x
        return fl.Start(y0, data=(gain,)), st

    def field(self, t, y, gain, ps, st):
        q, p = y
        force, st = self.model(self.at(t, q), ps, st)
        return (p, gain * force), st

    def terms(self, y0, args, dtypes):
        def kick(t, q, args):
            ps, st, gain = args
            return gain * self.model(self.at(t, q), ps, st)[0]

        fields = (lambda t, p, args: p), kick
        return tuple(diffrax.ODETerm(dtypes.field(field)) for field in fields)

    def outputs(self, solution):
        q, _ = super().outputs(solution)
        return 2 * q


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_a_layer_with_terms_inputs_and_outputs_of_its_own(key, dtype):
    """Symplectic steps of Euler, which the solver takes by the two terms."""
    steps = {"dt0": 0.125, "stepsize_controller": diffrax.ConstantStepSize()}
    layer = Leaping(jnp.negative, solver=diffrax.SemiImplicitEuler(), **steps)
    ps, st = fl.setup(key, layer, dtype)
    y0 = jnp.array([1.0, 2.0], dtype), jnp.array([0.5, 0.0], dtype)
    found, new = jax.jit(layer)((y0, jnp.array(3.0, dtype)), ps, st)
    assert found.dtype == dtype
    q, p = (np.asarray(half, float) for half in y0)
    for _ in range(8):
        q = q + 0.125 * p
        p = p - 0.125 * 3 * q
    np.testing.assert_allclose(found, 2 * q, rtol=1e-6)
    assert new.stats.num_steps == 8
    assert new.stats.num_evaluations == -1


# What the layers can do


@pytest.mark.slow
def test_each_sample_of_a_controlled_equation_takes_its_own_steps(key):
    """One path drives all, as `jax.vmap` over the starts does."""
    ts = jnp.linspace(0.0, 1.0, 6)
    path = diffrax.CubicInterpolation(
        ts, diffrax.backward_hermite_coefficients(ts, jnp.stack([ts, jnp.sin(6 * ts)], axis=-1))
    )
    model = fl.Dense(3, 6, jnp.tanh)
    layer, each = (fl.NeuralCDE(model, 2, saveat=[0.5, 1.0], batching=name) for name in ("shared", "each"))
    ps, st = fl.setup(key, layer, float)
    z0 = jnp.array([[0.1, 0.2, 0.3], [3.0, -40.0, 1.0]])
    zs, new = jax.jit(each)((z0, path), ps, st)
    expected, stats = jax.jit(jax.vmap(lambda z: layer((z, path), ps, st), out_axes=(1, 0)))(z0)
    assert_close(zs, expected)
    assert new.stats.num_steps == stats.stats.num_steps.max()


@pytest.mark.long
def test_each_sample_of_a_flow_takes_its_own_steps(key):
    x = jnp.array([[0.1, 0.2], [3.0, -4.0], [1.0, 1.0]])
    model = fl.Dense(2, 2, jnp.tanh)
    layer, each = (fl.FFJORD(model, regularize=True, batching=name) for name in ("shared", "each"))
    ps, st = fl.setup(key, layer, float)
    density, new = jax.jit(each)(x, ps, st)
    expected, _ = jax.jit(jax.vmap(layer, (0, None, None)))(x, ps, st)
    assert_close(density, expected)
    assert new.stats.kinetic > 0
    sample, _ = jax.jit(lambda key: each.sample(key, (3, 2), ps, st))(key)
    assert sample.shape == (3, 2)
    probed = fl.FFJORD(model, divergence="hutchinson", probes=3, batching="each")
    ps, st = fl.setup(key, probed, float)
    # As in one system, but for the steps.
    shared = fl.FFJORD(model, divergence="hutchinson", probes=3, stepsize_controller=TIGHT)
    assert_close(jax.jit(probed)(x, ps, st)[0], jax.jit(shared)(x, ps, st)[0], rtol=1e-2)


@pytest.mark.long
def test_each_sample_of_a_stochastic_equation_has_its_own_path(key):
    """dy = 0.5 dW by single samples: `y0 + 0.5 W(t1)` along the path of each."""
    layer = fl.NeuralSDE(lambda y: 0 * y, lambda y: 0.5 * jnp.ones_like(y), dt0=0.25, batching="each")
    ps, st = fl.setup(key, layer, float)
    y0 = jnp.zeros((2, 3, 1))
    y, new = jax.jit(layer)(y0, ps, st)
    paths = layer.brownian_path(y0, st)
    w = jax.vmap(jax.vmap(lambda path: path.evaluate(0.0, 1.0)))(paths)
    assert_close(y, 0.5 * w)
    assert len(np.unique(y)) == 6
    assert new.stats.num_steps == 4
    assert new.stats.num_evaluations == -1


def test_an_event_ends_a_stochastic_solve(key):
    event = diffrax.Event(lambda t, y, args, **_: y[0] > 0.55)
    layer = fl.NeuralSDE(jnp.ones_like, lambda y: 0 * y, dt0=0.1, event=event)
    solution, new = jax.jit(layer.solve)(jnp.zeros(1), *fl.setup(key, layer, float))
    np.testing.assert_allclose(solution.ys, [[0.6]], rtol=1e-6)
    assert new.stats.result == jax.tree.leaves(diffrax.RESULTS.event_occurred)[0]


def test_options_that_make_no_sense_are_taken_away():
    for option in ({"saveat": [0.5]}, {"event": None}):
        with pytest.raises(TypeError, match="unexpected keyword argument"):
            fl.FFJORD(fl.Dense(2, 2), **option)


# Failures, events, dense output and batches


CONSTANT = {"stepsize_controller": diffrax.ConstantStepSize(), "dt0": 0.02}


def test_numbers_that_are_not_finite_are_never_silent(key):
    """dy/dt = 10 y^2 from 1 is infinite at 0.1. Constant steps go on, adaptive ones stop."""

    def solver(**options):
        node = fl.NeuralODE(lambda y: 10 * y**2, max_steps=128, **options)
        ps, st = fl.setup(key, node, float)
        return jax.jit(lambda y0: node(y0, ps, st)[1].stats.result)

    fine = jnp.full((2, 2), 0.01)
    nan, infinite = fine.at[0, 1].set(jnp.nan), fine.at[1, 0].set(1.0)
    codes = (diffrax.RESULTS.nonfinite, diffrax.RESULTS.max_steps_reached)
    nonfinite, too_many_steps = (jax.tree.leaves(code)[0] for code in codes)
    adaptive = solver(throw=False, batching="each")
    assert [adaptive(y0) for y0 in (fine, nan, infinite)] == [0, nonfinite, too_many_steps]
    constant = solver(throw=False, **CONSTANT)
    assert [constant(y0) for y0 in (fine, nan, infinite)] == [0, nonfinite, nonfinite]
    throwing = solver(**CONSTANT)
    assert throwing(fine) == 0
    with pytest.raises(Exception, match="[Nn]onfinite"):
        throwing(infinite)


def test_a_start_that_is_not_finite(key):
    node = fl.NeuralODE(Rotation())
    ps, st = fl.setup(key, node, float)
    nan = jnp.array([1.0, jnp.nan])
    with pytest.raises(ValueError, match="initial state of finite numbers") as info:
        node(nan, ps, st)
    assert "in the layer NeuralODE" in info.value.__notes__[0]
    with pytest.raises(Exception, match="initial state of finite numbers"):
        jax.jit(node)(nan, ps, st)


def half(t, y, args, **kwargs):
    """Zero where y is the rate, 1/2: at log(2) / rate for y = exp(-rate t)."""
    ps, _ = args
    return y[0] - ps.rate


@pytest.mark.long
def test_an_event_ends_the_solve(key):
    event = diffrax.Event(half, optx.Newton(1e-10, 1e-10))
    node = fl.NeuralODE(Scaled(), t1=jnp.inf, event=event, stepsize_controller=TIGHT)
    assert node == fl.NeuralODE(Scaled(), t1=jnp.inf, event=event, stepsize_controller=TIGHT)
    ps, st = fl.setup(key, node, float)
    solution, new = jax.jit(node.solve)(jnp.ones(1), ps, st)
    np.testing.assert_allclose(solution.ts, np.log(2) / 0.5, rtol=1e-7)
    np.testing.assert_allclose(solution.ys, 0.5, rtol=1e-7)
    assert new.stats.result == jax.tree.leaves(diffrax.RESULTS.event_occurred)[0]

    each = fl.NeuralODE(Scaled(), t1=3.0, event=event, saveat=[1.0, 3.0], batching="each")
    ys, _ = jax.jit(each)(jnp.array([[1.0], [5.0]]), ps, st)
    decay = np.exp([-0.5, -1.5])
    np.testing.assert_allclose(ys[..., 0], [[decay[0], 5 * decay[0]], [np.inf, 5 * decay[1]]], rtol=1e-3)


@pytest.mark.long
@pytest.mark.parametrize("batching", ["shared", "each"])
def test_dense_output(key, batching):
    saveat = diffrax.SaveAt(dense=True)
    node = fl.NeuralODE(Scaled(), saveat=saveat, stepsize_controller=TIGHT, batching=batching)
    ps, st = fl.setup(key, node, float)
    y0 = jnp.array([[1.0, 2.0], [-1.0, 0.0], [5.0, 0.1]])

    @jax.jit
    def middle(y0):
        solution, _ = node.solve(y0, ps, st)
        evaluate = type(solution).evaluate
        return jax.vmap(evaluate, (0, None))(solution, 0.5) if batching == "each" else evaluate(solution, 0.5)

    np.testing.assert_allclose(middle(y0), y0 * np.exp(-0.25), rtol=1e-6)
    with pytest.raises(ValueError, match=r"saveat to save values.*layer\.solve\(x, ps, st\)"):
        node(y0, ps, st)


def test_wrong_batches(key):
    with pytest.raises(ValueError, match="NeuralODE.batching: expected 'shared' or 'each', found 'all'"):
        fl.NeuralODE(MODEL, batching="all")
    node = fl.NeuralODE(Scaled(), batching="each")
    ps, st = fl.setup(key, node, float)
    for y0 in ({"a": jnp.ones((2, 1)), "b": jnp.ones((3, 1))}, jnp.ones((0, 2))):
        with pytest.raises(ValueError, match=r"shape \(\*batch, n\).*found"):
            node(y0, ps, st)


def test_tolerances_are_short_for_a_controller():
    pid = diffrax.PIDController(rtol=1e-6, atol=1e-8)
    assert fl.NeuralODE(jnp.tanh, rtol=1e-6, atol=1e-8) == fl.NeuralODE(jnp.tanh, stepsize_controller=pid)
    one = fl.FFJORD(fl.Dense(2, 2), rtol=1e-3)
    assert one.stepsize_controller == diffrax.PIDController(rtol=1e-3, atol=1e-6)
    with pytest.raises(
        ValueError, match="NeuralODE: expected rtol and atol, or a stepsize_controller, found both"
    ):
        fl.NeuralODE(jnp.tanh, rtol=1e-6, stepsize_controller=pid)
    with pytest.raises(ValueError, match=r"NeuralODE\.atol: expected a finite number above 0"):
        fl.NeuralODE(jnp.tanh, atol=0.0)
    with pytest.raises(TypeError, match="rtol"):
        fl.NeuralSDE(fl.Dense(1, 1), fl.Dense(1, 1), rtol=1e-3)
