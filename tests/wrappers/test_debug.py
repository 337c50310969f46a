import pickle
import re

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flatlayers as fl
from tests.helpers import assert_close, assert_same


def log_of_negative(x):
    return jnp.log(x - 10)


def root_of_zero(x):
    """x, with a derivative of infinity times 0."""
    return x + jnp.sqrt(0 * x)


@jax.custom_vjp
def wrong_rule(x):
    return x


wrong_rule.defvjp(lambda x: (x, None), lambda _, ct: (jnp.nan * ct,))


def blame(f, *args):
    """Return what the error says, without the stack that JAX and equinox put around it."""
    with pytest.raises(RuntimeError, match="flatlayers debug") as info:
        jax.block_until_ready(f(*args))
    return re.findall("flatlayers debug: (.*)", str(info.value))[-1]


def setup(model, nan="both"):
    model = fl.debug(model, nan=nan)
    return model, *fl.setup(jax.random.key(0), model, float)


def chain(function):
    return fl.Chain(fl.Dense(2, 3, jnp.tanh), function, fl.Dense(3, 2))


def ode(function, **options):
    steps = {"solver": diffrax.Euler(), "dt0": 0.5, "stepsize_controller": diffrax.ConstantStepSize()}
    model = fl.Chain(fl.Dense(2, 2), function, fl.Dense(2, 2))
    return fl.Chain(pre=fl.Dense(2, 2), node=fl.NeuralODE(model, max_steps=4, **steps, **options))


# What it names


@pytest.mark.long
@pytest.mark.parametrize("transform", [lambda f: f, jax.jit])
def test_the_layer_whose_output_is_bad(transform):
    model, ps, st = setup(chain(log_of_negative))
    message = "NaN or infinity in the output of layer 'layer_1' (WrappedFunction(log_of_negative))"
    assert blame(transform(model), jnp.ones(2), ps, st) == message
    batch = jnp.ones((3, 2))
    assert blame(transform(jax.vmap(model, (0, None, None))), batch, ps, st) == message
    gradient = jax.grad(lambda ps: jnp.sum(model(batch, ps, st)[0] ** 2))
    assert blame(transform(gradient), ps) == message


@pytest.mark.long
@pytest.mark.parametrize(("transform", "function"), [(lambda f: f, wrong_rule), (jax.jit, root_of_zero)])
def test_the_layer_whose_rule_makes_a_bad_cotangent(transform, function):
    model, ps, st = setup(chain(function))
    message = (
        "NaN or infinity in the cotangent of the input of layer 'layer_1' "
        f"(WrappedFunction({function.__name__})): its own backward pass made it"
    )
    x = jnp.ones((3, 2))
    assert jnp.isfinite(model(x, ps, st)[0]).all()
    assert blame(transform(jax.grad(lambda ps: jnp.sum(model(x, ps, st)[0] ** 2))), ps) == message
    each = jax.vmap(jax.grad(lambda ps, x: jnp.sum(model(x, ps, st)[0] ** 2)), (None, 0))
    assert blame(transform(each), ps, x) == message


def test_what_comes_from_outside_is_not_blamed_on_the_layer():
    model, ps, st = setup(chain(jnp.sin))
    x = jnp.ones(2)
    assert blame(model, x.at[0].set(jnp.inf), ps, st).startswith(
        "NaN or infinity in the input of layer 'layer_0'"
    )
    bad = ps.at["layer_2.bias"].set(jnp.nan)
    assert blame(model, x, bad, st).startswith(
        "NaN or infinity in the parameters of layer 'layer_2' (Dense(3, 2))"
    )
    assert blame(model[1], jnp.nan, {}, {}).startswith("NaN or infinity in the input of layer 'layer_1'")
    message = blame(jax.jit(jax.grad(lambda ps: root_of_zero(model(x, ps, st)[0]).sum())), ps)
    assert message == (
        "NaN or infinity in the cotangent of the output of layer 'layer_2' (Dense(3, 2)): "
        "it comes from what follows the layer"
    )


def test_a_rule_that_is_wrong_for_parameters():
    class Scale(fl.Layer):
        def parameters(self):
            return {"log_scale": fl.Param((), fl.initializers.zeros)}

        def forward(self, x, ps, st):
            return wrong_rule(ps.log_scale) + x, st

    model, ps, st = setup(fl.Chain(inner={"a": fl.Dense(2, 2)}["a"], scale=Scale()))
    message = blame(jax.grad(lambda ps: model(jnp.ones(2), ps, st)[0].sum()), ps)
    assert message.startswith("NaN or infinity in the cotangent of the parameters of layer 'scale' (Scale())")
    alone, ps, st = setup(Scale())
    message = blame(jax.grad(lambda ps: alone(1.0, ps, st)[0]), ps)
    assert "parameters of layer 'Scale' (Scale()): its own" in message


@pytest.mark.long
def test_inside_a_solve_inside_jit():
    model, ps, st = setup(ode(log_of_negative))
    message = "NaN or infinity in the output of layer 'node.layer_1' (WrappedFunction(log_of_negative))"
    assert blame(jax.jit(model), jnp.ones(2), ps, st) == message


@pytest.mark.long
@pytest.mark.parametrize("adjoint", [None, diffrax.BacksolveAdjoint()], ids=["default", "backsolve"])
def test_backward_through_a_solve_inside_jit(adjoint):
    model, ps, st = setup(ode(wrong_rule, adjoint=adjoint))
    x = jnp.ones(2)
    message = blame(jax.jit(jax.grad(lambda ps: jnp.sum(model(x, ps, st)[0] ** 2))), ps)
    place = "the input of layer 'node.layer_1' (WrappedFunction(wrong_rule))"
    assert message == f"NaN or infinity in the cotangent of {place}: its own backward pass made it"


@pytest.mark.long
def test_paths_through_wrappers_and_containers():
    class Pair(fl.Container):
        parts: dict

        def forward(self, x, ps, st):
            for name, layer in self.parts.items():
                x, _ = layer(x, ps.parts[name], st.parts[name])
            return x, st

    skip = fl.SkipConnection(fl.Repeated(fl.WrappedFunction(log_of_negative), 2), jnp.add)
    for outer, path in [
        (fl.Chain(pair=Pair({"a": fl.Dense(2, 2), "b": skip})), "pair.parts.b.layer.layer"),
        (fl.Chain(fl.share_parameters(chain(log_of_negative), {})), "layer_0.layer_1"),
        (fl.MLP(2, (3,), 2, log_of_negative), "MLP"),
        (fl.Chain(fl.WeightNorm(fl.Dense(2, 2, log_of_negative), "weight")), "layer_0"),
    ]:
        model, ps, st = setup(outer)
        assert f"the output of layer {path!r}" in blame(jax.jit(model), jnp.ones(2), ps, st)
    both, ps, st = setup(fl.Chain(fl.BidirectionalRNN(fl.GRUCell(2, 3))))
    message = blame(both, jnp.full((4, 2), jnp.inf), ps, st)
    assert message.startswith(
        "NaN or infinity in the input of layer 'layer_0.forward|backward' (GRUCell(2, 3)"
    )


# What it leaves as it is


@pytest.mark.long
@pytest.mark.parametrize("transform", [lambda f: f, jax.jit])
def test_nothing_changes_when_all_is_finite(transform):
    plain = fl.Chain(fl.Dense(2, 8, jnp.tanh), fl.Dropout(0.5), fl.Dense(8, 2))
    model, ps, st = setup(plain)
    assert model.layout == plain.layout
    for new, old in zip((ps, st), fl.setup(jax.random.key(0), plain, float), strict=True):
        assert jax.tree.structure(new) == jax.tree.structure(old)
        assert new == old if isinstance(new, fl.Record) else bool((new == old).data.all())
    x = jax.random.normal(jax.random.key(1), (5, 2))

    def loss(model, ps, x):
        y, new = model(x, ps, st)
        return jnp.sum(y**2), (y, new)

    gradient = transform(jax.value_and_grad(loss, (1, 2), has_aux=True))
    (value, (y, new)), slopes = gradient(model, ps, x)
    (expected, (other, old)), others = gradient(plain, ps, x)
    assert new == old
    # Compiled, the layers of the plain model are fused with each other, and rounded together.
    compare = assert_close if transform is jax.jit else assert_same
    compare((value, y, slopes), (expected, other, others))


@pytest.mark.long
def test_all_transformations_go_through():
    plain = chain(jnp.sin)
    model, ps, st = setup(plain)
    x, v = jnp.array([0.3, -0.7]), jnp.array([1.0, 2.0])

    def results(model):
        def f(x):
            return jnp.sum(model(x, ps, st)[0] ** 3)

        return (
            jax.jvp(f, (x,), (v,)),
            jax.hessian(f)(x),
            jax.jacrev(jax.jacrev(f))(x),
            jax.grad(lambda x: jax.jvp(f, (x,), (v,))[1])(x),
            jax.grad(jax.checkpoint(f))(x),
        )

    assert_close(jax.jit(results, static_argnums=0)(model), jax.jit(results, static_argnums=0)(plain))


def test_only_what_is_asked_for_is_checked():
    x = jnp.ones(2)
    model, ps, st = setup(chain(log_of_negative), "backward")
    assert jnp.isnan(model(x, ps, st)[0]).all()
    model, ps, st = setup(chain(root_of_zero), "forward")
    slope = jax.grad(lambda ps: model(x, ps, st)[0].sum())(ps)
    assert jnp.isnan(slope.layer_0.bias).all()
    for nan in ("forward", "backward"):
        model, ps, st = setup(chain(log_of_negative if nan == "forward" else root_of_zero), nan)
        assert "layer_1" in blame(jax.grad(lambda ps: jnp.sum(model(x, ps, st)[0] ** 2)), ps)  # noqa: B023


@pytest.mark.long
def test_integers_keys_and_flags_are_left_alone():
    class Pick(fl.Layer):
        def forward(self, x, ps, st):
            y = x["table"][x["index"]] if x["flag"] else None
            return {"y": y, "key": jax.random.split(x["key"])[0], "n": x["index"], "rest": x["rest"]}, st

    model, ps, st = setup(fl.Chain(Pick()))
    x = {"index": jnp.array([0, 1]), "flag": True, "key": jax.random.key(3), "rest": (2, 0.5, None)}
    vector = fl.ComponentVector.of({"a": 1.0, "b": [2.0, 3.0]})
    y, _ = model({**x, "table": vector, "np": np.ones(2, "float16")}, ps, st)
    np.testing.assert_array_equal(y["y"], [1.0, 2.0])
    assert y["rest"] == (2, 0.5, None)
    slope = jax.grad(lambda table: model({**x, "table": table}, ps, st)[0]["y"].sum())(vector)
    np.testing.assert_array_equal(slope, [1.0, 1.0, 0.0])
    model, ps, st = setup(fl.Chain(fl.Embedding(5, 2), fl.Dense(2, 1)))
    y, pull = jax.vjp(lambda i, ps: model(i, ps, st)[0], jnp.array([1, 4]), ps)
    index, slope = pull(jnp.ones_like(y))
    assert index.dtype == jax.dtypes.float0
    assert jnp.abs(slope.layer_0.weight[1]).min() > 0


def test_float32_stays_float32():
    model = fl.debug(chain(jnp.sin))
    ps, st = fl.setup(jax.random.key(0), model)
    y, slope = jax.value_and_grad(lambda ps: model(jnp.ones(2, jnp.float32), ps, st)[0].sum())(ps)
    assert y.dtype == slope.dtype == jnp.float32


# What it gives


def test_each_leaf_is_wrapped_and_shows_its_attributes():
    model = fl.debug(ode(jnp.sin), nan="forward")
    assert [path for path, layer in fl.select(model, "*") if isinstance(layer, fl.DebugLayer)] == [
        "pre",
        "node.layer_0",
        "node.layer_1",
        "node.layer_2",
    ]
    pre = model["pre"]
    assert (pre.out_dims, pre.path, pre.nan) == (2, "pre", "forward")
    assert repr(pre) == "DebugLayer(Dense(2, 2), 'pre', nan='forward')"
    with pytest.raises(AttributeError, match="'Dense' object has no attribute 'width'"):
        _ = pre.width
    again = fl.debug(ode(log_of_negative), nan="forward")
    assert pickle.loads(pickle.dumps(again)) == again != model
    assert hash(model) == hash(fl.debug(ode(jnp.sin), nan="forward"))


def test_a_mapping_of_layers():
    layers = fl.debug({"rate": fl.Param((), fl.initializers.ones), "nets": {"a": chain(log_of_negative)}})
    ps, st = fl.setup(jax.random.key(0), layers, float)
    message = blame(layers["nets"]["a"], jnp.ones(2), ps.nets.a, st.nets.a)
    assert "'nets.a.layer_1'" in message


def test_another_word_for_what_to_check():
    with pytest.raises(ValueError, match="debug: nan: expected 'forward', 'backward' or 'both', found 'all'"):
        fl.debug(fl.Dense(2, 2), nan="all")
