import dataclasses
import pickle

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flatlayers as fl
from tests.helpers import assert_close, assert_same, central_difference, count_primitives


NETWORK = fl.Chain(fl.Dense(3, 8, jnp.tanh), fl.Dense(8, 2, jnp.sin))


@pytest.fixture
def network(key):
    return fl.setup(key, NETWORK, float)


def tanh_network(key):
    """u(x) = sum of a tanh(w x + b), with its first and second derivative by hand."""
    model = fl.Chain(fl.Dense(1, 6, jnp.tanh), fl.Dense(6, 1, use_bias=False))
    ps, st = fl.setup(key, model, float)
    ps = ps + jax.random.normal(key, ps.shape)
    w, b, a = (np.asarray(part) for part in (ps.layer_0.weight[:, 0], ps.layer_0.bias, ps.layer_1.weight[0]))

    def by_hand(x):
        u = np.tanh(x * w + b)
        return u @ a, (w * (1 - u**2)) @ a, (-2 * w**2 * u * (1 - u**2)) @ a

    return model, ps, st, by_hand


# By a vector


LAYOUT = fl.Layout({"x": {"b": (2, 3), "c": ()}, "y": (4,)})


@pytest.fixture
def v():
    return fl.ComponentVector(jax.random.normal(jax.random.key(0), (LAYOUT.length,)), LAYOUT)


def potential(v):
    return jnp.sum(jnp.sin(v.x.b)) * v.x.c + jnp.sum(v.y**3) * v.x.c**2


@pytest.mark.long
def test_jacobian_to_a_vector_is_a_matrix_with_names(v):
    def f(v):
        return fl.ComponentVector.of({"sum": v.y[0] + v.x.c, "part": {"twice": 2 * v.x.b}})

    J = fl.jacobian(f)(v)
    assert isinstance(J, fl.ComponentMatrix)
    assert J.shape == (J.rows.length, J.cols.length) == (7, 11)
    assert J["part.twice", "x.b"].shape == (2, 3, 2, 3)
    assert_same(J["part.twice", "x.b"].reshape(6, 6), 2 * jnp.eye(6))
    assert_same(J["sum", "y"], jnp.array([1.0, 0, 0, 0]))
    assert_same(J["part", "x"].data, J.data[1:, :7])
    assert_same(J["sum", "x"].data, J.data[:1, :7])
    assert_same(J.T["x.b", "sum"], J["sum", "x.b"])


@pytest.mark.long
@pytest.mark.parametrize("shape", [(), (2,), (30, 2)])
def test_jacobian_to_an_array_is_a_vector_with_leading_axes(v, shape):
    def f(v, scale):
        return jnp.full(shape, scale * potential(v))

    J = fl.jacobian(f)(v, 3.0)
    assert J.shape == (*shape, 11)
    assert J.x.b.shape == (*shape, 2, 3)
    assert_close(J.data, jnp.broadcast_to(3 * jax.grad(potential)(v).data, (*shape, 11)))


def test_both_modes_agree(v):
    def f(v):
        return jnp.sin(v.data) * v.x.c

    assert_close(fl.jacobian(f, mode="fwd")(v).data, fl.jacobian(f)(v).data)


def test_hessian(v):
    H = jax.jit(fl.hessian(potential))(v)
    assert H["x.b", "y"].shape == (2, 3, 4)
    assert_close(H["y", "y"], jnp.diag(6 * v.y * v.x.c**2))
    assert_close(H["x.b", "x.c"], jnp.cos(v.x.b))
    assert_same(H.data, H.T.data)
    w = H @ v
    assert w.layout == v.layout
    assert_close(w.data, H.data @ v.data)
    assert_close(H @ v.data, H.data @ v.data)
    assert_close(v.data @ H, v.data @ H.data)
    assert_close((H @ H).data, H.data @ H.data)
    assert_same(np.asarray(H), np.asarray(H.data))
    assert_same(jnp.trace(H), jnp.trace(H.data))
    assert_same(pickle.loads(pickle.dumps(H))["x.b", "y"], H["x.b", "y"])
    assert len(jax.tree.leaves(H)) == 1


def test_bad_functions_and_vectors(v):
    with pytest.raises(TypeError, match="ComponentVector"):
        fl.jacobian(jnp.sum)(v.data)
    with pytest.raises(ValueError, match="vmap"):
        fl.hessian(potential)(fl.ComponentVector(jnp.ones((2, 11)), LAYOUT))
    with pytest.raises(ValueError, match="scalar"):
        fl.hessian(lambda v: v.y)(v)
    with pytest.raises(ValueError, match="'rev' or 'fwd', found 'forward'"):
        fl.jacobian(potential, mode="forward")


# Products


@pytest.mark.parametrize("lead", [(), (5,)])
def test_products_of_an_affine_map(key, lead):
    layer = fl.Dense(3, 2)
    ps, st = fl.setup(key, layer, float)
    x, v, u = (jax.random.normal(jax.random.key(i), (*lead, n)) for i, n in enumerate((3, 3, 2)))
    weight = np.asarray(ps.weight)
    assert_close(fl.jacobian_vector_product(layer)(x, v, ps, st), np.asarray(v) @ weight.T)
    assert_close(fl.vector_jacobian_product(layer)(x, u, ps, st), np.asarray(u) @ weight)


def test_products_agree_with_finite_differences_and_with_each_other(network):
    ps, st = network
    x, v, u = (jax.random.normal(jax.random.key(i), (5, n)) for i, n in enumerate((3, 3, 2)))
    forward = jax.jit(lambda *args: fl.jacobian_vector_product(NETWORK)(*args))(x, v, ps, st)
    backward = jax.jit(lambda *args: fl.vector_jacobian_product(NETWORK)(*args))(x, u, ps, st)
    slope = central_difference(lambda x: NETWORK(x, ps, st)[0], x, v)
    np.testing.assert_allclose(forward, slope, rtol=1e-7)
    np.testing.assert_allclose(jnp.sum(u * forward), jnp.sum(backward * v), rtol=1e-12)
    one = jax.vmap(lambda x, v: fl.jacobian_vector_product(NETWORK)(x, v, ps, st))(x, v)
    assert_close(forward, one)


def test_inputs_and_outputs_are_any_pytree():
    def model(x, ps, st):
        return {"sum": ps * x["a"] + x["b"][0], "square": x["a"] ** 2}, st

    x = {"a": 3.0, "b": (jnp.array([1.0, 2.0]),)}
    v = {"a": 1.0, "b": (jnp.array([10.0, 20.0]),)}
    product = fl.jacobian_vector_product(model)(x, v, 2.0, {})
    assert_close(product, {"sum": np.array([12.0, 22.0]), "square": 6.0})
    u = {"sum": jnp.array([1.0, 0.5]), "square": 10.0}
    assert_close(fl.vector_jacobian_product(model)(x, u, 2.0, {}), {"a": 63.0, "b": (np.array([1.0, 0.5]),)})


def test_a_vector_is_an_input_and_an_output():
    x = fl.ComponentVector.of({"q": [1.0, 2.0], "p": 3.0})
    model = fl.WrappedFunction(lambda x: x.replace(q=x.q * x.p, p=jnp.sum(x.q)))
    v = fl.ComponentVector(jnp.array([1.0, 0.0, 10.0]), x.layout)
    product = fl.jacobian_vector_product(model)(x, v, {}, {})
    assert_close(product, fl.ComponentVector(jnp.array([13.0, 20.0, 1.0]), x.layout))
    product = fl.vector_jacobian_product(model)(x, v, {}, {})
    assert_close(product, fl.ComponentVector(jnp.array([13.0, 10.0, 1.0]), x.layout))
    other = fl.ComponentVector.of({"q": [1.0, 2.0], "r": 3.0})
    with pytest.raises(TypeError, match="same layout"):
        fl.jacobian_vector_product(model)(x, other, {}, {})


def test_the_state_is_used_and_stays(key):
    model = fl.Chain(fl.Dense(3, 8), fl.Dropout(0.5))
    ps, st = fl.setup(key, model, float)
    x, v = jnp.ones(3), jnp.array([1.0, 2.0, 3.0])
    mask = np.asarray(model(x, ps, st)[0]) != 0
    product = fl.jacobian_vector_product(model)(x, v, ps, st)
    np.testing.assert_allclose(product, 2 * mask * np.asarray(ps.layer_0.weight @ v), rtol=1e-12)
    product = fl.jacobian_vector_product(model)(x, v, ps, fl.testmode(st))
    np.testing.assert_allclose(product, ps.layer_0.weight @ v, rtol=1e-12)


@pytest.mark.long
def test_forward_mode_through_a_solve(key):
    """y' = y (1 - y) from y0: dy(1)/dy0 = e / (1 + y0 (e - 1))^2."""
    controller = diffrax.PIDController(rtol=1e-9, atol=1e-11)
    y0, one = jnp.array([0.2, 0.5]), jnp.ones(2)
    node = fl.NeuralODE(lambda y: y * (1 - y), stepsize_controller=controller)
    ps, st = fl.setup(key, node, float)
    expected = np.e / (1 + y0 * (np.e - 1)) ** 2
    for adjoint in (None, diffrax.ForwardMode()):
        product = fl.jacobian_vector_product(dataclasses.replace(node, adjoint=adjoint))
        np.testing.assert_allclose(product(y0, one, ps, st), expected, rtol=1e-8)
    other = dataclasses.replace(node, adjoint=fl.GaussAdjoint())
    with pytest.raises(TypeError, match=r"found forward-mode.*adjoint=diffrax.ForwardMode\(\)"):
        fl.jacobian_vector_product(other)(y0, one, ps, st)


@pytest.mark.long
def test_hessian_of_what_has_forward_mode_alone(key):
    """y(1) = 1 / (1 + rate) for dy/dt = -rate y^2."""

    class Decay(fl.Layer):
        def parameters(self):
            return {"rate": fl.Param((), fl.initializers.ones)}

        def forward(self, y, ps, st):
            return -ps.rate * y**2, st

    controller = diffrax.PIDController(rtol=1e-9, atol=1e-11)
    node = fl.NeuralODE(Decay(), stepsize_controller=controller, adjoint=diffrax.ForwardMode())
    ps, st = fl.setup(key, node, float)
    H = fl.hessian(lambda ps: node(jnp.ones(1), ps, st)[0][0])(ps)
    np.testing.assert_allclose(H["rate", "rate"], 2 / 2**3, rtol=1e-6)


def test_forward_mode_through_a_function_that_has_none():
    @jax.custom_vjp
    def double(x):
        return 2 * x

    double.defvjp(lambda x: (2 * x, None), lambda _, ct: (2 * ct,))
    with pytest.raises(TypeError, match="custom_vjp") as info:
        fl.jacobian_vector_product(double)(jnp.ones(2), jnp.ones(2), {}, {})
    assert any("adjoint=diffrax.ForwardMode()" in note for note in info.value.__notes__)


def test_wrong_directions(network):
    ps, st = network
    x, u = jnp.ones((5, 3)), jnp.ones((5, 2))
    with pytest.raises(ValueError, match=r"v like x, float64\[5,3\], found float64\[3\]"):
        fl.jacobian_vector_product(NETWORK)(x, jnp.ones(3), ps, st)
    with pytest.raises(ValueError, match=r"v like y, float64\[5,2\], found float64\[5,3\]"):
        fl.vector_jacobian_product(NETWORK)(x, x, ps, st)
    with pytest.raises(ValueError, match=r"v like x, float64\[5,3\], found \(float64\[5,3\]\)"):
        fl.jacobian_vector_product(NETWORK)(x, (x,), ps, st)
    with pytest.raises(TypeError, match=r"dtype of y, float64\[5,2\], found float32\[5,2\]"):
        fl.vector_jacobian_product(NETWORK)(x, u.astype("float32"), ps, st)
    with pytest.raises(TypeError, match=r"floating numbers to differentiate by, found int64\[3\]"):
        fl.jacobian_vector_product(NETWORK)(jnp.arange(3), x, ps, st)


# Jacobians of a batch


@pytest.mark.parametrize("mode", ["rev", "fwd"])
def test_batched_jacobian_equals_that_of_each_sample(network, mode):
    ps, st = network
    x = jax.random.normal(jax.random.key(1), (5, 3))
    J = jax.jit(lambda x: fl.batched_jacobian(NETWORK, mode=mode)(x, ps, st))(x)
    assert J.shape == (5, 2, 3)
    for transform in (jax.jacfwd, jax.jacrev):
        assert_close(J, jax.vmap(transform(lambda x: NETWORK(x, ps, st)[0]))(x))


@pytest.mark.long
@pytest.mark.parametrize("mode", ["rev", "fwd"])
def test_batched_jacobian_of_several_axes(key, mode):
    """y[i, j] = w[i] x[j] over features of shape (2, 2): a Jacobian (batch, *outputs, *features)."""
    w = np.array([1.0, 2.0, 3.0])
    model = fl.WrappedFunction(lambda x: jnp.asarray(w)[None, :, None, None] * x[:, None] ** 2)
    x = jax.random.normal(key, (4, 2, 2))
    expected = np.einsum("i,bjk,jl,km->bijklm", w, 2 * np.asarray(x), np.eye(2), np.eye(2))
    assert_close(fl.batched_jacobian(model, mode=mode)(x, {}, {}), expected)
    total = fl.WrappedFunction(lambda x: jnp.sum(x**2, (1, 2)))
    assert_close(fl.batched_jacobian(total, mode=mode)(x, {}, {}), 2 * x)


@pytest.mark.parametrize("mode", ["rev", "fwd"])
def test_batched_jacobian_of_vectors(mode):
    x = fl.ComponentVector.of({"q": np.ones((4, 2)), "p": np.arange(4.0)[:, None]})
    x = fl.ComponentVector(jnp.concatenate([x.q, x.p], 1), fl.Layout({"q": (2,), "p": (1,)}))
    model = fl.WrappedFunction(lambda x: x.replace(q=x.q * x.p, p=2 * x.p))
    J = fl.batched_jacobian(model, mode=mode)(x, {}, {})
    p = np.arange(4.0)
    assert_close(J[:, 0, 0], p)
    assert_close(J[:, 0], np.stack([p, 0 * p, 1 + 0 * p], 1))
    assert_close(J[:, 2], np.tile([0.0, 0.0, 2.0], (4, 1)))


def test_batched_jacobian_calls_the_model_on_the_whole_batch(key):
    """In test mode BatchNorm is an affine map of each sample."""
    model = fl.BatchNorm(3)
    ps, st = fl.setup(key, model, float)
    st = fl.testmode(st.replace(running_var=jnp.array([1.0, 4.0, 9.0])))
    J = fl.batched_jacobian(model)(jnp.ones((5, 3)), ps, st)
    np.testing.assert_allclose(J, np.tile(np.diag([1, 1 / 2, 1 / 3]), (5, 1, 1)), rtol=1e-4)


@pytest.mark.long
def test_batched_jacobian_through_a_solve(key):
    class Rotation(fl.Layer):
        def forward(self, y, ps, st):
            return jnp.stack([y[..., 1], -y[..., 0]], -1), st

    node = fl.NeuralODE(Rotation(), stepsize_controller=diffrax.PIDController(rtol=1e-9, atol=1e-11))
    ps, st = fl.setup(key, node, float)
    J = fl.batched_jacobian(node)(jax.random.normal(key, (3, 2)), ps, st)
    rotation = np.array([[np.cos(1), np.sin(1)], [-np.sin(1), np.cos(1)]])
    np.testing.assert_allclose(J, np.tile(rotation, (3, 1, 1)), atol=1e-8)


def test_what_has_no_batched_jacobian(network):
    ps, st = network
    with pytest.raises(ValueError, match=r"shape \(batch, \*features\), found shape \(3,\)"):
        fl.batched_jacobian(NETWORK)(jnp.ones(3), ps, st)
    with pytest.raises(ValueError, match=r"batch axis of x, of size 5, found shape \(2,\)"):
        fl.batched_jacobian(lambda x, ps, st: (x.sum(0), st))(jnp.ones((5, 2)), ps, st)
    with pytest.raises(TypeError, match="to be one array, found "):
        fl.batched_jacobian(NETWORK)((jnp.ones((5, 3)),), ps, st)
    with pytest.raises(TypeError, match=r"one floating array, found \("):
        fl.batched_jacobian(lambda x, ps, st: ((x, x), st))(jnp.ones((5, 3)), ps, st)
    with pytest.raises(ValueError, match="'rev' or 'fwd', found 'forward'"):
        fl.batched_jacobian(NETWORK, mode="forward")(jnp.ones((5, 3)), ps, st)


# Hessians


def test_hessian_vector_product_of_a_network(network):
    ps, st = network
    x = jax.random.normal(jax.random.key(1), (5, 3))
    v = fl.ComponentVector(jax.random.normal(jax.random.key(2), ps.shape), ps.layout)

    def loss(ps):
        return jnp.sum(NETWORK(x, ps, st)[0] ** 2)

    product = jax.jit(lambda ps, v: fl.hessian_vector_product(loss)(ps, v))(ps, v)
    assert product.layout == ps.layout
    assert_close(product, jax.jit(fl.hessian(loss))(ps) @ v)
    slope = central_difference(jax.jit(jax.grad(loss)), ps, v)
    np.testing.assert_allclose(product.data, slope.data, rtol=1e-6, atol=1e-8)


def test_hessian_vector_product_of_what_is_known():
    A = np.array([[2.0, 1.0, 0.0], [1.0, 3.0, -1.0], [0.0, -1.0, 5.0]])
    ps = fl.ComponentVector.of({"a": 1.0, "b": [2.0, -1.0]})
    v = np.array([1.0, -1.0, 2.0])

    def f(ps):
        data = jnp.asarray(ps)
        return data @ A @ data / 2

    product = fl.hessian_vector_product(f)(ps, v)
    assert isinstance(product, jax.Array)
    assert_close(product, A @ v)
    assert_close(fl.hessian_vector_product(f)(ps, fl.ComponentVector(v, ps.layout)).b, (A @ v)[1:])
    assert_close(fl.hessian_vector_product(f)(ps.data, v), A @ v)
    product = fl.hessian_vector_product(lambda t: t["x"] ** 2 * t["y"])
    tree = product({"x": 3.0, "y": 2.0}, {"x": 1.0, "y": 1.0})
    assert_close(tree, {"x": 10.0, "y": 6.0})
    with pytest.raises(ValueError, match=r"returns a scalar, found float64\[2\]"):
        fl.hessian_vector_product(lambda ps: ps.b)(ps, ps)
    with pytest.raises(ValueError, match=r"shape \(..., 3\), found shape \(4,\)"):
        fl.hessian_vector_product(f)(ps, np.ones(4))
    with pytest.raises(TypeError, match="same layout"):
        fl.hessian_vector_product(f)(ps, fl.ComponentVector.of({"a": v}))


# A loss that contains derivatives


def residual(model, x, ps, st):
    """u'' + u u' - 1, forward over forward."""
    one = jnp.ones_like(x)
    u, _ = model(x, ps, st)
    u_x, u_xx = jax.jvp(lambda x: fl.jacobian_vector_product(model)(x, one, ps, st), (x,), (one,))
    return u_xx + u * u_x - 1


@pytest.mark.long
def test_first_and_second_derivatives_of_a_network_by_hand(key):
    model, ps, st, by_hand = tanh_network(key)
    x = jnp.linspace(-1, 1, 7)[:, None]
    one = jnp.ones_like(x)
    u, u_x, u_xx = by_hand(np.asarray(x))

    def forward(x):
        return fl.jacobian_vector_product(model)(x, one, ps, st)

    def backward(x):
        return fl.vector_jacobian_product(model)(x, one, ps, st)

    assert_close(model(x, ps, st)[0][:, 0], u)
    for first in (forward, backward):
        value, slope = jax.jit(lambda x, first=first: jax.jvp(first, (x,), (one,)))(x)
        assert_close(value[:, 0], u_x)
        assert_close(slope[:, 0], u_xx)
    assert_close(residual(model, x, ps, st)[:, 0], u_xx + u * u_x - 1)


def test_gradient_of_a_residual_over_the_flat_vector(key):
    model, ps, st, _ = tanh_network(key)
    x = jnp.linspace(-1, 1, 7)[:, None]
    direction = fl.ComponentVector(jax.random.normal(jax.random.key(2), ps.shape), ps.layout)

    @jax.jit
    def loss(ps):
        return jnp.mean(residual(model, x, ps, st) ** 2)

    gradient = jax.jit(jax.grad(loss))(ps)
    assert gradient.layout == ps.layout
    np.testing.assert_allclose(gradient @ direction, central_difference(loss, ps, direction), rtol=1e-6)


def test_the_program_does_not_grow_with_the_batch(key):
    model, ps, st, _ = tanh_network(key)

    def gradient(batch):
        x = jnp.ones((batch, 1))
        counts = count_primitives(jax.grad(lambda ps: jnp.sum(residual(model, x, ps, st) ** 2)), ps)
        return counts, count_primitives(lambda x: fl.batched_jacobian(model)(x, ps, st), x)

    small, large = gradient(2), gradient(50)
    assert small == large
    assert not small[0].keys() & {"while", "scan"}


@pytest.mark.long
def test_a_network_learns_a_differential_equation(key):
    """u' = cos(x) u with u(0) = 1 has the solution exp(sin(x))."""
    model = fl.Chain(fl.Dense(1, 16, jnp.tanh), fl.Dense(16, 1))
    ps, st = fl.setup(key, model, float)
    x = jnp.linspace(-1, 1, 33)[:, None]
    adam = optax.adam(1e-2)

    def u(x, ps, st):
        return 1 + x * model(x, ps, st)[0], st

    def loss(ps):
        u_x = fl.jacobian_vector_product(u)(x, jnp.ones_like(x), ps, st)
        return jnp.mean((u_x - jnp.cos(x) * u(x, ps, st)[0]) ** 2)

    def step(carry, _):
        ps, moments = carry
        value, gradient = jax.value_and_grad(loss)(ps)
        updates, moments = adam.update(gradient, moments)
        return (optax.apply_updates(ps, updates), moments), value

    with jax.numpy_dtype_promotion("standard"):  # Adam mixes integers and floats
        (ps, _), losses = jax.jit(lambda c: jax.lax.scan(step, c, length=500))((ps, adam.init(ps)))
    assert losses[-1] < 1e-3 * losses[0]
    np.testing.assert_allclose(u(x, ps, st)[0], np.exp(np.sin(x)), rtol=0.02)
