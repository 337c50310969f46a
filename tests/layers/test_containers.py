import copy
import dataclasses
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flatlayers as fl
from tests.helpers import assert_close, assert_same, central_difference


def run(layer, x, dtype=float):
    ps, st = fl.setup(jax.random.key(0), layer, dtype)
    return layer(x, ps, st)[0]


class Sum(fl.Layer):
    """A connection with a parameter: the sum of a tuple, and a count in its state."""

    def parameters(self):
        return {"scale": fl.Param((), fl.initializers.constant(2.0))}

    def states(self, key):
        return {"count": 0}

    def forward(self, x, ps, st):
        assert isinstance(x, tuple)
        return ps.scale * sum(x), st.replace(count=st.count + 1)


def test_chain_runs_in_order_and_flattens_nothing(key):
    model = fl.Chain(fl.Dense(2, 3), jnp.tanh, fl.Chain(fl.Dense(3, 3), jnp.sin), head=fl.Dense(3, 1))
    ps, st = fl.setup(key, model, float)
    assert ps.layout.names == ("layer_0", "layer_1", "layer_2", "head")
    assert st.layer_2.layer_1 == {}
    x = jax.random.normal(key, (5, 2))
    h = jnp.tanh(x @ ps.layer_0.weight.T)
    h = jnp.sin(h @ ps.layer_2.layer_0.weight.T)
    assert_close(model(x, ps, st)[0], h @ ps.head.weight.T)
    assert run(fl.Chain(), 3.0) == 3.0


def test_chain_indexes_and_slices(key):
    model = fl.Chain(fl.Dense(2, 3), jnp.tanh, fl.Dense(3, 4), head=fl.Dense(4, 1))
    ps, st = fl.setup(key, model, float)
    assert model[0] == fl.Dense(2, 3)
    assert model[-1] == model["head"] == fl.Dense(4, 1)
    assert len(model) == len(list(model)) == 4
    x = jax.random.normal(key, (5, 2))
    middle, new = model[:2](x, ps, st)
    assert new == st
    assert_same(model[2:](middle, ps, st)[0], model(x, ps, st)[0])
    assert list(model[1:].layout.names) == ["layer_1", "layer_2", "head"]
    assert repr(model[2:]) == "Chain(layer_2=Dense(3, 4), head=Dense(4, 1))"
    with pytest.raises(KeyError, match="nearest: head"):
        model["haed"]
    with pytest.raises(IndexError):
        model[7]


def test_chain_repr_rebuilds_it():
    tanh = jnp.tanh
    model = fl.Chain(fl.Dense(2, 3, tanh), fl.Dropout(0.5), fl.Dense(3, 1, use_bias=False), name="net")
    assert (
        repr(model)
        == "Chain(Dense(2, 3, activation=tanh), Dropout(0.5), Dense(3, 1, use_bias=False), name='net')"
    )
    assert eval(repr(model), {**vars(fl), "tanh": tanh}) == model
    assert fl.display_name(model) == "net"


def test_parallel(key):
    double = fl.WrappedFunction(lambda x: 2 * x)
    assert run(fl.Parallel(None, jnp.sin, double), 1.0) == (jnp.sin(1.0), 2.0)
    assert run(fl.Parallel(lambda *ys: ys, jnp.sin, double), (1.0, 3.0)) == (jnp.sin(1.0), 6.0)
    calls = []
    run(fl.Parallel(lambda *ys: calls.append(len(ys)), jnp.sin, double, third=double), 1.0)
    assert calls == [3]
    model = fl.Parallel(Sum(), fl.Dense(2, 2), b=fl.Dense(2, 2))
    ps, st = fl.setup(key, model, float)
    assert ps.layout.names == ("layer_0", "b", "connection")
    x = jnp.ones((3, 2))
    y, new = model(x, ps, st)
    assert_close(y, 2 * (x @ ps.layer_0.weight.T + x @ ps.b.weight.T))
    assert new.connection.count == 1
    with pytest.raises(ValueError, match="tuple of 2 inputs, one for each layer, found 3"):
        model((x, x, x), ps, st)


def test_branch_layer(key):
    assert run(fl.BranchLayer(jnp.sin, jnp.cos), 1.0) == (jnp.sin(1.0), jnp.cos(1.0))
    assert run(fl.BranchLayer(lambda x: x[0], lambda x: x[1], fusion=jnp.subtract), (5.0, 3.0)) == 2.0
    model = fl.BranchLayer(fl.Dense(2, 2), b=fl.Dense(2, 2), fusion=Sum())
    ps, st = fl.setup(key, model, float)
    assert ps.layout.names == ("layer_0", "b", "fusion")
    assert_close(model(jnp.ones(2), ps, st)[0], 2 * (ps.layer_0.weight + ps.b.weight) @ jnp.ones(2))


def test_pairwise_fusion(key):
    # ((1 + 10) * 2 + 100) * 2 + 1000 with `layer` doubling after each joining
    double = fl.WrappedFunction(lambda x: 2 * x)
    assert run(fl.PairwiseFusion(jnp.add, double, double), (1.0, 10.0, 100.0)) == (1 * 2 + 10) * 2 + 100
    assert run(fl.PairwiseFusion(jnp.add, double, double), 1.0) == (1 * 2 + 1) * 2 + 1
    assert run(fl.PairwiseFusion(jnp.subtract, double), (1.0, 10.0)) == 2 - 10
    model = fl.PairwiseFusion(Sum(), double, double)
    ps, st = fl.setup(key, model, float)
    y, new = model((1.0, 10.0, 100.0), ps, st)
    assert y == 2 * (2 * (2 * (2 * 1 + 10)) + 100)
    assert new.connection.count == 2
    with pytest.raises(ValueError, match="tuple of 3 inputs"):
        model((1.0, 2.0), ps, st)
    with pytest.raises(TypeError, match="connection"):
        fl.PairwiseFusion(3, double)


def test_skip_connection(key):
    assert run(fl.SkipConnection(lambda x: 2 * x, jnp.subtract), 3.0) == 3.0
    model = fl.SkipConnection(fl.Dense(2, 2), Sum())
    ps, st = fl.setup(key, model, float)
    assert ps.layout.names == ("layer", "connection")
    x = jnp.arange(2.0)
    y, new = model(x, ps, st)
    assert_close(y, 2 * (ps.layer.weight @ x + x))
    assert new.connection.count == 1


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("lead", [(), (5,), (4, 5)])
def test_maxout(key, dtype, lead):
    model = fl.Maxout(lambda: fl.Dense(3, 2), 4)
    assert model == fl.Maxout(*[fl.Dense(3, 2)] * 4)
    ps, st = fl.setup(key, model, dtype)
    assert ps.layout.names == ("layer_0", "layer_1", "layer_2", "layer_3")
    x = jax.random.normal(key, (*lead, 3), dtype)
    weights = np.stack([np.asarray(ps[name].weight) for name in ps.layout.names])
    expected = np.einsum("nij,...j->n...i", weights, np.asarray(x)).max(axis=0)
    y, new = jax.jit(model)(x, ps, st)
    assert y.dtype == dtype
    assert new == st
    np.testing.assert_allclose(y, expected, rtol=1e-5 if dtype == jnp.float32 else 1e-12, atol=1e-7)


def test_maxout_gradient(key):
    model = fl.Maxout(fl.Dense(3, 2, jnp.sin), fl.Dense(3, 2), third=fl.Dense(3, 2))
    ps, st = fl.setup(key, model, float)
    x = jax.random.normal(key, (4, 3))
    direction = fl.ComponentVector(jax.random.normal(jax.random.key(2), ps.shape), ps.layout)

    def loss(ps):
        return jnp.sum(model(x, ps, st)[0] ** 2)

    slope = jax.grad(loss)(ps) @ direction
    np.testing.assert_allclose(slope, central_difference(loss, ps, direction), rtol=1e-7)


def test_maxout_of_functions_and_layers_with_state(key):
    assert run(fl.Maxout(jnp.sin, lambda x: 0 * x + 0.5), 0.1) == 0.5
    model = fl.Maxout(Sum(), Sum())
    ps, st = fl.setup(key, model, float)
    y, new = model((1.0, 2.0), ps, st)
    assert y == 6.0
    assert (new.layer_0.count, new.layer_1.count) == (1, 1)
    dropping = fl.Maxout(fl.Dropout(0.5), fl.Dropout(0.5))
    ps, st = fl.setup(key, dropping, float)
    x = jnp.ones(100)
    y, new = dropping(x, ps, st)
    assert_same(y, jnp.maximum(*(fl.Dropout(0.5)(x, {}, st[name])[0] for name in st)))
    assert_same(dropping(x, ps, fl.testmode(st))[0], x)


def test_maxout_of_what_does_not_fit(key):
    for make in (lambda: fl.Maxout(), lambda: fl.Maxout(fl.NoOpLayer, 0)):
        with pytest.raises(ValueError, match="one layer or more, found none"):
            make()
    with pytest.raises(TypeError, match="expected a layer or a function, found 3"):
        fl.Maxout(fl.Dense(3, 2), 3)
    model = fl.Maxout(fl.Dense(3, 2), fl.Dense(3, 1))
    ps, st = fl.setup(key, model, float)
    with pytest.raises(ValueError, match=r"outputs of one shape, found \[\(2,\), \(1,\)\]"):
        model(jnp.ones(3), ps, st)


@pytest.mark.parametrize(
    "model",
    [
        fl.Chain(fl.Dense(2, 2), fl.Dense(2, 2)),
        fl.Parallel(jnp.add, fl.Dense(2, 2), fl.Dense(2, 2)),
        fl.BranchLayer(fl.Dense(2, 2), fl.Dense(2, 2), fusion=jnp.add),
        fl.PairwiseFusion(jnp.add, fl.Dense(2, 2)),
        fl.SkipConnection(fl.Dense(2, 2), jnp.add),
        fl.Maxout(fl.Dense(2, 2), last=fl.Dense(2, 2)),
    ],
    ids=lambda model: type(model).__name__,
)
def test_in_transformations(key, model):
    ps, st = fl.setup(key, model, float)
    x = jax.random.normal(key, (5, 2))
    y, new = jax.jit(model)(x, ps, st)
    assert new == st
    assert_close(y, jax.vmap(lambda x: model(x, ps, st)[0])(x))
    assert y.shape == fl.output_shape(model, x)
    assert ps.size == fl.parameter_length(model)
    assert jnp.isfinite(jax.grad(lambda ps: model(x, ps, st)[0].sum())(ps).data).all()
    assert eval(repr(model), {**vars(fl), "add": jnp.add}) == model
    assert np.isfinite(y).all()


@pytest.mark.parametrize(
    "make",
    [
        lambda connection: fl.Parallel(connection, jnp.tanh),
        lambda connection: fl.BranchLayer(jnp.tanh, fusion=connection),
        lambda connection: fl.PairwiseFusion(connection, jnp.tanh),
        lambda connection: fl.SkipConnection(jnp.tanh, connection),
    ],
)
def test_what_is_no_connection(make):
    with pytest.raises(
        TypeError, match="[.](connection|fusion): expected a function or a layer.*, found '[+]'"
    ):
        make("+")


# Children as attributes


CONTAINERS = [
    fl.Chain(fl.Dense(2, 3), jnp.tanh, head=fl.Dense(3, 1)),
    fl.Parallel(jnp.add, fl.Dense(2, 3), jnp.tanh, head=fl.Dense(2, 3)),
    fl.BranchLayer(fl.Dense(2, 3), jnp.tanh, head=fl.Dense(2, 3), fusion=fl.NoOpLayer()),
    fl.PairwiseFusion(jnp.add, fl.Dense(2, 2), jnp.tanh, head=fl.Dense(2, 2)),
    fl.Maxout(fl.Dense(2, 2), jnp.tanh, head=fl.Dense(2, 2)),
]
containers = pytest.mark.parametrize("model", CONTAINERS, ids=lambda model: type(model).__name__)


@containers
def test_children_are_attributes(model):
    assert model.layer_0 is model.layers["layer_0"]
    assert model.layer_1 is model.layers["layer_1"]
    assert model.head is model.layers["head"]
    assert hasattr(model, "head")
    assert not hasattr(model, "layer_2")
    assert {"layer_0", "layer_1", "head", "layers", "forward"} <= set(dir(model))
    with pytest.raises(AttributeError, match=f"{type(model).__name__}: no name 'haed'; the nearest: head"):
        _ = model.haed
    with pytest.raises(AttributeError, match="_head"):
        _ = model._head
    with pytest.raises(dataclasses.FrozenInstanceError, match="cannot assign 'head'"):
        model.head = fl.Dense(3, 1)


@containers
def test_attributes_do_not_disturb_what_python_and_jax_ask_for(key, model):
    # Without functions of JAX, which cannot be pickled.
    connection = {"connection": fl.NoOpLayer()} if hasattr(model, "connection") else {}
    named = dataclasses.replace(
        model, layers={"layer_0": fl.Dense(2, 2), "head": fl.NoOpLayer()}, **connection
    )
    again = pickle.loads(pickle.dumps(named))
    assert again == named
    assert again.head == fl.NoOpLayer()
    assert copy.deepcopy(model) == copy.copy(model) == model
    assert hash(copy.deepcopy(model)) == hash(model)
    assert next(field.name for field in dataclasses.fields(model)) == "layers"
    for name in (
        "__wrapped__",
        "__jax_array__",
        "__array__",
        "_repr_html_never",
        "__pdoc__",
        "_fields",
        "shape",
    ):
        assert not hasattr(model, name)
    with pytest.raises(AttributeError):
        object.__new__(type(model)).head  # noqa: B018


@pytest.mark.parametrize(
    "name", ["trace", "lower", "eval_shape", "clear_cache", "name", "connection", "compile"]
)
def test_a_child_may_have_the_name_of_what_jax_gives_a_compiled_function(key, name):
    """`jax.jit` copies the attributes of a callable to the function that it makes of it."""
    for make in (fl.BranchLayer, lambda **layers: fl.Parallel(None, **layers)):
        if name == "connection" and make is not fl.BranchLayer:
            continue
        model = make(**{name: fl.Dense(2, 3), "other": fl.Dense(2, 1)})
        ps, st = fl.setup(key, model, float)
        x = jnp.ones((4, 2))
        compiled = jax.jit(model)
        assert_close(compiled(x, ps, st)[0], model(x, ps, st)[0])
        assert compiled.lower(x, ps, st).compile()(x, ps, st)[0][0].shape == (4, 3)
        assert jax.eval_shape(jax.vmap(model, (0, None, None)), x, ps, st)[0][1].shape == (4, 1)
        assert fl.display_name(model) == type(model).__name__
        assert getattr(model, name) is model.layers[name]


def test_an_attribute_of_the_class_comes_first():
    model = fl.Chain(forward=fl.Dense(2, 3), states=fl.Dense(3, 1))
    assert callable(model.forward)
    assert model["forward"] == fl.Dense(2, 3)
    assert model.layers["states"] == fl.Dense(3, 1)


def test_a_part_of_a_chain_and_a_chain_in_a_chain():
    model = fl.Chain(fl.Chain(a=fl.Dense(2, 3), b=fl.Dense(3, 4)), body=fl.Dense(4, 5), end=jnp.tanh)
    assert model.layer_0.b == fl.Dense(3, 4)
    assert model[1:].body == fl.Dense(4, 5)
    with pytest.raises(AttributeError, match="no name 'layer_0'; there are: body, end"):
        _ = model[1:].layer_0
    assert fl.MLP(2, (3, 4), 1).layer_1 == fl.Dense(3, 4, jnp.tanh)
    with pytest.raises(AttributeError, match="MLP: no name 'layer_9'; the nearest: layer_"):
        _ = fl.MLP(2, (3, 4), 1).layer_9
    assert pickle.loads(pickle.dumps(fl.MLP(2, (3,), 1, None))).layer_1 == fl.Dense(3, 1)


# Arguments


@pytest.mark.parametrize("bad", [3, 2.5, "a", None, True, fl.Dense, jnp.ones(2)])
@pytest.mark.parametrize(
    ("make", "where"),
    [
        (lambda bad: fl.Chain(fl.Dense(2, 3), bad), "Chain.layer_1"),
        (lambda bad: fl.Chain(head=bad), "Chain.head"),
        (lambda bad: fl.Parallel(None, bad), "Parallel.layer_0"),
        (lambda bad: fl.BranchLayer(body=bad), "BranchLayer.body"),
        (lambda bad: fl.PairwiseFusion(jnp.add, bad), "PairwiseFusion.layer_0"),
        (lambda bad: fl.Maxout(bad), "Maxout.layer_0"),
        (lambda bad: fl.SkipConnection(bad, jnp.add), "SkipConnection.layer"),
    ],
)
def test_what_is_no_layer(make, where, bad):
    with pytest.raises(TypeError, match=f"{where}: expected a layer or a function, found "):
        make(bad)


@pytest.mark.parametrize("n", [-1, 2.5, float("nan"), True])
def test_how_many_layers_maxout_makes(n):
    with pytest.raises((TypeError, ValueError), match="Maxout.n: expected an integer of at least 0, found"):
        fl.Maxout(fl.NoOpLayer, n)
    assert len(fl.Maxout(fl.NoOpLayer, np.int64(3)).layers) == 3
    with pytest.raises(TypeError, match="Maxout: expected a function that makes a layer, found 'a'"):
        fl.Maxout("a", 3)


def test_a_name_is_a_string():
    with pytest.raises(TypeError, match="Chain.name: expected a string or None, found 3"):
        fl.Chain(name=3)


@pytest.mark.parametrize(
    "model",
    [
        fl.Chain(),
        fl.Chain(fl.Dense(2, 2), jnp.sin, head=fl.Dense(2, 1), name="net"),
        fl.Parallel(None, jnp.sin, b=jnp.cos),
        fl.Parallel(fl.WrappedFunction(jnp.add), jnp.sin, jnp.cos),
        fl.BranchLayer(jnp.sin, jnp.cos, fusion=jnp.add),
        fl.PairwiseFusion(jnp.add, jnp.sin, last=fl.Dense(2, 2)),
        fl.Maxout(fl.Dense(2, 2), fl.Dense(2, 2)),
        fl.SkipConnection(fl.Dense(2, 2), jnp.add),
    ],
    ids=repr,
)
def test_the_constructor_arguments_make_an_equal_layer(model):
    arguments = list(model.constructor_arguments())
    positional = [value for _, value, is_keyword in arguments if not is_keyword]
    named = {name: value for name, value, is_keyword in arguments if is_keyword}
    assert type(model)(*positional, **named) == model
