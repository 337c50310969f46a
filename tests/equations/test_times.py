"""Times of any scale and offset: each solver layer against a closed form, with its gradient."""

import re

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flatlayers as fl


TIGHT = diffrax.PIDController(rtol=1e-9, atol=1e-30)
PARTS = np.array([0.0, 1e-7, 0.25, 0.6, 1 - 1e-7, 1.0])  # of the whole time
SCALES = {
    "picoseconds": (0.0, 1e-12),
    "eons": (-3e12, 1e12),
    "offset": (1e10, 100.0),
    "days": (59000.0, 0.1),
    "back": (1.7e9, -3600.0),
}


class Decay(fl.Layer):
    """dy/dt = -rate y / scale, so that y = y0 exp(-rate s) with s from 0 to 1."""

    scale: float

    def parameters(self):
        return {"rate": fl.Param((), fl.initializers.constant(1.5))}

    def forward(self, y, ps, st):
        return -ps.rate * y / self.scale, st


class Spring(Decay):
    """d2q/dt2 = (rate / scale)^2 q, of which one solution is exp(-rate s)."""

    def forward(self, x, ps, st):
        return (ps.rate / self.scale) ** 2 * x[..., :1], st


class Energy(Decay):
    """rate (q^2 + p^2) / (2 scale), so that q + ip turns by the angle rate s."""

    def forward(self, x, ps, st):
        return ps.rate / (2 * self.scale) * jnp.sum(x**2, -1), st


def times_of(name):
    t0, scale = SCALES[name]
    ts = t0 + scale * PARTS
    return t0, scale, ts, (ts - t0) / scale


def options(t0, scale, ts):
    return {"t0": t0, "t1": float(ts[-1]), "saveat": ts, "stepsize_controller": TIGHT}


def check(layer, x, ts, expected, slope, pick=lambda ys: ys[..., 0], rtol=1e-6):
    """The saved values, and the gradient of their sum with respect to the one parameter."""
    assert layer.saveat == tuple(ts.tolist())
    check_values(layer, x, expected, slope, pick, rtol)


def check_values(layer, x, expected, slope, pick, rtol):
    ps, st = fl.setup(jax.random.key(0), layer, float)

    @jax.jit
    def values(ps):
        loss, pull, ys = jax.vjp(
            lambda ps: (lambda ys: (jnp.sum(ys), ys))(pick(layer(x, ps, st)[0])), ps, has_aux=True
        )
        return ys, pull(jnp.ones_like(loss))[0].data

    ys, gradient = values(ps)
    np.testing.assert_allclose(ys, expected, rtol=rtol, atol=rtol)
    np.testing.assert_allclose(gradient, [slope], rtol=10 * rtol)


@pytest.mark.long
@pytest.mark.parametrize("name", SCALES)
def test_neural_ode(name):
    t0, scale, ts, s = times_of(name)
    layer = fl.NeuralODE(Decay(scale), **options(t0, scale, ts))
    decay = np.exp(-1.5 * s)
    check(layer, jnp.ones(1), ts, decay, -np.sum(s * decay))


OTHERS = [
    "offset",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("picoseconds", "eons", "days", "back")),
]


@pytest.mark.parametrize("name", OTHERS)
def test_second_order(name):
    t0, scale, ts, s = times_of(name)
    layer = fl.SecondOrderNeuralODE(Spring(scale), **options(t0, scale, ts))
    x = (jnp.ones(1), jnp.array([-1.5 / scale]))
    ps, st = fl.setup(jax.random.key(0), layer, float)
    (q, v), _ = jax.jit(layer)(x, ps, st)
    np.testing.assert_allclose(q[:, 0], np.exp(-1.5 * s), rtol=1e-6)
    np.testing.assert_allclose(v[:, 0] * scale, -1.5 * np.exp(-1.5 * s), rtol=1e-6)
    assert layer.saveat == tuple(ts.tolist())


@pytest.mark.long
@pytest.mark.parametrize("name", OTHERS)
def test_augmented(name):
    t0, scale, ts, s = times_of(name)
    node = fl.NeuralODE(Decay(scale), **options(t0, scale, ts))
    decay = np.exp(-1.5 * s)
    check_values(
        fl.AugmentedNDE(node, 2), jnp.ones(1), decay, -np.sum(s * decay), lambda ys: ys[..., 0], 1e-6
    )


@pytest.mark.long
@pytest.mark.parametrize("name", OTHERS)
def test_hamiltonian(name):
    t0, scale, ts, s = times_of(name)
    layer = fl.NeuralODE(fl.HamiltonianNN(Energy(scale)), **options(t0, scale, ts))
    check(layer, jnp.array([1.0, 0.0]), ts, np.cos(1.5 * s), -np.sum(s * np.sin(1.5 * s)))


@pytest.mark.long
@pytest.mark.parametrize("given", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", OTHERS[:-1])
def test_cde(name, given):
    """The path is s, from 0 to 1; its ends are those of the solve, given or not."""
    t0, _, ts, s = times_of(name)
    ends = {"t0": t0, "t1": float(ts[-1])} if given else {}
    layer = fl.NeuralCDE(Decay(1.0), 1, saveat=ts, stepsize_controller=TIGHT, **ends)
    control = diffrax.LinearInterpolation(jnp.asarray(ts), jnp.asarray(s)[:, None])
    decay = np.exp(-1.5 * s)
    ps, st = fl.setup(jax.random.key(0), layer, float)
    value = jax.jit(jax.value_and_grad(lambda ps: jnp.sum(layer((jnp.ones(1), control), ps, st)[0])))
    total, gradient = value(ps)
    np.testing.assert_allclose(total, decay.sum(), rtol=1e-6)
    np.testing.assert_allclose(gradient.data, [-np.sum(s * decay)], rtol=1e-5)
    assert layer.saveat == tuple(ts.tolist())


@pytest.mark.long
@pytest.mark.parametrize("name", OTHERS[:-1])
def test_sde(name):
    """dX = rate dt / scale + dW / sqrt(scale): Euler steps are exact, along the layer's own path."""
    t0, scale, ts, s = times_of(name)

    class Drift(Decay):
        def forward(self, y, ps, st):
            return ps.rate / self.scale * jnp.ones_like(y), st

    layer = fl.NeuralSDE(
        Drift(scale),
        lambda y: jnp.ones_like(y) / np.sqrt(scale),
        t0=t0,
        t1=ts[-1],
        dt0=scale / 64,
        saveat=ts[[0, 2, 5]],
    )
    ps, st = fl.setup(jax.random.key(0), layer, float)
    y0 = jnp.zeros(3)
    path = jax.jit(lambda t: layer.brownian_path(y0, st).evaluate(t))
    expected = [1.5 * s[i] + path(ts[i]) / np.sqrt(scale) for i in (0, 2, 5)]

    @jax.jit
    def total(ps):
        return jax.value_and_grad(lambda ps: (lambda ys: (ys.sum(), ys))(layer(y0, ps, st)[0]), has_aux=True)(
            ps
        )

    (_, ys), gradient = total(ps)
    np.testing.assert_allclose(ys, expected, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(gradient.data, [3 * np.sum(s[[0, 2, 5]])], rtol=1e-6)


@pytest.mark.long
@pytest.mark.parametrize("name", OTHERS)
def test_ffjord(name):
    """The flow shrinks by exp(-rate): x = z exp(-rate), log p(x) = log N(x exp(rate)) + rate."""
    t0, scale, ts, _ = times_of(name)
    layer = fl.FFJORD(Decay(scale), t0=t0, t1=float(ts[-1]), stepsize_controller=TIGHT)
    z = 0.3
    x = jnp.array([[z * np.exp(-1.5)]])
    expected = -0.5 * (z**2 + np.log(2 * np.pi)) + 1.5
    check_values(layer, x, [expected], -(z**2) + 1, lambda log_density: log_density, 1e-6)


@pytest.mark.long
@pytest.mark.parametrize("name", OTHERS)
def test_multiple_shooting(name):
    t0, scale, _, _ = times_of(name)
    s = np.linspace(0, 1, 7)
    decay = np.exp(-1.5 * s)[:, None]
    node = fl.NeuralODE(Decay(scale), stepsize_controller=TIGHT)
    ps, st = fl.setup(jax.random.key(0), node, float)

    @jax.jit
    def loss(ps):
        return fl.multiple_shooting(node, t0 + scale * s, 0 * decay, decay[:-1:2], ps, st, continuity=0.0)

    (_, predictions), gradient = (
        jax.value_and_grad(loss, has_aux=True)(ps)[0],
        jax.grad(lambda p: loss(p)[0])(ps),
    )
    index = np.arange(3)[:, None] * 2 + np.arange(3)
    np.testing.assert_allclose(predictions, decay[index], rtol=1e-5)
    slope = np.mean(-2 * (s[index] - s[::2][:3, None])[..., None] * decay[index] ** 2)
    np.testing.assert_allclose(gradient.data, [slope], rtol=1e-4)


# Which times are clipped


def saved(saveat, **ends):
    return fl.NeuralODE(lambda y: -y, saveat=saveat, **ends).saveat


@pytest.mark.parametrize("t1", [0.1, 0.3, 1.1, 0.7, 123.4, -0.3])
def test_the_rounding_of_an_end_in_the_times_own_dtype_is_forgiven(t1):
    for dtype in (np.float32, np.float16, jnp.bfloat16):
        times = np.linspace(0, t1, 5).astype(dtype)
        found = saved(times, t1=t1)
        inner = times.astype(float)
        assert found[:-1] == tuple(inner[:-1].tolist())
        assert found[-1] == (t1 if abs(inner[-1]) > abs(t1) else inner[-1])
    beyond = [0.0, float(np.nextafter(t1, 2 * t1))]
    assert saved(beyond, t1=t1) == (0.0, t1)
    assert saved(diffrax.SaveAt(ts=jnp.asarray(beyond)), t1=t1) == (0.0, t1)
    with_end = saved(diffrax.SaveAt(t0=True, ts=jnp.linspace(0, t1, 5, dtype=jnp.float32)), t1=t1)
    assert abs(np.asarray(with_end.value.subs.ts)).max() <= abs(t1)


@pytest.mark.parametrize(
    ("saveat", "ends"),
    [
        ([0.5, 1.0 + 1e-9], {}),
        ([0.5, float(np.float32(0.1))], {"t1": 0.1}),  # a float is of float64
        (np.array([-1e-12, 1.0]), {}),
        (np.array([1e-12, 1.1e-12]), {"t1": 1e-12}),
        (np.float32([0.0, 1.00001]), {}),
        ([1.7e9 - 1e-3, 1.7e9], {"t0": 1.7e9, "t1": 1.7e9 + 60}),
        ([0.5, np.nan], {}),
        ([np.inf], {}),
        (diffrax.SaveAt(ts=[0.5, 1.1], t1=True), {}),
    ],
)
def test_times_outside_are_refused(saveat, ends):
    with pytest.raises(ValueError, match=r"expected times in `saveat` from t0=.* to t1=.*, found"):
        saved(saveat, **ends)


@pytest.mark.parametrize(
    ("saveat", "ends", "way_out"),
    [
        ([0.0, 2.0, 5.0], {}, "t1=1.0, found 2.0; the solve ends at t1: give `t1=5.0`"),
        ([-2.0, -1.0, 1.0], {}, "t1=1.0, found -2.0; the solve starts at t0: give `t0=-2.0`"),
        ([1.0, -2.0], {"t0": 1.0, "t1": -1.0}, "t1=-1.0, found -2.0; the solve ends at t1: give `t1=-2.0`"),
        ([2.0, 0.0], {"t0": 1.0, "t1": -1.0}, "found 2.0; the solve starts at t0: give `t0=2.0`"),
        ([0.5, np.nan], {}, "t1=1.0, found nan"),
    ],
)
def test_times_outside_say_which_end_to_give(saveat, ends, way_out):
    with pytest.raises(ValueError, match=re.escape(way_out) + "$"):
        saved(saveat, **ends)


def test_infinite_times():
    event = diffrax.Event(lambda t, y, args, **_: y[0] < 0.5)
    assert fl.NeuralODE(lambda y: -y, t1=np.inf, event=event, saveat=[1.0]).saveat == (1.0,)
    with pytest.raises(ValueError, match="from t0=0.0 to t1=inf, found inf"):
        fl.NeuralODE(lambda y: -y, t1=np.inf, event=event, saveat=[1.0, np.inf])


def test_steps_that_no_dtype_resolves(key):
    """1e10 + 1e-7 is 1e10 in float64: such a solve would stand still."""
    constant = diffrax.ConstantStepSize()
    node = fl.NeuralODE(
        lambda y: -y, t0=1e10, t1=1e10 + 1, dt0=1e-7, stepsize_controller=constant, max_steps=None
    )
    with pytest.raises(ValueError, match=r"expected steps that float64 resolves at t=1.*, found dt0=1e-07"):
        node(jnp.ones(1), *fl.setup(key, node, float))


def test_inner_times_stay():
    near = [1e-300, 1e-12, 0.5, 1 - 2**-53, 1.0]
    assert saved(near) == tuple(near)
    assert saved(near[::-1], t0=1.0, t1=0.0) == tuple(near[::-1])
    assert saved([59000.0, 59000.0 + 2**-37], t0=59000.0, t1=59001.0)[1] == 59000.0 + 2**-37


@pytest.mark.long
@pytest.mark.parametrize("kind", ["float32 path", "float32 times"])
def test_the_ends_of_a_path_may_be_rounded(key, kind):
    """A path of float32 in a float64 solve, with its ends as numbers or not at all, and the reverse."""
    dtypes = (np.float32, float) if kind == "float32 path" else (float, np.float32)
    knots, times = (np.linspace(0.1, 0.7, 7).astype(dtype) for dtype in dtypes)
    control = diffrax.LinearInterpolation(jnp.asarray(knots), jnp.asarray(knots)[:, None])
    for ends in ({}, {"t0": 0.1, "t1": 0.7}):
        layer = fl.NeuralCDE(lambda z: -z, 1, saveat=times, **ends)
        with jax.numpy_dtype_promotion("standard"):
            zs, _ = layer((jnp.ones(1), control), *fl.setup(key, layer, float))
        np.testing.assert_allclose(zs[:, 0], np.exp(0.1 - times), rtol=1e-4)
    layer = fl.NeuralCDE(lambda z: -z, 1, saveat=diffrax.SaveAt(ts=[float(times[0]), 0.3, float(times[-1])]))
    with jax.numpy_dtype_promotion("standard"):
        zs, _ = layer((jnp.ones(1), control), *fl.setup(key, layer, float))
    np.testing.assert_allclose(zs[:, 0], np.exp(0.1 - np.array([0.1, 0.3, 0.7])), rtol=1e-4)
    layer = fl.NeuralCDE(lambda z: -z, 1, t1=0.7001)
    with pytest.raises(ValueError, match="within the times of the control"):
        layer((jnp.ones(1), control), *fl.setup(key, layer, float))


# Times that float32 does not hold


UNIX = {"t0": 1.7e9, "t1": 1.7e9 + 60, "saveat": 1.7e9 + np.arange(0, 61, 10)}


@pytest.mark.long
@pytest.mark.parametrize(
    ("options", "rate"),
    [
        (UNIX, 1 / 60),
        ({"t0": 59000.0, "t1": 59001.0, "saveat": 59000 + np.arange(0, 145, 12) / 144}, 1.0),
        ({"t1": 1e6, "saveat": [1e6 - 0.02, 1e6 - 0.01, 1e6]}, 1e-6),
        ({"t0": 2020.0, "t1": 2020.01}, 100.0),
        ({"t0": 3e7, "t1": 3e7 + 8, "dt0": 0.125, "stepsize_controller": diffrax.ConstantStepSize()}, 1 / 8),
    ],
)
def test_times_that_float32_does_not_hold(key, options, rate):
    """With x64 the solve is of float64 and its result of float32, without the error says what to do."""
    layer = fl.NeuralODE(Decay(1.5 / rate), **options)
    for dtype in (jnp.float32, jnp.bfloat16):
        ps, st = fl.setup(key, layer, dtype)
        ys, _ = jax.jit(layer)(jnp.ones(1, dtype), ps, st)
        assert ys.dtype == dtype
        expected = np.exp(-rate * (np.asarray(layer.saveat or layer.t1) - layer.t0))
        np.testing.assert_allclose(
            ys[..., 0].astype(float), expected, rtol=4e-4 if dtype == jnp.float32 else 3e-2
        )
    with (
        jax.enable_x64(False),
        pytest.raises(ValueError, match=r"expected (times|steps) that float32.*t0=0.*x64"),
    ):
        layer(jnp.ones(1), *fl.setup(key, layer))


def test_times_that_float32_holds_stay_of_float32(key):
    seen = []

    def field(x):
        seen.append(x[0].dtype)
        return -x[1]

    for options in (
        {"t1": 1e4, "saveat": np.linspace(0, 1e4, 1001)},
        {"t0": 100.1, "t1": 101.1},
        {"t1": 1e-12},
    ):
        layer = fl.NeuralODE(field, with_time=True, **options)
        jax.eval_shape(layer, jnp.ones(1, jnp.float32), *fl.setup(key, layer))
    assert set(seen) == {jnp.dtype("float32")}


@pytest.mark.long
def test_shooting_at_times_that_float32_does_not_hold(key):
    node = fl.NeuralODE(Decay(90.0))
    ts = 1.7e9 + np.arange(0, 61, 10)
    expected = np.exp(-(ts - ts[0]) / 60)[:, None]
    ps, st = fl.setup(key, node)
    for times in (ts, jnp.asarray(ts), ts.tolist()):
        _, predictions = fl.multiple_shooting(
            node, times, np.float32(0 * expected), jnp.ones((1, 1), jnp.float32), ps, st
        )
        assert predictions.dtype == jnp.float32
        np.testing.assert_allclose(predictions[0], expected, rtol=1e-3)
    with jax.enable_x64(False), pytest.raises(ValueError, match="expected times that float32 tells apart"):
        fl.multiple_shooting(node, ts, expected, jnp.ones((1, 1)), ps, st)


# Numbers


@pytest.mark.parametrize("kind", ["ode", "cde", "sde", "flow", "second"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"t0": np.nan}, r"\.t0: expected a finite number.*, found nan"),
        ({"t1": np.nan}, r"\.t1: expected a finite number.*, found nan"),
        ({"t1": np.inf}, r"\.t1: expected a finite number.*, found inf"),
        ({"dt0": np.nan}, r"\.dt0: expected a finite number.*, found nan"),
        ({"dt0": np.inf}, r"\.dt0: expected a finite number.*, found inf"),
        ({"t0": 0.0, "t1": 1.0, "dt0": -0.1}, r"\.dt0: expected.*, found -0\.1"),
        ({"t0": 0.0, "t1": 1.0, "dt0": 0.0}, r"\.dt0: expected.*, found 0\.0"),
        ({"max_steps": 0}, r"\.max_steps: expected an integer of at least 1 or None, found 0"),
        ({"max_steps": -5}, r"\.max_steps: expected an integer of at least 1 or None, found -5"),
        ({"max_steps": 10.5}, r"\.max_steps: expected an integer of at least 1 or None, found 10\.5"),
    ],
)
def test_numbers_out_of_range(kind, options, message):
    with pytest.raises(ValueError, match=message):
        LAYERS[kind](**options)


LAYERS = {
    "ode": lambda **options: fl.NeuralODE(fl.Dense(2, 2), **options),
    "cde": lambda **options: fl.NeuralCDE(fl.Dense(2, 2), 1, **options),
    "sde": lambda **options: fl.NeuralSDE(fl.Dense(2, 2), fl.Dense(2, 2), **options),
    "flow": lambda **options: fl.FFJORD(fl.Dense(2, 2), **options),
    "second": lambda **options: fl.SecondOrderNeuralODE(fl.Dense(4, 2), **options),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_numbers_of_numpy_and_jax(kind):
    given = LAYERS[kind](t0=np.float32(0), t1=jnp.asarray(2.0), dt0=np.float64(0.25), max_steps=np.int64(50))
    assert given == LAYERS[kind](t0=0, t1=2, dt0=0.25, max_steps=50)
    assert type(given.max_steps) is int
    for wrong in ({"t1": "1"}, {"max_steps": True}, {"with_time": 1}, {"throw": None}):
        with pytest.raises(TypeError, match="expected .*, found"):
            LAYERS[kind](**wrong)
