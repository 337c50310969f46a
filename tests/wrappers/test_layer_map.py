import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flatlayers as fl
from tests.helpers import assert_close, assert_same


class Body(fl.Container):
    """Children in a dict and a tuple, a parameter and a state of its own."""

    parts: dict
    steps: tuple

    def parameters(self):
        return {**super().parameters(), "gain": fl.Param((), fl.initializers.constant(2.0))}

    def states(self, key):
        return {**super().states(key), "count": 0}

    def forward(self, x, ps, st):
        for name, layer in self.parts.items():
            x, _ = layer(x, ps.parts[name], st.parts[name])
        for i, layer in enumerate(self.steps):
            x, _ = layer(x, ps.steps[f"layer_{i}"], st.steps[f"layer_{i}"])
        return ps.gain * x, st.replace(count=st.count + 1)


class Residual(fl.Wrapper):
    layer: fl.Layer

    def forward(self, x, ps, st):
        y, st = self.layer(x, ps, st)
        return x + y, st


def body():
    return Body(
        {"a": fl.Dense(2, 3), "b": fl.Chain(jnp.tanh, fl.Dense(3, 2))}, (fl.Dense(2, 2), fl.Dense(2, 2))
    )


def setup(model, dtype=float):
    return fl.setup(jax.random.key(0), model, dtype)


def same(layer, ps, st, path):
    return layer, ps, st


def widened(layer, ps, st, path):
    """Each output twice: `Dense(in, out)` as `Dense(in, 2 out)`."""
    if not isinstance(layer, fl.Dense):
        return layer, ps, st
    twice = {"weight": jnp.concatenate([ps.weight] * 2, -2), "bias": jnp.concatenate([ps.bias] * 2, -1)}
    return fl.Dense(layer.in_dims, 2 * layer.out_dims), twice, st


def scaled(factor):
    return lambda layer, ps, st, path: (layer, jax.tree.map(lambda a: factor(path) * a, ps), st)


def without_bias(layer, ps, st, path):
    if not isinstance(layer, fl.Dense):
        return layer, ps, st
    return fl.Dense(layer.in_dims, layer.out_dims, use_bias=False), {"weight": ps.weight}, st


def seen(model, ps=None, st=None):
    """The leaves of a model as `layer_map` sees them, if it changes nothing."""
    found = {}

    def look(layer, ps, st, path):
        assert isinstance(ps, fl.Record)
        assert isinstance(st, fl.Record)
        found[path] = (layer, ps, st)
        return layer, ps, st

    ps, st = setup(model) if ps is None else (ps, st)
    new, new_ps, new_st = fl.layer_map(look, model, ps, st)
    assert new == model
    assert new_ps.layout == ps.layout
    assert_same(new_ps, ps)
    assert new_st == st
    assert jax.tree.structure(new_st) == jax.tree.structure(st)
    return found


# layer_map: parameters


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_the_new_vector_is_that_of_the_new_model(dtype):
    model = fl.Chain(fl.Dense(2, 3), jnp.tanh, fl.Dense(3, 1))
    ps, st = setup(model, dtype)
    ps = ps + jnp.arange(len(ps)).astype(dtype)
    x = np.array([[0.3, -0.2], [1.0, 0.5]], dtype)
    new, smaller, new_st = fl.layer_map(without_bias, model, ps, st)
    assert new == fl.Chain(fl.Dense(2, 3, use_bias=False), jnp.tanh, fl.Dense(3, 1, use_bias=False))
    assert smaller.layout == new.layout
    assert smaller.dtype == dtype
    first, last = np.asarray(ps.layer_0.weight), np.asarray(ps.layer_2.weight)
    np.testing.assert_array_equal(smaller.data, np.concatenate([first.ravel(), last.ravel()]))
    rtol = 1e-5 if dtype == jnp.float32 else 1e-12
    np.testing.assert_allclose(new(x, smaller, new_st)[0], np.tanh(x @ first.T) @ last.T, rtol=rtol)


def test_each_leaf_is_seen_in_order_with_its_path_parameters_and_state():
    model = fl.Chain(body=body(), drop=fl.Dropout(0.5), head=fl.MLP(2, (3,), 1))
    ps, st = setup(model)
    found = seen(model)
    assert list(found) == [
        "body.parts.a",
        "body.parts.b.layer_0",
        "body.parts.b.layer_1",
        "body.steps.layer_0",
        "body.steps.layer_1",
        "drop",
        "head",
    ]
    assert found["body.parts.b.layer_0"] == (fl.WrappedFunction(jnp.tanh), {}, {})
    assert found["drop"][2] == st.drop
    for path in ("body.parts.a", "body.steps.layer_1"):
        assert_same(found[path][1].weight, ps[path].weight)
    assert_same(found["head"][1].layer_1.bias, ps.head.layer_1.bias)
    assert list(seen(fl.Dense(2, 2))) == [""]


def test_what_containers_have_of_their_own_is_kept():
    model = fl.Chain(body=body())
    ps, st = setup(model)
    _, st = model(jnp.ones(2), ps, st)
    new, small, new_st = fl.layer_map(without_bias, model, ps, st)
    assert small.body.gain == 2.0
    assert new_st.body.count == 1
    zero = fl.ComponentVector.of(
        jax.tree.map_with_path(lambda p, a: 0 * a if "bias" in str(p) else a, ps.unpack()), ps.layout
    )
    assert_close(new(jnp.ones(2), small, new_st)[0], model(jnp.ones(2), zero, st)[0])


def test_a_leaf_may_become_anything():
    model = fl.Chain(fl.Dense(2, 3), fl.Dense(3, 1))
    ps, st = setup(model)

    def change(layer, ps, st, path):
        if path == "layer_0":
            return (lambda x: 3 * x), {}, {}
        deeper = fl.Chain(inner=layer, drop=fl.Dropout(0.5), norm=fl.LayerNorm(1))
        inside, state = setup(deeper)
        return deeper, inside.replace(inner=ps), state

    new, ps_new, st_new = fl.layer_map(change, model, ps, st)
    assert ps_new.layout == new.layout
    assert_same(ps_new.layer_1.inner.weight, ps.layer_1.weight)
    assert st_new.layer_1.drop.training
    assert new(jnp.ones(3), ps_new, st_new)[0].shape == (1,)


def test_parameters_as_a_mapping_and_with_leading_axes():
    model = fl.Chain(fl.Dense(2, 3), fl.Dense(6, 1))
    ps, st = setup(model)
    _, packed, _ = fl.layer_map(widened, model, ps, st)
    for mapping in (ps.unpack(), ps.to_dict()):
        _, record, _ = fl.layer_map(widened, model, mapping, st)
        assert isinstance(record, fl.Record)
        assert_same(record, packed.unpack())
    many = fl.ComponentVector(jnp.stack([ps.data, 2 * ps.data]), ps.layout)
    _, both, _ = fl.layer_map(widened, model, many, st)
    assert_same(both.data, jnp.stack([packed.data, 2 * packed.data]))


def test_it_is_a_function_of_the_parameters():
    model = fl.Chain(fl.Dense(2, 3), fl.Dense(6, 1))
    ps, st = setup(model)

    def total(ps):
        return fl.layer_map(widened, model, ps, st)[1].data.sum()

    assert_same(jax.jit(jax.grad(total))(ps).data, 2 * jnp.ones(len(ps)))


def test_a_mapping_of_layers():
    model = {
        "rate": fl.Param((), fl.initializers.ones),
        "net": fl.Dense(2, 3),
        "more": {"a": fl.Stacked(fl.Dense(1, 1), 3)},
    }
    ps, st = setup(model)
    new, small, new_st = fl.layer_map(without_bias, model, ps, st)
    stacked = fl.Layout({"weight": (1, 1)}).stack(3)
    assert small.layout == fl.Layout({"rate": (), "net": {"weight": (3, 2)}, "more": {"a": stacked}})
    assert new["more"]["a"] == fl.Stacked(fl.Dense(1, 1, use_bias=False), 3)
    assert_same(small.more.a.weight, ps.more.a.weight)
    assert new_st == st


# layer_map: wrappers


def test_repeated_layers_are_seen_once_with_all_copies():
    model = fl.Repeated(Residual(fl.Chain(fl.Dense(2, 2), fl.Dropout(0.5))), 3)
    ps, st = setup(model)
    found = seen(model)
    assert list(found) == ["layer.layer_0", "layer.layer_1"]
    assert found["layer.layer_0"][1].weight.shape == (3, 2, 2)
    assert found["layer.layer_1"][2].key.shape == (3,)
    new, small, st = fl.layer_map(without_bias, model, ps, fl.testmode(st))
    assert small.layout == new.layout
    y = np.ones(2)
    for weight in np.asarray(ps.layer.layer_0.weight):
        y = y + weight @ y
    assert_close(new(jnp.ones(2), small, st)[0], y)


def test_the_state_inside_a_wrapper_is_found():
    node = fl.NeuralODE(fl.Chain(fl.Dense(2, 2), fl.Dropout(0.5)))
    cell = fl.StatefulRecurrentCell(fl.GRUCell(2, 2))
    spectral = fl.SpectralNorm(fl.Dense(2, 2), "weight")
    trap = Residual(fl.SkipConnection(fl.Dropout(0.5), jnp.add))  # both have a field `layer`
    model = fl.Chain(node=node, cell=cell, spectral=spectral, trap=trap)
    ps, st = setup(model)
    _, st = model(jnp.ones(2), ps, st)
    assert st.cell.carry is not None
    found = seen(model, ps, st)
    assert list(found) == ["node.layer_0", "node.layer_1", "cell", "spectral", "trap.layer"]
    assert found["node.layer_1"][2] == st.node.model.layer_1
    assert found["trap.layer"][2] == st.trap.layer
    assert found["cell"][2] == found["spectral"][2] == {}
    _, ps, st = fl.layer_map(lambda layer, p, s, path: (layer, p, fl.testmode(s)), model, ps, st)
    assert st.node.model.layer_1.training is st.trap.layer.training is False
    assert st.spectral.training is True


def test_a_solve_gains_and_loses_the_state_of_its_model():
    node = fl.NeuralODE(fl.Chain(fl.Dense(2, 2), jnp.tanh))
    ps, st = setup(node)
    _, st = node(jnp.ones(2), ps, st)
    dropout = fl.Dropout(0.5)

    def with_dropout(layer, ps, st, path):
        return (
            (layer, ps, st)
            if path == "layer_0"
            else (dropout, {}, fl.initial_states(jax.random.key(1), dropout))
        )

    new, ps, more = fl.layer_map(with_dropout, node, ps, st)
    assert jax.tree.structure(more) == jax.tree.structure(setup(new)[1])
    assert more.stats == st.stats
    _, after = new(jnp.ones(2), ps, more)
    assert after.model.layer_1.key != more.model.layer_1.key
    back, ps, less = fl.layer_map(
        lambda layer, p, s, path: (layer, p, s) if path == "layer_0" else (jnp.tanh, {}, {}), new, ps, more
    )
    assert back == node
    assert less == st


def test_wrappers_that_change_parameters_are_leaves():
    model = fl.Chain(fl.WeightNorm(fl.Dense(2, 2), "weight"), fl.freeze(fl.Dense(2, 2), "bias"))
    ps, st = setup(model)
    found = seen(model)
    assert list(found) == ["layer_0", "layer_1"]
    assert list(found["layer_0"][1]) == ["weight_g", "weight_v", "bias"]
    assert list(found["layer_1"][2]) == ["frozen", "layer"]
    thawed, ps, st = fl.layer_map(
        lambda layer, p, s, path: fl.unfreeze_parameters(layer, p, s) if path == "layer_1" else (layer, p, s),
        model,
        ps,
        st,
    )
    assert thawed == fl.Chain(model[0], fl.Dense(2, 2))
    assert thawed(jnp.ones(2), ps, st)[0].shape == (2,)


def test_the_own_state_of_a_wrapper_that_does_not_fit_any_more():
    model = fl.Chain(a=fl.SpectralNorm(fl.Dense(2, 2), "weight"))
    with pytest.raises(ValueError, match=r"SpectralNorm at 'a' to keep a state with weight_u: \(2,\)"):
        fl.layer_map(widened, model, *setup(model))


# layer_map: ties


def test_tied_parameters_stay_tied():
    plain = fl.Chain(encoder=fl.Dense(2, 2), decoder=fl.Dense(2, 2), head=fl.Dense(2, 1))
    model = fl.share_parameters(plain, {"decoder.weight": "encoder.weight"})
    ps, st = setup(model)
    assert list(seen(model)) == ["encoder", "decoder", "head"]
    new, twice, _ = fl.layer_map(scaled(lambda path: 2.0), model, ps, st)
    assert new == model
    assert_same(twice.data, 2 * ps.data)
    new, small, _ = fl.layer_map(without_bias, model, ps, st)
    assert small.layout == new.layout
    assert_same(small.data, jnp.concatenate([ps.encoder.weight.ravel(), ps.head.weight.ravel()]))


def test_tied_parameters_that_get_different_values():
    model = fl.share_parameters(fl.Chain(a=fl.Dense(2, 2), b=fl.Dense(2, 2)), {"b": "a"})
    ps, st = setup(model)
    differently = scaled(lambda path: 2.0 if path == "a" else 3.0)
    for values in (ps, ps.unpack()):
        with pytest.raises(
            ValueError, match=r"'b.weight' and 'a.weight' have one place: expected equal values"
        ):
            fl.layer_map(differently, model, values, st)


# layer_map: errors


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda layer, p, s: (layer, {**p, "bias": jnp.ones(5)}, s),
            ValueError,
            r"shape \(3,\) for 'net.layer_0.bias'.*\(5,\)",
        ),
        (
            lambda layer, p, s: (layer, jax.tree.map(lambda a: a[None], p), s),
            ValueError,
            r"shape \(3, 2\) for 'net.layer_0.weig",
        ),
        (
            lambda layer, p, s: (fl.Dense(2, 4), p, s),
            ValueError,
            r"shape \(4, 2\) for 'net.layer_0.weight'.*\(3, 2\)",
        ),
        (
            lambda layer, p, s: (layer, {"weight": p.weight}, s),
            KeyError,
            "a value for 'net.layer_0.bias', found none",
        ),
        (
            lambda layer, p, s: (layer, {**p, "wieght": p.weight}, s),
            KeyError,
            "'net.layer_0.wieght': no name 'wieght'",
        ),
        (lambda layer, p, s: (layer, p), TypeError, r"returns \(layer, ps, st\), found .* for 'net.layer_0'"),
        (
            lambda layer, p, s: (fl.Dropout(0.5), {}, s),
            KeyError,
            "a state with key, training .* at 'net.layer_0'",
        ),
        (lambda layer, p, s: (layer, p, None), TypeError, "expected a state for 'net.layer_0', found None"),
        (lambda layer, p, s: (3, p, s), TypeError, "expected a layer or a function, found 3"),
    ],
)
def test_what_does_not_fit_the_new_layer(change, error, message):
    model = fl.Chain(net=fl.Chain(fl.Dense(2, 3)))
    with pytest.raises(error, match=message):
        fl.layer_map(lambda layer, ps, st, path: change(layer, ps, st), model, *setup(model))


def test_parameters_of_another_model():
    model = fl.Chain(fl.Dense(2, 3))
    ps, st = setup(fl.Chain(fl.Dense(2, 2)))
    with pytest.raises(TypeError, match="same layout"):
        fl.layer_map(same, model, ps, st)
    with pytest.raises(ValueError, match=r"expected shape \(3, 2\) for 'layer_0.weight'"):
        fl.layer_map(same, model, ps.unpack(), st)


# select


def test_layers_are_listed_depth_first_with_groups():
    model = fl.Chain(body=body(), head=fl.MLP(2, (3,), 1), ode=fl.NeuralODE(Residual(fl.Dense(1, 1))))
    everything = fl.select(model, "*")
    assert [path for path, _ in everything] == [
        "body",
        "body.parts.a",
        "body.parts.b",
        "body.parts.b.layer_0",
        "body.parts.b.layer_1",
        "body.steps.layer_0",
        "body.steps.layer_1",
        "head",
        "head.layer_0",
        "head.layer_1",
        "ode",
        "ode",
        "ode",
    ]
    assert [type(layer) for _, layer in everything[-3:]] == [fl.NeuralODE, Residual, fl.Dense]
    assert fl.select(model, "body.parts.?") == [
        ("body.parts.a", fl.Dense(2, 3)),
        ("body.parts.b", dict(everything)["body.parts.b"]),
    ]
    assert [path for path, _ in fl.select(model, "*.layer_1")] == [
        "body.parts.b.layer_1",
        "body.steps.layer_1",
        "head.layer_1",
    ]
    layers = {"rate": fl.Param((), fl.initializers.ones), "nets": {"a": fl.Stacked(fl.Dense(1, 1), 2)}}
    assert fl.select(layers, "nets.*") == [("nets.a", fl.Dense(1, 1))]


def test_a_pattern_that_matches_nothing():
    model = fl.Chain(encoder=fl.Chain(fl.Dense(2, 2)), head=fl.Dense(2, 2))
    for error in (KeyError, ValueError):
        with pytest.raises(error, match=r"'encodr' matches nothing: no name 'encodr'; the nearest: encoder"):
            fl.select(model, "encodr")
    with pytest.raises(KeyError, match="there are no names here"):
        fl.select(fl.Dense(2, 2), "*")


# replace_layer


def test_the_model_with_one_layer_replaced():
    new = fl.Dense(2, 2, jnp.sin)
    model = fl.Chain(fl.Dense(2, 2), jnp.tanh, fl.Dense(2, 2))
    assert fl.replace_layer(model, "layer_2", new) == fl.Chain(fl.Dense(2, 2), jnp.tanh, new)
    assert fl.replace_layer(model, "layer_1", jnp.sin) == fl.Chain(fl.Dense(2, 2), jnp.sin, fl.Dense(2, 2))
    assert model == fl.Chain(fl.Dense(2, 2), jnp.tanh, fl.Dense(2, 2))
    deep = fl.Chain(body=body(), node=fl.NeuralODE(Residual(model), t1=2.0))
    other = fl.replace_layer(
        fl.replace_layer(deep, "body.parts.b.layer_1", fl.Dense(3, 2, jnp.sin)), "node.layer_2", new
    )
    parts = {"a": fl.Dense(2, 3), "b": fl.Chain(jnp.tanh, fl.Dense(3, 2, jnp.sin))}
    node = fl.NeuralODE(Residual(fl.Chain(fl.Dense(2, 2), jnp.tanh, new)), t1=2.0)
    assert other == fl.Chain(body=Body(parts, body().steps), node=node)
    assert fl.replace_layer(deep, "node", new)["node"] == new
    assert fl.replace_layer(deep, ("body", "steps", "layer_0"), new)["body"].steps == (new, fl.Dense(2, 2))
    ps, _ = setup(deep)
    changed, _ = setup(fl.replace_layer(deep, "body.parts.a", fl.Dense(2, 3, use_bias=False)))
    assert_same(changed.node, ps.node)
    assert_same(changed.body.parts.a.weight, ps.body.parts.a.weight)


def test_replacing_in_a_mapping_and_under_two_names():
    layers = {"rate": fl.Param((), fl.initializers.ones), "nets": {"a": fl.Stacked(fl.Dense(1, 1), 2)}}
    new = fl.replace_layer(layers, "nets.a", fl.Dense(1, 3))
    assert new == {**layers, "nets": {"a": fl.Stacked(fl.Dense(1, 3), 2)}}
    both = fl.BidirectionalRNN(fl.GRUCell(2, 3))
    assert fl.replace_layer(both, "backward", fl.GRUCell(2, 4)) == fl.BidirectionalRNN(fl.GRUCell(2, 4))


def test_a_path_that_leads_to_no_layer():
    model = fl.Chain(encoder=fl.Chain(fl.Dense(2, 2)), mlp=fl.MLP(2, (3,), 2))
    with pytest.raises(KeyError, match=r"'encodr': no name 'encodr'; the nearest: encoder"):
        fl.replace_layer(model, "encodr", jnp.sin)
    for path in ("", "encoder.layer_0.weight", "enc", "encoder."):
        with pytest.raises(KeyError, match=f"'{path}': no name"):
            fl.replace_layer(model, path, jnp.sin)
    with pytest.raises(KeyError, match="'mlp.layer_0': the layer around it makes this layer itself"):
        fl.replace_layer(model, "mlp.layer_0", jnp.sin)
    with pytest.raises(TypeError, match="expected a layer or a function, found <class"):
        fl.replace_layer(model, "mlp", fl.Dense)
    with pytest.raises(KeyError, match="'nets': no name"):
        fl.replace_layer({"nets": {"a": fl.Dense(1, 1)}}, "nets", jnp.sin)
