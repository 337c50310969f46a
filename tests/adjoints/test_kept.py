"""Gradients from kept residuals: of all steps, some or none, against diffrax's default and the formula."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flatlayers as fl
from flatlayers.adjoints import _checkpoints
from flatlayers.adjoints._plan import BUDGET
from tests.adjoints.helpers import ADJOINT, DEFAULT
from tests.adjoints.kept import (
    START,
    WEIGHTS,
    assert_equal_gradients,
    assert_equal_to_default,
    gradients,
    keeping,
    network,
    network_solve,
    written_out,
)


pytestmark = pytest.mark.long


NONE = fl.AdaptiveCheckpointAdjoint(keep=0)


def name_of(x):
    return type(x).__name__ if isinstance(x, diffrax.AbstractSolver) else str(x)


# All numbers of steps, against the method written out in forward mode


def ends(solver, adjoint, max_steps, h=0.07):
    """The gradients of a function of the state after `n` steps."""

    def loss(inputs, n):
        options = {"solver": solver, "max_steps": max_steps, "dt0": h, "t1": n * h, "adjoint": adjoint}
        return network_solve(y0=inputs[0], p=inputs[1], **options).ys[0] @ jnp.array([1.0, -0.7])

    return jax.grad(loss)


def expected_ends(solver, steps, h=0.07):
    """The same for all numbers of steps from none to `steps`."""

    def values(inputs):
        return written_out(solver, network, *inputs, h, steps) @ jnp.array([1.0, -0.7])

    return jax.jit(jax.jacfwd(values))((START, WEIGHTS))


@pytest.mark.parametrize(
    ("solver", "kept", "size", "max_steps"),
    [
        (diffrax.Tsit5(), 8, 8, 40),
        (diffrax.Heun(), 30, 30, 200),
        *(
            pytest.param(solver, *numbers, marks=pytest.mark.slow)
            for solver in (diffrax.Tsit5(), diffrax.Heun())
            for numbers in [(3, 3, 40), (5, 5, 7), (60, 48, 60), (3, 3, 300), (30, 30, 300), (60, 48, 300)]
        ),
    ],
    ids=name_of,
)
def test_every_number_of_steps(plans, solver, kept, size, max_steps):
    """From none to all that are allowed: less than are kept, as many, more, and with starts left out."""
    grad = ends(solver, keeping(kept, solver), max_steps)
    counts = jnp.arange(max_steps + 1.0)
    found = jax.jit(jax.vmap(grad, (None, 0)))((START, WEIGHTS), counts)
    assert {plan.size for plan in plans} == {size}
    assert _checkpoints.thins(max_steps, plans[0].block) == (max_steps >= 200)
    expected = expected_ends(solver, max_steps)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12)
        assert abs(b[1:]).max() > 1e-3
    # Under `vmap` the samples that are done go on with the rest, alone they stop.
    alone = jax.jit(grad)
    for n in {size - 2, size - 1, size, size + 1, max_steps // 2 + 3, max_steps}:
        if n >= 0:
            at_n = jax.tree.map(lambda x, n=n: x[n], expected)
            for a, b in zip(*map(jax.tree.leaves, (alone((START, WEIGHTS), float(n)), at_n)), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12)


# All that solves can be made of, against diffrax's default

SOLVERS = [
    diffrax.Tsit5(),
    diffrax.Dopri5(),
    diffrax.Dopri8(),
    diffrax.Heun(),
    diffrax.Bosh3(),
    diffrax.Midpoint(),
    diffrax.Ralston(),
]
PID = diffrax.PIDController(rtol=1e-6, atol=1e-6)
CONTROLLERS = {
    "constant": {"dt0": 0.1},
    "pid": {"stepsize_controller": PID, "dt0": 1.4},  # the first attempt is rejected
    "jumps": {"stepsize_controller": diffrax.ClipStepSizeController(PID, jump_ts=[0.5, 1.1]), "dt0": None},
    "to": {"stepsize_controller": diffrax.StepTo(jnp.linspace(0.0, 1.5, 16) ** 2 / 1.5), "dt0": None},
}


def scaled(t, y, args):
    return args["c"] * t * y


SAVES = {
    "end": diffrax.SaveAt(t1=True),
    "start and end": diffrax.SaveAt(t0=True, t1=True, fn=scaled),
    "ts": diffrax.SaveAt(ts=jnp.array([0.0, 0.01, 0.02, 0.5, 0.9, 1.5])),
    "steps": diffrax.SaveAt(steps=True, t0=True),
    "dense": diffrax.SaveAt(dense=True),
    "several": diffrax.SaveAt(
        subs={
            "ts": diffrax.SubSaveAt(ts=jnp.linspace(0.1, 1.4, 9), t0=True, t1=True),
            "steps": diffrax.SubSaveAt(steps=2, fn=scaled),
        },
        dense=True,
    ),
}
QUICK = [
    (diffrax.Tsit5(), "pid", "end"),
    (diffrax.Bosh3(), "pid", "several"),
    (diffrax.Dopri5(), "jumps", "start and end"),
    (diffrax.Heun(), "to", "ts"),
]
# Any two of a case come together in one of these.
SLOW = [
    (solver, controller, save)
    for i, solver in enumerate(SOLVERS)
    for j, controller in enumerate(CONTROLLERS)
    for k, save in enumerate(SAVES)
    if (i + j + k) % 3 == 0
]


def is_dense(save):
    return save not in ("end", "start and end")


def tolerance(controller):
    """The next step follows from an error that rounding has a part in, of whoever adds up the stages."""
    return 1e-10 if controller in ("pid", "jumps") else 1e-12


@pytest.mark.parametrize(("solver", "controller", "save"), QUICK, ids=name_of)
def test_some_steps_are_kept(plans, solver, controller, save):
    options = {"solver": solver, "saveat": SAVES[save], "max_steps": 4096} | CONTROLLERS[controller]
    some = keeping(4, solver, is_dense(save))
    stats = assert_equal_to_default([some], START, WEIGHTS, rtol=tolerance(controller), **options)
    assert {plan.size for plan in plans} == {4}
    assert stats["num_accepted_steps"] > 6
    assert controller != "pid" or stats["num_rejected_steps"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(("solver", "controller", "save"), SLOW, ids=name_of)
def test_none_some_and_all_steps_are_kept(plans, solver, controller, save):
    options = {"solver": solver, "saveat": SAVES[save], "max_steps": 4096} | CONTROLLERS[controller]
    some = keeping(3, solver, is_dense(save))
    adjoints, rtol = [NONE, some, ADJOINT], tolerance(controller)
    stats = assert_equal_to_default(adjoints, START, WEIGHTS, rtol=rtol, **options)
    assert {plan and plan.size for plan in plans} == {None, 3, 48}
    assert stats["num_accepted_steps"] > 4


@pytest.mark.parametrize("save", ["end", pytest.param("dense", marks=pytest.mark.slow)])
@pytest.mark.parametrize("max_steps", [1, pytest.param(2, marks=pytest.mark.slow), 5])
def test_a_solve_that_takes_as_many_steps_as_it_may(plans, save, max_steps):
    options = {"saveat": SAVES[save], "max_steps": max_steps, "dt0": 1.5 / max_steps}
    stats = assert_equal_to_default([ADJOINT], START, WEIGHTS, **options)
    assert stats["num_accepted_steps"] == max_steps
    assert {plan.size for plan in plans} == {max_steps + 2}  # with room for an attempt after them


def test_no_steps():
    """The state at the end is that at the start, in all that is saved."""
    saveat = diffrax.SaveAt(ts=[0.0, 0.0], t0=True, t1=True)
    options = {"saveat": saveat, "t1": 0.0, "max_steps": 8}
    (by_y0, by_p), _ = gradients(keeping(4, diffrax.Tsit5(), True), START, WEIGHTS, **options)
    weights = jnp.cos(jnp.arange(8.0)).reshape(4, 2).sum(0)
    np.testing.assert_allclose(by_y0, 2 * weights * START + 4, rtol=1e-14)
    assert not any(x.any() for x in jax.tree.leaves(by_p))


@pytest.mark.parametrize(
    "solver", [diffrax.Tsit5(), pytest.param(diffrax.Heun(), marks=pytest.mark.slow)], ids=name_of
)
def test_backward_in_time(solver):
    options = {"solver": solver, "t1": -1.0, "dt0": -0.1, "saveat": diffrax.SaveAt(ts=[0.0, -0.33, -1.0])}
    assert_equal_to_default([keeping(4, solver, True)], START, WEIGHTS, **options)


def bounded(t, y, p):
    """No number beyond a state that the solution comes to at about half of the time."""
    return jnp.where(y[0] < 1, network(t, y, p) + 1.0, jnp.nan)


@pytest.mark.parametrize(
    ("solver", "kept", "save"),
    [
        (diffrax.Tsit5(), 48, "end"),
        *(
            pytest.param(solver, kept, save, marks=pytest.mark.slow)
            for solver in (diffrax.Tsit5(), diffrax.Heun(), diffrax.Dopri8())
            for save in ("end", "several")
            for kept in (0, 3, 7, 8, 9, 10, 48)
        ),
    ],
    ids=name_of,
)
def test_a_last_attempt_that_is_no_number(solver, kept, save):
    """Against a solve from one accepted step to the next, of a field that is a number everywhere."""
    inside = {
        "ts": diffrax.SubSaveAt(ts=[0.01, 0.03, 0.2]),
        "steps": diffrax.SubSaveAt(steps=2, fn=scaled),
    }
    saveat = SAVES["end"] if save == "end" else diffrax.SaveAt(subs=inside)
    options = {"solver": solver, "throw": False, "t1": 1.5}
    controller = diffrax.PIDController(rtol=1e-4, atol=1e-4)
    fails = {"stepsize_controller": controller, "dt0": 0.05, "max_steps": 40, "field": bounded}
    some = keeping(kept, solver, save != "end")
    # An error that is all but rounding chooses the times of steps: they are of a solve that rounds alike.
    alike = some if kept < 7 else DEFAULT
    solution = network_solve(alike, START, WEIGHTS, saveat=SAVES["steps"], **options | fails)
    count = int(solution.stats["num_accepted_steps"])
    assert solution.result == diffrax.RESULTS.max_steps_reached
    assert solution.stats["num_rejected_steps"] > 5
    assert 4 < count < 30
    ts = solution.ts[: count + 1]
    assert 0.2 < ts[-1] < 1.4

    def loss(inputs, adjoint, more):
        ys = network_solve(adjoint, *inputs, saveat=saveat, **options | more).ys
        ys = jax.tree.map(lambda ys: jnp.where(jnp.isfinite(ys), jnp.sin(ys), 0.0).sum(), ys)
        return sum(jax.tree.leaves(ys))

    to = {"stepsize_controller": diffrax.StepTo(ts), "dt0": None, "t1": ts[-1]}
    to["field"] = lambda t, y, p: network(t, y, p) + 1.0
    found, expected = (
        jax.jit(jax.grad(lambda x, adjoint=adjoint, more=more: loss(x, adjoint, more)))((START, WEIGHTS))
        for adjoint, more in ((some, fails), (DEFAULT, to))
    )
    assert_equal_gradients(found, expected, 1e-10)


# States, fields and weights of all kinds


def test_samples_with_their_own_numbers_of_steps(four):
    y0 = jnp.array([[0.01, 0.0], [0.3, -0.2], [30.0, -9.0]])
    options = {"stepsize_controller": diffrax.PIDController(rtol=1e-7, atol=1e-7), "dt0": None}
    options["field"] = lambda t, y, p: 3 * network(t, y, p) - jnp.sin(y)

    def each(adjoint):
        def one(y0, p):
            solution = network_solve(adjoint, y0, p, saveat=diffrax.SaveAt(ts=[0.4, 1.5]), **options)
            return jnp.sum(jnp.sin(solution.ys)), solution.stats["num_accepted_steps"]

        return jax.jit(jax.vmap(jax.grad(one, (0, 1), has_aux=True), (0, None)))(y0, WEIGHTS)

    expected, counts = each(DEFAULT)
    found, _ = each(four)
    assert len(set(counts.tolist())) == 3
    assert counts.max() - counts.min() > 4
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12 * abs(b).max())


def test_the_bytes_are_divided_among_samples(key, plans):
    assert ADJOINT.shared_by(1) is ADJOINT
    assert ADJOINT.shared_by(5).keep == BUDGET // 5
    assert fl.AdaptiveCheckpointAdjoint(keep=1000, every=2).shared_by(3) == fl.AdaptiveCheckpointAdjoint(
        keep=333, every=2
    )
    x = jax.random.normal(key, (3, 4))
    # Of Tsit5 six stages leave the two factors, 4 and 6 numbers, for 8 steps and two blocks of 4.
    keep = 3 * (8 + 8) * 6 * 8 * (4 + 6)

    def gradient(adjoint, batching):
        model = fl.Chain(fl.Dense(4, 6, jnp.tanh), fl.Dense(6, 4))
        node = fl.NeuralODE(model, t1=2.0, adjoint=adjoint, batching=batching)
        ps, st = fl.setup(key, node, float)
        return jax.jit(jax.grad(lambda ps: jnp.sum(jnp.sin(node(x, ps, st)[0]))))(ps).data

    found = gradient(fl.AdaptiveCheckpointAdjoint(keep=keep), "each")
    assert {plan.size for plan in plans} == {8}
    assert_equal_gradients(found, gradient(DEFAULT, "each"))
    # Side by side in one solve they have three times the bytes and leave three times as many.
    plans.clear()
    gradient(fl.AdaptiveCheckpointAdjoint(keep=keep), "shared")
    assert {plan.size for plan in plans} == {8}


def test_with_fewer_states_no_residuals_are_kept(plans):
    """Since the states between are made again one by one."""
    adjoint = fl.AdaptiveCheckpointAdjoint(keep=2**20, every=3)
    jax.make_jaxpr(lambda y0: gradients(adjoint, y0, WEIGHTS, saveat=SAVES["ts"], max_steps=64))(START)
    assert plans == []


@pytest.mark.slow
@pytest.mark.parametrize("solver", [diffrax.Heun(), diffrax.Midpoint()], ids=name_of)
def test_noise(four, solver):
    def solve(adjoint, y0, p):
        path = diffrax.VirtualBrownianTree(0.0, 1.0, 1e-3, (3,), jax.random.key(1))
        noise = diffrax.ControlTerm(lambda t, y, p: 0.3 * jnp.cos(p["W2"] * y[:, None]), path)
        terms = diffrax.MultiTerm(diffrax.ODETerm(lambda t, y, p: network(t, y, p)), noise)
        saveat, options = diffrax.SaveAt(ts=[0.31, 1.0]), {"adjoint": adjoint, "max_steps": 64}
        return diffrax.diffeqsolve(terms, solver, 0.0, 1.0, 0.04, y0, p, saveat=saveat, **options)

    assert_equal_to_default([four], START, WEIGHTS, of=solve)


@pytest.mark.parametrize("solver", [diffrax.Tsit5(), diffrax.Heun()], ids=name_of)
def test_a_control_with_a_gradient(four, plans, solver):
    """`dy = tanh(W y) dX` over an interpolation of values that are differentiated."""
    ts = jnp.linspace(0.0, 1.0, 5)

    def solve(adjoint, y0, weight, values):
        coefficients = diffrax.backward_hermite_coefficients(ts, values)
        term = diffrax.ControlTerm(
            lambda t, y, p: jnp.tanh(jnp.tensordot(p, y, 1)), diffrax.CubicInterpolation(ts, coefficients)
        )
        options = {"saveat": diffrax.SaveAt(t1=True, ts=[0.3]), "adjoint": adjoint, "max_steps": 64}
        return diffrax.diffeqsolve(term, solver, 0.0, 1.0, 0.04, y0, weight, **options)

    weight = jnp.cos(jnp.arange(12.0)).reshape(2, 3, 2)
    values = jnp.sin(jnp.arange(15.0)).reshape(5, 3)
    assert_equal_to_default([four], START, weight, values, of=solve)
    assert not any(plan.is_chained for plan in plans)


def test_a_pytree_and_weights_used_in_several_ways(four):
    """In two products, in the transpose of one, by itself, and through what the field closes over."""

    def solve(adjoint, y0, weight, bias):
        def field(t, y, _):
            u = jnp.tanh(weight @ y["u"] + bias)
            v = weight @ jnp.sin(u + bias) + weight.T @ y["u"] + jnp.sum(weight) * y["v"]
            return {"u": u - y["u"] * jnp.cos(t), "v": 0.2 * v - y["v"]}

        saveat, options = diffrax.SaveAt(t1=True), {"adjoint": adjoint, "max_steps": 64}
        term, solver = diffrax.ODETerm(field), diffrax.Tsit5()
        return diffrax.diffeqsolve(term, solver, 0.0, 1.0, 0.04, y0, saveat=saveat, **options)

    y0 = {"u": jnp.array([0.3, -0.4, 0.1]), "v": jnp.array([1.0, 0.2, -0.7])}
    inputs = y0, jnp.sin(jnp.arange(9.0)).reshape(3, 3), jnp.array([0.1, -0.5, 0.2])
    assert_equal_to_default([four], *inputs, of=solve)


@pytest.mark.filterwarnings("ignore:Complex dtype support in Diffrax")
def test_complex_states_and_weights(four):
    def solve(adjoint, y0, weight, bias):
        field = diffrax.ODETerm(lambda t, y, p: jnp.tanh(y @ weight.T + bias[None]) - y)
        options = {"adjoint": adjoint, "max_steps": 64}
        return diffrax.diffeqsolve(field, diffrax.Tsit5(), 0.0, 1.0, 0.05, y0, **options)

    def numbers(seed, *shape):
        return jax.lax.complex(*jax.random.normal(jax.random.key(seed), (2, *shape)))

    def gradient(adjoint):
        def loss(inputs):
            ys = solve(adjoint, *inputs).ys
            return jnp.sum(jnp.abs(ys) ** 2) + jnp.sum(jnp.imag(ys) ** 3)

        return jax.jit(jax.grad(loss))((numbers(0, 2, 3), numbers(1, 3, 3), numbers(2, 3)))

    found = gradient(four)
    assert_equal_gradients(found, gradient(DEFAULT))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, pytest.param(jnp.float16, marks=pytest.mark.slow)])
def test_half_precisions(key, four, dtype):
    """To rounding, against the same numbers in float32."""
    node = fl.NeuralODE(
        fl.Chain(fl.Dense(2, 8, jnp.tanh), fl.Dense(8, 2)),
        stepsize_controller=diffrax.ConstantStepSize(),
        dt0=0.04,
        max_steps=64,
        adjoint=four,
    )
    ps, st = fl.setup(key, node, dtype)
    gradient = jax.jit(jax.grad(lambda ps, y0: jnp.sum(node(y0, ps, st)[0] ** 2)))
    y0 = jnp.array([1.0, 0.5], dtype)
    found = gradient(ps, y0).data
    expected = gradient(ps.map(lambda x: x.astype(jnp.float32)), y0.astype(jnp.float32)).data
    assert found.dtype == dtype
    error = jnp.linalg.norm(found.astype(jnp.float32) - expected)
    assert error < 4 * float(jnp.finfo(dtype).eps) * jnp.linalg.norm(expected)


# Inside of transformations


@pytest.mark.slow
def test_a_hessian():
    """Forward over reverse, against the method written out."""

    def loss(inputs, adjoint):
        ys = network_solve(adjoint, *inputs, t1=1.2, dt0=0.1, max_steps=16).ys
        return jnp.sum(jnp.sin(ys))

    def expected(inputs):
        return jnp.sum(jnp.sin(written_out(diffrax.Tsit5(), network, *inputs, 0.1, 12)[-1]))

    inputs = START, WEIGHTS
    some = keeping(5, diffrax.Tsit5())
    found = jax.jit(jax.jacfwd(jax.jacrev(lambda inputs: loss(inputs, some))))(inputs)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(jax.hessian(expected)(inputs)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


def test_donated_arguments_and_programs_inside_of_programs():
    """A step of gradient descent whose parts are compiled apart, against one in which nothing is."""
    field = jax.jit(network)

    def step(inputs, grad):
        return jax.tree.map(lambda x, ct: x - 0.1 * ct, inputs, grad(inputs))

    def loss(inputs, adjoint):
        return jnp.sum(jnp.sin(network_solve(adjoint, *inputs, field=field, max_steps=32).ys))

    some = keeping(5, diffrax.Tsit5())
    inner = jax.jit(lambda inputs: loss(inputs, some))
    donated = jax.jit(lambda inputs: step(inputs, jax.jit(jax.grad(inner))), donate_argnums=0)
    expected = jax.jit(lambda inputs: step(inputs, jax.grad(lambda inputs: loss(inputs, DEFAULT))))
    inputs = START, WEIGHTS
    expected = expected(expected(inputs))
    found = donated(donated(jax.tree.map(jnp.array, inputs)))
    assert_equal_gradients(found, expected)
    assert_equal_gradients(jax.grad(inner)(inputs), jax.grad(lambda inputs: loss(inputs, DEFAULT))(inputs))
