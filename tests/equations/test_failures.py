"""Numbers that are not finite are told of by every solver layer: a code without `throw`, an error with it."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest

import flatlayers as fl


TSIT5 = diffrax.Tsit5()
CONSTANT = {"stepsize_controller": diffrax.ConstantStepSize(), "dt0": 0.02}
NONFINITE, TOO_MANY, TOO_SHORT = (
    jax.tree.leaves(code)[0]
    for code in (diffrax.RESULTS.nonfinite, diffrax.RESULTS.max_steps_reached, diffrax.RESULTS.dt_min_reached)
)


def square(y):
    """dy/dt = 10 y^2: infinite at 0.1 / y0."""
    return 10 * y**2


def path():
    ts = jnp.linspace(0, 1, 3)
    return diffrax.LinearInterpolation(ts, ts[:, None])


# Each with how it is called for a start.
LAYERS = {
    "ode": (lambda **o: fl.NeuralODE(square, **o), lambda y: y),
    "each": (lambda **o: fl.NeuralODE(square, batching="each", **o), lambda y: jnp.stack([y, 0 * y + 0.01])),
    "second": (
        lambda **o: fl.SecondOrderNeuralODE(lambda x: 100 * x[..., :1] ** 3, **o),
        lambda y: (y, 2 * y),
    ),
    "augmented": (lambda **o: fl.AugmentedNDE(fl.NeuralODE(square, **o), 1), lambda y: y),
    "cde": (lambda **o: fl.NeuralCDE(square, 1, **o), lambda y: (y, path())),
    "sde": (lambda **o: fl.NeuralSDE(square, lambda y: 0 * y, **o), lambda y: y),
    "flow": (lambda **o: fl.FFJORD(lambda z: -square(z), **o), lambda y: y[None]),
}


def code(layer, x):
    ps, st = fl.setup(jax.random.key(0), layer, float)
    _, st = jax.jit(layer)(x, ps, st)
    return (st.model if "stats" not in st else st).stats.result


@pytest.mark.long
@pytest.mark.parametrize("kind", LAYERS)
def test_constant_steps(kind):
    make, start = LAYERS[kind]
    layer = make(throw=False, **CONSTANT)
    ps, st = fl.setup(jax.random.key(0), layer, float)

    @jax.jit
    def codes(y):
        st_of = layer(start(y), ps, st)[1]
        return (st_of.model if "stats" not in st_of else st_of).stats.result

    found = [codes(jnp.array([y])) for y in (0.01, np.nan, np.inf, 1.0)]
    assert found == [0, NONFINITE, NONFINITE, NONFINITE]


@pytest.mark.long
@pytest.mark.parametrize("kind", LAYERS)
def test_constant_steps_that_raise(kind):
    make, start = LAYERS[kind]
    layer = make(**CONSTANT)
    ps, st = fl.setup(jax.random.key(0), layer, float)
    with pytest.raises(ValueError, match="initial state of finite numbers"):
        layer(start(jnp.array([np.nan])), ps, st)
    with pytest.raises(Exception, match="[Nn]onfinite"):
        jax.jit(layer)(start(jnp.array([1.0])), ps, st)


ADAPTIVE = [
    pytest.param(kind, marks=[] if kind in ("ode", "flow") else pytest.mark.slow)
    for kind in LAYERS
    if kind != "sde"
]


@pytest.mark.long
@pytest.mark.parametrize("max_steps", [256, None])
@pytest.mark.parametrize("kind", ADAPTIVE)
def test_adaptive_steps(kind, max_steps):
    """Without `max_steps` the solve ends where a step does not change the time any more."""
    make, start = LAYERS[kind]
    layer = make(throw=False, max_steps=max_steps)
    ps, st = fl.setup(jax.random.key(0), layer, float)

    @jax.jit
    def codes(y):
        st_of = layer(start(y), ps, st)[1]
        return (st_of.model if "stats" not in st_of else st_of).stats.result

    found = [codes(jnp.array([y])) for y in (0.01, np.nan, 1.0)]
    assert found == [0, NONFINITE, TOO_MANY if max_steps else TOO_SHORT]
    with pytest.raises(Exception, match="maximum number" if max_steps else "minimum step size"):
        jax.jit(make(max_steps=max_steps))(start(jnp.array([1.0])), ps, st)


@pytest.mark.long
def test_an_adaptive_solve_without_max_steps_is_right_where_it_can_be():
    controller = diffrax.ClipStepSizeController(
        diffrax.PIDController(rtol=1e-8, atol=1e-10), jump_ts=jnp.array([0.3, 0.6]), step_ts=jnp.array([0.5])
    )
    for solver, t0, t1 in ((TSIT5, 0.0, 1.0), (diffrax.Kvaerno5(), 0.0, 1.0), (TSIT5, 1.0, 0.0)):
        node = fl.NeuralODE(
            lambda y: -y, t0=t0, t1=t1, solver=solver, stepsize_controller=controller, max_steps=None
        )
        y, _ = jax.jit(node)(jnp.ones(2), *fl.setup(jax.random.key(0), node))
        np.testing.assert_allclose(y, np.exp(t0 - t1), rtol=1e-6)


@pytest.mark.long
def test_adaptive_steps_that_accept_what_is_not_finite():
    """By a least step, by a norm that looks elsewhere, and by an overflow in the last step."""
    least = diffrax.PIDController(rtol=1e-4, atol=1e-6, dtmin=0.05)
    first = diffrax.PIDController(rtol=1e-4, atol=1e-6, norm=lambda error: jnp.abs(error[0]))
    cases = [
        (square, 1.0, {"stepsize_controller": least}),
        (lambda y: jnp.stack([-y[0], 10 * y[1] ** 2]), 1.0, {"stepsize_controller": first, "dt0": 0.02}),
        (lambda y: jnp.full_like(y, 1.5e308), 1e308, {}),
    ]
    for field, y0, options in cases:
        y = jnp.full(2, y0)
        assert code(fl.NeuralODE(field, throw=False, max_steps=64, **options), y) in (NONFINITE, TOO_MANY)
        node = fl.NeuralODE(field, max_steps=64, **options)
        with pytest.raises(Exception, match="[Nn]onfinite|maximum number"):
            jax.jit(node)(y, *fl.setup(jax.random.key(0), node))


@pytest.mark.long
@pytest.mark.parametrize(
    "saveat", [diffrax.SaveAt(dense=True), diffrax.SaveAt(steps=True), diffrax.SaveAt(ts=[0.05, 0.09, 0.5])]
)
def test_whatever_is_saved(saveat):
    node = fl.NeuralODE(square, saveat=saveat, throw=False, **CONSTANT)
    ps, st = fl.setup(jax.random.key(0), node)
    found = jax.jit(lambda y: node.solve(y, ps, st)[1].stats.result)
    assert [found(jnp.array([y])) for y in (0.01, 1.0)] == [0, NONFINITE]


def test_a_code_of_diffrax_stays():
    """Too few steps with dense output: what it would be at the end is not known, and not the cause."""
    node = fl.NeuralODE(lambda y: -y, saveat=diffrax.SaveAt(dense=True), max_steps=1, throw=False)
    _, st = node.solve(jnp.ones(1), *fl.setup(jax.random.key(0), node))
    assert st.stats.result == TOO_MANY


def test_an_event_before_the_numbers_end_is_no_failure():
    event = diffrax.Event(lambda t, y, args, **_: y[0] - 2.0, optx.Newton(1e-8, 1e-8))
    node = fl.NeuralODE(
        square, event=event, saveat=[0.01, 0.5], stepsize_controller=diffrax.PIDController(1e-8, 1e-8)
    )
    ys, st = jax.jit(node)(jnp.ones(1), *fl.setup(jax.random.key(0), node))
    assert st.stats.result == jax.tree.leaves(diffrax.RESULTS.event_occurred)[0]
    np.testing.assert_allclose(ys[:, 0], [1 / 0.9, np.inf], rtol=1e-6)


def test_the_worst_code_of_a_batch():
    """Largest of the failures, whatever the others are: success, or an event."""
    event = diffrax.Event(lambda t, y, args, **_: (y[0] > 0.15) & (y[0] < 0.9))
    node = fl.NeuralODE(square, event=event, batching="each", max_steps=256, throw=False)
    ps, st = fl.setup(jax.random.key(0), node)
    worst = jax.jit(lambda y: node(y[:, None], ps, st)[1].stats.result)
    event_code = jax.tree.leaves(diffrax.RESULTS.event_occurred)[0]
    cases = ([0.01, 0.02], 0), ([0.01, 0.1], event_code), ([0.1, 1.0], TOO_MANY), ([1.0, np.nan], NONFINITE)
    for starts, right in cases:
        assert worst(jnp.array(starts)) == right


@pytest.mark.long
@pytest.mark.parametrize("options", [{}, CONSTANT], ids=["adaptive", "constant"])
def test_samples_of_a_flow(options):
    make, _ = LAYERS["flow"]
    up = fl.FFJORD(square, max_steps=128, **options)
    ps, st = fl.setup(jax.random.key(0), up)
    with pytest.raises(Exception, match="[Nn]onfinite|maximum number"):
        up.sample(jax.random.key(0), (8, 1), ps, st)
    quiet = fl.FFJORD(square, max_steps=128, throw=False, **options)
    assert quiet.sample(jax.random.key(0), (8, 1), ps, st)[1].stats.result in (NONFINITE, TOO_MANY)

    class Broken:
        def log_prob(self, x):
            return jnp.zeros(x.shape[:-1])

        def sample(self, key, shape, dtype):
            return jnp.full(shape, jnp.nan, dtype)

    broken = make(base=Broken(), **options)
    with pytest.raises(ValueError, match="initial state of finite numbers"):
        broken.sample(jax.random.key(0), (8, 1), ps, st)


# Options that are refused


def test_the_tolerance_of_a_brownian_path():
    def sde(**options):
        return fl.NeuralSDE(lambda y: 0 * y, jnp.ones_like, **options)

    for tol in (-1, 0, np.nan, np.inf, -1e-300):
        with pytest.raises(
            ValueError, match=r"NeuralSDE\.tol: expected a finite number above 0 or None, found"
        ):
            sde(tol=tol)
    adaptive = {"stepsize_controller": diffrax.PIDController(1e-3, 1e-6), "solver": diffrax.Heun()}
    steps = diffrax.StepTo(jnp.array([0.0, 0.5, 0.6, 1.0]))
    cases = [
        ({"dt0": 0.01}, 0.01),
        ({"dt0": 0.25, "t1": 2.0}, 0.25),
        ({"dt0": 2.0}, 1.0),
        ({"t0": 5.0, "t1": 5.5, **adaptive}, 0.5),
        ({"dt0": None, "stepsize_controller": steps}, 0.1),
    ]
    for options, shortest in cases:
        with pytest.raises(ValueError, match=r"NeuralSDE\.tol: expected less than the shortest step"):
            sde(tol=1.001 * shortest, **options)
        assert sde(tol=0.999 * shortest, **options).tol == 0.999 * shortest
        assert sde(**options)._tolerance() < shortest


@pytest.mark.long
def test_the_variance_along_steps_to_given_times():
    """More steps than the default tolerance of an adaptive solve resolves: each has its own noise."""
    ts = jnp.concatenate([jnp.linspace(0, 1e-5, 201), jnp.array([1.0])])
    model = fl.NeuralSDE(
        lambda y: 0 * y,
        lambda y: jnp.ones_like(y),
        dt0=None,
        stepsize_controller=diffrax.StepTo(ts),
        saveat=diffrax.SaveAt(steps=True),
        max_steps=201,
    )
    ys, _ = jax.jit(model)(jnp.zeros((200, 1)), *fl.setup(jax.random.key(0), model, float))
    increments = np.diff(ys[:200, :, 0], axis=0)
    np.testing.assert_allclose(increments.std(), np.sqrt(5e-8), rtol=0.05)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda n: fl.FFJORD(fl.Dense(1, 1), divergence="hutchinson", probes=n), "FFJORD.probes"),
        (lambda n: fl.AugmentedNDE(fl.NeuralODE(fl.Dense(2, 2)), n), "AugmentedNDE.extra"),
        (lambda n: fl.NeuralCDE(fl.Dense(2, 4), n), "NeuralCDE.channels"),
        (
            lambda n: fl.NeuralSDE(fl.Dense(2, 2), fl.Dense(2, 4), noise="general", noise_dims=n),
            "NeuralSDE.noise_dims",
        ),
        (lambda n: fl.NeuralODE(fl.Dense(2, 2), max_steps=n), "NeuralODE.max_steps"),
    ],
)
def test_sizes(make, name):
    """Integers of NumPy and JAX too, nothing else."""
    assert make(np.int32(2)) == make(2) == make(jnp.asarray(2))
    for wrong in (2.0, 2.5, np.nan, 0, -1):
        with pytest.raises(ValueError, match=rf"{name}: expected an integer of at least 1.*, found"):
            make(wrong)
    for wrong in ("2", True, [2]):
        with pytest.raises(TypeError, match=rf"{name}: expected an integer of at least 1.*, found"):
            make(wrong)


def test_choices():
    for make, message in (
        (lambda: fl.NeuralODE(fl.Dense(2, 2), batching="Each"), r"NeuralODE\.batching: .*'shared' or 'each'"),
        (lambda: fl.NeuralODE(fl.Dense(2, 2), batching=None), r"NeuralODE\.batching: .*'shared' or 'each'"),
        (
            lambda: fl.NeuralSDE(fl.Dense(2, 2), fl.Dense(2, 2), noise="full"),
            r"NeuralSDE\.noise: .*'general'",
        ),
        (
            lambda: fl.FFJORD(fl.Dense(2, 2), divergence="Exact"),
            r"FFJORD\.divergence: .*'exact' or 'hutchinson'",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            make()


@pytest.mark.long
@pytest.mark.parametrize("compiled", [False, True])
def test_a_failure_says_what_to_change(compiled):
    def message(y0=1.0, dtype=jnp.float32, f=lambda y: -100 * y, **options):
        layer = fl.NeuralODE(f, **options)
        ps, st = fl.setup(jax.random.key(0), layer)
        with pytest.raises(RuntimeError) as info:
            jax.block_until_ready((jax.jit(layer) if compiled else layer)(jnp.array([y0], dtype), ps, st))
        if not compiled:
            assert len(str(info.value).splitlines()) == 2
            assert "debug" not in str(info.value)
        return str(info.value)

    text = message(max_steps=5)
    assert "NeuralODE: The maximum number of solver steps was reached.\nHere max_steps=5: raise it" in text
    assert "rtol" in text
    assert "stiff" in text
    assert "bfloat16" not in text
    assert "below the precision of bfloat16" in message(max_steps=5, dtype=jnp.bfloat16)
    blown = message(1e30, f=lambda y: y * y, stepsize_controller=diffrax.ConstantStepSize(), dt0=0.1)
    assert "NeuralODE: Nonfinite" in blown
    assert "smaller dt0" in blown
    assert "dtmin" not in blown
    minimum = diffrax.PIDController(rtol=1e-6, atol=1e-9, dtmin=0.3, force_dtmin=False)
    assert "minimum step size was reached" in message(stepsize_controller=minimum)
