import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flatlayers as fl
from tests.core.models import Counter, Linear, net
from tests.helpers import assert_same


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


def test_a_float32_model_stays_float32(key):
    model = fl.Chain(fl.Dense(2, 4, jnp.tanh), fl.Dropout(0.5), fl.Diagonal(4), fl.Dense(4, 1))
    ps, st = fl.setup(key, model)
    y, st = jax.jit(model)(jnp.ones((3, 2), jnp.float32), ps, st)
    assert ps.dtype == y.dtype == jnp.float32


# Several keys


@pytest.mark.long
def test_each_member_is_that_of_its_key(key):
    model = {
        "net": fl.Chain(fl.Dense(3, 4), fl.BatchNorm(4), fl.Dropout(0.5), Counter()),
        "blocks": fl.Stacked(fl.Dense(2, 2), 3),
        "rate": fl.Param((), fl.initializers.ones, bounds=(0, 2)),
    }
    keys = jax.random.split(key, 4)
    ps, st = fl.setup(keys, model)
    assert ps.shape == (4, fl.parameter_length(model))
    assert ps.blocks.weight.shape == (4, 3, 2, 2)
    assert st.net.layer_2.training is True
    for i in range(4):
        one, state = fl.setup(keys[i], model)
        assert_same(ps.lead[i], one)
        assert_same(jax.tree.map(lambda leaf, i=i: leaf[i], st), state)
    assert_same(fl.initial_parameters(keys, model), ps)
    assert_same(fl.initial_states(keys, model), st)
    assert_same(jax.jit(lambda keys: fl.initial_parameters(keys, model))(keys).lead[2].rate, ps.lead[2].rate)
    grid, states = fl.setup(keys.reshape(2, 2), model)
    assert_same(grid.data, ps.data.reshape(2, 2, -1))
    assert jax.tree.structure(states) == jax.tree.structure(st)
    assert_same(states.net.layer_3.key, st.net.layer_3.key.reshape(2, 2))
    mapped = jax.vmap(lambda key: fl.initial_parameters(key, model))(keys)
    assert_same(mapped, ps)


def test_raw_keys_are_not_several(key):
    model = fl.Dense(2, 3)
    raw = jax.random.key_data(key)
    assert_same(fl.initial_parameters(raw, model), fl.initial_parameters(key, model))
    for wrong in (jax.random.split(raw, 4), np.zeros((3, 2), np.uint32)):
        for make in (fl.setup, fl.initial_parameters, fl.initial_states):
            with pytest.raises(TypeError, match="such as jax.random.split.*wrap_key_data"):
                make(wrong, model)
