import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flatlayers as fl
from tests.helpers import assert_close, central_difference

from .test_spectral import formula


def gelu(x):
    """The approximation by a hyperbolic tangent, which `jax.nn.gelu` is."""
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def dense(x, ps):
    return x @ np.asarray(ps.weight).T + np.asarray(ps.bias)


def operator(x, ps, model, modes, activation):
    """The formula of Li et al., with the coordinates of the points appended."""
    if model.grid:
        sizes = x.shape[-1 - len(modes) : -1]
        grid = np.stack(np.meshgrid(*(np.arange(n) / n for n in sizes), indexing="ij"), axis=-1)
        x = np.concatenate([x, np.broadcast_to(grid, (*x.shape[:-1], len(modes)))], axis=-1)
    v = dense(activation(dense(x, ps.lifting.layer_0)), ps.lifting.layer_1)
    for i in range(model.layers):
        part = ps[f"layer_{i}"]
        z = formula(v, np.asarray(part.spectral.weight), np.asarray(part.spectral.bias), modes)
        v = z + v @ np.asarray(part.pointwise.weight).T
        v = activation(v) if i < model.layers - 1 else v
    return dense(activation(dense(v, ps.projection.layer_0)), ps.projection.layer_1)


@pytest.mark.long
@pytest.mark.parametrize(
    ("model", "shape", "activation", "dtype"),
    [
        (fl.FourierNeuralOperator(5, 2, 3, 1), (4, 9, 2), gelu, jnp.float64),
        (fl.FourierNeuralOperator(5, 2, 3, 1, 2), (4, 9, 2), gelu, jnp.float32),
        (fl.FourierNeuralOperator((4,), 1, 2, 2, 1, grid=False, activation=jnp.tanh), (8, 1), np.tanh, float),
        (fl.FourierNeuralOperator((3, 4), 1, 3, 2, 2), (2, 2, 5, 6, 1), gelu, jnp.float64),
        (fl.FourierNeuralOperator((2, 3, 2), 1, 2, 1, 2, activation=jnp.sin), (4, 3, 2, 1), np.sin, float),
    ],
    ids=["line", "float32", "without coordinates", "plane", "space"],
)
def test_formula(key, model, shape, activation, dtype):
    modes = model.modes if isinstance(model.modes, tuple) else (model.modes,)
    ps, st = fl.setup(key, model, dtype)
    x = jax.random.normal(jax.random.key(1), shape, dtype)
    y, new = jax.jit(model)(x, ps, st)
    assert y.dtype == dtype
    assert new == st
    assert fl.output_shape(model, x) == y.shape == (*shape[:-1], model.out_channels)
    rtol = 1e-4 if dtype == jnp.float32 else 1e-11
    expected = operator(np.asarray(x, float), ps, model, modes, activation)
    np.testing.assert_allclose(y, expected, rtol=0, atol=rtol * np.abs(expected).max())


@pytest.mark.parametrize("modes", [(8,), (5, 6), (4, 4, 5)])
@pytest.mark.parametrize(("grid", "layers", "ratio"), [(True, 4, 2), (False, 1, 1.5)])
def test_number_of_parameters(modes, grid, layers, ratio):
    """By neuraloperator's formula, two real parameters for a complex one."""
    ins, width, outs = 2, 6, 3
    options = {"lifting_channel_ratio": ratio, "projection_channel_ratio": ratio}
    model = fl.FourierNeuralOperator(modes, ins, width, outs, layers, grid=grid, **options)
    hidden = int(ratio * width)
    channels = ins + len(modes) * grid
    lifting = (channels + 1) * hidden + (hidden + 1) * width
    projection = (width + 1) * hidden + (hidden + 1) * outs
    block = 2 * width**2 * np.prod(modes[:-1]) * (modes[-1] // 2 + 1) + width + width**2
    assert fl.parameter_length(model) == lifting + layers * block + projection


def of_neuraloperator(other):
    """The parameters of its model, by the names of ours."""

    def pointwise(module):
        fcs = {f"layer_{i}": fc for i, fc in enumerate(module.fcs)}
        return {n: {"weight": fc.weight.detach()[..., 0], "bias": fc.bias.detach()} for n, fc in fcs.items()}

    def block(conv, skip):
        weight = np.moveaxis(conv.weight.to_tensor().detach().numpy(), (0, 1), (-2, -1))
        bias = conv.bias.detach().ravel()
        return {
            "spectral": {"weight": np.stack([weight.real, weight.imag]), "bias": bias},
            "pointwise": {"weight": skip.conv.weight.detach()[..., 0]},
        }

    blocks = zip(other.fno_blocks.convs, other.fno_blocks.fno_skips, strict=True)
    named = {
        "lifting": pointwise(other.lifting),
        **{f"layer_{i}": block(*pair) for i, pair in enumerate(blocks)},
        "projection": pointwise(other.projection),
    }
    return fl.ComponentVector.of(jax.tree.map(jnp.asarray, jax.tree.map(np.asarray, named)))


@pytest.mark.long
@pytest.mark.parametrize(("modes", "sizes"), [((8,), (13,)), ((4, 5), (6, 8))])
def test_equals_neuraloperator(key, modes, sizes):
    torch = pytest.importorskip("torch", reason="PyTorch is an optional package")
    models = pytest.importorskip("neuralop.models", reason="neuraloperator is an optional package")
    torch.manual_seed(0)
    # Without its channel MLP, its version 2 applies the activation twice: a ReLU is the same then.
    options = {"n_layers": 3, "use_channel_mlp": False, "non_linearity": torch.nn.functional.relu}
    other = models.FNO(modes, in_channels=2, out_channels=3, hidden_channels=6, **options)
    model = fl.FourierNeuralOperator(modes, 2, 6, 3, 3, activation=jax.nn.relu)
    ps = of_neuraloperator(other)
    st = fl.initial_states(key, model)
    assert ps.size == fl.parameter_length(model)
    x = np.random.default_rng(0).normal(size=(5, *sizes, 2)).astype(np.float32)
    theirs = other(torch.from_numpy(np.moveaxis(x, -1, 1).copy())).detach().numpy()
    np.testing.assert_allclose(model(x, ps, st)[0], np.moveaxis(theirs, 1, -1), rtol=1e-4, atol=1e-5)


@pytest.mark.long
def test_norms_and_names(key):
    model = fl.FourierNeuralOperator(4, 1, 4, 1, 2, norm=fl.BatchNorm(4), lifting_channel_ratio=0)
    ps, st = fl.setup(key, model, float)
    assert ps.layout.names == ("lifting", "layer_0", "layer_1", "projection")
    assert ps.lifting.layer_0.weight.shape == (4, 2)
    assert model.layer_0.activation is jax.nn.gelu
    assert model.layer_1.activation is None
    _, new = model(jnp.ones((3, 8, 1)), ps, st)
    assert (new.layer_1.norm.running_var != st.layer_1.norm.running_var).all()
    with pytest.raises(AttributeError, match="FourierNeuralOperator: no name 'layer_2'"):
        _ = model.layer_2


def test_the_resolution_makes_no_difference(key):
    """Without layers between them that add frequencies, the points of a grid are those of a finer one."""
    model = fl.FourierNeuralOperator(8, 1, 4, 2, 2, grid=False, activation=None)
    ps, st = fl.setup(key, model, float)
    coarse, fine = (model(np.cos(2 * np.pi * 3 * np.arange(n) / n)[:, None], ps, st)[0] for n in (16, 48))
    np.testing.assert_allclose(fine[::3], coarse, rtol=0, atol=1e-12)


def test_a_smooth_function_at_another_resolution(key):
    """What the activations add beyond the coarse grid's frequencies is small for a smooth function."""
    model = fl.FourierNeuralOperator(8, 1, 4, 1, 2, grid=False)
    ps, st = fl.setup(key, model, float)
    coarse, fine = (model(np.sin(2 * np.pi * np.arange(n) / n)[:, None], ps, st)[0] for n in (64, 192))
    np.testing.assert_allclose(fine[::3], coarse, rtol=0, atol=1e-8)


def test_coordinates_are_those_of_each_resolution(key):
    """A point has the same ones in every grid that has it."""
    model = fl.FourierNeuralOperator(1, 1, 3, 2, 0)
    ps, st = fl.setup(key, model, float)
    coarse, fine = (model(jnp.ones((n, 1)), ps, st)[0] for n in (5, 20))
    assert_close(coarse, fine[::4])


def test_gradient_and_vmap(key):
    model = fl.FourierNeuralOperator((3, 4), 1, 2, 1, 1)
    ps, st = fl.setup(key, model, float)
    x = jax.random.normal(key, (3, 5, 6, 1))
    direction = fl.ComponentVector(jax.random.normal(jax.random.key(2), ps.shape), ps.layout)

    @jax.jit
    def loss(ps):
        return jnp.sum(model(x, ps, st)[0] ** 2)

    slope = jax.grad(loss)(ps) @ direction
    np.testing.assert_allclose(slope, central_difference(loss, ps, direction), rtol=1e-6)
    together, each = jax.jit(lambda x: (model(x, ps, st)[0], jax.vmap(lambda x: model(x, ps, st)[0])(x)))(x)
    assert_close(together, each)


def test_a_grid_that_does_not_fit(key):
    model = fl.Chain(operator=fl.FourierNeuralOperator(8, 2, 3, 1))
    ps, st = fl.setup(key, model, float)
    for shape, message in [
        ((5, 16, 1), r"expected x of shape \(\.\.\., width, 2\), found shape \(5, 16, 1\)"),
        ((5, 7, 2), r"spatial sizes of at least \(8,\), for the modes \(8,\), found \(7,\)"),
    ]:
        with pytest.raises(ValueError, match=message) as error:
            model(jnp.ones(shape), ps, st)
        assert "in the layer operator" in error.value.__notes__[0]
    assert "in the layer operator.layer_0.spectral" in error.value.__notes__[0]
    with pytest.raises(TypeError, match="expected floating x, found complex128"):
        model(jnp.ones((5, 16, 2), complex), ps, st)
    with pytest.raises(ValueError, match="FourierNeuralOperator.modes: expected modes for 1, 2 or 3 axes"):
        fl.FourierNeuralOperator((), 1, 1, 1)


# DeepONet


def deep_operator(b, t, bias, outs):
    """Sums over products, one by one: group `o` of the features is that of output `o`, or of all."""
    size = b.shape[-1] // outs if b.shape[-1] == t.shape[-1] else min(b.shape[-1], t.shape[-1])
    t = np.broadcast_to(t, (*b.shape[:-1], *t.shape[-2:]))
    y = np.zeros((*t.shape[:-1], outs))
    for n in range(t.shape[-2]):
        for o in range(outs):
            for j in range(size):
                mine, other = (o * size + j if w.shape[-1] > size else j for w in (b, t))
                y[..., n, o] += b[..., mine] * t[..., n, other]
    return y + bias


@pytest.mark.parametrize(("outs", "features"), [(1, (4, 4)), (3, (6, 6)), (3, (6, 2)), (3, (2, 6))], ids=str)
@pytest.mark.parametrize(
    ("u", "points", "dtype"),
    [
        ((5,), (7, 2), jnp.float64),
        ((4, 5), (7, 2), jnp.float32),
        ((4, 5), (4, 7, 2), jnp.float64),
        ((2, 3, 5), (2, 3, 7, 2), jnp.float64),
    ],
    ids=["one", "shared points", "own points", "two batch axes"],
)
def test_deeponet(key, outs, features, u, points, dtype):
    model = fl.DeepONet(fl.Dense(5, features[0]), fl.Dense(2, features[1], jnp.tanh), out_dims=outs)
    ps, st = fl.setup(key, model, dtype)
    ps = ps + 1
    u, points = (jax.random.normal(jax.random.key(i), s, dtype) for i, s in enumerate((u, points)))
    y, new = model((u, points), ps, st)
    assert y.dtype == dtype
    assert new == st
    assert y.shape == fl.output_shape(model, (u, points)) == (*u.shape[:-1], 7, outs)
    b, t = dense(np.asarray(u), ps.branch), np.tanh(dense(np.asarray(points), ps.trunk))
    rtol = 1e-5 if dtype == jnp.float32 else 1e-12
    np.testing.assert_allclose(y, deep_operator(b, t, np.asarray(ps.bias), outs), rtol=rtol, atol=rtol)


def test_deeponet_of_other_layers(key):
    """A branch of convolutions, a trunk of functions of one variable, states, and no bias."""
    branch = fl.Chain(fl.CrossCor((3,), 1, 2), fl.BatchNorm(2), fl.FlattenLayer(), fl.Dense(12, 3))
    model = fl.DeepONet(branch, fl.Chebyshev(3), use_bias=False)
    ps, st = fl.setup(key, model, float)
    assert ps.size == fl.parameter_length(branch)
    u, points = jax.random.normal(key, (4, 8, 1)), jnp.linspace(-1.0, 1.0, 5)
    y, new = model((u, points), ps, st)
    b, state = branch(u, ps.branch, st.branch)
    expected = np.polynomial.chebyshev.chebval(np.asarray(points), np.asarray(b).T)
    np.testing.assert_allclose(y[..., 0], expected, rtol=1e-12)
    assert (new.branch.layer_1.running_mean == state.layer_1.running_mean).all()


def test_deeponet_gradient_and_vmap(key):
    model = fl.DeepONet(fl.MLP(5, (4,), 6), fl.MLP(2, (4,), 6), out_dims=2)
    ps, st = fl.setup(key, model, float)
    u, points = jax.random.normal(key, (3, 5)), jax.random.normal(key, (3, 7, 2))
    direction = fl.ComponentVector(jax.random.normal(jax.random.key(2), ps.shape), ps.layout)

    @jax.jit
    def loss(ps):
        return jnp.sum(model((u, points), ps, st)[0] ** 2)

    slope = jax.grad(loss)(ps) @ direction
    np.testing.assert_allclose(slope, central_difference(loss, ps, direction), rtol=1e-7)
    each = jax.vmap(lambda u, points: model((u, points), ps, st)[0])(u, points)
    assert_close(model((u, points), ps, st)[0], each)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (jnp.ones((4, 5)), "expected a tuple of 2 inputs, one for each function and its points, found 1"),
        ((jnp.ones((4, 5)),) * 3, "expected a tuple of 2 inputs, .*, found 3"),
        ((jnp.ones((4, 6)), jnp.ones((7, 2))), r"expected x of shape \(\.\.\., 5\), found shape \(4, 6\)"),
        ((jnp.ones((4, 5)), jnp.ones((7, 3))), r"expected x of shape \(\.\.\., 2\), found shape \(7, 3\)"),
        (
            (jnp.ones((4, 5)), jnp.ones((3, 7, 2))),
            r"of shape \(n, d\) or \(4, n, d\), found shape \(3, 7, 2\)",
        ),
        ((jnp.ones(5), jnp.ones((3, 7, 2))), r"expected points of shape \(n, d\), found shape \(3, 7, 2\)"),
        ((jnp.ones((4, 5)), jnp.ones(2)), r"points of shape \(n, d\) or \(4, n, d\), found shape \(2,\)"),
    ],
)
def test_functions_and_points_that_do_not_fit(key, x, message):
    model = fl.Chain(operator=fl.DeepONet(fl.Dense(5, 3), fl.Dense(2, 3)))
    ps, st = fl.setup(key, model, float)
    with pytest.raises(ValueError, match=message) as error:
        model(x, ps, st)
    assert "in the layer operator" in error.value.__notes__[0]


@pytest.mark.parametrize(("features", "outs"), [((3, 4), 1), ((4, 4), 3), ((6, 3), 3)])
def test_features_that_do_not_fit(key, features, outs):
    model = fl.DeepONet(fl.Dense(5, features[0]), fl.Dense(2, features[1]), out_dims=outs)
    ps, st = fl.setup(key, model, float)
    message = "expected branch and trunk with the same number of features, .*, found {} and {}"
    with pytest.raises(ValueError, match=message.format(*features)):
        model((jnp.ones((4, 5)), jnp.ones((7, 2))), ps, st)
