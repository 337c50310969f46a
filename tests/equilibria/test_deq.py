import functools

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest

import flatlayers as fl
from tests.helpers import assert_close, central_difference, compiled_by_default


TIGHT = fl.Anderson(1e-12, 1e-12)


def mixed(z, x):
    return jnp.tanh(0.5 * z + x)


def zeros(x):
    """A start of four features."""
    return jnp.zeros((*x.shape[:-1], 4), x.dtype)


CELL = fl.Parallel(mixed, fl.Dense(4, 4), fl.Dense(3, 4))
NOISY = fl.Parallel(
    mixed, fl.Chain(fl.Dense(4, 4), fl.Dropout(0.3)), fl.Chain(fl.Dense(3, 4), fl.BatchNorm(4))
)


# The state of `CELL`, which has none.
STATE = fl.Record(layer_0={}, layer_1={})


def deq(model, *args, **options):
    """A layer whose model keeps four features."""
    return fl.DeepEquilibriumNetwork(model, *args, **{"init": zeros} | options)


def problem(layer, dtype=float, x=None):
    """Parameters, state and an input of five samples."""
    key = jax.random.key(1)
    return *fl.setup(key, layer, dtype), jax.random.normal(key, (5, 3), dtype) if x is None else x


def assert_slopes(loss, gradient, ps, x):
    """Compare the gradient of `loss(ps, x)` along a direction with central differences."""
    along_ps = fl.ComponentVector(jax.random.normal(jax.random.key(2), ps.shape), ps.layout)
    along_x = jax.random.normal(jax.random.key(3), x.shape)
    by_ps, by_x = gradient
    exact = central_difference(lambda ps: loss(ps, x), ps, along_ps)
    np.testing.assert_allclose(by_ps @ along_ps, exact, rtol=1e-6)
    exact = central_difference(lambda x: loss(ps, x), x, along_x)
    np.testing.assert_allclose(jnp.vdot(by_x, along_x), exact, rtol=1e-6)


def test_the_output_is_a_fixed_point():
    layer = deq(CELL)
    ps, st, x = problem(layer, jnp.float32)
    z, new = jax.jit(layer)(x, ps, st)
    residual = jnp.abs(CELL((z, x), ps.model, STATE)[0] - z).max()
    assert residual < 1e-4
    np.testing.assert_allclose(new.stats.residual, residual, rtol=1e-3)
    assert new.stats.result == 0 < new.stats.num_steps
    assert z.dtype == jnp.float32
    assert jax.tree.structure(new) == jax.tree.structure(st)
    assert jax.tree.map(jnp.result_type, new) == jax.tree.map(jnp.result_type, st)
    solution, _ = layer.solve(x, ps, st)
    assert_close(solution.value, z, rtol=1e-6)
    assert solution.stats["num_steps"] == new.stats.num_steps
    assert ps.layout.names == ("model", "init")
    assert list(st) == ["stats"]


# Differentiating


def unrolled(layer, ps, x, steps=500):
    z = jnp.zeros((*x.shape[:-1], 4))
    return jax.lax.scan(lambda z, _: (layer((z, x), ps.model, STATE)[0], None), z, length=steps)[0]


UNROLL = pytest.param("unroll", marks=pytest.mark.slow)


@pytest.mark.long
@pytest.mark.parametrize("adjoint", [None, fl.PhantomAdjoint(200, 1.0), UNROLL])
def test_the_gradient_is_that_of_500_applications(adjoint):
    layer = deq(CELL, TIGHT, adjoint=adjoint)
    ps, st, x = problem(layer)
    found = jax.jit(jax.grad(lambda ps, x: jnp.sum(layer(x, ps, st)[0] ** 3), (0, 1)))(ps, x)
    exact = jax.jit(jax.grad(lambda ps, x: jnp.sum(unrolled(CELL, ps, x) ** 3), (0, 1)))(ps, x)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())


@pytest.mark.slow
def test_gradients_with_dropout_and_state_inside():
    layer = deq(NOISY, TIGHT, jacobian_regularization=1)
    chain = fl.Chain(deq=layer, head=fl.Dense(4, 2))
    ps, st, x = problem(chain)

    def loss(ps, x):
        y, new = chain(x, ps, st)
        return jnp.sum(y**3) + new.deq.stats.jacobian_loss

    assert_slopes(jax.jit(loss), jax.jit(jax.grad(loss, (0, 1)))(ps, x), ps, x)


@pytest.mark.slow
def test_under_vmap_and_in_a_chain():
    layer = deq(CELL, TIGHT)
    ps, st, x = problem(layer)

    def loss(ps, x):
        z, new = fl.Chain(layer)(x, {"layer_0": ps}, {"layer_0": st})
        return jnp.sum(z**2), (z, new.layer_0.stats.num_steps)

    each = jax.vmap(jax.value_and_grad(loss, has_aux=True), (None, 0))
    (_, (z, steps)), gradients = jax.jit(each)(ps, x)
    np.testing.assert_allclose(gradients.data.sum(0), exact_gradient(), rtol=1e-8, atol=1e-9)
    np.testing.assert_allclose(z, jax.jit(layer)(x, ps, st)[0], rtol=1e-10)
    assert len(set(steps.tolist())) > 1


@functools.cache
def exact_gradient():
    """Of the sum of squares, in float64."""
    ps, _, x = problem(deq(CELL))
    return jax.jit(jax.grad(lambda ps: jnp.sum(unrolled(CELL, ps, x) ** 2)))(ps).data


@pytest.mark.long
def test_the_jacobian_of_a_linear_map():
    """`z = A z + x`: the loss over all probes is `|A|^2 / n`, its gradient `2 A / n`."""
    matrix = jnp.array([[0.3, -0.2], [0.1, 0.4]])
    cell = fl.Parallel(jnp.add, fl.Dense(2, 2, use_bias=False), fl.NoOpLayer())
    layer = fl.DeepEquilibriumNetwork(cell, jacobian_regularization=400)
    ps, st, x = problem(layer, x=jnp.ones((3, 2)))
    ps = ps.at["model.layer_0.weight"].set(matrix)

    def loss(ps, st):
        new = layer(x, ps, st)[1]
        return new.stats.jacobian_loss, new

    compiled = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (value, new), gradient = compiled(ps, st)
    np.testing.assert_allclose(value, jnp.sum(matrix**2) / 2, rtol=0.1)
    np.testing.assert_allclose(gradient.model.layer_0.weight, matrix, atol=0.05)
    assert (jax.random.key_data(new.key) != jax.random.key_data(st.key)).any()
    assert compiled(ps, st)[0][0] == value != compiled(ps, new)[0][0]
    radius = fl.spectral_radius(cell, x, x, ps.model, {})
    np.testing.assert_allclose(radius, abs(np.linalg.eigvals(matrix)).max(), rtol=0.02)


def steady_state(tolerance):
    event = diffrax.steady_state_event(rtol=tolerance, atol=tolerance)
    return fl.SteadyState(solver=diffrax.Tsit5(), event=event)


@pytest.mark.parametrize(
    ("solver", "dtype", "rtol"),
    [
        (fl.Anderson(1e-10, 1e-10, batch_axes=1), jnp.float64, 1e-6),
        (fl.Anderson(1e-2, 1e-2), jnp.bfloat16, 0.1),
        (optx.FixedPointIteration(1e-5, 1e-5), jnp.float32, 1e-3),
        (optx.Newton(1e-10, 1e-10), jnp.float64, 1e-6),
        (steady_state(1e-5), jnp.float32, 1e-3),
    ],
    ids=lambda part: part.__name__ if isinstance(part, type) else type(part).__name__,
)
@pytest.mark.slow
def test_any_solver_in_any_dtype(solver, dtype, rtol):
    layer = deq(CELL, solver)
    ps, _, x = problem(layer)
    ps, x, st = (
        ps.map(lambda p: p.astype(dtype)),
        x.astype(dtype),
        fl.setup(jax.random.key(1), layer, dtype)[1],
    )

    def loss(ps):
        z, new = layer(x, ps, st)
        return jnp.sum(z**2), (z, new.stats)

    (_, (z, stats)), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(ps)
    assert z.dtype == gradient.dtype == dtype
    assert stats.residual.dtype == (jnp.float32 if dtype == jnp.bfloat16 else dtype)
    assert stats.result == 0 < stats.num_steps
    exact = exact_gradient()
    np.testing.assert_allclose(gradient.data.astype(float), exact, rtol=rtol, atol=rtol * np.abs(exact).max())


@pytest.mark.filterwarnings("ignore:Complex support")
def test_complex_states():
    """No holomorphic map: its derivative is linear in real and imaginary parts only."""
    rng = np.random.default_rng(0)
    matrix = jnp.asarray(rng.normal(size=(3, 3)) + 1j * rng.normal(size=(3, 3))) / 6

    def model(zx):
        z, x = zx
        return matrix @ z + 0.2 * jnp.conj(z) * jnp.abs(z).astype(z.dtype) + x

    solver, start = optx.FixedPointIteration(1e-13, 1e-13), fl.WrappedFunction(jnp.zeros_like)
    layer = fl.DeepEquilibriumNetwork(model, solver, init=start, max_steps=500)
    ps, st = fl.setup(jax.random.key(0), layer, float)
    x, along = jnp.asarray(0.1 * (rng.normal(size=(2, 3)) + 1j * rng.normal(size=(2, 3))))
    loss = jax.jit(lambda x: jnp.sum(jnp.abs(layer(x, ps, st)[0]) ** 2 * jnp.arange(1.0, 4.0)))
    gradient = jax.jit(jax.grad(loss))(x)
    slope = central_difference(loss, x, along)
    np.testing.assert_allclose(jnp.sum(gradient * along).real, slope, rtol=1e-6)
    with pytest.raises(ValueError, match=r"y of real arrays with numbers, found complex128\[3\]"):
        fl.DeepEquilibriumNetwork(model, init=start)(x, ps, st)
    probed = fl.DeepEquilibriumNetwork(
        lambda zx: matrix @ zx[0] + zx[1], solver, init=start, jacobian_regularization=400
    )
    ps, st = fl.setup(jax.random.key(0), probed, float)
    found = probed(x, ps, st)[1].stats.jacobian_loss
    np.testing.assert_allclose(found, jnp.sum(jnp.abs(matrix) ** 2) / 3, rtol=0.1)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_steps():
    wide = fl.Parallel(mixed, fl.Dense(1024, 1024), fl.Dense(16, 1024))

    def memory(steps):
        layer = deq(wide, max_steps=steps, init=lambda x: jnp.zeros((256, 1024), x.dtype))
        st = fl.initial_states(jax.random.key(0), layer)
        ps = jax.eval_shape(lambda: fl.initial_parameters(jax.random.key(0), layer))
        x = jax.ShapeDtypeStruct((256, 16), jnp.float32)
        gradient = jax.jit(jax.grad(lambda ps, x: jnp.sum(layer(x, ps, st)[0] ** 2)))
        return compiled_by_default(gradient.lower(ps, x)).memory_analysis().temp_size_in_bytes

    assert memory(20) == memory(200) < 2e9 / 10


# The start, the depth, the state


class Counted(fl.Wrapper):
    """A model whose state has the number of its evaluations and the last `z`."""

    layer: fl.Layer

    def states(self, key):
        return {"count": 0, "seen": jnp.zeros((5, 4))}

    def forward(self, zx, ps, st):
        y, _ = self.layer(zx, ps, fl.Record(layer_0={}, layer_1={}))
        return y, st.replace(count=st.count + 1, seen=zx[0])


def test_the_state_is_that_of_one_evaluation_at_the_start():
    start = fl.Dense(3, 4)
    layer = fl.DeepEquilibriumNetwork(Counted(CELL), init=start)
    ps, st, x = problem(layer)
    assert ps.layout.names == ("model", "init")
    _, new = jax.jit(layer)(x, ps, st)
    assert new.model.count == 1
    np.testing.assert_array_equal(new.model.seen, start(x, ps.init, {})[0])
    assert new.stats.num_steps > 1


@pytest.mark.parametrize("depth", [1, 4])
def test_a_fixed_depth_applies_the_model_so_often(depth):
    layer = deq(CELL, fixed_depth=depth)
    ps, st, x = problem(layer)
    z, new = jax.jit(layer)(x, ps, st)
    expected = jnp.zeros((5, 4))
    for _ in range(depth):
        expected, _ = CELL((expected, x), ps.model, STATE)
    np.testing.assert_allclose(z, expected, rtol=1e-12)
    assert new.stats.num_steps == depth
    after, _ = CELL((z, x), ps.model, STATE)
    np.testing.assert_allclose(new.stats.residual, jnp.abs(after - z).max(), rtol=1e-12)


def test_the_shape_of_the_state_is_that_of_x_or_of_the_start():
    weight = fl.Param((3, 4), fl.initializers.glorot_uniform)

    class Plain(fl.Layer):
        def parameters(self):
            return {"weight": weight}

        def forward(self, zx, ps, st):
            z, x = zx
            return jnp.tanh(0.5 * z + x @ ps.weight), st

    for layer, features in (
        (deq(Plain()), 4),
        (fl.DeepEquilibriumNetwork(lambda zx: 0.5 * zx[0] + zx[1]), 3),
    ):
        ps, st, x = problem(layer)
        assert fl.output_shape(layer, x) == (5, features)
        assert fl.output_shape(layer, x[0]) == (features,)
    without = fl.DeepEquilibriumNetwork(CELL)
    ps, st, x = problem(without)
    with pytest.raises(ValueError, match=r"expected x of shape \(..., 4\)") as info:
        without(x, ps, st)
    assert any("a start like x, float64[5,3]: `init=...` gives" in note for note in info.value.__notes__)
    pair = fl.DeepEquilibriumNetwork(
        lambda zx: {"a": 0.5 * zx[0]["b"] + zx[1], "b": 0.5 * zx[0]["a"]},
        TIGHT,
        init=lambda x: {"a": jnp.zeros_like(x), "b": jnp.zeros_like(x)},
    )
    ps, st, x = problem(pair)
    assert_close(jax.jit(pair)(x, ps, st)[0], {"a": x / 0.75, "b": x / 1.5})


# The spectral radius


@pytest.mark.parametrize(
    "matrix",
    [
        [[0.5, 0.3], [0.0, -0.2]],
        [[0.0, 0.8], [-0.8, 0.0]],
        [[0.7, 0.0], [0.0, -0.7]],
        [[0.0, 1.0], [0.0, 0.0]],
    ],
    ids=["gap", "complex pair", "opposite signs", "nilpotent"],
)
def test_the_spectral_radius_with_and_without_a_gap(matrix):
    matrix, z = jnp.array(matrix), jnp.ones(2)
    radius = fl.spectral_radius(lambda zx: matrix @ zx[0] + zx[1], z, z, {}, {})
    np.testing.assert_allclose(radius, abs(np.linalg.eigvals(matrix)).max(), rtol=0.01, atol=1e-12)


# Failures


(SLOW,) = jax.tree.leaves(optx.RESULTS.nonlinear_max_steps_reached)
(BROKEN,) = jax.tree.leaves(optx.RESULTS.nonfinite)


@pytest.mark.long
def test_a_failed_solve_is_a_code_or_an_error():
    codes = {}
    for name, model in {
        "drifts": lambda zx: zx[0] + 1,
        "nan": lambda zx: jnp.nan * zx[0] + zx[1],
    }.items():
        layer = fl.DeepEquilibriumNetwork(model, max_steps=10)
        ps, st, x = problem(layer)
        z, new = jax.jit(layer)(x, ps, st)
        codes[name] = int(new.stats.result)
        assert jnp.isfinite(z).all()
    assert codes == {"drifts": SLOW, "nan": BROKEN}
    layer = deq(CELL, TIGHT, max_steps=2, throw=True)
    ps, st, x = problem(layer)
    with pytest.raises(Exception, match="maximum number of steps"):
        jax.jit(layer)(x, ps, st)
    start = deq(CELL, init=lambda x: jnp.full((5, 4), jnp.nan))
    ps, st, x = problem(start)
    assert jax.jit(start)(x, ps, st)[1].stats.result == BROKEN


def test_bad_input_is_named():
    for model, match in (
        (
            lambda zx: jnp.concatenate([zx[0], zx[1]], -1),
            r"output is like z, float64\[5,3\], found float64\[5,6\]; `init=...`",
        ),
        (fl.Parallel(jnp.add, fl.Dense(4, 5), fl.Dense(3, 5)), r"expected x of shape \(..., 4\)"),
    ):
        chain = fl.Chain(deq=fl.DeepEquilibriumNetwork(model))
        ps, st, x = problem(chain)
        with pytest.raises(ValueError, match=match) as info:
            chain(x, ps, st)
        assert any("in the layer deq" in note for note in info.value.__notes__)
    for kind, match, options in (
        (TypeError, "SteadyState", {"solver": diffrax.Tsit5()}),
        (TypeError, "expected adjoint", {"adjoint": diffrax.DirectAdjoint()}),
        (ValueError, "'phantom', 'unroll'", {"adjoint": "phantoms"}),
        (TypeError, r"DeepEquilibriumNetwork.max_steps: .* at least 1, found None", {"max_steps": None}),
        (ValueError, "max_steps: expected an integer of at least 1, found 2.5", {"max_steps": 2.5}),
        (TypeError, "max_steps: .* found True", {"max_steps": True}),
        (ValueError, "fixed_depth: .* found 0", {"fixed_depth": 0}),
        (ValueError, "fixed_depth: .* found nan", {"fixed_depth": np.nan}),
        (ValueError, "jacobian_regularization: .* found 0.5", {"jacobian_regularization": 0.5}),
        (TypeError, "throw: expected True or False, found 1", {"throw": 1}),
    ):
        with pytest.raises(kind, match=match):
            fl.DeepEquilibriumNetwork(CELL, **options)
    with pytest.raises(ValueError, match="steps: expected an integer of at least 2, found 1"):
        fl.spectral_radius(CELL, x, x, {}, {}, steps=1)
    numpys = fl.DeepEquilibriumNetwork(
        CELL, max_steps=np.int32(9), fixed_depth=np.int64(2), jacobian_regularization=True
    )
    assert numpys == fl.DeepEquilibriumNetwork(CELL, max_steps=9, fixed_depth=2, jacobian_regularization=1)


def test_a_solver_that_does_not_take_the_dtype_is_named():
    layer = fl.DeepEquilibriumNetwork(lambda zx: 0.5 * zx[0] + zx[1], optx.Newton(1e-2, 1e-2))
    ps, st = fl.setup(jax.random.key(0), layer)
    with pytest.raises((NotImplementedError, TypeError)) as info:  # by the version of JAX
        layer(jnp.ones(3, jnp.bfloat16), ps, st)
    assert any("z, bfloat16[3], by Newton" in note for note in info.value.__notes__)


def test_an_error_in_the_solve_names_the_solver_as_it_was_given(monkeypatch):
    def refuses(*_, **__):
        raise TypeError("no such dtype")

    monkeypatch.setattr(optx, "fixed_point", refuses)
    layer = fl.DeepEquilibriumNetwork(lambda zx: 0.5 * zx[0] + zx[1], optx.FixedPointIteration(1e-2, 1e-2))
    with pytest.raises(TypeError, match="no such dtype") as info:
        layer(jnp.ones(3), *fl.setup(jax.random.key(0), layer, float))
    assert "in the solve for z, float64[3], by FixedPointIteration" in info.value.__notes__


def test_equal_layers_are_equal():
    def layer(**options):
        return fl.DeepEquilibriumNetwork(CELL, **options)

    assert layer() == layer(solver=fl.Anderson(1e-4, 1e-4)) != layer(solver=fl.Broyden(1e-4, 1e-4))
    assert hash(layer(adjoint="phantom")) == hash(layer(adjoint="phantom"))
    assert layer(solver=optx.Newton(1e-4, 1e-4)) == layer(solver=optx.Newton(1e-4, 1e-4))
    assert repr(layer(max_steps=9)).endswith(", max_steps=9)")
