"""Solves of mixed dtypes: what comes out, and that it is right, against closed forms and plain diffrax."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest

import flatlayers as fl


F32, F64, BF16, F16 = jnp.float32, jnp.float64, jnp.bfloat16, jnp.float16
PID = diffrax.PIDController(rtol=1e-5, atol=1e-7)
CONSTANT = {"stepsize_controller": diffrax.ConstantStepSize(), "dt0": 0.01}
TOLERANCE = {jnp.dtype(F64): 1e-4, jnp.dtype(F32): 1e-4, jnp.dtype(F16): 3e-3, jnp.dtype(BF16): 2e-2}


@pytest.fixture(autouse=True)
def _promotion():
    """Mixing dtypes is what a user without strict promotion does."""
    with jax.numpy_dtype_promotion("standard"):
        yield


class Decay(fl.Layer):
    """dy/dt = -rate y, on arrays and pairs."""

    def parameters(self):
        return {"rate": fl.Param((), fl.initializers.constant(1.0))}

    def forward(self, y, ps, st):
        return jax.tree.map(lambda y: -ps.rate * y, y), st


class Fall(Decay):
    """For `SecondOrderNeuralODE`: d2q/dt2 = rate q, of which exp(-t) is one solution."""

    def forward(self, x, ps, st):
        return ps.rate * x[..., :1], st


def solve(layer, x, dtype, pick=lambda ys: ys):
    """The value, and the gradient with respect to the rate of half the sum of squares."""
    ps, st = fl.setup(jax.random.key(0), layer, dtype)

    @jax.jit
    def run(ps):
        ys, pull = jax.vjp(lambda ps: pick(layer(x, ps, st)[0]), ps)
        return ys, pull(ys)[0]

    ys, gradient = run(ps)
    assert gradient.dtype == dtype
    return ys, gradient.rate


def check(found, dtype):
    ys, gradient = found
    value = np.exp(-1)
    rtol = TOLERANCE[jnp.dtype(dtype)]
    assert ys.dtype == dtype
    np.testing.assert_allclose(ys.astype(float), np.broadcast_to(value, ys.shape), rtol=rtol)
    rtol = 4 * max(rtol, TOLERANCE[jnp.dtype(gradient.dtype)])
    np.testing.assert_allclose(float(gradient), -ys.size * value**2, rtol=rtol)


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


MIXED = [
    (F32, F64, F64),
    slow(F64, F32, F64),
    slow(F32, F32, F32),
    (BF16, F32, F32),
    (F32, BF16, F32),
    (BF16, BF16, BF16),
    slow(F16, F16, F16),
    (jnp.int32, F32, F32),
]


@pytest.mark.long
@pytest.mark.parametrize(("of_y", "of_ps", "result"), MIXED)
def test_a_state_is_promoted_by_the_models_output(of_y, of_ps, result):
    check(solve(fl.NeuralODE(Decay()), jnp.ones(2, of_y), of_ps), result)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [CONSTANT, {"batching": "each"}, {"adjoint": fl.GaussAdjoint()}, {"adjoint": diffrax.BacksolveAdjoint()}],
    ids=["constant", "each", "gauss", "backsolve"],
)
@pytest.mark.parametrize(("of_y", "of_ps", "result"), MIXED[:-1])
def test_with_other_options(of_y, of_ps, result, options):
    check(solve(fl.NeuralODE(Decay(), **options), jnp.ones(2, of_y), of_ps), result)


CONTROLLERS = {
    "jump": diffrax.ClipStepSizeController(PID, jump_ts=jnp.array([0.3, 0.7])),
    "step": diffrax.ClipStepSizeController(PID, step_ts=jnp.array([0.4])),
    "tolerances": diffrax.PIDController(rtol=1e-5, atol=jnp.array([1e-6, 1e-8])),
    "dtmax": diffrax.PIDController(rtol=jnp.array(1e-5), atol=1e-7, dtmax=jnp.array(0.2)),
    "jump32": diffrax.ClipStepSizeController(PID, jump_ts=jnp.array([0.3, 0.7], F32)),
}


@pytest.mark.long
@pytest.mark.parametrize("of_y", [F32, slow(F64), slow(BF16)])
@pytest.mark.parametrize("kind", CONTROLLERS)
def test_arrays_of_a_controller_do_not_count(kind, of_y):
    node = fl.NeuralODE(Decay(), stepsize_controller=CONTROLLERS[kind])
    ps, st = fl.setup(jax.random.key(0), node, of_y)
    ys, _ = jax.jit(node)(jnp.ones(2, of_y), ps, st)
    assert ys.dtype == of_y
    np.testing.assert_allclose(ys.astype(float), np.exp(-1), rtol=TOLERANCE[jnp.dtype(of_y)])


@pytest.mark.parametrize(("of_y", "of_ts"), [(F32, F64), slow(F64, F32), slow(F32, F32)])
def test_steps_to_given_times(of_y, of_ts):
    controller = diffrax.StepTo(jnp.linspace(0, 1, 101, dtype=of_ts))
    node = fl.NeuralODE(Decay(), solver=diffrax.Heun(), stepsize_controller=controller)
    check(solve(node, jnp.ones(2, of_y), of_y), of_y)


def test_a_jump_is_where_diffrax_has_it():
    """A force that is switched on at 0.3: the position at 1 is 0.7^2 / 2, to rounding, only with the jump."""

    def force(x):
        t, state = x
        return jnp.stack([state[1], jnp.where(t < 0.3, 0.0, 1.0).astype(state.dtype)])

    controller = diffrax.ClipStepSizeController(PID, jump_ts=jnp.array([0.3]))
    node = fl.NeuralODE(force, with_time=True, stepsize_controller=controller)
    y, _ = node(jnp.zeros(2, F32), *fl.setup(jax.random.key(0), node))
    assert y.dtype == F32
    np.testing.assert_allclose(y, [0.245, 0.7], rtol=1e-6)


@pytest.mark.long
@pytest.mark.parametrize(("of_y", "of_threshold"), [(F32, F64), (BF16, F32), slow(F64, F32), slow(F32, F32)])
def test_an_event_of_another_dtype(of_y, of_threshold):
    event = diffrax.Event(lambda t, y, args, **_: y[0] - of_threshold(0.5), optx.Newton(1e-6, 1e-6))
    node = fl.NeuralODE(Decay(), t1=5.0, event=event)
    solution, _ = jax.jit(node.solve)(jnp.ones(1, of_y), *fl.setup(jax.random.key(0), node, of_y))
    assert solution.ys.dtype == of_y
    np.testing.assert_allclose(solution.ts, np.log(2), rtol=TOLERANCE[jnp.dtype(of_y)])


PAIRS = [(F32, F64, F64), slow(F64, F32, F64), (BF16, BF16, BF16)]


@pytest.mark.long
@pytest.mark.parametrize(("of_y", "of_ps", "result"), PAIRS)
def test_second_order(of_y, of_ps, result):
    layer = fl.SecondOrderNeuralODE(Fall(), stepsize_controller=PID)
    x = (jnp.ones(1, of_y), -jnp.ones(1, of_y))
    ps, st = fl.setup(jax.random.key(0), layer, of_ps)
    pair, _ = jax.jit(layer)(x, ps, st)
    for found, right in zip(pair, (np.exp(-1), -np.exp(-1)), strict=True):
        assert found.dtype == result
        np.testing.assert_allclose(found.astype(float), right, rtol=TOLERANCE[jnp.dtype(result)])


@pytest.mark.long
@pytest.mark.parametrize(("of_y", "of_ps", "result"), PAIRS)
def test_augmented(of_y, of_ps, result):
    layer = fl.AugmentedNDE(fl.NeuralODE(Decay()), 2)
    ys, _ = jax.jit(layer)(jnp.ones((3, 1), of_y), *fl.setup(jax.random.key(0), layer, of_ps))
    assert ys.dtype == result
    expected = np.broadcast_to([np.exp(-1), 0, 0], (3, 3))
    np.testing.assert_allclose(ys.astype(float), expected, rtol=TOLERANCE[jnp.dtype(result)])


@pytest.mark.long
@pytest.mark.parametrize("of_path", [slow(F32), F64])
@pytest.mark.parametrize(("of_y", "of_ps", "result"), [*PAIRS, (F32, F32, F32)])
def test_cde(of_y, of_ps, result, of_path):
    """Of the path t, so that it is the decay."""
    ts = jnp.linspace(0, 1, 5, dtype=of_path)
    layer = fl.NeuralCDE(Decay(), 1, stepsize_controller=CONTROLLERS["jump"])
    control = diffrax.LinearInterpolation(ts, ts[:, None])
    check(solve(layer, (jnp.ones(2, of_y), control), of_ps), result)


@pytest.mark.long
@pytest.mark.parametrize(("of_y", "of_ps", "result"), [*PAIRS, slow(F32, F32, F32)])
@pytest.mark.parametrize("noise", ["diagonal", slow("general")])
def test_sde(of_y, of_ps, result, noise):
    """dy = -rate y dt + dW / 2 by Euler steps, made by hand along the path that the layer gives."""
    dims = {} if noise == "diagonal" else {"noise_dims": 2}

    def diffusion(y):
        return jnp.full((*y.shape[:-1], y.shape[-1] * dims.get("noise_dims", 1)), 0.5, y.dtype)

    layer = fl.NeuralSDE(Decay(), diffusion, dt0=0.125, noise=noise, **dims)
    ps, st = fl.setup(jax.random.key(0), layer, of_ps)
    y0 = jnp.ones((3, 2), of_y)
    ys, _ = jax.jit(layer)(y0, ps, st)
    path = jax.jit(lambda t: layer.brownian_path(y0, st).evaluate(t))
    y, before = np.ones((3, 2)), 0.0
    for t in np.arange(1, 9) / 8:
        now = np.asarray(path(t), float)
        step = now - before
        y, before = y - y / 8 + 0.5 * (step if noise == "diagonal" else step.sum(-1, keepdims=True)), now
    assert ys.dtype == result
    np.testing.assert_allclose(ys.astype(float), y, atol=TOLERANCE[jnp.dtype(result)] / 2)


@pytest.mark.long
@pytest.mark.parametrize(("of_y", "of_ps", "result"), PAIRS)
def test_ffjord(of_y, of_ps, result):
    """x = z / e, so that log p(x) = log N(e x) + 1."""
    layer = fl.FFJORD(Decay())
    x = jnp.array([[0.25], [0.0]], of_y)
    expected = -0.5 * (np.array([0.25, 0.0]) ** 2 * np.exp(2) + np.log(2 * np.pi)) + 1
    ps, st = fl.setup(jax.random.key(0), layer, of_ps)
    log_density, _ = jax.jit(layer)(x, ps, st)
    assert log_density.dtype == result
    np.testing.assert_allclose(log_density.astype(float), expected, rtol=10 * TOLERANCE[jnp.dtype(result)])
    sample, _ = layer.sample(jax.random.key(1), (2000, 1), ps, st)
    assert sample.dtype == of_ps
    np.testing.assert_allclose(float(sample.astype(float).std()), np.exp(-1), rtol=0.05)


@pytest.mark.long
@pytest.mark.parametrize(("of_y", "of_ps", "result"), PAIRS)
@pytest.mark.parametrize("of_ts", [slow(F32), F64])
def test_shooting(of_y, of_ps, result, of_ts):
    s = np.linspace(0, 1, 5)
    decay = np.exp(-s)[:, None]
    node = fl.NeuralODE(Decay())
    ps, st = fl.setup(jax.random.key(0), node, of_ps)
    _, found = fl.multiple_shooting(
        node, jnp.asarray(s, of_ts), decay, jnp.asarray(decay[:-1:2], of_y), ps, st
    )
    assert found.dtype == result
    np.testing.assert_allclose(found.astype(float), [decay[:3], decay[2:]], rtol=TOLERANCE[jnp.dtype(result)])


@pytest.mark.long
@pytest.mark.parametrize(("of_y", "of_ps"), [(F32, F64), (F64, F32), (F32, F32)])
def test_a_hamiltonian(of_y, of_ps):
    """The energy's gradient has the dtype of the state, whatever that of the parameters."""

    class Energy(Decay):
        def forward(self, x, ps, st):
            return ps.rate * jnp.sum(x**2, -1) / 2, st

    node = fl.NeuralODE(fl.HamiltonianNN(Energy()), stepsize_controller=PID)
    ys, _ = jax.jit(node)(jnp.array([1.0, 0.0], of_y), *fl.setup(jax.random.key(0), node, of_ps))
    assert ys.dtype == of_y
    np.testing.assert_allclose(ys, [np.cos(1), -np.sin(1)], rtol=1e-4)


# Half precisions


HALF = {"decay": (lambda y: -y, [1.0], lambda t: np.exp(-t)[..., None], 2.0)}
HALF["small"] = (HALF["decay"][0], [1e-3], lambda t: 1e-3 * np.exp(-t)[..., None], 2.0)
HALF["rotation"] = (
    lambda y: jnp.stack([y[1], -y[0]]),
    [1.0, 0.0],
    lambda t: np.stack([np.cos(t), -np.sin(t)], -1),
    2 * np.pi,
)
HALF["small rotation"] = (
    HALF["rotation"][0],
    [2**-10, 0.0],
    lambda t: 2**-10 * HALF["rotation"][2](t),
    2 * np.pi,
)
HALF["relaxation"] = (lambda y: 20 * (1 - y), [0.0], lambda t: (1 - np.exp(-20 * t))[..., None], 1.0)


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("kind", HALF)
def test_a_half_precision_solve_has_the_digits_of_its_state(kind, dtype):
    """By default; the error is relative to the largest state. A small one is as good as a large one."""
    field, y0, solution, t1 = HALF[kind]
    times = np.linspace(0, t1, 33)
    node = fl.NeuralODE(field, t1=t1, saveat=times)
    ys, st = jax.jit(node)(jnp.asarray(y0, dtype), *fl.setup(jax.random.key(0), node, dtype))
    expected = solution(times)
    error = abs(ys.astype(float) - expected).max() / abs(expected).max()
    assert ys.dtype == dtype
    assert error < 4 * float(jnp.finfo(dtype).eps)
    assert st.stats.result == 0
    assert st.stats.num_steps < 150


@pytest.mark.long
def test_the_model_sees_states_of_its_own_dtype_and_times_of_float32():
    seen = []

    def field(x):
        seen.append((x[0].dtype, x[1].dtype))
        return -x[1]

    node = fl.NeuralODE(field, with_time=True, saveat=diffrax.SaveAt(ts=[0.5, 1.0], t1=True))
    ys, _ = node(jnp.ones(1, BF16), *fl.setup(jax.random.key(0), node, BF16))
    assert set(seen[1:]) == {(jnp.dtype(F32), jnp.dtype(BF16))}
    assert ys.dtype == BF16


@pytest.mark.long
@pytest.mark.parametrize("dtype", [BF16, F16, F32, F64])
def test_strict_promotion_is_kept_where_nothing_is_mixed(dtype):
    node = fl.NeuralODE(fl.Dense(2, 2, jnp.tanh), stepsize_controller=CONTROLLERS["jump"])
    ps, st = fl.setup(jax.random.key(0), node, dtype)
    with jax.numpy_dtype_promotion("strict"):
        gradient = jax.eval_shape(jax.grad(lambda y: node(y, ps, st)[0].sum()), jnp.ones(2, dtype))
    assert gradient.dtype == dtype


@pytest.mark.long
@pytest.mark.parametrize("options", [{}, CONSTANT])
def test_an_overflow_on_the_way_out_is_told(options):
    """120000 is beyond float16, not beyond the float32 that the solver has."""
    node = fl.NeuralODE(lambda y: jnp.full_like(y, 6e4), t1=2.0, throw=False, **options)
    ps, st = fl.setup(jax.random.key(0), node)
    _, st = node(jnp.ones(1, F16), ps, st)
    assert st.stats.result == jax.tree.leaves(diffrax.RESULTS.nonfinite)[0]
    node = fl.NeuralODE(lambda y: jnp.full_like(y, 6e4), t1=2.0, **options)
    with pytest.raises(Exception, match="[Nn]onfinite"):
        node(jnp.ones(1, F16), ps, st)


# Complex and real


@pytest.mark.parametrize(("of_y", "of_controller"), [(jnp.complex64, "jump"), slow(jnp.complex128, None)])
def test_a_complex_state(of_y, of_controller):
    controller = CONTROLLERS.get(of_controller, PID)
    node = fl.NeuralODE(
        lambda y: 1j * y, stepsize_controller=controller, adjoint=diffrax.RecursiveCheckpointAdjoint()
    )
    with pytest.warns(UserWarning, match="Complex"):
        y, _ = node(jnp.ones(2, of_y), *fl.setup(jax.random.key(0), node))
    assert y.dtype == of_y
    np.testing.assert_allclose(y, np.exp(1j), rtol=1e-4)


def test_a_complex_output_for_a_real_state_is_refused():
    node = fl.NeuralODE(lambda y: 1j * y)
    with pytest.raises(ValueError, match=r"output is like y0, float32\[2\], found complex64\[2\]"):
        node(jnp.ones(2, F32), *fl.setup(jax.random.key(0), node))


def test_leaves_of_several_dtypes_have_one():
    """As in diffrax, where the times promote all of them."""
    y0 = {"a": jnp.ones(2, F32), "b": jnp.ones(2, F64), "c": jnp.array([1, 2])}
    node = fl.NeuralODE(Decay())
    ys, _ = node(y0, *fl.setup(jax.random.key(0), node))
    assert {leaf.dtype for leaf in jax.tree.leaves(ys)} == {jnp.dtype(F64)}
    np.testing.assert_allclose(ys["c"], np.exp(-1) * np.array([1, 2]), rtol=1e-4)
