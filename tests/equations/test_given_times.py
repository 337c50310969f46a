"""Times as data: values and derivatives with respect to them against closed forms and finite differences."""

import functools

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest

import flatlayers as fl
from tests.helpers import assert_close, central_difference, counting_jit


TIGHT = diffrax.PIDController(rtol=1e-9, atol=1e-11)
TIMES = jnp.array([0.4, 0.9, 2.0])


class Wave(fl.Layer):
    """dy/dt = -rate y cos(t), so that y = y0 exp(-rate (sin(t) - sin(t0)))."""

    def parameters(self):
        return {"rate": fl.Param((), fl.initializers.constant(1.3))}

    def forward(self, x, ps, st):
        t, y = x
        return -ps.rate * y * jnp.cos(t), st


def exact(rate, y0, t0, ts):
    return y0 * jnp.exp(-rate * (jnp.sin(ts) - jnp.sin(t0)))


def wave(**options):
    node = fl.NeuralODE(Wave(), with_time=True, **{"stepsize_controller": TIGHT, **options})
    _, st = fl.setup(jax.random.key(0), node, float)

    def solve(rate, y0, t0, ts):
        ps = fl.ComponentVector(jnp.reshape(rate, 1), node.layout)
        ys, _ = node((jnp.reshape(y0, 1), fl.SolveTimes(ts, t0=t0)), ps, st)
        return ys[:, 0]

    return solve


POINT = (1.3, 0.7, 0.1, TIMES)
ADJOINTS = {
    "default": None,
    "gauss": fl.GaussAdjoint(),
    "checkpoint": diffrax.RecursiveCheckpointAdjoint(),
    "backsolve": diffrax.BacksolveAdjoint(),
    "direct": diffrax.DirectAdjoint(),
}


@pytest.mark.parametrize(
    "name",
    ["default", *(pytest.param(name, marks=pytest.mark.slow) for name in ADJOINTS if name != "default")],
)
def test_gradients_with_respect_to_times_by_any_adjoint(name):
    solve = wave(adjoint=ADJOINTS[name], max_steps=128)
    found = jax.jit(jax.jacrev(solve, argnums=(0, 1, 2, 3)))(*POINT)
    for a, b in zip(found, jax.jacrev(exact, argnums=(0, 1, 2, 3))(*POINT), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-8)


@pytest.mark.slow
def test_forward_mode():
    solve = wave(adjoint=diffrax.ForwardMode(), max_steps=128)
    found = jax.jit(jax.jacfwd(solve, argnums=(0, 2, 3)))(*POINT)
    for a, b in zip(found, jax.jacfwd(exact, argnums=(0, 2, 3))(*POINT), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-8)


@pytest.mark.slow
def test_second_derivatives_with_respect_to_times_and_all_else():
    solve, unpack = wave(), lambda v: (v[0], v[1], v[2], v[3:])
    v = jnp.concatenate([jnp.array(POINT[:3]), TIMES])
    found = jax.jit(jax.jacfwd(jax.jacrev(lambda v: solve(*unpack(v)))))(v)
    np.testing.assert_allclose(found, jax.hessian(lambda v: exact(*unpack(v)))(v), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_second_derivative_that_would_be_wrong_raises():
    solve = wave()
    for by, other in ((0, 3), (1, 2)):
        with pytest.raises(
            RuntimeError, match="expected a second derivative by a time.* to begin with the time"
        ):
            jax.jit(jax.jacfwd(jax.grad(lambda *v: solve(*v).sum(), by), other))(*POINT)


def test_the_slope_at_the_end_is_the_field():
    """d y(t1)/d t1 = f(t1, y1) of a network, and finite differences."""
    node = fl.NeuralODE(fl.MLP(2, (8,), 2, jnp.tanh), stepsize_controller=TIGHT)
    ps, st = fl.setup(jax.random.key(1), node, float)
    y0 = jnp.array([0.3, -1.0])
    end = jax.jit(lambda t1: node((y0, fl.SolveTimes(t1=t1)), ps, st)[0])
    y1, slope = end(1.7), jax.jacrev(end)(1.7)
    assert_close(slope, node.model(y1, ps, node.model.states(jax.random.key(0)))[0], rtol=1e-7)
    assert_close(slope, central_difference(end, jnp.array(1.7), jnp.array(1.0)), rtol=1e-5)
    assert_close(y1, fl.NeuralODE(node.model, t1=1.7, stepsize_controller=TIGHT)(y0, ps, st)[0])


@pytest.mark.slow
def test_second_order_equations():
    """q'' = -q from (1, 0): (cos, -sin)."""
    spring = fl.SecondOrderNeuralODE(lambda x: -x[..., :1], stepsize_controller=TIGHT)
    ps, st = fl.setup(jax.random.key(0), spring, float)
    start = (jnp.ones(1), jnp.zeros(1))

    @jax.jit
    def position(ts):
        return spring((start, fl.SolveTimes(ts)), ps, st)[0][0][:, 0]

    assert_close(position(TIMES), jnp.cos(TIMES), rtol=1e-7)
    assert_close(jax.jacrev(position)(TIMES), jnp.diag(-jnp.sin(TIMES)), rtol=1e-6)


# Times of each sample


ROWS = np.array([[0.1, 0.5, 1.0, 2.0], [0.3, 0.4, np.nan, np.nan], [np.nan, 1.5, np.nan, 1.6]])
ENTRIES = np.isfinite(ROWS)


def padded(batched):
    """Return the masked loss of three series as a function of rate and times, and its closed form."""
    node = fl.NeuralODE(
        Wave(), with_time=True, batching="each" if batched else "shared", stepsize_controller=TIGHT
    )
    ps, st = fl.setup(jax.random.key(0), node, float)
    y0 = jnp.array([[1.0], [2.0], [-1.0]])

    def values(ps, ts):
        times = fl.SolveTimes(ts, mask=ENTRIES)
        if batched:
            return node((y0, times), ps, st)[0][..., 0].T
        return jax.vmap(lambda y0, times: node((y0, times), ps, st)[0][:, 0])(y0, times)

    return values, (lambda ps, ts: exact(ps.rate, y0, 0.0, jnp.where(ENTRIES, ts, 0.0))), ps


@pytest.mark.long
@pytest.mark.parametrize("batched", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_padded_series_of_each_sample(batched):
    values, expected, ps = padded(batched)
    ts, weight = jnp.asarray(ROWS), jnp.asarray(ENTRIES, float)

    def loss(values):
        def of(ps, ts):
            found = values(ps, ts)
            return jnp.sum(weight * found**2), found

        return jax.value_and_grad(of, (0, 1), has_aux=True)

    (_, found), (of_ps, of_ts) = jax.jit(loss(values))(ps, ts)
    (_, exact_values), (exact_ps, exact_ts) = jax.jit(loss(expected))(ps, ts)
    assert jnp.isfinite(found).all()
    np.testing.assert_allclose(found[ENTRIES], exact_values[ENTRIES], rtol=1e-7)
    np.testing.assert_allclose(of_ps.data, exact_ps.data, rtol=1e-6)
    np.testing.assert_allclose(of_ts, exact_ts, rtol=1e-6, atol=1e-9)  # zero where there is no time


@pytest.mark.long
def test_a_time_that_is_left_out_repeats_the_state_before(key):
    node = fl.NeuralODE(lambda y: -y, batching="each", stepsize_controller=TIGHT)
    ps, st = fl.setup(key, node, float)
    ys, _ = node((jnp.ones((3, 1)), fl.SolveTimes(ROWS, mask=ENTRIES)), ps, st)
    filled = np.array([[0.1, 0.5, 1.0, 2.0], [0.3, 0.4, 0.4, 0.4], [0.0, 1.5, 1.5, 1.6]])
    np.testing.assert_allclose(ys[..., 0].T, np.exp(-filled), rtol=1e-7)
    none, _ = node((jnp.ones((3, 1)), fl.SolveTimes(ROWS, mask=0 * ENTRIES == 1)), ps, st)
    np.testing.assert_allclose(none, 1.0)


@pytest.mark.slow
def test_starts_and_ends_of_each_sample(key):
    node = fl.NeuralODE(lambda y: -y, t1=3.0, batching="each", stepsize_controller=TIGHT)
    ps, st = fl.setup(key, node, float)
    y0, t0, t1 = jnp.ones((2, 2, 1)), jnp.array([[0.0, 1.0], [2.0, 3.0]]), jnp.array([[1.0, 1.5], [0.0, 3.0]])

    def end(t0, t1):
        y, new = node((y0, fl.SolveTimes(t0=t0, t1=t1)), ps, st)
        return y[..., 0], new

    (y, new), (of_t0, of_t1) = jax.jit(end)(t0, t1), jax.grad(lambda *t: end(*t)[0].sum(), (0, 1))(t0, t1)
    np.testing.assert_allclose(y, np.exp(t0 - t1), rtol=1e-7)  # one of them goes back
    np.testing.assert_allclose(of_t0, np.exp(t0 - t1), rtol=1e-7)
    np.testing.assert_allclose(of_t1, -np.exp(t0 - t1), rtol=1e-7)
    assert new.stats.result == 0
    np.testing.assert_allclose(end(t0, None)[0], np.exp(t0 - 3), rtol=1e-7)


class Timed(fl.Layer):
    """dy/dt = -y, and the time of the last evaluation in the state."""

    def states(self, key):
        return {"t": jnp.zeros(())}

    def forward(self, x, ps, st):
        t, y = x
        return jax.tree.map(jnp.negative, y), st.replace(t=jnp.asarray(t, st.t.dtype))


def test_states_are_those_at_the_start_of_the_first_sample(key):
    node = fl.NeuralODE(Timed(), with_time=True, batching="each")
    ps, st = fl.setup(key, node, float)
    times = fl.SolveTimes([1.0, 2.0], t0=jnp.array([0.5, 0.75]))
    ys, new = jax.jit(node)((jnp.ones((2, 1)), times), ps, st)
    assert new.model.t == 0.5
    np.testing.assert_allclose(ys[..., 0], np.exp([[-0.5, -0.25], [-1.5, -1.25]]), rtol=1e-3)


def test_named_and_nested_states(key):
    """A vector with names, and a pytree: the slope at a time is the field's."""
    node = fl.NeuralODE(Timed(), with_time=True, stepsize_controller=TIGHT)
    ps, st = fl.setup(key, node, float)
    named = fl.ComponentVector.of({"a": jnp.ones(2), "b": jnp.array(3.0)})

    @jax.jit
    def at(t, y0):
        return node((y0, fl.SolveTimes(t[None])), ps, st)[0]

    for y0 in (named, {"a": jnp.ones(2), "b": jnp.array(-1.0)}):
        ys, slope = jax.jvp(functools.partial(at, y0=y0), (jnp.array(0.5),), (jnp.array(1.0),))
        assert_close(slope, jax.tree.map(jnp.negative, ys))
        assert_close(ys, jax.tree.map(lambda y: jnp.exp(-0.5) * y[None], y0), rtol=1e-6)


def test_other_times_need_no_other_program(key):
    node = fl.NeuralODE(lambda y: -y, batching="each")
    ps, st = fl.setup(key, node, float)
    solve, traced = counting_jit(lambda x: node(x, ps, st)[0])
    for scale in (1.0, 2.0):
        solve((jnp.ones((2, 1)), fl.SolveTimes(scale * TIMES)))
    assert len(traced) == 1


# Other layers


@pytest.mark.slow
def test_a_controlled_equation(key):
    """dz = -z dX with X = t^2: z = exp(-t^2), and the slope is that of the path."""
    knots = jnp.linspace(0.0, 2.0, 41)
    path = diffrax.CubicInterpolation(
        knots, diffrax.backward_hermite_coefficients(knots, knots[:, None] ** 2)
    )
    layer = fl.NeuralCDE(lambda z: -z, 1, stepsize_controller=TIGHT)
    ps, st = fl.setup(key, layer, float)
    values = jax.jit(lambda ts: layer(((jnp.ones(1), path), fl.SolveTimes(ts)), ps, st)[0][:, 0])
    ts = jnp.array([0.25, 1.0, 1.75])
    z1 = layer((jnp.ones(1), path), ps, st)[0]
    np.testing.assert_allclose(z1, np.exp(-4.0), rtol=1e-3)
    np.testing.assert_allclose(values(ts), np.exp(-(ts**2)), rtol=1e-3)
    numeric = (values(ts + 1e-5) - values(ts - 1e-5)) / 2e-5
    np.testing.assert_allclose(jax.jacrev(values)(ts), np.diag(numeric), rtol=1e-3)
    with pytest.raises(ValueError, match="within the times of the control"):
        layer(((jnp.ones(1), path), fl.SolveTimes([0.5, 2.5])), ps, st)


@pytest.mark.parametrize(
    "adjoint", [None, pytest.param(diffrax.RecursiveCheckpointAdjoint(), marks=pytest.mark.slow)]
)
def test_a_stochastic_equation(key, adjoint):
    """dX = dW: the values are those of the layer's path; there is no gradient by times."""
    layer = fl.NeuralSDE(lambda y: 0 * y, jnp.ones_like, t1=2.0, dt0=0.125, adjoint=adjoint)
    ps, st = fl.setup(key, layer, float)
    path = layer.brownian_path(jnp.zeros(1), st)
    ts = jnp.array([0.5, 1.25])
    values = jax.jit(lambda ts: layer((jnp.zeros(1), fl.SolveTimes(ts)), ps, st)[0])
    np.testing.assert_allclose(values(ts), [path.evaluate(t) for t in ts], atol=1e-9)
    with pytest.raises(RuntimeError, match="no gradient|cannot be autodifferentiated|nondifferentiable"):
        jax.grad(lambda ts: values(ts).sum())(ts)
    for wrong in ([0.5, 2.5], [-0.5, 1.0]):
        with pytest.raises(ValueError, match=r"from t0=0.0 to t1=2.0 of the layer|in order"):
            layer((jnp.zeros(1), fl.SolveTimes(wrong)), ps, st)


def test_augmented(key):
    path = diffrax.LinearInterpolation(jnp.array([0.0, 1.0]), jnp.array([[0.0], [1.0]]))
    ode, cde = fl.NeuralODE(lambda y: -y), fl.NeuralCDE(lambda z: -z, 1)
    for layer, x in ((ode, jnp.ones(1)), (cde, (jnp.ones(1), path))):
        layer = fl.AugmentedNDE(layer, 2)
        ys, _ = layer((x, fl.SolveTimes([0.5, 1.0])), *fl.setup(key, layer, float))
        np.testing.assert_allclose(ys, [[np.exp(-0.5), 0, 0], [np.exp(-1.0), 0, 0]], rtol=1e-3)


def test_a_flow_has_no_save_times(key):
    flow = fl.FFJORD(fl.Dense(1, 1))
    with pytest.raises(TypeError, match=r"FFJORD has no save times, found SolveTimes\(ts: float64\[1\]"):
        flow((jnp.ones(1), fl.SolveTimes([0.5])), *fl.setup(key, flow, float))


# What is saved


@pytest.mark.slow
def test_solutions_and_other_saved_values(key):
    both = fl.NeuralODE(lambda y: -y, saveat=diffrax.SaveAt(t0=True, t1=True), stepsize_controller=TIGHT)
    ps, st = fl.setup(key, both, float)

    @jax.jit
    def ends(t0, t1):
        solution, _ = both.solve((jnp.ones(1), fl.SolveTimes(t0=t0, t1=t1)), ps, st)
        return solution.ts, solution.ys[:, 0], solution.t1

    ts, ys, _ = ends(0.5, 2.0)
    assert_close(ts, jnp.array([0.5, 2.0]))
    assert_close(ys, jnp.array([1.0, np.exp(-1.5)]), rtol=1e-7)
    of_ts, of_ys, of_t1 = jax.jacrev(ends, 1)(0.5, 2.0)
    assert (of_ts.tolist(), float(of_t1)) == ([0.0, 1.0], 1.0)
    assert_close(of_ys, jnp.array([0.0, -np.exp(-1.5)]), rtol=1e-7)
    dense = fl.NeuralODE(lambda y: -y, saveat=diffrax.SaveAt(dense=True), stepsize_controller=TIGHT)
    middle = jax.jit(lambda t1: dense.solve((jnp.ones(1), fl.SolveTimes(t1=t1)), ps, st)[0].evaluate(0.5))
    np.testing.assert_allclose(middle(2.0), np.exp(-0.5), rtol=1e-6)
    with pytest.raises(RuntimeError, match="AdaptiveCheckpointAdjoint gives no gradient with respect to t1"):
        jax.grad(lambda t1: middle(t1).sum())(2.0)


@pytest.mark.slow
def test_with_an_event_a_gradient_is_the_adjoints_matter(key):
    event = diffrax.Event(lambda t, y, args, **_: y[0] < 0.1)
    node = fl.NeuralODE(lambda y: -y, event=event, stepsize_controller=TIGHT)
    ps, st = fl.setup(key, node, float)
    values = jax.jit(lambda ts: node((jnp.ones(1), fl.SolveTimes(ts)), ps, st)[0][:, 0])
    assert_close(values(TIMES), jnp.exp(-TIMES), rtol=1e-7)
    assert_close(jax.jacrev(values)(TIMES), jnp.diag(-jnp.exp(-TIMES)), rtol=1e-5)


def test_an_end_that_an_event_makes(key):
    """Half of `exp(t0 - t)` is left at `t0 + log(2)`."""
    event = diffrax.Event(lambda t, y, args, **_: y[0] - 0.5, optx.Newton(1e-9, 1e-9))
    node = fl.NeuralODE(lambda y: -y, t1=np.inf, event=event, stepsize_controller=TIGHT)
    ps, st = fl.setup(key, node, float)
    solution, _ = node.solve((jnp.ones(1), fl.SolveTimes(t0=0.25)), ps, st)
    assert_close(solution.ts, jnp.array([0.25 + np.log(2)]), 1e-7)
    with pytest.raises(ValueError, match="expected finite times"):
        node((jnp.ones(1), fl.SolveTimes(t1=np.nan)), ps, st)


# Dtypes


@pytest.mark.long
def test_known_times_are_solved_in_a_dtype_that_tells_them_apart(key):
    """In float32, unless its numbers are too far apart; so are times of a field's own."""
    seen = []

    def field(x):
        seen.append(x[0].dtype)
        return -x[1] / 60

    node = fl.NeuralODE(field, t0=1.7e9, t1=1.7e9 + 60, with_time=True)
    ps, st = fl.setup(key, node)
    ts = 1.7e9 + np.arange(0, 61, 20)
    ys, _ = node((jnp.ones(1, jnp.float32), fl.SolveTimes(ts)), ps, st)
    assert ys.dtype == jnp.float32
    assert jnp.dtype("float64") in seen
    np.testing.assert_allclose(ys[:, 0], np.exp(-(ts - ts[0]) / 60), rtol=1e-3)
    seen.clear()
    node((jnp.ones(1, jnp.float32), fl.SolveTimes([0.25, 0.75], t0=0)), ps, st)
    assert set(seen) == {jnp.dtype("float32")}


def test_rounded_times_begin_at_the_start_of_the_layer(key):
    node = fl.NeuralODE(lambda y: -y, t0=0.7, t1=1.0)
    ps, st = fl.setup(key, node, float)
    for make in (np.asarray, jnp.asarray):
        ys, _ = node((jnp.ones(1), fl.SolveTimes(make(np.float32([0.7, 0.8])))), ps, st)
        np.testing.assert_allclose(ys[:, 0], [1.0, np.exp(-0.1)], rtol=1e-4)


@pytest.mark.parametrize("times", [[0.1, 0.7], np.array([0.1, 0.7]), jnp.array([0.1, 0.7], jnp.float32)])
def test_any_numbers_without_x64(times):
    """Nothing warns of a dtype that JAX does not have there."""
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        layer = fl.NeuralODE(lambda y: -y)
        ps, st = fl.setup(jax.random.key(0), layer)
        y, _ = layer((jnp.ones(1, jnp.float32), fl.SolveTimes(times, t0=np.float64(0.0))), ps, st)
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y[:, 0], np.exp(-np.asarray(times)), rtol=1e-2)
