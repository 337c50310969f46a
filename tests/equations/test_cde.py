import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest
import scipy.linalg

import flatlayers as fl
from tests.helpers import assert_close, central_difference


TIGHT = diffrax.PIDController(rtol=1e-9, atol=1e-11)
FIELD = fl.Chain(fl.Dense(3, 8, jnp.tanh), fl.Dense(8, 6, jnp.tanh))
TIMES = jnp.linspace(0.0, 2.0, 9)


class LinearField(fl.Layer):
    """(A_1 z, ..., A_c z): a matrix A_c a channel."""

    hidden: int
    channels: int

    def parameters(self):
        return {"a": fl.Param((self.channels, self.hidden, self.hidden), fl.initializers.glorot_uniform)}

    def forward(self, z, ps, st):
        return jnp.einsum("cij,...j->...ic", ps.a, z).reshape(*z.shape[:-1], -1), st


def cubic(data, ts=TIMES):
    return diffrax.CubicInterpolation(ts, diffrax.backward_hermite_coefficients(ts, data))


def wave(*phases):
    """Data of two channels, the time and a sine, for one phase or a batch of them."""
    phase = np.array(phases) if len(phases) > 1 else np.array(phases)[0]
    t = np.asarray(TIMES).reshape(-1, *(1,) * phase.ndim) + 0 * phase
    return jnp.stack([t, np.sin(3 * t + phase)], axis=-1)


def call(key, cde, x):
    ps, st = fl.setup(key, cde, float)
    z, new = jax.jit(cde)(x, ps, st)
    assert jax.tree.structure(new) == jax.tree.structure(st)
    assert new.stats.result == 0
    return z, ps


# Closed forms


def test_a_linear_equation_along_a_line_is_a_matrix_exponential(key):
    """X(t) = t * slope gives z(t) = expm(t sum_c slope_c A_c) z0, for one sample and for a batch."""
    slope = np.array([0.7, -1.2])
    control = diffrax.LinearInterpolation(TIMES, jnp.outer(TIMES, slope))
    cde = fl.NeuralCDE(LinearField(3, 2), 2, saveat=[0.5, 2.0], stepsize_controller=TIGHT)
    z0 = np.random.default_rng(0).normal(size=(4, 3))
    zs, ps = call(key, cde, (jnp.asarray(z0), control))
    for z, t in zip(zs, (0.5, 2.0), strict=True):
        flow = scipy.linalg.expm(t * np.tensordot(slope, np.asarray(ps.a), 1))
        np.testing.assert_allclose(z, z0 @ flow.T, rtol=1e-7, atol=1e-9)


def test_one_channel_depends_on_the_ends_of_the_path_alone(key):
    """dz = f(z) dX is z' = f(z) run for the time X(t1) - X(t0), whatever is in between."""
    data = jnp.array([0.3, 0.5, 2.0, -1.0, 0.2, 0.0, 1.0, 1.4, 1.1])[:, None]
    field = fl.Dense(2, 2, jnp.tanh)
    cde = fl.NeuralCDE(field, 1, stepsize_controller=TIGHT)
    z0 = jnp.array([1.0, -0.5])
    z, ps = call(key, cde, (z0, cubic(data)))
    ode = fl.NeuralODE(field, t1=0.8, stepsize_controller=TIGHT)
    assert_close(z, jax.jit(ode)(z0, ps, fl.initial_states(key, ode))[0], atol=1e-6)


@pytest.mark.long
def test_equals_plain_diffrax(key):
    control = cubic(wave(0.0))
    cde = fl.NeuralCDE(FIELD, 2, t0=0.25, t1=1.5, saveat=[0.5, 1.5])
    z0 = jnp.array([1.0, -1.0, 0.5])
    zs, ps = call(key, cde, (z0, control))
    term = diffrax.ControlTerm(
        lambda t, z, ps: FIELD(z, ps, {"layer_0": {}, "layer_1": {}})[0].reshape(3, 2), control
    )
    plain = diffrax.diffeqsolve(
        term.to_ode(),
        diffrax.Tsit5(),
        0.25,
        1.5,
        None,
        z0,
        ps.unpack(),
        saveat=diffrax.SaveAt(ts=jnp.array([0.5, 1.5])),
        stepsize_controller=diffrax.PIDController(rtol=1e-4, atol=1e-6),
    ).ys
    assert_close(zs, plain)


# Batches


@pytest.mark.long
def test_a_path_for_each_sample_in_one_system_and_under_vmap(key):
    cde = fl.NeuralCDE(FIELD, 2, stepsize_controller=TIGHT)
    ps, st = fl.setup(key, cde, float)
    z0 = jax.random.normal(key, (3, 3))
    data = wave(0.0, 1.0, 2.0)
    together, new = jax.jit(cde)((z0, cubic(data)), ps, st)
    each = jax.vmap(lambda z0, data: cde((z0, cubic(data)), ps, st), (0, 1))
    apart, news = jax.jit(each)(z0, data)
    assert_close(together, apart, atol=1e-6)
    assert new.stats.num_steps.shape == ()
    assert news.stats.num_steps.shape == (3,)


def test_a_vector_is_a_state_and_float32_stays_float32(key):
    z0 = fl.ComponentVector.of({"a": jnp.ones(2, jnp.float32), "b": jnp.ones((), jnp.float32)})
    cde = fl.NeuralCDE(FIELD, 2, saveat=[1.0], dt0=0.1)
    ts = TIMES.astype(jnp.float32)
    control = cubic(wave(0.0).astype(jnp.float32), ts)
    z, new = jax.eval_shape(cde, (z0, control), *fl.setup(key, cde))
    assert z.layout == z0.layout
    assert z.shape == (1, 3)
    assert z.dtype == jnp.float32
    assert new.stats.num_steps.dtype == jnp.int32


# Differentiating and state


class Readout(fl.Container):
    """A start from the first value of the data, and a number at the end of the path."""

    start: fl.Layer
    rest: fl.Layer

    def forward(self, x, ps, st):
        ts, data = x
        z0, start = self.start(data[0], ps.start, st.start)
        y, rest = self.rest((z0, cubic(data, ts)), ps.rest, st.rest)
        return y, st.replace(start=start, rest=rest)


@pytest.mark.long
@pytest.mark.parametrize("adjoint", [None, diffrax.BacksolveAdjoint()], ids=["default", "Backsolve"])
def test_gradients_agree_with_central_differences(key, adjoint):
    """With respect to the vector, with dropout inside, and to the data, in a chain."""
    field = fl.Chain(fl.Dense(3, 8, jnp.tanh), fl.Dropout(0.5), fl.Dense(8, 6))
    steps = diffrax.ConstantStepSize()
    cde = fl.NeuralCDE(field, 2, stepsize_controller=steps, dt0=0.05, adjoint=adjoint, max_steps=64)
    model = Readout(fl.Dense(2, 3), fl.Chain(cde=cde, head=fl.Dense(3, 1)))
    ps, st = fl.setup(key, model, float)
    data = wave(0.5)

    def squares(ps, data):
        return jnp.sum(model((TIMES, data), ps, st)[0] ** 2)

    loss = jax.jit(jax.value_and_grad(squares, (0, 1)))
    _, (by_ps, by_data) = loss(ps, data)
    direction = fl.ComponentVector(jax.random.normal(jax.random.key(2), ps.shape), ps.layout)
    slope = central_difference(lambda ps: loss(ps, data)[0], ps, direction)
    np.testing.assert_allclose(by_ps @ direction, slope, rtol=1e-5)
    bump = jax.random.normal(key, data.shape)
    slope = central_difference(lambda data: loss(ps, data)[0], data, bump)
    np.testing.assert_allclose(jnp.vdot(by_data, bump), slope, rtol=1e-5)


class Counted(fl.Layer):
    """A field that counts its evaluations and draws a number."""

    def states(self, key):
        return {"count": 0, "key": key}

    def forward(self, z, ps, st):
        key, now = jax.random.split(st.key)
        return z * jax.random.uniform(now, (), z.dtype), st.replace(count=st.count + 1, key=key)


def test_the_state_is_frozen_during_the_solve(key):
    cde = fl.NeuralCDE(Counted(), 1, stepsize_controller=TIGHT)
    ps, st = fl.setup(key, cde, float)
    control = diffrax.LinearInterpolation(TIMES, TIMES[:, None])
    z, new = jax.jit(cde)((jnp.ones(2), control), ps, st)
    draw = jax.random.uniform(jax.random.split(st.model.key)[1], (), float)
    np.testing.assert_allclose(z, np.exp(2 * draw) * np.ones(2), rtol=1e-8)
    assert list(st) == ["stats", "model"]
    assert new.model.count == 1
    assert jax.tree.structure(new) == jax.tree.structure(st)
    assert list(fl.initial_states(key, fl.NeuralCDE(FIELD, 2))) == ["stats"]


def test_time_is_an_input_with_time(key):
    """dz = t dX with X = t."""
    cde = fl.NeuralCDE(lambda x: x[0] * jnp.ones_like(x[1]), 1, with_time=True)
    ps, st = fl.setup(key, cde, float)
    control = diffrax.LinearInterpolation(TIMES, TIMES[:, None])
    solution, _ = jax.jit(cde.solve)((jnp.ones(1), control), ps, st)
    assert_close(solution.ys[-1], 3.0 * np.ones(1))
    assert solution.t1 == 2.0


def test_an_event_ends_the_solve(key):
    """dz = dX with X = t, until z = 1."""
    event = diffrax.Event(lambda t, y, args, **kwargs: y[0] - 1.0, optx.Newton(1e-8, 1e-8))
    cde = fl.NeuralCDE(jnp.ones_like, 1, event=event)
    ps, st = fl.setup(key, cde, float)
    control = diffrax.LinearInterpolation(TIMES, TIMES[:, None])
    solution, new = jax.jit(cde.solve)((jnp.zeros(1), control), ps, st)
    assert_close(solution.ts, np.ones(1), rtol=1e-6)
    assert new.stats.num_evaluations > 0


# What does not fit


def test_equal_layers_are_equal():
    assert fl.NeuralCDE(FIELD, 2, saveat=jnp.array([0.5])) == fl.NeuralCDE(FIELD, 2, saveat=[0.5])
    assert hash(fl.NeuralCDE(FIELD, 2)) == hash(fl.NeuralCDE(FIELD, 2)) != hash(fl.NeuralCDE(FIELD, 3))
    assert fl.NeuralCDE(FIELD, 2).layout == FIELD.layout


@pytest.mark.parametrize(
    ("x", "kind", "message"),
    [
        (jnp.ones(3), TypeError, r"a pair \(z0, control\), found float64\[3\]"),
        ((jnp.ones(3), wave(0.0)), TypeError, r"control to be a path, .* found float64\[9,2\]"),
        (
            (jnp.ones(3), diffrax.VirtualBrownianTree(0.0, 1.0, 0.1, (2,), jax.random.key(0))),
            TypeError,
            "with a derivative, found VirtualBrownianTree: for noise use NeuralSDE",
        ),
        ((jnp.full(3, jnp.inf), cubic(wave(0.0))), ValueError, "initial state of finite numbers"),
        ((jnp.ones(()), cubic(wave(0.0))), ValueError, r"shape \(..., hidden\), found float64\[\]"),
        (
            (jnp.ones(3), cubic(wave(0.0)[:, :1])),
            ValueError,
            r"2 channels, of shape \(2,\) at .* float64\[1\]",
        ),
        (
            (jnp.ones((5, 3)), cubic(wave(0.0, 1.0))),
            ValueError,
            r"of shape \(2,\) or \(5, 2\) at a time, found float64\[2,2\]",
        ),
    ],
)
def test_wrong_input(key, x, kind, message):
    cde = fl.NeuralCDE(FIELD, 2)
    with pytest.raises(kind, match=message) as info:
        cde(x, *fl.setup(key, cde, float))
    assert "in the layer NeuralCDE" in info.value.__notes__[0]


def test_a_field_that_does_not_fit_is_named_before_the_solve(key):
    cde = fl.NeuralCDE(fl.Dense(3, 5), 2)
    with pytest.raises(ValueError, match=r"\(..., hidden \* channels\), here \(4, 6\), found float64\[4,5\]"):
        cde((jnp.ones((4, 3)), cubic(wave(0.0))), *fl.setup(key, cde, float))
    with pytest.raises(ValueError, match="NeuralCDE.channels: expected an integer of at least 1, found 0"):
        fl.NeuralCDE(FIELD, 0)
    with pytest.raises(ValueError, match="from t0=0.0 to t1=1.0, found 2.0"):
        fl.NeuralCDE(FIELD, 2, t0=0.0, t1=1.0, saveat=[2.0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"t1": 3.0}, "expected t0=None and t1=3.0 within the times of the control"),
        ({"saveat": [3.0]}, "must lie between t0 and t1"),
        ({"max_steps": 2, "stepsize_controller": TIGHT}, "maximum number of solver steps"),
    ],
)
def test_what_is_found_at_run_time(key, options, message):
    cde = fl.NeuralCDE(jnp.sin, 1, **options)
    x = (jnp.ones(1), cubic(wave(0.0)[:, 1:]))
    with pytest.raises(Exception, match=message):
        jax.jit(cde)(x, *fl.setup(key, cde, float))
