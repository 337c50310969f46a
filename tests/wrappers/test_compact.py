import dataclasses
import pickle

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flatlayers as fl
from flatlayers.core.rebuild import replaceable, with_children
from tests.helpers import assert_close, assert_same, central_difference
from tests.wrappers.compacts import ONES, called, compact


@fl.compact(w1=fl.Dense(1, 4), act=jnp.tanh, scale=fl.Param((), ONES), w2=fl.Dense(4, 2))
def net(m, x):
    """A perceptron with a scale."""
    return m.w2(m.scale * m.act(m.w1(x)))


class Net(fl.Container):
    """The same, written out."""

    w1: fl.Layer
    w2: fl.Layer

    def parameters(self):
        children = super().parameters()
        return {"w1": children["w1"], "scale": fl.Param((), ONES), "w2": children["w2"]}

    def forward(self, x, ps, st):
        h, w1 = self.w1(x, ps.w1, st.w1)
        y, w2 = self.w2(ps.scale * jnp.tanh(h), ps.w2, st.w2)
        return y, st.replace(w1=w1, w2=w2)


CONTAINER = Net(fl.Dense(1, 4), fl.Dense(4, 2))


@fl.compact(
    first=fl.Dropout(0.5),
    blocks=[fl.Dense(2, 2), jnp.tanh, (fl.Dense(2, 2), fl.Dropout(0.5))],
    heads={"mean": fl.Dense(2, 1), "spread": fl.Dense(2, 1, jnp.exp)},
    count=fl.State(0),
    training=fl.State(True),
)
def nested(m, x):
    m.count = m.count + 1
    x = m.first(m.first(x))
    x = m.blocks[1](m.blocks[0](x))
    for layer in m.blocks[2]:
        x = layer(x)
    return m.heads["mean"](x) + (m.heads.spread(x) if m.training else 0.0)


# An ordinary layer


def test_it_is_a_layer_like_the_container_written_out(key):
    assert isinstance(net, fl.Layer)
    assert net.layout == CONTAINER.layout
    assert net.layout.names == ("w1", "scale", "w2")
    ps, st = fl.setup(key, net, float)
    assert_same((ps, st), fl.setup(key, CONTAINER, float))
    assert st == fl.initial_states(key, CONTAINER) == {"w1": {}, "w2": {}}
    x = jax.random.normal(key, (5, 1))
    assert_same(jax.jit(net)(x, ps, st)[0], jax.jit(CONTAINER)(x, ps, st)[0])
    assert_same(net(x, ps.unpack(), st.to_dict())[0], net(x, ps, st)[0])
    assert_close(jax.vmap(lambda x: net(x, ps, st)[0])(x), net(x, ps, st)[0])
    assert fl.output_shape(net, x) == (5, 2)
    assert fl.stateless_apply(net, x, ps).shape == (5, 2)


def test_gradient(key):
    ps, st = fl.setup(key, net, float)
    x = jax.random.normal(key, (5, 1))
    direction = fl.ComponentVector(jax.random.normal(jax.random.key(2), ps.shape), ps.layout)

    def loss(layer, ps):
        return jnp.sum(layer(x, ps, st)[0] ** 2)

    gradient = jax.jit(jax.grad(loss, argnums=1))(net, ps)
    np.testing.assert_allclose(
        gradient @ direction, central_difference(lambda ps: loss(net, ps), ps, direction), rtol=1e-7
    )
    assert_same(gradient, jax.jit(jax.grad(loss, argnums=1))(CONTAINER, ps))


def test_float32_stays_float32(key):
    ps, st = fl.setup(key, net)
    y, _ = net(jnp.ones((5, 1), jnp.float32), ps, st)
    assert y.dtype == jnp.float32


def test_equal_functions_with_equal_fields_are_equal():
    def f(m, x):
        return m.w(x)

    def g(m, x):
        return m.w(x)

    layer = fl.compact(w=fl.Dense(2, 2), sizes=[1, 2], start=fl.State(np.zeros(2)))(f)
    same = fl.compact(w=fl.Dense(2, 2), sizes=(1, 2), start=fl.State(jnp.zeros(2)))(f)
    assert layer == same
    assert hash(layer) == hash(same)
    assert layer != fl.compact(w=fl.Dense(2, 2), sizes=(1, 2), start=fl.State(np.zeros(2)))(g)
    assert layer != fl.compact(w=fl.Dense(2, 2), sizes=(1, 3), start=fl.State(np.zeros(2)))(f)
    assert layer != fl.compact(w=fl.Dense(2, 2), sizes=(1, 2), start=fl.State(np.ones(2)))(f)
    assert jax.tree.leaves(layer) == []
    with pytest.raises(dataclasses.FrozenInstanceError, match="immutable"):
        layer.w = fl.Dense(2, 2)
    traces = []
    call = jax.jit(lambda layer, ps: traces.append(1) or ps)
    for one in (layer, same):
        call(one, fl.initial_parameters(jax.random.key(0), one))
    assert len(traces) == 1


def test_text():
    assert fl.display_name(net) == "net"
    expected = "net(w1=Dense(1, 4), act=tanh, scale=Param((), ones), w2=Dense(4, 2))"
    assert repr(net) == expected
    assert net.__doc__ == "A perceptron with a scale."
    layer = compact(
        count=fl.State(0),
        training=fl.State(True),
        mean=fl.State(jnp.zeros(3, jnp.float32)),
        key=fl.State(jax.random.split),
        fixed=fl.State(fl.Param((), ONES)),
        layers=(fl.Dense(1, 2), jnp.sin),
        by_name={"a": fl.Dense(1, 2)},
        depth=3,
    )
    assert repr(layer) == (
        "<lambda>(count=State(0), training=State(True), mean=State(float32[3]), key=State(split), "
        "fixed=State(Param((), ones)), layers=(Dense(1, 2), WrappedFunction(sin)), "
        "by_name={'a': Dense(1, 2)}, depth=3)"
    )


def test_display():
    layer = compact(blocks=[fl.Dense(1, 1)] * 3, mean=fl.State(jnp.zeros(9, jnp.float32)), depth=3)
    text = fl.pformat(fl.Chain(layer))
    assert "layer_0=<lambda>(" in text
    assert "mean=State(float32[9]), depth=3" in text


def test_fields_are_attributes_of_the_layer():
    assert net.w1 == fl.Dense(1, 4)
    assert nested.blocks[2][0] == fl.Dense(2, 2)
    with pytest.raises(AttributeError, match="no name 'w3'; the nearest: w"):
        _ = net.w3


def test_pickle():
    assert pickle.loads(pickle.dumps(net)) is net
    assert pickle.loads(pickle.dumps(fl.Chain(net, fl.Dense(2, 1)))) == fl.Chain(net, fl.Dense(2, 1))
    plain = fl.compact(w1=fl.Dense(1, 4), act=len)(net.function)
    assert plain != net
    assert pickle.loads(pickle.dumps(plain)) == plain
    by_name = fl.compact(w1=fl.Dense(1, 4))(max)
    assert pickle.loads(pickle.dumps(by_name)) == by_name
    with pytest.raises((pickle.PicklingError, AttributeError), match="(?i)can't pickle"):
        pickle.dumps(compact())


def test_children_can_be_replaced():
    assert replaceable(net) == {"w1": net.w1, "w2": net.w2}
    wide = with_children(net, {"w1": fl.Dense(1, 8), "w2": fl.Dense(8, 2)})
    assert (wide.w1, wide.name, wide.function) == (fl.Dense(1, 8), "net", net.function)
    assert fl.parameter_length(wide) == 16 + 1 + 18
    assert wide.__doc__ == net.__doc__
    assert pickle.loads(pickle.dumps(wide)) == wide
    changed = with_children(nested, {"blocks.layer_2.layer_1": fl.Dropout(0.1)})
    assert changed.blocks[2][1] == fl.Dropout(0.1)


# Children


def test_tuples_and_dicts_of_layers_are_children(key):
    dense = {"weight": (2, 2), "bias": (2,)}
    head = {"weight": (1, 2), "bias": (1,)}
    blocks = {"layer_0": dense, "layer_1": {}, "layer_2": {"layer_0": dense, "layer_1": {}}}
    expected = {"first": {}, "blocks": blocks, "heads": {"mean": head, "spread": head}}
    assert nested.layout == fl.Layout(expected)
    ps, st = fl.setup(key, nested, float)
    st = fl.testmode(st)
    x = jax.random.normal(key, (5, 2))
    p = jax.tree.map(np.asarray, ps.unpack())
    h = np.tanh(x @ p.blocks.layer_0.weight.T) @ p.blocks.layer_2.layer_0.weight.T
    y, new = jax.jit(nested)(x, ps, st)
    np.testing.assert_allclose(y, h @ p.heads.mean.weight.T, rtol=1e-12)
    assert new == {**st, "count": jnp.asarray(1)}
    assert jax.tree.structure(new) == jax.tree.structure(st)


def test_the_state_of_a_child_goes_from_call_to_call(key):
    ps, st = fl.setup(key, nested, float)
    x = jnp.ones((20, 2))
    y, new = jax.jit(nested)(x, ps, st)
    once, first = nested.first(x, {}, st.first)
    twice, first = nested.first(once, {}, first)
    assert new.first == first
    assert not np.array_equal(once != 0, twice != 0)
    h = jnp.tanh(fl.Dense(2, 2)(twice, ps.blocks.layer_0, {})[0])
    h = fl.Dense(2, 2)(h, ps.blocks.layer_2.layer_0, {})[0]
    h, last = fl.Dropout(0.5)(h, {}, st.blocks.layer_2.layer_1)
    assert new.blocks.layer_2.layer_1 == last
    mean, spread = (h @ head.weight.T for head in (ps.heads.mean, ps.heads.spread))
    assert_close(y, mean + jnp.exp(spread))
    assert jax.tree.structure(new) == jax.tree.structure(st)
    again, same = jax.jit(nested)(x, ps, st)
    assert_same(again, y)
    assert same == new


def test_parts_of_a_child():
    def f(m, x):
        assert (m.w.layer, m.w.st) == (fl.Dense(2, 3), {})
        assert set(dir(m)) >= {"w", "group", "rate"}
        assert list(m.group) == ["a", "b"]
        return x @ m.w.ps.weight.T + m.group.a.ps.weight[0] * m.rate

    y, _ = called(compact(f, w=fl.Dense(2, 3), group={"a": fl.Diagonal(1), "b": fl.Dropout(0.1)}, rate=2.0))
    assert_same(y, 2 * jnp.ones(3))


def test_a_child_may_change_the_type_of_its_state():
    layer = compact(lambda m, x: m.drop(x), drop=fl.VariationalHiddenDropout(0.5))
    _, new = called(layer)
    assert new.drop.mask.shape == (2,)


def test_compact_in_compact_in_a_chain_in_a_solve(key):
    outer = compact(lambda m, x: -m.rate * m.inner(x), rate=fl.Param((), ONES), inner=scaled)
    euler = {"solver": diffrax.Euler(), "stepsize_controller": diffrax.ConstantStepSize(), "dt0": 0.125}
    model = fl.NeuralODE(fl.Chain(outer, fl.NoOpLayer()), t1=0.5, **euler)
    ps, st = fl.setup(key, model, float)
    assert ps.layout == fl.Layout({"layer_0": {"rate": (), "inner": {"scale": (2,)}}, "layer_1": {}})

    @jax.jit
    def final(ps):
        y, new = model(jnp.array([1.0, 2.0]), ps, st)
        return jnp.sum(y), (y, new)

    gradient, (y, new) = jax.grad(final, has_aux=True)(ps)
    np.testing.assert_allclose(y, (1 - 0.125) ** 4 * np.array([1.0, 2.0]), rtol=1e-12)
    np.testing.assert_allclose(gradient.layer_0.rate, -4 * 0.125 * (1 - 0.125) ** 3 * 3, rtol=1e-12)
    assert new.model.layer_0.inner.count == 1


@fl.compact(scale=fl.Param((2,), ONES), count=fl.State(0))
def scaled(m, x):
    m.count = m.count + 1
    return m.scale * x


# States


def test_kinds_of_states(key):
    layer = compact(
        blank=fl.State(jnp.zeros(3, jnp.float32)),
        table=fl.State(np.arange(4)),
        rate=fl.State(0.5),
        flag=fl.State(None),
        mode=fl.State("fast"),
        draw=fl.State(lambda key: jax.random.normal(key, (2,))),
        other=fl.State(lambda key: jax.random.normal(key, (2,))),
        key=fl.State(lambda key: key),
        group=fl.State(lambda key: {"a": 1, "training": True}),
        fixed=fl.State(fl.Param((2,), ONES)),
    )
    for dtype in (jnp.float32, jnp.float64):
        st = fl.initial_states(key, layer, dtype)
        assert list(st) == list(layer.fields)
        assert (st.blank.dtype, st.rate.dtype, st.draw.dtype) == (dtype, dtype, dtype)
        assert_same((st.table, st.fixed), (np.arange(4), np.ones(2, dtype)))
        assert (st.flag, st.mode, st.group.training) == (None, "fast", True)
        assert not np.array_equal(st.draw, st.other)
        assert jnp.issubdtype(st.key.dtype, jax.dtypes.prng_key)
        assert not fl.testmode(st).group.training
        assert layer(1.0, {}, st)[1] == st
    assert fl.state_length(layer) == 3 + 4 + 1 + 1 + 1 + 2 + 2 + 1 + 2 + 2
    assert fl.parameter_length(layer) == 0


def test_reading_after_an_assignment_gives_the_new_value():
    def f(m, x):
        m.total = m.total + x.sum()
        m.total = 2 * m.total
        m.flag = "seen"
        return m.total

    layer = compact(f, total=fl.State(1.0), flag=fl.State(None))
    ps, st = fl.setup(jax.random.key(0), layer, float)
    y, new = jax.jit(layer)(jnp.ones(3), ps, st)
    assert y == new.total == 8
    assert (st.total, st.flag, new.flag) == (1, None, "seen")


def test_numbers_take_the_dtype_of_the_state():
    def f(m, x):
        m.mean, m.count, m.seen = 0.0, 3, True
        return x

    layer = compact(
        f,
        mean=fl.State(1.0),
        count=fl.State(jnp.int8(0)),
        seen=fl.State(jnp.asarray(False)),
        more=fl.State(1),
    )
    ps, st = fl.setup(jax.random.key(0), layer, jnp.float32)
    _, new = jax.jit(layer)(1.0, ps, st)
    assert jax.tree.structure(new) == jax.tree.structure(st)
    for name in st:
        assert (new[name].dtype, new[name].shape, new[name].weak_type) == (st[name].dtype, (), False)
    assert new == {"mean": jnp.float32(0), "count": jnp.int8(3), "seen": jnp.asarray(True), "more": st.more}
    layer = compact(lambda m, x: setattr(m, "count", 0.5), count=fl.State(0))
    with pytest.raises(Exception, match="promotion"):
        called(layer)


def test_a_key_is_split_on_use(key):
    def f(m, x):
        m.key, now = jax.random.split(m.key)
        return x + jax.random.normal(now, x.shape)

    layer = compact(f, key=fl.State(lambda key: key))
    ps, st = fl.setup(key, layer, float)
    one, new = layer(jnp.zeros(3), ps, st)
    two, _ = layer(jnp.zeros(3), ps, new)
    assert_same(one, layer(jnp.zeros(3), ps, st)[0])
    assert not np.array_equal(one, two)


# Ensembles


def test_an_ensemble(key):
    ps, st = jax.vmap(lambda key: fl.setup(key, scaled, float))(jax.random.split(key, 3))
    ps = ps * jnp.arange(6.0).reshape(3, 2)
    ys, new = jax.vmap(scaled, (None, 0, 0))(jnp.ones(2), ps, st)
    assert_same(ys, np.arange(6.0).reshape(3, 2))
    assert_same(new.count, np.array([1, 1, 1]))
