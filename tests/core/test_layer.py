import copy
import dataclasses
import functools
import pickle
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flatlayers as fl
from tests.helpers import assert_same, count_primitives


class Linear(fl.Layer):
    in_dims: int
    out_dims: int

    def parameters(self):
        return {
            "weight": fl.Param((self.out_dims, self.in_dims), fl.initializers.glorot_uniform),
            "bias": fl.Param((self.out_dims,), fl.initializers.zeros),
        }

    def forward(self, x, ps, st):
        return x @ ps.weight.T + ps.bias[None], st


class Counter(fl.Layer):
    """Counts its calls, in a state that it returns as a dict."""

    def states(self, key):
        return {"count": 0, "inner": {"rate": 0.5}, "training": True, "key": key}

    def forward(self, x, ps, st):
        return x, {**st, "count": st.count + 1}


class Net(fl.Container):
    encoder: fl.Layer
    hidden: tuple
    heads: dict
    scale: float = 2.0

    def parameters(self):
        return {**super().parameters(), "gain": fl.Param((), fl.initializers.ones)}

    def forward(self, x, ps, st):
        x, encoder = self.encoder(x, ps.encoder, st.encoder)
        for i, layer in enumerate(self.hidden):
            x, _ = layer(x, ps.hidden[f"layer_{i}"], st.hidden[f"layer_{i}"])
        y, _ = self.heads["mean"](x, ps.heads.mean, st.heads.mean)
        return self.scale * ps.gain * y, st.replace(encoder=encoder)


def net():
    return Net(Linear(3, 4), [Linear(4, 4), jnp.tanh], {"mean": Linear(4, 1), "spread": Linear(4, 1)})


# A frozen description


def test_a_subclass_is_a_frozen_dataclass():
    assert Linear(3, 2) == Linear(in_dims=3, out_dims=2)
    assert hash(Linear(3, 2)) == hash(Linear(3, 2))
    assert Linear(3, 2) != Linear(2, 3)
    assert dataclasses.replace(Linear(3, 2), out_dims=5) == Linear(3, 5)
    with pytest.raises(dataclasses.FrozenInstanceError, match="'in_dims' of Linear"):
        Linear(3, 2).in_dims = 4
    with pytest.raises(dataclasses.FrozenInstanceError):
        del Linear(3, 2).in_dims
    assert pickle.loads(pickle.dumps(net().encoder)) == Linear(3, 4)
    assert pickle.loads(pickle.dumps(fl.Dense(3, 2, use_bias=False))) == fl.Dense(3, 2, use_bias=False)


def test_lists_and_dicts_in_fields_are_frozen():
    model = net()
    assert isinstance(model.hidden, tuple)
    assert model.hidden[1] == fl.WrappedFunction(jnp.tanh)
    assert hash(model) == hash(net())
    assert model == net()


def test_an_init_written_out_may_assign():
    class Own(fl.Container):
        first: fl.Layer
        sizes: tuple

        def __init__(self, *sizes):
            self.sizes = list(sizes)
            self.first = Linear(sizes[0], sizes[1])

    class Inherited(Own):
        def extra(self):
            return 1

    for cls in (Own, Inherited):
        layer = cls(2, 3)
        assert layer.sizes == (2, 3)
        assert layer == cls(2, 3)
        assert fl.parameter_length(layer) == 9
        with pytest.raises(dataclasses.FrozenInstanceError):
            layer.sizes = ()


class Sized(fl.Layer):
    """Its hook completes one field from another."""

    sizes: list
    total: int | None = None

    def check_fields(self):
        if not self.sizes:
            raise ValueError("Sized.sizes: expected one size or more, found none")
        self.sizes = [2 * size for size in self.sizes] if self.total is None else self.sizes
        self.total = sum(self.sizes)


def test_the_hook_completes_fields_by_plain_assignment():
    layer = Sized([1, 2])
    assert (layer.sizes, layer.total) == ((2, 4), 6)
    assert hash(layer) == hash(Sized((1, 2)))
    with pytest.raises(ValueError, match="one size or more"):
        Sized([])
    with pytest.raises(dataclasses.FrozenInstanceError):
        layer.total = 3
    assert pickle.loads(pickle.dumps(layer)) == layer
    assert dataclasses.replace(layer, sizes=(3,)).total == 3

    class Empty(fl.Layer):
        def check_fields(self):
            self.extra = 3

    assert Empty().extra == 3  # a layer without fields has the hook, too


def test_the_hook_is_called_once_by_the_class_itself():
    calls = []

    class Base(fl.Layer):
        size: int

        def __init__(self, size):
            self.size = size

        def check_fields(self):
            calls.append(type(self).__name__)

    class Derived(Base):
        def __init__(self):
            super().__init__(3)
            self.size = 4

    assert (Base(2).size, Derived().size) == (2, 4)
    assert calls == ["Base", "Derived"]


def test_what_the_hook_leaves_is_checked():
    class Holder(fl.Layer):
        value: object

        def check_fields(self):
            self.value = jnp.ones(2)

    with pytest.raises(TypeError, match=r"Holder.value: layers hold no arrays"):
        Holder(3)


def test_a_post_init_works_as_in_any_dataclass():
    class Plain(fl.Layer):
        size: int

        def __post_init__(self):
            self.size = self.size + 1

        def check_fields(self):
            self.size = 10 * self.size

    assert Plain(1).size == 20


def test_the_hook_of_a_wrapper_finds_the_child():
    class Inner(fl.Wrapper):
        layer: fl.Layer
        size: int | None = None

        def check_fields(self):
            self.size = fl.parameter_length(self.child)

    assert Inner(jnp.sin).size == 0
    assert Inner(fl.Dense(3, 2)).size == 8


def test_arrays_in_fields_are_refused():
    class Holder(fl.Layer):
        value: object

    for value in (
        jnp.ones(2),
        np.ones(2),
        (1, jnp.ones(2)),
        {"a": np.ones(1)},
        fl.ComponentVector.of({"a": 1.0}),
    ):
        with pytest.raises(
            TypeError, match=r"Holder.value: layers hold no arrays; declare it in `parameters`"
        ):
            Holder(value)
    with pytest.raises(TypeError, match=r"Holder.value: expected a value with a hash"):
        Holder({1, 2})
    with pytest.raises(TypeError, match="Holder"):
        Holder(lambda: 0).forward(1, {}, {})


def test_a_layer_is_an_argument_of_plain_jit():
    traces = []

    @jax.jit
    def call(layer, x, ps, st):
        traces.append(layer)
        return layer(x, ps, st)[0]

    ps, st = fl.setup(jax.random.key(0), Linear(3, 2), float)
    for _ in range(2):
        assert call(Linear(3, 2), jnp.ones((1, 3)), ps, st).shape == (1, 2)
    assert len(traces) == 1
    assert jax.tree.leaves(Linear(3, 2)) == []


# Parameters and states


def test_layout_is_declared_and_cached():
    model = net()
    assert model.layout is model.layout
    linear = {"weight": (4, 3), "bias": (4,)}
    head = {"weight": (1, 4), "bias": (1,)}
    expected = {
        "encoder": linear,
        "hidden": {"layer_0": {"weight": (4, 4), "bias": (4,)}, "layer_1": {}},
        "heads": {"mean": head, "spread": head},
        "gain": (),
    }
    assert model.layout == fl.Layout(expected)
    assert fl.parameter_length(model) == model.layout.length == 16 + 20 + 10 + 1


def test_setup_and_forward():
    model = net()
    ps, st = fl.setup(jax.random.key(0), model, float)
    assert ps.layout == model.layout
    x = jnp.ones((5, 3))
    y, new = model(x, ps, st)
    p = ps.unpack()
    h = jnp.tanh((x @ p.encoder.weight.T + p.encoder.bias[None]) @ p.hidden.layer_0.weight.T)
    np.testing.assert_allclose(y, 2.0 * (h @ p.heads.mean.weight.T), rtol=1e-12)
    assert jax.tree.structure(new) == jax.tree.structure(st)
    assert_same(model(x, p, st)[0], y)
    assert_same(fl.apply(model, x, ps, st)[0], y)
    assert_same(fl.stateless_apply(model, x, ps), y)


def test_parameters_may_be_any_object_with_the_right_attributes():
    Params = __import__("collections").namedtuple("Params", "weight bias")
    layer = Linear(3, 2)
    ps, st = fl.setup(jax.random.key(0), layer, float)
    x = jnp.ones((1, 3))
    assert_same(layer(x, Params(ps.weight, ps.bias), st)[0], layer(x, ps, st)[0])


def test_each_parameter_has_its_own_key(key):
    small = fl.Chain(a=fl.Dense(3, 4), b=fl.Dense(4, 4))
    large = fl.Chain(new=fl.Dense(3, 3), a=fl.Dense(3, 4), b=fl.Dense(4, 4), c=fl.Dense(4, 4))
    one, two = fl.initial_parameters(key, small), fl.initial_parameters(key, large)
    assert_same(one.a.data, two.a.data)
    assert_same(one.b.data, two.b.data)
    assert not np.array_equal(two.b.weight, two.c.weight)
    assert_same(fl.setup(key, small)[0], one)
    assert_same(fl.setup(key, small)[1], fl.initial_states(key, small))
    assert_same(fl.initial_parameters(jax.random.PRNGKey(0), small), one)
    assert not np.array_equal(one.data, fl.initial_parameters(jax.random.key(1), small).data)
    with pytest.raises(TypeError, match="PRNG key"):
        fl.setup(0, small)


def test_a_mechanism_and_a_network_in_one_vector(key):
    model = {
        "alpha": fl.Param((), fl.initializers.constant(0.5)),
        "nets": {"f": Linear(2, 1), "n": Counter()},
    }
    ps, st = fl.setup(key, model, float)
    assert ps.layout == fl.Layout({"alpha": (), "nets": {"f": {"weight": (1, 2), "bias": (1,)}, "n": {}}})
    assert ps.alpha == 0.5
    assert st.nets.n.count == 0
    assert fl.parameter_length(model) == 4


def test_wrappers_have_no_name_of_their_own(key):
    class Twice(fl.Wrapper):
        layer: fl.Layer
        times: int = 2

        def forward(self, x, ps, st):
            for _ in range(self.times):
                x, st = self.layer(x, ps, st)
            return x, st

    wrapped = Twice(fl.Chain(fl.Dense(2, 2), Counter()))
    ps, st = fl.setup(key, wrapped)
    assert ps.layout == wrapped.layer.layout
    assert wrapped(jnp.ones(2, jnp.float32), ps, st)[1].layer_1.count == 2
    assert fl.Wrapper.__call__ is fl.Layer.__call__
    assert Twice(jnp.sin).layer == fl.WrappedFunction(jnp.sin)

    class Two(fl.Wrapper):
        a: object
        b: object

    with pytest.raises(TypeError, match=r"one field that is a layer, found \['a', 'b'\]"):
        Two(fl.NoOpLayer(), fl.NoOpLayer())
    with pytest.raises(TypeError, match="expected a layer or a function"):
        Two(3, 4)


def test_state_structure_is_kept(key):
    layer = Counter()
    ps, st = fl.setup(key, layer)
    assert (st.count.dtype, st.inner.rate.dtype) == (jnp.result_type(int), jnp.float32)
    _, new = layer(1.0, ps, st)
    assert isinstance(new, fl.Record)
    assert jax.tree.structure(new) == jax.tree.structure(st)
    assert new.count == 1
    assert fl.initial_states(key, layer, jnp.float64).inner.rate.dtype == jnp.float64
    assert fl.initial_states(key, layer, jnp.bfloat16).inner.rate.dtype == jnp.float32
    assert jax.tree.structure(jax.lax.scan(lambda st, _: (layer(1.0, ps, st)[1], None), st, length=3)[0])


def test_lengths(key):
    assert fl.state_length(Counter()) == 4
    assert fl.state_length(fl.Chain(Counter(), fl.Dense(2, 2), Counter())) == 8
    assert fl.state_length(fl.Dense(2, 2)) == 0
    with pytest.raises(ValueError, match="Counter with a state of length 4"):
        fl.stateless_apply(Counter(), 1.0, {})


def test_flags_and_fields_of_a_state(key):
    model = fl.Chain(Counter(), fl.Chain(Counter()), fl.Dense(2, 2))
    _, st = fl.setup(key, model)
    off = fl.testmode(st)
    assert (off.layer_0.training, off.layer_1.layer_0.training) == (False, False)
    assert fl.trainmode(off) == st
    assert jax.tree.structure(fl.trainmode(off)) == jax.tree.structure(st)
    new = fl.update_state(st, "count", jnp.asarray(7))
    assert (new.layer_0.count, new.layer_1.layer_0.count) == (7, 7)
    with pytest.raises(KeyError, match="nearest: count"):
        fl.update_state(st, "cuont", 1)
    empty = fl.Record()
    assert fl.testmode(empty) == empty
    assert fl.testmode.__test__ is False
    assert fl.preserves_state_type(model)


def test_output_shape_runs_nothing():
    calls = []

    class Slow(fl.Layer):
        def forward(self, x, ps, st):
            calls.append(isinstance(x, jax.core.Tracer))
            return {"a": x, "b": (x.sum(),)}, st

    assert fl.output_shape(Slow(), jax.ShapeDtypeStruct((5, 3), jnp.float32)) == {"a": (5, 3), "b": ((),)}
    assert calls == [True]
    assert fl.output_shape(net(), jnp.ones((5, 3))) == (5, 1)
    assert fl.output_shape(net(), jnp.ones((5, 3), jnp.float32)) == (5, 1)


def test_names_and_questions():
    class Named(fl.Layer):
        name: str = "the encoder"

    assert fl.display_name(Named()) == "the encoder"
    assert fl.display_name(Linear(2, 3)) == "Linear"
    assert fl.contains_layer({"a": [(Linear(2, 3),)]})
    assert not fl.contains_layer({"a": [1, jnp.sin]})


# Structure


@pytest.mark.parametrize("depth", [1, 3, 9])
def test_one_split_and_one_concatenation_at_any_depth(key, depth):
    model = functools.reduce(lambda inner, _: fl.Chain(fl.Dense(2, 2), inner), range(depth), fl.Dense(2, 2))
    ps, st = fl.setup(key, model)
    x = jnp.ones((3, 2), jnp.float32)
    counts = count_primitives(jax.grad(lambda ps: model(x, ps, st)[0].sum()), ps)
    assert counts["split"] == 1
    assert counts["concatenate"] == 1
    assert counts["pad"] == counts["slice"] == 0


def test_a_float32_model_stays_float32(key):
    model = fl.Chain(fl.Dense(2, 4, jnp.tanh), fl.Dropout(0.5), fl.Diagonal(4), fl.Dense(4, 1))
    ps, st = fl.setup(key, model)
    y, st = jax.jit(model)(jnp.ones((3, 2), jnp.float32), ps, st)
    assert ps.dtype == y.dtype == jnp.float32


# Errors say where


def test_an_error_names_the_layer_and_its_input(key):
    model = fl.Chain(Linear(2, 2), fl.Chain(fl.NoOpLayer(), encoder=fl.Chain(fl.Dense(3, 4))))
    ps, st = fl.setup(key, model)
    for call in (model, jax.jit(model)):
        with pytest.raises(ValueError, match=r"\(..., 3\), found shape \(5, 2\)") as info:
            call(jnp.ones((5, 2), jnp.float32), ps, st)
        (note,) = [note for note in info.value.__notes__ if "layer" in note]
        assert "layer_1.encoder.layer_0: Dense(3, 4)" in note
        assert "float32[5,2]" in note
    with pytest.raises(ValueError, match="found shape") as info:
        fl.Dense(3, 4)(jnp.ones(2), *fl.setup(key, fl.Dense(3, 4)))
    assert "in the layer Dense: Dense(3, 4)" in info.value.__notes__[0]


def test_two_uses_of_one_layer_are_told_apart(key):
    layer = fl.Dense(2, 2)

    def fail(x):
        raise RuntimeError("no")

    inner = fl.Chain(layer, fail)
    for model, path in [
        (fl.Chain(fl.NoOpLayer(), inner), "layer_1.layer_1"),
        (net_of(inner), "second.layer_1"),
    ]:
        ps, st = fl.setup(key, model)
        with pytest.raises(RuntimeError, match="no") as info:
            model(jnp.ones(2, jnp.float32), ps, st)
        assert f"in the layer {path}: WrappedFunction(fail)" in info.value.__notes__[0]


def net_of(layer):
    class Two(fl.Container):
        first: fl.Layer
        second: fl.Layer

        def forward(self, x, ps, st):
            return self.second(x, ps.second, st.second)

    return Two(layer, layer)


def test_wrong_declarations():
    class Wrong(fl.Layer):
        def parameters(self):
            return {"weight": 3}

    with pytest.raises(TypeError, match="below 'weight': .* found 3"):
        _ = Wrong().layout

    class Reserved(fl.Layer):
        def parameters(self):
            return {"data": fl.Param((), fl.initializers.ones)}

    with pytest.raises(ValueError, match="'data' is reserved"):
        _ = Reserved().layout

    class NoPair(fl.Layer):
        def forward(self, x, ps, st):
            return x

    with pytest.raises(TypeError, match=r"return \(y, st\)"):
        NoPair()(jnp.ones(2), {}, {})

    class BadInit(fl.Layer):
        def parameters(self):
            return {"w": fl.Param((2,), lambda key, shape, dtype: jnp.ones(3))}

    with pytest.raises(ValueError, match=r"\(2,\), found shape \(3,\)") as info:
        fl.setup(jax.random.key(0), {"net": BadInit()})
    assert "'net.w'" in info.value.__notes__[0]
    with pytest.raises(TypeError, match="initializer"):
        fl.Param((2,), 3.0)
    with pytest.raises(TypeError, match=r"Dense\(\.\.\.\)"):
        fl.Chain(fl.Dense)


# What once went wrong


def test_the_order_of_layers_counts():
    one, two = fl.Chain(a=jnp.sin, b=jnp.square), fl.Chain(b=jnp.square, a=jnp.sin)
    assert one != two
    ps = {"a": {}, "b": {}}
    call = jax.jit(lambda layer, x, ps, st: layer(x, ps, st)[0])
    assert call(one, 1.0, ps, ps) == jnp.sin(1.0) ** 2
    assert call(two, 1.0, ps, ps) == jnp.sin(1.0)


def test_fields_take_any_dict_and_nested_lists():
    class Options(fl.Layer):
        options: dict

    assert hash(Options({"data": 1, 2: "x", "a-b": None})) == hash(Options({"data": 1, 2: "x", "a-b": None}))

    class Nested(fl.Container):
        blocks: tuple

    assert Nested([fl.NoOpLayer(), [fl.Dense(2, 2), jnp.sin]]).layout == fl.Layout(
        {"blocks": {"layer_0": {}, "layer_1": {"layer_0": {"weight": (2, 2), "bias": (2,)}, "layer_1": {}}}}
    )


def test_a_subclass_with_a_class_variable_keeps_the_init_it_inherits():
    class Forgetful(fl.Chain):
        keeps_state_type: ClassVar[bool] = False

    assert len(Forgetful(fl.Dense(2, 2), jnp.tanh)) == 2
    assert not fl.preserves_state_type({"a": Forgetful(fl.Dense(2, 2))})


def test_a_class_variable_is_known_by_its_annotation_not_by_the_word():
    class ClassVariety:
        pass

    class Tagged(fl.Dense):
        tag: ClassVariety | None = None

    class Written(fl.Dense):
        tag: "ClassVariety | None" = None
        count: "ClassVar[ClassVariety | int]" = 3

    assert Tagged(3, 2, tag=None) == Tagged(3, 2)
    assert [field.name for field in dataclasses.fields(Tagged)][-1] == "tag"
    assert Written(3, 2, tag=None) == Written(3, 2)
    assert Written.count == Written(3, 2).count == 3


def test_layers_copy_and_replace():
    model = fl.Chain(fl.Dense(2, 2, jnp.tanh), head=fl.Dense(2, 1))
    assert copy.deepcopy(model) == model
    assert dataclasses.replace(model, name="net") == fl.Chain(*model[:1], name="net", head=fl.Dense(2, 1))
    with pytest.raises(ValueError, match="two layers named 'layer_0'"):
        fl.Chain(fl.Dense(2, 2), layer_0=fl.Dense(2, 2))


def test_setup_says_what_it_cannot_take(key):
    for wrong in ({"f": jnp.tanh}, (fl.Dense(2, 2),), fl.Param((2,), fl.initializers.ones), {"a": {"b": 3}}):
        with pytest.raises(TypeError, match="expected a"):
            fl.setup(key, wrong)
    with pytest.raises(ValueError, match="below 'layer_0': 'weight'.*-3"):
        _ = fl.Chain(Linear(2, -3)).layout
    with pytest.raises(ValueError, match="below 'a': below 'b': .*'c-d'"):
        fl.Layout({"a": {"b": {"c-d": ()}}})


def test_flags_inside_tuples_are_found():
    st = fl.Record(cells=(fl.Record(training=True), fl.Record(count=1)))
    assert fl.testmode(st).cells[0].training is False
    assert fl.testmode({"a": {"training": True}}).a.training is False
