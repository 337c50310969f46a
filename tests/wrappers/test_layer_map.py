import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flatlayers as fl
from tests.helpers import assert_close, assert_same
from tests.wrappers.models import Residual, body, setup


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


# Parameters


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


# Wrappers


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


@pytest.mark.long
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


# Ties


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


# Errors


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
