import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flatlayers as fl
from tests.helpers import assert_close, assert_same, central_difference


class Contract(fl.Layer):
    """A parameter of any shape, summed against `x`: what it is called with can be read off its gradient."""

    shape: tuple
    axis: int | None = None

    def parameters(self):
        init = fl.initializers.normal
        return {
            "offset": fl.Param((), init),
            "kernel": fl.Param(self.shape, init, output_axis=self.axis),
        }

    def forward(self, x, ps, st):
        return ps.offset + jnp.sum(ps.kernel * x), st


def weight_of(layer, ps, st):
    """The weight that a `Dense` inside multiplies by."""
    return layer(jnp.eye(layer.layer.in_dims, dtype=ps.dtype), ps, st)[0].T


def normed(v, g, axis):
    """The definition, output by output, in NumPy."""
    v, g = np.moveaxis(np.asarray(v), axis, 0), np.asarray(g).reshape(-1)
    w = np.stack([scale * part / np.sqrt((part**2).sum()) for scale, part in zip(g, v, strict=True)])
    return np.moveaxis(w, 0, axis)


# WeightNorm

CASES = [
    (fl.Dense(3, 2, jnp.tanh), "weight", (5, 3)),
    (fl.Dense(3, 2, use_bias=False), ("weight",), (3,)),
    (fl.Dense(3, 2, init_bias=fl.initializers.normal), ("weight", "bias"), (5, 3)),
    (fl.CrossCor((2, 3), 2, 4), "weight", (5, 4, 4, 2)),
    (fl.ConvTranspose((2,), 2, 4), "weight", (5, 4, 2)),
    (Contract((2, 3, 4)), "kernel", (2, 3, 4)),
]


@pytest.mark.long
@pytest.mark.parametrize(("layer", "names", "shape"), CASES, ids=lambda part: repr(part))
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_equal_to_the_layer_at_initialisation(key, layer, names, shape, dtype):
    """For the same key, bit for bit; `g` and `v` take the place of the weight in the vector."""
    wrapped = fl.WeightNorm(layer, names)
    (plain, st), (ps, new) = fl.setup(key, layer, dtype), fl.setup(key, wrapped, dtype)
    x = jax.random.normal(key, shape, dtype)
    assert_same(wrapped(x, ps, new), layer(x, plain, st))
    assert_close(jax.jit(wrapped)(x, ps, new), layer(x, plain, st), rtol=1e-5, atol=1e-5)
    assert fl.output_shape(wrapped, x) == layer(x, plain, st)[0].shape
    assert (fl.parameter_length(wrapped), fl.state_length(wrapped)) == (ps.size, 0)
    for name in layer.layout.names:
        if name in names:
            assert_same(ps[f"{name}_v"], plain[name])
            assert ps[f"{name}_g"].ndim == plain[name].ndim
        else:
            assert_same(ps[name], plain[name])


@pytest.mark.parametrize(
    ("shape", "declared", "given", "axis"),
    [
        ((2, 3), None, None, 0),
        ((4,), None, None, 0),
        ((2, 3, 4), None, None, -1),
        ((2, 3, 4), 1, None, 1),
        ((2, 3, 4), 1, 0, 0),
        ((2, 3, 4), None, -2, 1),
    ],
)
def test_formula(key, shape, declared, given, axis):
    layer = fl.WeightNorm(Contract(shape, declared), "kernel", axis=given)
    ps, st = fl.setup(key, layer, float)
    ps = ps + jax.random.normal(jax.random.key(1), ps.shape)
    sizes = [1] * len(shape)
    sizes[axis] = shape[axis]
    assert ps.kernel_g.shape == tuple(sizes)
    assert ps.layout.names == ("offset", "kernel_g", "kernel_v")
    kernel = jax.jit(jax.grad(lambda x: layer(x, ps, st)[0]))(jnp.ones(shape))
    np.testing.assert_allclose(kernel, normed(ps.kernel_v, ps.kernel_g, axis), rtol=1e-12)
    others = tuple(a for a in range(len(shape)) if a != axis % len(shape))
    np.testing.assert_allclose(
        np.sqrt(np.sum(np.square(kernel), others)), abs(np.asarray(ps.kernel_g)).reshape(-1), rtol=1e-12
    )


@pytest.mark.long
def test_each_of_several_copies_has_its_own_norm(key):
    model = fl.Chain(fl.WeightNorm(fl.Dense(3, 3), "weight"), fl.WeightNorm(fl.Dense(3, 3), "weight"))
    plain = fl.Chain(fl.Dense(3, 3), fl.Dense(3, 3))
    x = jnp.ones((2, 3))
    assert_same(model(x, *fl.setup(key, model, float)), plain(x, *fl.setup(key, plain, float)))
    repeated, same = fl.Repeated(model[0], 3), fl.Repeated(plain[0], 3)
    assert_close(repeated(x, *fl.setup(key, repeated, float)), same(x, *fl.setup(key, same, float)))
    twice = fl.WeightNorm(model[0], "weight_v")
    ps, st = fl.setup(key, twice, float)
    assert ps.layout.names == ("weight_g", "weight_v_g", "weight_v_v", "bias")
    assert_close(twice(x, ps, st)[0], model[0](x, *fl.setup(key, model[0], float))[0])


@pytest.mark.long
def test_it_learns_length_and_direction_apart(key):
    layer = fl.WeightNorm(fl.Dense(3, 2), "weight")
    ps, st = fl.setup(key, layer, float)
    x = jax.random.normal(key, (5, 3))

    def loss(ps):
        return jnp.sum(jnp.sin(layer(x, ps, st)[0]))

    slope = jax.grad(loss)(ps)
    direction = ps.map(jnp.cos)
    np.testing.assert_allclose(slope @ direction, central_difference(loss, ps, direction), rtol=1e-8)
    # A step along v changes nothing to first order.
    np.testing.assert_allclose(jnp.sum(slope.weight_v * ps.weight_v, 1), 0, atol=1e-12)
    assert_close(weight_of(layer, ps.at["weight_v"].multiply(7.0), st), weight_of(layer, ps, st))
    assert_close(jax.vmap(lambda x: layer(x, ps, st)[0])(x), layer(x, ps, st)[0])  # batched and not


def test_a_wrapped_layer_keeps_its_state(key):
    class Counting(fl.Dense):
        def states(self, key):
            return {"count": 0}

        def forward(self, x, ps, st):
            return super().forward(x, ps, st)[0], st.replace(count=st.count + 1)

    for wrapper in (fl.WeightNorm, fl.SpectralNorm):
        layer = wrapper(Counting(3, 2), "weight")
        ps, st = fl.setup(key, layer, float)
        for _ in range(3):
            _, st = layer(jnp.ones(3), ps, st)
        assert st.count == 3


def test_a_weight_without_a_direction(key):
    zero = fl.Dense(3, 2, init_weight=fl.initializers.zeros)
    with pytest.raises(ValueError, match="norms of 'weight' that are not zero, found 2 of 2") as info:
        fl.setup(key, fl.Chain(net=fl.WeightNorm(zero, "weight")))
    assert any("net.weight_g" in note for note in info.value.__notes__)
    with pytest.raises(ValueError, match="'bias'"):
        fl.setup(key, fl.WeightNorm(fl.Dense(3, 2), ("weight", "bias")))
    layer = fl.WeightNorm(fl.Dense(3, 2), "weight")
    ps, st = fl.setup(key, layer, float)
    row = ps.at["weight_v"].set(ps.weight_v.at[1].set(0.0))
    with pytest.raises(ValueError, match="norms of 'weight_v' that are not zero, found 1 of 2") as info:
        fl.Chain(head=layer)(jnp.ones(3), {"head": row}, {"head": st})
    assert "head" in info.value.__notes__[0]
    assert not jnp.isfinite(jax.jit(layer)(jnp.ones(3), row, st)[0]).all()
    spectral = fl.SpectralNorm(zero, "weight")
    with pytest.raises(ValueError, match="'weight'"):
        spectral(jnp.ones(3), *fl.setup(key, spectral, float))


@pytest.mark.parametrize("wrapper", [fl.WeightNorm, fl.SpectralNorm])
def test_what_is_refused(wrapper):
    with pytest.raises(KeyError, match="Dense: no name 'wieght'; the nearest: weight"):
        wrapper(fl.Dense(3, 2), "wieght")
    with pytest.raises(ValueError, match=r"'bias' with an axis 1, found shape \(2,\)"):
        wrapper(fl.Dense(3, 2), ("weight", "bias"), axis=1)
    with pytest.raises(TypeError, match="'layer_0' to be a parameter"):
        wrapper(fl.Chain(fl.Dense(3, 2)), "layer_0")
    layer = wrapper(fl.Dense(3, 2), ["weight"])
    assert eval(repr(layer), vars(fl)) == layer
    with pytest.raises(ValueError, match=r"\(..., 3\)") as info:
        fl.Chain(layer)(jnp.ones(4), *fl.setup(jax.random.key(0), fl.Chain(layer), float))
    assert "layer_0: Dense" in info.value.__notes__[0]


# SpectralNorm


@pytest.mark.long
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_the_largest_singular_value_is_one(key, dtype):
    layer = fl.SpectralNorm(fl.Dense(6, 4, use_bias=False), "weight")
    ps, st = fl.setup(key, layer, dtype)
    step = jax.jit(layer)
    for _ in range(300):
        _, st = step(jnp.ones(6, dtype), ps, st)
    tolerance = 1e-5 if dtype == jnp.float32 else 1e-9
    weight = weight_of(layer, ps, fl.testmode(st))
    singular = np.linalg.svd(np.asarray(ps.weight), compute_uv=False)
    np.testing.assert_allclose(weight, np.asarray(ps.weight) / singular[0], rtol=10 * tolerance)
    np.testing.assert_allclose(np.linalg.svd(weight, compute_uv=False)[0], 1, rtol=tolerance)
    left = np.linalg.svd(np.asarray(ps.weight))[0][:, 0]
    np.testing.assert_allclose(abs(left @ st.weight_u), 1, rtol=tolerance)
    assert fl.parameter_length(layer) == ps.size == 24
    assert fl.state_length(layer) == 5
    assert fl.preserves_state_type(layer)


@pytest.mark.long
@pytest.mark.parametrize(
    ("layer", "shape", "axis"),
    [
        (fl.CrossCor((2, 3), 2, 4), (5, 4, 4, 2), -1),
        (fl.ConvTranspose((2,), 2, 4), (5, 4, 2), -2),
        (Contract((3, 2, 4), 0), (3, 2, 4), 0),
    ],
    ids=repr,
)
def test_the_matrix_has_the_outputs_against_the_rest(key, layer, shape, axis):
    name = "kernel" if isinstance(layer, Contract) else "weight"
    wrapped = fl.SpectralNorm(layer, name, iterations=300)
    assert fl.SpectralNorm(layer, name, iterations=300, axis=axis).states(key).keys() == {
        f"{name}_u",
        "training",
    }
    ps, st = fl.setup(key, wrapped, float)
    x = jax.random.normal(key, shape)
    weight = np.moveaxis(np.asarray(ps[name]), axis, 0)
    largest = np.linalg.norm(weight.reshape(weight.shape[0], -1), 2)
    scaled = ps.at[name].multiply(1 / largest)
    assert_close(wrapped(x, ps, st)[0], layer(x, scaled, {})[0], rtol=1e-4)


def test_one_step_is_the_power_iteration(key):
    layer = fl.SpectralNorm(fl.Dense(3, 2, use_bias=False), "weight", iterations=2)
    ps, st = fl.setup(key, layer, float)
    np.testing.assert_allclose(np.linalg.norm(st.weight_u), 1, rtol=1e-6)
    weight, u = np.asarray(ps.weight), np.asarray(st.weight_u)
    for _ in range(2):
        v = weight.T @ u / np.linalg.norm(weight.T @ u)
        u = weight @ v / np.linalg.norm(weight @ v)
    y, new = layer(jnp.eye(3), ps, st)
    np.testing.assert_allclose(new.weight_u, u, rtol=1e-12)
    np.testing.assert_allclose(y.T, weight / np.linalg.norm(weight.T @ u), rtol=1e-12)


def test_spectral_norm_iterates_in_training_only(key):
    layer = fl.SpectralNorm(fl.Dense(6, 4), "weight")
    ps, st = fl.setup(key, layer, float)
    x = jax.random.normal(key, (5, 6))
    _, new = layer(x, ps, st)
    assert not np.array_equal(new.weight_u, st.weight_u)
    y, same = jax.jit(layer)(x, ps, fl.testmode(new))
    assert same == fl.testmode(new)
    assert_close(y, jax.vmap(lambda x: layer(x, ps, same)[0])(x))
    assert_close(layer(x, ps, st)[0], y)


@pytest.mark.parametrize(
    ("made", "called"), [("float32", "float64"), ("float64", "float32"), ("bfloat16", "bfloat16")]
)
def test_the_vector_keeps_its_dtype(key, made, called):
    layer = fl.SpectralNorm(fl.Dense(3, 2), "weight")
    st = fl.initial_states(key, layer, made)
    ps = fl.initial_parameters(key, layer, called)
    y, new = layer(jnp.ones(3, called), ps, st)
    assert y.dtype == called
    assert new.weight_u.dtype == st.weight_u.dtype == ("float64" if made == "float64" else "float32")


@pytest.mark.long
def test_gradient_of_spectral_norm(key):
    layer = fl.SpectralNorm(fl.Dense(3, 2, jnp.tanh), "weight", iterations=50)
    ps, st = fl.setup(key, layer, float)
    ps = ps + 0.1
    x = jax.random.normal(key, (5, 3))
    direction = ps.map(jnp.cos)
    for state in (st, fl.testmode(st)):

        def loss(ps, state=state):
            return jnp.sum(layer(x, ps, state)[0] ** 2)

        # In training the vector has converged, where the singular value does not depend on it.
        slope = jax.jit(jax.grad(loss))(ps) @ direction
        np.testing.assert_allclose(slope, central_difference(loss, ps, direction), rtol=1e-7)


def test_spectral_norm_and_dropout_share_the_flag(key):
    class Dropped(fl.Dense):
        def states(self, key):
            return {"key": key, "training": True}

        def forward(self, x, ps, st):
            y, st = fl.Dropout(0.5)(x, ps, st)
            return super().forward(y, ps, st)[0], st

    layer = fl.SpectralNorm(Dropped(8, 2), ("weight",))
    ps, st = fl.setup(key, layer, float)
    y, new = layer(jnp.ones(8), ps, st)
    assert not np.array_equal(layer(jnp.ones(8), ps, new)[0], y)
    assert fl.testmode(new) == layer(jnp.ones(8), ps, fl.testmode(new))[1]
    assert jax.tree.structure(new) == jax.tree.structure(st)
    with pytest.raises(
        ValueError, match="SpectralNorm.iterations: expected an integer of at least 1, found 0"
    ):
        fl.SpectralNorm(fl.Dense(3, 2), "weight", iterations=0)


# What it needs of the core


def test_parameters_with_one_key_name_are_drawn_alike(key):
    class Pair(fl.Layer):
        def parameters(self):
            init = fl.initializers.normal
            return {
                "first": fl.Param((3,), init),
                "second": fl.Param((3,), init, key_name="first"),
                "third": fl.Param((3,), init),
            }

    ps = fl.initial_parameters(key, {"net": Pair()}).net
    assert_same(ps.first, ps.second)
    assert not np.array_equal(ps.first, ps.third)
    param = fl.Param((2, 3), fl.initializers.ones, output_axis=1, key_name="first")
    assert repr(param) == "Param((2, 3), ones, output_axis=1, key_name='first')"
