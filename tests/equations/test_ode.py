import functools

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flatlayers as fl
from tests.helpers import assert_close, central_difference, equations, inner_jaxprs


TIGHT = diffrax.PIDController(rtol=1e-9, atol=1e-11)
MODEL = fl.Chain(fl.Dense(2, 8, jnp.tanh), fl.Dense(8, 2))


class Rotation(fl.Layer):
    """dy/dt = rate * (y1, -y0), whose solution is known."""

    def parameters(self):
        return {"rate": fl.Param((), fl.initializers.constant(2.0))}

    def forward(self, y, ps, st):
        return ps.rate * jnp.stack([y[1], -y[0]]), st


class Scaled(fl.Layer):
    """A field on any pytree: dy/dt = -rate * y, or -rate * t with time."""

    with_time: bool = False

    def parameters(self):
        return {"rate": fl.Param((), fl.initializers.constant(0.5))}

    def forward(self, x, ps, st):
        if self.with_time:
            t, y = x
            return jax.tree.map(lambda y: -ps.rate * t * jnp.ones_like(y), y), st
        return jax.tree.map(lambda y: -ps.rate * y, x), st


def test_solves_what_is_known_in_closed_form(key):
    times = (0.0, 0.5, 1.3)
    node = fl.NeuralODE(Rotation(), t1=2.0, saveat=times, stepsize_controller=TIGHT)
    ps, st = fl.setup(key, node, float)
    ys, new = jax.jit(node)(jnp.array([1.0, 0.0]), ps, st)
    expected = np.stack([np.cos(2 * np.array(times)), -np.sin(2 * np.array(times))], 1)
    np.testing.assert_allclose(ys, expected, atol=1e-8)
    assert ps.layout == Rotation().layout
    assert jax.tree.structure(new) == jax.tree.structure(st)
    assert new.stats.num_steps == new.stats.num_accepted_steps + new.stats.num_rejected_steps > 0
    assert new.stats.result == 0


@pytest.mark.long
def test_equals_plain_diffrax(key):
    node = fl.NeuralODE(MODEL, t0=0.5, t1=2.0, saveat=[1.0, 2.0])
    ps, st = fl.setup(key, node, float)
    y0 = jnp.array([1.0, -1.0])

    def plain(args):
        return diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, args: MODEL(y, args, fl.initial_states(key, MODEL))[0]),
            diffrax.Tsit5(),
            0.5,
            2.0,
            None,
            y0,
            args,
            saveat=diffrax.SaveAt(ts=jnp.array([1.0, 2.0])),
            stepsize_controller=diffrax.PIDController(rtol=1e-4, atol=1e-6),
        ).ys

    def squares(solve):
        return jax.jit(jax.value_and_grad(lambda ps: jnp.sum(solve(ps) ** 2)))(ps)

    assert_close(squares(lambda ps: node(y0, ps, st)[0]), squares(plain), rtol=1e-8)


def test_what_is_saved(key):
    y0 = jnp.array([1.0, -1.0])

    def shape(saveat):
        node = fl.NeuralODE(MODEL, saveat=saveat, max_steps=64)
        return fl.output_shape(node, y0)

    assert shape(None) == shape(diffrax.SaveAt(t1=True)) == (2,)
    assert shape([0.5]) == shape(diffrax.SaveAt(ts=[0.5])) == (1, 2)
    assert shape(diffrax.SaveAt(t0=True, t1=True, ts=[0.5])) == (3, 2)
    assert shape(diffrax.SaveAt(steps=True)) == (64, 2)
    assert shape(diffrax.SaveAt(dense=True, t1=True)) == (2,)


@pytest.mark.long
@pytest.mark.parametrize("t1", [0.1, 0.3, 1.1, 20.0])
def test_times_from_a_float32_array(key, t1):
    node = fl.NeuralODE(Rotation(), t1=t1, saveat=jnp.linspace(0, t1, 5, dtype=jnp.float32), dt0=0.1)
    assert node.saveat[-1] == t1
    ps, st = fl.setup(key, node, jnp.float32)
    assert jnp.isfinite(jax.jit(node)(jnp.ones(2, jnp.float32), ps, st)[0]).all()


def test_a_jacobian_goes_through_a_solve(key):
    node = fl.NeuralODE(Rotation(), stepsize_controller=TIGHT)
    ps, st = fl.setup(key, node, float)
    y0 = fl.ComponentVector.of({"a": 1.0, "b": 0.5})
    c, s = np.cos(2.0), np.sin(2.0)
    J = jax.jit(fl.jacobian(lambda v: fl.ComponentVector(node(v.data, ps, st)[0], y0.layout)))(y0)
    np.testing.assert_allclose(J.data, [[c, s], [-s, c]], atol=1e-7)


def test_errors_of_solve_are_those_of_the_layer(key):
    node = fl.NeuralODE(fl.Dense(2, 3))
    with pytest.raises(ValueError, match="is like y0") as info:
        node.solve(jnp.ones(2), *fl.setup(key, node, float))
    assert "in the layer NeuralODE: NeuralODE(Dense(2, 3))" in info.value.__notes__[0]
    other = fl.NeuralODE(lambda y: fl.ComponentVector.of({"p": y.data}))
    with pytest.raises(TypeError, match="same layout"):
        other(fl.ComponentVector.of({"q": jnp.ones(2)}), *fl.setup(key, other, float))


def test_equal_nodes_are_equal():
    def node(**options):
        return fl.NeuralODE(MODEL, **options)

    times = jnp.linspace(0, 1, 5)
    assert node(saveat=times) == node(saveat=times.tolist()) == node(saveat=diffrax.SaveAt(ts=times))
    assert hash(node(saveat=times)) == hash(node(saveat=diffrax.SaveAt(ts=times)))
    assert node(saveat=times).saveat == tuple(times.tolist())
    mixed = [node(saveat=diffrax.SaveAt(t0=True, ts=t)) for t in (times, times, times[:3])]
    assert mixed[0] == mixed[1] != mixed[2]
    assert hash(mixed[0]) == hash(mixed[1])
    for adjoint in (diffrax.BacksolveAdjoint, diffrax.DirectAdjoint, diffrax.RecursiveCheckpointAdjoint):
        assert hash(node(adjoint=adjoint())) == hash(node(adjoint=adjoint()))
        assert node(adjoint=adjoint()) == node(adjoint=adjoint())
    jumps = [diffrax.ClipStepSizeController(TIGHT, jump_ts=jnp.array([t])) for t in (0.5, 0.5, 0.6)]
    nodes = [node(stepsize_controller=controller) for controller in jumps]
    assert nodes[0] == nodes[1] != nodes[2]
    assert "NeuralODE(Chain(Dense" in repr(node(t1=2.0))


def test_time_is_an_input_with_time(key):
    node = fl.NeuralODE(Scaled(with_time=True), t1=2.0, with_time=True, stepsize_controller=TIGHT)
    ps, st = fl.setup(key, node, float)
    y, _ = jax.jit(node)(jnp.array([1.0]), ps, st)
    np.testing.assert_allclose(y, 1 - 0.5 * 2.0**2 / 2, atol=1e-8)
    back = fl.NeuralODE(Scaled(with_time=True), t0=2.0, t1=0.0, with_time=True, stepsize_controller=TIGHT)
    np.testing.assert_allclose(jax.jit(back)(y, ps, st)[0], 1.0, rtol=1e-8)


@pytest.mark.long
def test_states_are_arrays_vectors_or_pytrees(key):
    node = fl.NeuralODE(Scaled(), saveat=[0.5, 1.0], stepsize_controller=TIGHT)
    ps, st = fl.setup(key, node, float)
    y0 = fl.ComponentVector.of({"position": [1.0, 2.0], "velocity": 3.0})
    ys, _ = jax.jit(node)(y0, ps, st)
    assert ys.position.shape == (2, 2)
    np.testing.assert_allclose(ys.velocity, 3 * np.exp([-0.25, -0.5]), rtol=1e-8)
    ys, _ = jax.jit(node)({"a": jnp.ones(2), "b": (jnp.ones(()),)}, ps, st)
    np.testing.assert_allclose(ys["b"][0], np.exp([-0.25, -0.5]), rtol=1e-8)
    dense = fl.NeuralODE(fl.Dense(3, 3))
    out, _ = jax.eval_shape(dense, y0, *fl.setup(key, dense, float))
    assert out.layout == y0.layout


@pytest.mark.long
@pytest.mark.parametrize("batch", [False, True])
def test_float32_stays_float32_with_x64_on(key, batch):
    seen = []

    class Watch(fl.Wrapper):
        layer: fl.Layer

        def forward(self, x, ps, st):
            seen.append(x[0].dtype)
            return self.layer(x[1], ps, st)

    node = fl.NeuralODE(Watch(MODEL), saveat=[0.5, 1.0], dt0=0.1, with_time=True)
    ps, st = fl.setup(key, node)
    y0 = jnp.ones((3, 2) if batch else 2, jnp.float32)
    gradient = jax.eval_shape(jax.grad(lambda ps: node(y0, ps, st)[0].sum()), ps)
    assert gradient.dtype == jax.eval_shape(node, y0, ps, st)[0].dtype == ps.dtype == jnp.float32
    assert set(seen) == {jnp.dtype("float32")}


# Differentiating


@pytest.mark.long
@pytest.mark.parametrize(
    "adjoint",
    [None, pytest.param(diffrax.BacksolveAdjoint(), marks=pytest.mark.slow)],
    ids=lambda adjoint: type(adjoint).__name__,
)
def test_gradients_agree_with_central_differences(key, adjoint):
    node = fl.NeuralODE(
        Rotation(), t1=1.5, saveat=[0.7, 1.5], stepsize_controller=TIGHT, adjoint=adjoint, max_steps=256
    )
    ps, st = fl.setup(key, node, float)
    y0 = jnp.array([1.0, 0.5])

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1))
    def loss(ps, y0):
        return jnp.sum(node(y0, ps, st)[0] ** 3)

    _, (by_ps, by_y0) = loss(ps, y0)
    unit = fl.ComponentVector(jnp.ones(1), ps.layout)
    np.testing.assert_allclose(
        by_ps @ unit, central_difference(lambda p: loss(p, y0)[0], ps, unit), rtol=1e-6
    )
    direction = jnp.array([0.3, -0.8])
    np.testing.assert_allclose(
        by_y0 @ direction, central_difference(lambda y: loss(ps, y)[0], y0, direction), rtol=1e-6
    )


@pytest.mark.long
@pytest.mark.parametrize(
    "adjoint",
    [diffrax.RecursiveCheckpointAdjoint(), diffrax.BacksolveAdjoint(), "implicit"],
    ids=lambda adjoint: adjoint if isinstance(adjoint, str) else type(adjoint).__name__,
)
def test_plain_diffrax_takes_vectors_as_state_and_arguments(adjoint):
    """dx/dt = target - x and dv/dt = -rate v: at the end x = target, v = 0 for the implicit adjoint."""
    args = fl.ComponentVector.of({"target": [1.0, 2.0], "rate": 1.5})
    y0 = fl.ComponentVector.of({"x": [0.0, 0.5], "v": 1.0})
    implicit = adjoint == "implicit"
    direction = fl.ComponentVector.of({"target": [0.3, -0.7], "rate": 0.4})

    def solve(args, y0):
        return diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, p: y.replace(x=p.target - y.x, v=-p.rate * y.v)),
            diffrax.Tsit5(),
            0.0,
            jnp.inf if implicit else 2.0,
            0.1,
            y0,
            args,
            saveat=diffrax.SaveAt(t1=True) if implicit else diffrax.SaveAt(ts=[0.5, 1.0, 2.0]),
            stepsize_controller=TIGHT,
            adjoint=diffrax.ImplicitAdjoint() if implicit else adjoint,
            event=diffrax.Event(diffrax.steady_state_event(rtol=1e-9, atol=1e-10)) if implicit else None,
            max_steps=1024,
        )

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss(args):
        ys = solve(args, y0).ys
        return jnp.sum(ys.x**3) + jnp.sum(ys.v), ys

    # The backward pass of diffrax's ImplicitAdjoint mixes integers and floats.
    with jax.numpy_dtype_promotion("standard"):
        (_, ys), slope = loss(args)
        expected = central_difference(lambda args: loss(args)[0][0], args, direction, 1e-5)
    assert ys.x.shape == ((1, 2) if implicit else (3, 2))
    if not implicit:
        np.testing.assert_allclose(ys.v, np.exp(-1.5 * np.array([0.5, 1.0, 2.0])), rtol=1e-7)
    np.testing.assert_allclose(slope @ direction, expected, rtol=1e-5)


def test_the_state_can_be_carried_by_a_loop(key):
    node = fl.NeuralODE(fl.Chain(fl.Dense(2, 2), fl.Dropout(0.5)))
    ps, st = fl.setup(key, node, float)
    (y, new), _ = jax.lax.scan(lambda c, _: (node(c[0], ps, c[1]), None), (jnp.ones(2), st), length=3)
    assert y.shape == (2,)
    assert jax.tree.structure(new) == jax.tree.structure(st)


@pytest.mark.long
def test_vmap_gives_each_sample_its_own_steps(key):
    node = fl.NeuralODE(MODEL, saveat=[0.5, 1.0])
    ps, st = fl.setup(key, node, float)
    y0 = jnp.array([[0.1, 0.2], [30.0, -40.0], [1.0, -1.0]])
    ys, new = jax.jit(jax.vmap(node, (0, None, None)))(y0, ps, st)
    one = jax.jit(node)
    for y, start in zip(ys, y0, strict=True):
        assert_close(y, one(start, ps, st)[0])
    assert new.stats.num_steps.shape == (3,)
    each = fl.NeuralODE(MODEL, saveat=[0.5, 1.0], batching="each")
    zs, stats = jax.jit(each)(jnp.stack([y0, y0]), ps, st)
    assert zs.shape == (2, 2, 3, 2)
    assert_close(zs, jnp.stack([ys.swapaxes(0, 1)] * 2, 1))
    assert stats.stats.num_steps == new.stats.num_steps.max() > new.stats.num_steps.min()
    assert jax.tree.map(jnp.shape, stats) == jax.tree.map(jnp.shape, st)


def test_the_loop_does_not_unpack(key):
    node = fl.NeuralODE(MODEL)
    ps, st = fl.setup(key, node, float)
    jaxpr = jax.make_jaxpr(jax.grad(lambda ps: node(jnp.ones(2), ps, st)[0].sum()))(ps).jaxpr
    loops = [eqn for eqn in equations(jaxpr) if eqn.primitive.name in ("while", "scan")]
    assert loops
    inside = [eqn for loop in loops for inner in inner_jaxprs(loop) for eqn in equations(inner)]
    assert not [eqn for eqn in inside if eqn.primitive.name == "split"]
    assert len([eqn for eqn in equations(jaxpr) if eqn.primitive.name == "split"]) == 1


def test_no_leaks(key):
    node = fl.NeuralODE(MODEL)
    ps, st = fl.setup(key, node, float)
    y0 = jnp.ones(2)

    def trace():
        jax.make_jaxpr(jax.grad(lambda ps: node(y0, ps, st)[0].sum()))(ps)

    trace()  # diffrax leaks by itself on its first trace
    with jax.checking_leaks():
        trace()


def test_compiles_once_for_equal_nodes(key):
    traces = []

    @jax.jit
    def solve(node, y0, ps, st):
        traces.append(node)
        return node(y0, ps, st)[0]

    for _ in range(2):
        node = fl.NeuralODE(fl.Chain(fl.Dense(2, 8, jnp.tanh), fl.Dense(8, 2)), saveat=jnp.linspace(0, 1, 3))
        solve(node, jnp.ones(2), *fl.setup(key, node, float))
    assert len(traces) == 1


# Failures


def test_a_model_that_does_not_fit_is_named(key):
    node = fl.NeuralODE(fl.Chain(fl.Dense(2, 3)))
    with pytest.raises(ValueError, match=r"output is like y0, float64\[2\], found float64\[3\]") as info:
        fl.Chain(first=node)(jnp.ones(2), *fl.setup(key, fl.Chain(first=node), float))
    assert "in the layer first: NeuralODE" in info.value.__notes__[0]
    deep = fl.Chain(ode=fl.NeuralODE(fl.Chain(fl.Dense(2, 3), fl.Dense(4, 2))))
    with pytest.raises(ValueError, match=r"\(..., 4\), found shape \(3,\)") as info:
        deep(jnp.ones(2), *fl.setup(key, deep, float))
    assert "in the layer ode.layer_1: Dense(4, 2)" in info.value.__notes__[0]
    with pytest.raises(ValueError, match=r"from t0=0.0 to t1=1.0, found 2.0"):
        fl.NeuralODE(MODEL, saveat=[0.5, 2.0])


def test_a_failed_solve_raises_or_leaves_its_code(key):
    options = {"max_steps": 2, "stepsize_controller": TIGHT}
    ps, st = fl.setup(key, fl.NeuralODE(Rotation()), float)
    with pytest.raises(Exception, match="maximum number of solver steps"):
        jax.jit(fl.NeuralODE(Rotation(), **options))(jnp.ones(2), ps, st)
    _, new = jax.jit(fl.NeuralODE(Rotation(), throw=False, **options))(jnp.ones(2), ps, st)
    assert new.stats.result != 0
    assert new.stats.num_steps == 2


# Batches


@pytest.mark.long
def test_each_sample_is_what_the_model_sees(key):
    """`Rotation` takes one state of two numbers; the state is that of the first sample."""

    class Counting(fl.Wrapper):
        layer: fl.Layer

        def states(self, key):
            return {"count": 0.0}

        def forward(self, y, ps, st):
            dy, _ = self.layer(y, ps, {})
            return dy, st.replace(count=st.count + y[0])

    node = fl.NeuralODE(Counting(Rotation()), stepsize_controller=TIGHT, batching="each")
    ps, st = fl.setup(key, node, float)
    y0 = jnp.array([[[1.0, 0.0], [0.0, 1.0]], [[2.0, 0.0], [0.0, 0.0]]])
    y1, new = jax.jit(node)(y0, ps, st)
    c, s = np.cos(2.0), np.sin(2.0)
    np.testing.assert_allclose(y1, y0 @ np.array([[c, -s], [s, c]]), atol=1e-7)
    assert new.model.count == 1.0
    vector = fl.ComponentVector(y0[0], fl.Layout({"a": (), "b": ()}))
    assert jax.eval_shape(node, vector, ps, st)[0].layout == vector.layout


# Second order


class Spring(fl.Layer):
    """d2q/dt2 = -stiffness q, or t with time."""

    with_time: bool = False

    def parameters(self):
        return {"stiffness": fl.Param((), fl.initializers.constant(4.0))}

    def forward(self, x, ps, st):
        if self.with_time:
            t, state = x
            return t * jnp.ones_like(state[..., :1]), st
        return -ps.stiffness * x[..., : x.shape[-1] // 2], st


Q, V = np.array([[1.0, 0.5], [0.0, 2.0]]), np.array([[0.0, 1.0], [-1.0, 0.0]])


@pytest.mark.long
@pytest.mark.parametrize("batching", ["shared", "each"])
def test_a_spring(key, batching):
    times = np.array([0.5, 2.0])
    node = fl.SecondOrderNeuralODE(
        Spring(), t1=2.0, saveat=times, stepsize_controller=TIGHT, batching=batching
    )
    ps, st = fl.setup(key, node, float)
    assert ps.layout == Spring().layout
    (q, v), new = jax.jit(node)((Q, V), ps, st)
    c, s = (f(2 * times)[:, None, None] for f in (np.cos, np.sin))
    np.testing.assert_allclose(q, c * Q + s * V / 2, atol=1e-7)
    np.testing.assert_allclose(v, -2 * s * Q + c * V, atol=1e-7)
    assert jax.tree.map(jnp.shape, new) == jax.tree.map(jnp.shape, st)


def test_time_and_the_solution(key):
    node = fl.SecondOrderNeuralODE(Spring(with_time=True), t1=3.0, with_time=True)
    ps, st = fl.setup(key, node, float)
    solution, _ = jax.jit(node.solve)((jnp.ones(1), jnp.ones(1)), ps, st)
    np.testing.assert_allclose(solution.ys[0], 1 + 3.0 + 27 / 6, rtol=1e-4)
    np.testing.assert_allclose(solution.ys[1], 1 + 9 / 2, rtol=1e-4)


def test_wrong_inputs(key):
    node = fl.SecondOrderNeuralODE(Spring())
    ps, st = fl.setup(key, node, float)
    for x in (Q, (Q, V[0]), (Q, V, V), (1.0, 2.0)):
        with pytest.raises(ValueError, match=r"\(position, velocity\), arrays of the same shape .* found"):
            node(x, ps, st)
    wrong = fl.SecondOrderNeuralODE(fl.Dense(4, 4))
    with pytest.raises(ValueError, match=r"the acceleration, float64\[2,2\] .* found float64\[2,4\]") as info:
        wrong((Q, V), *fl.setup(key, wrong, float))
    assert "in the layer SecondOrderNeuralODE" in "".join(info.value.__notes__)
