import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optimistix as optx
import pytest

import flatlayers as fl
from flatlayers.adjoints import _checkpoints, _diffrax
from tests.helpers import assert_close, equations, inner_jaxprs


DEFAULT = diffrax.RecursiveCheckpointAdjoint()
ADJOINT = fl.AdaptiveCheckpointAdjoint()
PID = diffrax.PIDController(rtol=1e-6, atol=1e-8)


def sum_of_squares(tree):
    """A function with another weight for each number; what was not saved is infinite."""
    total = 0.0
    for leaf in jax.tree.leaves(eqx.filter(tree, eqx.is_inexact_array)):
        leaf = jnp.where(jnp.isfinite(leaf), leaf, 0).ravel()
        total = total + jnp.sum(jnp.cos(jnp.arange(leaf.size, dtype=leaf.dtype)) * leaf**2 + leaf)
    return total


def gradient(solve, adjoint, *inputs):
    """The value and the gradient with respect to all floating-point arrays in `inputs`."""

    @eqx.filter_jit
    @eqx.filter_value_and_grad
    def loss(inputs):
        return sum_of_squares(solve(adjoint, *inputs))

    return loss(inputs)


def assert_equals_default(solve, *inputs, adjoints=(ADJOINT,), rtol=1e-10):
    value, expected = gradient(solve, DEFAULT, *inputs)
    size = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
    assert 1e-3 < size < 1e6
    for adjoint in adjoints:
        same, found = gradient(solve, adjoint, *inputs)
        assert_close(same, value)
        assert_close(found, expected, rtol, rtol * size)


# Against diffrax's own adjoint


def field(t, y, args):
    """A field on a pytree; not all of its arguments are arrays."""
    rate, weight, name = args
    assert name == "name"
    u, v = y["u"], y["v"]
    return {"u": jnp.tanh(weight @ u) - rate * u + jnp.sin(t) * v, "v": -v * jnp.sum(u) * rate}


Y0 = {"u": jnp.array([1.0, -0.5, 0.3]), "v": jnp.array(0.7)}
ARGS = (jnp.array(0.4), jnp.array([[0.1, 1.0, -0.4], [-1.2, 0.3, 0.5], [0.2, -0.6, 0.9]]), "name")


def test_all_of_saveat():
    def solve(adjoint, y0, args, scale):
        def some(t, y, args):
            return scale * t * y["u"], args[0]

        subs = {
            "all": diffrax.SubSaveAt(t0=True, t1=True, ts=[0.0, 0.01, 0.02, 1.0, 1.5, 2.0], steps=True),
            "some": diffrax.SubSaveAt(t0=True, ts=[0.3, 1.9], steps=2, fn=some),
            "end": diffrax.SubSaveAt(t1=True, steps=3),
        }
        return diffrax.diffeqsolve(
            diffrax.ODETerm(field),
            diffrax.Tsit5(),
            0.0,
            2.0,
            None,
            y0,
            args,
            saveat=diffrax.SaveAt(subs=subs),
            stepsize_controller=PID,
            adjoint=adjoint,
            max_steps=64,
        ).ys

    assert_equals_default(solve, Y0, ARGS, jnp.array(1.3))


def test_backward_in_time_and_what_is_closed_over():
    def solve(adjoint, y0, args):
        return diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, _: field(t, y, args)),
            diffrax.Dopri8(),
            1.0,
            -0.7,
            -0.3,
            y0,
            saveat=diffrax.SaveAt(ts=[0.6, 0.5, -0.7], t0=True),
            stepsize_controller=PID,
            adjoint=adjoint,
            max_steps=64,
        ).ys

    assert_equals_default(solve, Y0, ARGS)


@pytest.mark.slow
def test_more_steps_than_are_kept():
    def solve(adjoint, y0, rate):
        return diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, rate: jnp.stack([y[1], -jnp.sin(rate * y[0])])),
            diffrax.Heun(),
            0.0,
            7.31,
            0.01,
            y0,
            rate,
            saveat=diffrax.SaveAt(ts=[0.005, 3.0, 7.3], t1=True),
            adjoint=adjoint,
        ).ys

    adjoints = (ADJOINT, fl.AdaptiveCheckpointAdjoint(every=3))
    assert_equals_default(solve, jnp.array([1.0, 0.0]), jnp.array(1.1), adjoints=adjoints)


def robertson(t, y, k):
    a, b, c = y
    slow, fast, mid = k[0] * a, k[1] * b**2, k[2] * b * c
    return jnp.stack([-slow + mid, slow - mid - fast, fast])


@pytest.mark.slow
def test_stiff():
    def solve(adjoint, y0, k):
        return diffrax.diffeqsolve(
            diffrax.ODETerm(robertson),
            diffrax.Kvaerno5(),
            0.0,
            100.0,
            None,
            y0,
            k,
            saveat=diffrax.SaveAt(ts=[1.0, 100.0]),
            stepsize_controller=diffrax.PIDController(rtol=1e-8, atol=1e-12),
            adjoint=adjoint,
        ).ys

    y0, k = jnp.array([1.0, 0.0, 0.0]), jnp.array([0.04, 3e7, 1e4])
    np.testing.assert_allclose(solve(ADJOINT, y0, k)[1], [0.6172348816, 6.1536e-06, 0.382758965], rtol=1e-5)
    assert_equals_default(solve, y0, k)


@pytest.mark.slow
def test_implicit_and_explicit_terms():
    def solve(adjoint, y0, args):
        terms = diffrax.MultiTerm(
            diffrax.ODETerm(lambda t, y, args: args[0] * jnp.sin(y[::-1])),
            diffrax.ODETerm(lambda t, y, args: -args[1] * y),
        )
        return diffrax.diffeqsolve(
            terms,
            diffrax.KenCarp4(),
            0.0,
            1.0,
            None,
            y0,
            args,
            saveat=diffrax.SaveAt(ts=[0.4, 0.9], steps=True),
            stepsize_controller=diffrax.PIDController(rtol=1e-3, atol=1e-5),
            adjoint=adjoint,
            max_steps=64,
        ).ys

    assert_equals_default(solve, jnp.array([1.0, 0.3]), (jnp.array(0.7), jnp.array([1.0, 3.0])))


@pytest.mark.parametrize(
    ("solver", "controller"),
    [
        pytest.param(diffrax.Euler(), diffrax.ConstantStepSize(), marks=pytest.mark.slow),
        (diffrax.ItoMilstein(), diffrax.ConstantStepSize()),
        (diffrax.Heun(), diffrax.PIDController(rtol=0.05, atol=0.05, error_order=1.0, dtmin=0.003)),
    ],
    ids=["Euler", "ItoMilstein", "Heun"],
)
@pytest.mark.slow
def test_stochastic(solver, controller):
    """`dy = -a sin(y) dt + b cos(y) dW`."""

    def solve(adjoint, y0, args):
        path = diffrax.VirtualBrownianTree(0.0, 1.0, 1e-3, (2,), jax.random.key(1))
        terms = diffrax.MultiTerm(
            diffrax.ODETerm(lambda t, y, args: -args[0] * jnp.sin(y)),
            diffrax.ControlTerm(lambda t, y, args: lx.DiagonalLinearOperator(args[1] * jnp.cos(y)), path),
        )
        return diffrax.diffeqsolve(
            terms,
            solver,
            0.0,
            1.0,
            0.05,
            y0,
            args,
            saveat=diffrax.SaveAt(ts=[0.31, 1.0]),
            stepsize_controller=controller,
            adjoint=adjoint,
            max_steps=200,
        ).ys

    assert_equals_default(solve, jnp.array([1.0, 0.5]), (jnp.array(0.8), jnp.array(0.3)))


@pytest.mark.parametrize(
    "solver",
    [diffrax.ReversibleHeun(), pytest.param(diffrax.LeapfrogMidpoint(), marks=pytest.mark.slow)],
    ids=["ReversibleHeun", "LeapfrogMidpoint"],
)
@pytest.mark.slow
def test_solvers_that_carry_a_state(solver):
    def solve(adjoint, y0, rate):
        return diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, rate: jnp.stack([y[1], -jnp.sin(rate * y[0])])),
            solver,
            0.0,
            1.0,
            0.02,
            y0,
            rate,
            saveat=diffrax.SaveAt(ts=[0.305, 0.995], t1=True),
            adjoint=adjoint,
            max_steps=64,
        ).ys

    assert_equals_default(solve, jnp.array([1.0, 0.0]), jnp.array(1.1))


@pytest.mark.slow
def test_a_solve_that_goes_on_with_the_state_of_another():
    def solve(adjoint, y0, rate):
        options = {"stepsize_controller": PID, "adjoint": adjoint, "max_steps": 64}
        term = diffrax.ODETerm(lambda t, y, rate: -rate * y**2)
        keep = diffrax.SaveAt(t1=True, solver_state=True, made_jump=True)
        first = diffrax.diffeqsolve(term, diffrax.Bosh3(), 0.0, 1.0, None, y0, rate, saveat=keep, **options)
        return diffrax.diffeqsolve(
            term,
            diffrax.Bosh3(),
            1.0,
            2.0,
            None,
            first.ys[-1],
            rate,
            solver_state=first.solver_state,
            made_jump=first.made_jump,
            **options,
        ).ys

    assert_equals_default(solve, jnp.array([1.0, 2.0]), jnp.array(0.7))


@pytest.mark.slow
def test_dense_output_across_a_jump():
    def solve(adjoint, y0, rate):
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, rate: -rate * y + jnp.where(t < 0.5, 0.0, 2.0)),
            diffrax.Tsit5(),
            0.0,
            1.0,
            None,
            y0,
            rate,
            saveat=diffrax.SaveAt(dense=True, t1=True),
            stepsize_controller=diffrax.ClipStepSizeController(PID, jump_ts=[0.5]),
            adjoint=adjoint,
            max_steps=64,
        )
        return jax.vmap(solution.evaluate)(jnp.linspace(0.0, 1.0, 11)), solution.ys

    assert_equals_default(solve, jnp.array([1.0, 2.0]), jnp.array(0.7))


@pytest.mark.slow
def test_no_steps_and_too_few():
    def solve(adjoint, y0, rate, t1, max_steps=8, ts=(0.0, 0.0)):
        return diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, rate: -rate * y),
            diffrax.Tsit5(),
            0.0,
            t1,
            None,
            y0,
            rate,
            saveat=diffrax.SaveAt(ts=jnp.array(ts), t0=True, t1=True),
            stepsize_controller=PID,
            adjoint=adjoint,
            max_steps=max_steps,
            throw=False,
        ).ys

    y0, rate = jnp.array([1.0, 2.0]), jnp.array(0.7)
    _, (by_y0, by_rate) = gradient(lambda *inputs: solve(*inputs, 0.0), ADJOINT, y0, rate)
    weights = sum(jnp.cos(jnp.array([2.0 * k, 2.0 * k + 1])) for k in range(4))
    assert_close(by_y0, 2 * weights * y0 + 4)
    assert by_rate == 0
    assert_equals_default(lambda *inputs: solve(*inputs, 10.0, 2, (0.01, 0.2, 9.0)), y0, rate)


# Against what is known


@pytest.mark.slow
def test_every_number_of_steps(monkeypatch):
    """Euler's method for dy/dt = -rate y is (1 - rate h)^n y0."""
    monkeypatch.setattr(_checkpoints, "PLAIN", 4)
    counts, h = jnp.arange(1.0, 81.0), 0.01

    def end(y0, rate, count, adjoint):
        term = diffrax.ODETerm(lambda t, y, rate: -rate * y)
        t1 = count * h
        return diffrax.diffeqsolve(
            term, diffrax.Euler(), 0.0, t1, h, y0, rate, adjoint=adjoint, max_steps=80
        ).ys[0]

    y0, rate = 1.5, 0.7
    for every in (1, 3):
        adjoint = fl.AdaptiveCheckpointAdjoint(every=every)
        assert _checkpoints.thins(80, every)
        grad = jax.grad(lambda y0, rate, count, a=adjoint: end(y0, rate, count, a), (0, 1))
        by_y0, by_rate = jax.jit(jax.vmap(grad, (None, None, 0)))(y0, rate, counts)
        np.testing.assert_allclose(by_y0, (1 - rate * h) ** counts, rtol=1e-12)
        np.testing.assert_allclose(by_rate, -counts * h * (1 - rate * h) ** (counts - 1) * y0, rtol=1e-12)


def test_lotka_volterra():
    """The reference values of SciMLSensitivity's tests."""

    def loss(p, u0):
        def lotka_volterra(t, u, p):
            x, y = u
            return jnp.stack([p[0] * x - p[1] * x * y * t, -p[2] * y + t * p[3] * x * y])

        ts = jnp.linspace(0.0, 10.0, 21)
        controller = diffrax.PIDController(rtol=1e-10, atol=1e-10)
        us = diffrax.diffeqsolve(
            diffrax.ODETerm(lotka_volterra),
            diffrax.Dopri8(),
            0.0,
            10.0,
            None,
            u0,
            p,
            saveat=diffrax.SaveAt(ts=ts),
            stepsize_controller=diffrax.ClipStepSizeController(controller, step_ts=ts),
            adjoint=ADJOINT,
        ).ys
        return jnp.sum((2 - us) ** 2) / 2

    by_p, by_u0 = jax.jit(jax.grad(loss, (0, 1)))(jnp.array([1.5, 1.0, 3.0, 1.0]), jnp.ones(2))
    np.testing.assert_allclose(by_p, [13.156719527, -16.810514044, 7.702708131, -25.639475860], rtol=1e-8)
    np.testing.assert_allclose(by_u0, [0.211965670, -17.191005071], rtol=1e-8, atol=1e-8 * 17)


@pytest.mark.slow
@pytest.mark.parametrize(
    "solver", [diffrax.Tsit5(), diffrax.Dopri5(scan_kind="lax"), diffrax.ReversibleHeun()]
)
def test_a_second_derivative(solver):
    """y(1) = 1 / (1 + rate) for dy/dt = -rate y^2."""

    def end(rate):
        term = diffrax.ODETerm(lambda t, y, rate: -rate * y**2)
        return diffrax.diffeqsolve(term, solver, 0.0, 1.0, 0.005, 1.0, rate, adjoint=ADJOINT).ys[0]

    first, second = jax.jit(lambda x: jax.jvp(jax.grad(end), (x,), (jnp.ones_like(x),)))(jnp.array(0.7))
    rtol = 1e-5 if isinstance(solver, diffrax.ReversibleHeun) else 1e-9
    np.testing.assert_allclose([first, second], [-(1.7**-2), 2 * 1.7**-3], rtol=rtol)
    np.testing.assert_allclose(jax.hessian(end)(0.7), second, rtol=1e-12)


@pytest.mark.slow
def test_the_hessian_of_a_network():
    """Forward over reverse, against an adjoint that has both."""

    def hessian(solver, adjoint):
        node = fl.NeuralODE(
            fl.Chain(fl.Dense(2, 3, jnp.tanh), fl.Dense(3, 2)),
            solver=solver,
            adjoint=adjoint,
            max_steps=16,
        )
        ps, st = fl.setup(jax.random.key(0), node, float)
        return fl.hessian(lambda ps: (node(jnp.array([1.0, -0.5]), ps, st)[0] ** 2).sum())(ps)

    found = hessian(diffrax.Tsit5(), ADJOINT)
    assert_close(found, hessian(diffrax.Tsit5(scan_kind="lax"), ADJOINT))
    assert_close(found, hessian(diffrax.Tsit5(), diffrax.DirectAdjoint()), rtol=1e-8, atol=1e-10)


@pytest.mark.slow
def test_forcing_through_an_interpolant():
    """dy/dt = g(t) - y with g linear between values: y(1) is linear in them."""
    ts = jnp.linspace(0.0, 1.0, 6)

    def end(values):
        path = diffrax.LinearInterpolation(ts, values)
        return diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, args: path.evaluate(t) - y),
            diffrax.Tsit5(),
            0.0,
            1.0,
            None,
            jnp.array(0.0),
            stepsize_controller=diffrax.ClipStepSizeController(
                diffrax.PIDController(rtol=1e-10, atol=1e-12), step_ts=ts
            ),
            adjoint=ADJOINT,
        ).ys[0]

    values = jnp.array([0.3, -1.0, 2.0, 0.5, 0.1, -0.4])
    found = jax.jit(jax.grad(end))(values)
    fine = np.linspace(0, 1, 100001)
    hats = [np.interp(fine, ts, np.eye(6)[k]) for k in range(6)]
    expected = [np.trapezoid(hat * np.exp(fine - 1), fine) for hat in hats]
    np.testing.assert_allclose(found, expected, rtol=1e-8)


# Structure


WIDE = fl.Chain(fl.Dense(24, 40, jnp.tanh), fl.Dense(40, 24))


def flat_loss(adjoint):
    """A loss of the flat vector itself, as `args` of plain diffrax."""
    st = fl.initial_states(jax.random.key(0), WIDE)

    def loss(ps, y0):
        term = diffrax.ODETerm(lambda t, y, ps: WIDE(y, ps, st)[0])
        options = {"stepsize_controller": PID, "adjoint": adjoint, "max_steps": 64}
        saveat = diffrax.SaveAt(ts=[0.3, 1.0])
        ys = diffrax.diffeqsolve(term, diffrax.Tsit5(), 0.0, 1.0, None, y0, ps, saveat=saveat, **options).ys
        return jnp.sum(ys**2)

    return loss


@pytest.mark.slow
def test_a_network_with_its_own_steps_for_each_sample():
    ps, _ = fl.setup(jax.random.key(0), WIDE, float)
    y0 = jax.random.normal(jax.random.key(1), (3, 24)) * jnp.array([[0.01], [1.0], [5.0]])
    found, expected = (
        jax.jit(jax.grad(lambda ps, y0, f=f: jax.vmap(f, (None, 0))(ps, y0).sum(), (0, 1)))(ps, y0)
        for f in (flat_loss(ADJOINT), flat_loss(DEFAULT))
    )
    assert_close(found, expected, atol=1e-10)


def test_a_flat_vector_is_taken_apart_outside_of_the_loop():
    ps, _ = fl.setup(jax.random.key(0), WIDE, float)
    jaxpr = jax.make_jaxpr(jax.grad(flat_loss(ADJOINT)))(ps, jnp.ones(24)).jaxpr
    *_, backward = (eqn for eqn in equations(jaxpr) if eqn.primitive.name == "while" and _has_scan(eqn))
    names = [eqn.primitive.name for inner in inner_jaxprs(backward) for eqn in equations(inner)]
    assert "dot_general" in names
    assert "split" not in names
    assert "concatenate" not in names


def _has_scan(loop):
    return any(eqn.primitive.name == "scan" for inner in inner_jaxprs(loop) for eqn in equations(inner))


def test_no_sum_over_the_weights_in_the_loop_over_stages():
    """The gradient of the weights comes out of the stages as one product a step."""
    node = fl.NeuralODE(WIDE, adjoint=ADJOINT)
    ps, st = fl.setup(jax.random.key(0), node, float)
    jaxpr = jax.make_jaxpr(jax.grad(lambda ps: jnp.sum(node(jnp.ones(24), ps, st)[0] ** 2)))(ps).jaxpr
    loops = [eqn for eqn in equations(jaxpr) if eqn.primitive.name == "while"]
    stages = [eqn for loop in loops for inner in inner_jaxprs(loop) for eqn in equations(inner)]
    stages = [eqn for eqn in stages if eqn.primitive.name == "scan"]
    inside = [eqn for scan in stages for inner in inner_jaxprs(scan) for eqn in equations(inner)]
    assert inside
    assert not [eqn for eqn in inside for var in eqn.outvars if var.aval.shape in ((40, 24), (24, 40))]
    assert not [
        eqn
        for loop in loops
        for i in inner_jaxprs(loop)
        for eqn in equations(i)
        if eqn.primitive.name == "split"
    ]


def temporary(adjoint, max_steps, size=10_000):
    def end(y0, rate):
        return diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, rate: -rate * y**2),
            diffrax.Euler(),
            0.0,
            1.0,
            0.1,
            y0,
            rate,
            adjoint=adjoint,
            max_steps=max_steps,
        ).ys.sum()

    compiled = jax.jit(jax.grad(end)).lower(jnp.ones(size), jnp.array(0.3)).compile()
    return compiled.memory_analysis().temp_size_in_bytes / (8 * size)


@pytest.mark.slow
def test_memory_in_states():
    few, more, default = (temporary(ADJOINT, steps) for steps in (20, 120, 4096))
    assert 0.9 < (more - few) / 100 < 1.1
    assert default < 160
    assert temporary(fl.AdaptiveCheckpointAdjoint(every=8), 4096) < default / 2


def test_float32_stays_float32():
    node = fl.NeuralODE(WIDE, adjoint=ADJOINT, saveat=[0.3, 1.0])
    ps, st = fl.setup(jax.random.key(0), node, jnp.float32)
    grad = jax.grad(lambda ps, y0: node(y0, ps, st)[0].sum(), (0, 1))
    shapes = jax.eval_shape(grad, ps, jnp.ones(24, jnp.float32))
    assert [leaf.dtype for leaf in jax.tree.leaves(shapes)] == [jnp.float32, jnp.float32]
    eqns = equations(jax.make_jaxpr(grad)(ps, jnp.ones(24, jnp.float32)).jaxpr)
    arrays = [var.aval for eqn in eqns for var in (*eqn.invars, *eqn.outvars) if var.aval.shape]
    assert not [array for array in arrays if array.dtype == jnp.float64]


def test_equal_adjoints_are_equal():
    nodes = [fl.NeuralODE(WIDE, adjoint=fl.AdaptiveCheckpointAdjoint(every=k)) for k in (1, 1, 2)]
    assert nodes[0] == nodes[1] != nodes[2]
    assert hash(nodes[0]) == hash(nodes[1])


# Errors


def decay(t0=0.0, t1=1.0, dt0=0.1, rate=1.0, **options):
    term = diffrax.ODETerm(lambda t, y, rate: -rate * y)
    options = {"adjoint": ADJOINT, "solver": diffrax.Tsit5()} | options
    return diffrax.diffeqsolve(term, t0=t0, t1=t1, dt0=dt0, y0=jnp.array(1.0), args=rate, **options)


def test_what_is_not_supported_says_what_is():
    with pytest.raises(ValueError, match=r"events. Use diffrax.RecursiveCheckpointAdjoint"):
        decay(event=diffrax.Event(lambda t, y, *_, **__: y - 0.5))
    with pytest.raises(ValueError, match=r"max_steps to be an integer .* diffrax.RecursiveCheckpointAdjoint"):
        decay(max_steps=None)
    for name in ("t0", "t1", "dt0"):
        with pytest.raises(RuntimeError, match=rf"no gradient with respect to {name}. Use diffrax.Recursive"):
            jax.grad(lambda x, name=name: decay(**{name: x}).ys[0])(0.1)
    with pytest.raises(RuntimeError, match=r"no gradient with respect to SaveAt\(ts=...\)"):
        jax.grad(lambda t: decay(saveat=diffrax.SaveAt(ts=t[None])).ys[0])(jnp.array(0.5))
    for every in (0, -1, 1.5):
        with pytest.raises(ValueError, match="`every` to be an integer of at least 1"):
            fl.AdaptiveCheckpointAdjoint(every=every)


FORWARD = {
    "jvp": lambda f, x: jax.jvp(f, (x,), (x,)),
    "jvp of jit": lambda f, x: jax.jvp(jax.jit(f), (x,), (x,)),
    "jit of jvp": lambda f, x: jax.jit(lambda x: jax.jvp(f, (x,), (jnp.ones_like(x),)))(x),
    "vmap of jvp": lambda f, x: jax.vmap(lambda x: jax.jvp(f, (x,), (jnp.ones_like(x),)))(x[None]),
    "jvp of vmap": lambda f, x: jax.jvp(jax.vmap(f), (x[None],), (x[None],)),
    "jvp of scan": lambda f, x: jax.jvp(
        lambda x: jax.lax.scan(lambda x, _: (f(x), None), x, length=2)[0], (x,), (x,)
    ),
    "jacfwd": lambda f, x: jax.jacfwd(f)(x),
    "linearize": lambda f, x: jax.linearize(f, x)[1](x),
    "grad of jvp": lambda f, x: jax.grad(lambda x: jax.jvp(f, (x,), (1.0,))[1])(x),
    "least squares": lambda f, x: optx.least_squares(
        lambda x, _: f(x), optx.LevenbergMarquardt(1e-3, 1e-3), x, throw=False
    ),
}


@pytest.mark.parametrize("name", FORWARD)
def test_forward_mode_is_refused_with_the_way_out(name):
    with pytest.raises(TypeError, match=r"AdaptiveCheckpointAdjoint has reverse mode.*forward-mode.*'bwd'"):
        FORWARD[name](lambda rate: decay(rate=rate).ys[0], jnp.array(0.7))


def test_the_way_out_of_forward_mode():
    """y(1) = exp(-rate) for dy/dt = -rate y."""

    def end(rate, adjoint=ADJOINT):
        return decay(rate=rate, adjoint=adjoint, max_steps=16).ys[0]

    rate = jnp.array(0.7)
    for adjoint in (diffrax.ForwardMode(), diffrax.DirectAdjoint()):
        assert_close(jax.jacfwd(end)(rate, adjoint), -jnp.exp(-rate), 1e-6)
    solver = optx.LevenbergMarquardt(1e-10, 1e-10)

    def residual(rate, _):
        return end(rate) - 0.25

    solution = optx.least_squares(residual, solver, rate, options={"jac": "bwd"})
    assert_close(solution.value, jnp.log(4.0), 1e-6)


REVERSE_TWICE = {
    "grad of grad": lambda f, x: jax.grad(jax.grad(f))(x),
    "jit": lambda f, x: jax.jit(jax.grad(jax.grad(f)))(x),
    "vmap": lambda f, x: jax.grad(lambda x: jax.vmap(jax.grad(f))(x).sum())(x[None]),
    "the value": lambda f, x: jax.grad(lambda x: jax.value_and_grad(f)(x)[0])(x),
}


@pytest.mark.parametrize("name", REVERSE_TWICE)
@pytest.mark.parametrize("solver", [diffrax.Tsit5(), diffrax.ReversibleHeun()])
def test_reverse_mode_twice_is_refused_with_the_way_out(name, solver):
    with pytest.raises(TypeError, match=r"no reverse mode over reverse mode.*fl.hessian.*DirectAdjoint\(\)"):
        REVERSE_TWICE[name](lambda rate: decay(rate=rate, solver=solver).ys[0], jnp.array(0.7))


def test_second_derivatives_with_steps_that_have_reverse_mode_only():
    def end(rate):
        return decay(rate=rate, solver=diffrax.Kvaerno3(), stepsize_controller=PID).ys[0]

    for derivative in (jax.hessian(end), jax.grad(jax.grad(end))):
        with pytest.raises(TypeError, match=r"no second derivative with Kvaerno3.*DirectAdjoint\(\)"):
            derivative(0.7)


def test_reverse_mode_inside_of_transformations():
    """What refuses forward mode is in nobody's way."""

    def f(rate):
        return decay(rate=rate).ys[0]

    rate, expected = jnp.array(0.7), -np.exp(-0.7)
    for gradient in (
        jax.grad(jax.checkpoint(f)),
        jax.jit(jax.grad(lambda x: jax.vmap(jax.checkpoint(f))(x[None])[0])),
        jax.grad(lambda x: jax.lax.cond(x > 0, f, lambda x: x, x)),
        jax.grad(lambda x: f(x) + x * jax.lax.stop_gradient(jax.grad(f)(x)) * 0),
        lambda x: jax.linear_transpose(jax.linearize(f, x)[1], x)(jnp.ones(()))[0],
    ):
        assert_close(gradient(rate), expected, 1e-5)


def test_bounds_of_the_step_size_have_no_gradient():
    """The default has one: diffrax applies them to the step that it has from the error."""

    def end(x, name, clipped, adjoint=ADJOINT):
        controller = diffrax.PIDController(rtol=1e-2, atol=1e-2, **{name: x})
        if clipped:
            controller = diffrax.ClipStepSizeController(controller, step_ts=[0.3])
        return decay(stepsize_controller=controller, adjoint=adjoint).ys[0]

    assert jax.grad(end)(0.15, "dtmax", False, DEFAULT) != 0
    for name, clipped in [("dtmax", False), ("dtmin", False), ("dtmax", True)]:
        message = rf"no gradient with respect to PIDController\({name}=...\). Use .*lax.stop_gradient"
        with pytest.raises(RuntimeError, match=message):
            jax.grad(end)(0.15, name, clipped)
    rest = {"rtol": 1e-2, "pcoeff": 0.1, "icoeff": 0.9, "dcoeff": 0.05, "factormin": 0.2, "factormax": 5.0}
    for name, value in rest.items():

        def tolerant(x, adjoint, name=name):
            controller = diffrax.PIDController(**({"rtol": 1e-2, "atol": 1e-2} | {name: x}))
            return decay(stepsize_controller=controller, adjoint=adjoint).ys[0]

        assert jax.grad(tolerant)(value, ADJOINT) == jax.grad(tolerant)(value, DEFAULT) == 0


def test_steps_that_are_given_have_no_gradient():
    def to(x):
        return decay(
            dt0=None, stepsize_controller=diffrax.StepTo(jnp.array([0.0, 1.0]).at[1].set(x)), t1=x
        ).ys[0]

    def clipped(x):
        return decay(stepsize_controller=diffrax.ClipStepSizeController(PID, jump_ts=x[None])).ys[0]

    with pytest.raises(RuntimeError, match="no gradient with respect to (StepTo|t1)"):
        jax.grad(to)(jnp.array(1.0))
    with pytest.raises(RuntimeError, match="no gradient with respect to ClipStepSizeController"):
        jax.grad(clipped)(jnp.array(0.4))


def test_other_versions_of_diffrax_are_named():
    for version in ("0.7.2", "0.7.3", "0.7.10.dev0"):
        _diffrax.check_version(version)
    for version in ("0.7.1", "0.6.0", "0.8.0", "1.0"):
        with pytest.raises(ImportError, match=rf"diffrax >= 0.7.2 and < 0.8.* found {version}"):
            _diffrax.check_version(version)


def test_a_weight_that_is_used_in_several_ways():
    # The field is a derivative of the network: each weight is in a product and in the transpose of one.
    model = fl.HamiltonianNN(fl.MLP(2, (8, 8), 1))
    y0 = jnp.array([[1.0, 0.2], [0.3, -0.5]])

    def gradient(adjoint):
        node = fl.NeuralODE(model, adjoint=adjoint)
        ps, st = fl.setup(jax.random.key(0), node, float)
        return jax.jit(jax.grad(lambda ps: jnp.sum(node(y0, ps, st)[0] ** 2)))(ps)

    assert_close(gradient(ADJOINT), gradient(DEFAULT))
