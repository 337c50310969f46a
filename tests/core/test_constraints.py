"""Parameters with bounds: layers see values, the vector has free numbers, whatever lies in between."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flatlayers as fl

from ..helpers import assert_close, assert_same


def logit(share):
    return np.log(share / (1 - share))


class Mechanism(fl.Container):
    """`growth * net(x) - loss`, with bounds of three kinds, one in a group and one in a stack."""

    net: fl.Layer

    def parameters(self):
        ones = fl.initializers.ones
        return {
            **super().parameters(),
            "growth": fl.Param((), fl.initializers.constant(2.5), bounds=(0, 10)),
            "inner": {"loss": fl.Param((2,), ones, bounds=(None, 3))},
            "gains": fl.Stacked(fl.Param((2,), ones, transform=fl.transforms.exp), 3),
        }

    def forward(self, x, ps, st):
        y, net = self.net(x, ps.net, st.net)
        y = ps.growth * y - ps.inner.loss
        return y * ps.gains.sum(0), st.replace(net=net)


MODEL = Mechanism(fl.Dense(2, 2, jnp.tanh))
X = np.array([0.3, -0.7])


def by_hand(ps):
    """The model from free numbers, by the formulas."""
    y = np.tanh(ps.net.weight @ X + ps.net.bias)
    growth = 10 / (1 + np.exp(-ps.growth))
    loss = 3 - np.log1p(np.exp(-ps.inner.loss))
    return (growth * y - loss) * np.exp(ps.gains).sum(0)


def moved(ps):
    noise = np.random.default_rng(0).normal(size=ps.shape)
    return ps + noise.astype(ps.dtype)


def test_the_vector_has_free_numbers_and_layers_see_values(key):
    ps, st = fl.setup(key, MODEL, float)
    assert_close(ps.growth, logit(0.25))
    assert_close(ps.inner.loss, np.full(2, -np.log(np.expm1(2.0))))
    assert_close(ps.gains, np.zeros((3, 2)))
    ps = moved(ps)
    assert_close(MODEL(X, ps, st)[0], by_hand(ps))
    assert_close(jax.jit(MODEL)(X, ps, st)[0], by_hand(ps))


def test_a_record_is_taken_as_it_is(key):
    ps, st = fl.setup(key, MODEL, float)
    ps = moved(ps)
    values = fl.constrained(MODEL, ps)
    assert_close(values.growth, 10 / (1 + np.exp(-ps.growth)))
    assert_same(values.net.weight, ps.net.weight)
    assert_same(MODEL(X, values, st)[0], MODEL(X, ps, st)[0])
    assert_close(fl.unconstrained(MODEL, values), ps)
    assert_close(fl.unconstrained(MODEL, values.to_dict()), ps)


def test_gradients_are_those_of_free_numbers(key):
    ps, st = fl.setup(key, MODEL, float)
    ps = moved(ps)
    gradient = jax.grad(lambda ps: MODEL(X, ps, st)[0].sum())(ps)
    for label, found in zip(ps.layout.labels(), gradient.data, strict=True):
        i, h = ps.layout.labels().index(label), 1e-6
        up, down = (by_hand(ps.at[i : i + 1].add(d)).sum() for d in (h, -h))
        assert_close(found, (up - down) / (2 * h), rtol=1e-7, atol=1e-7)


def test_without_bounds_nothing_is_added():
    model = fl.Chain(fl.Dense(2, 8, jnp.tanh), fl.Repeated(fl.Dense(8, 8), 3))
    ps, st = fl.setup(jax.random.key(0), model, float)
    by_vector = jax.make_jaxpr(lambda ps: model(X, ps, st)[0])(ps)
    by_record = jax.make_jaxpr(lambda ps: model(X, ps.unpack(), st)[0])(ps)
    assert str(by_vector) == str(by_record)
    assert_same(fl.constrained(model, ps), ps.unpack())


def test_leading_axes(key):
    ps, _ = fl.setup(key, MODEL, float)
    members = fl.ComponentVector(ps.data[None] + jnp.arange(4.0)[:, None], ps.layout)
    values = fl.constrained(MODEL, members)
    assert values.gains.shape == (4, 3, 2)
    assert_close(values.inner.loss[2], fl.constrained(MODEL, members.lead[2]).inner.loss)
    assert_close(fl.unconstrained(MODEL, values), members)


def test_a_mapping_and_the_layers_in_it(key):
    parts = {"rate": fl.Param((), fl.initializers.ones, bounds=(0, None)), "model": MODEL}
    ps, st = fl.setup(key, parts, float)
    values = fl.constrained(parts, ps)
    assert_close(values.rate, 1.0)
    expected = MODEL(X, ps.model, st.model)[0]
    assert_same(MODEL(X, values.model, st.model)[0], expected)
    assert_close(expected, by_hand(ps.model))


def test_inside_other_layers(key):
    ps, st = fl.setup(key, MODEL, float)
    ps = moved(ps)
    chain = fl.Chain(fl.SkipConnection(MODEL, jnp.add))
    inside = fl.ComponentVector(ps.data, chain.layout)
    found, _ = chain(X, inside, fl.initial_states(key, chain, float))
    assert_close(found, X + by_hand(ps))
    repeated = fl.Repeated(MODEL, 2)
    both, states = fl.setup(key, repeated, float)
    first, second = (jax.tree.map(lambda leaf, i=i: leaf[i], both.layer.unpack()) for i in range(2))
    y, _ = MODEL(X, fl.ComponentVector.of(first, MODEL.layout), st)
    y, _ = MODEL(y, fl.ComponentVector.of(second, MODEL.layout), st)
    assert_close(repeated(X, both, states)[0], y)
    assert_close(repeated(X, {"layer": both.layer}, states)[0], y)


def test_a_parameter_among_the_states_has_its_value(key):
    class Held(fl.Layer):
        def states(self, key):
            return {"rate": fl.Param((), fl.initializers.constant(0.5), bounds=(0, 1))}

        def forward(self, x, ps, st):
            return st.rate * x, st

    ps, st = fl.setup(key, Held(), float)
    assert_close(Held()(1.0, ps, st)[0], 0.5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_dtype_of_the_vector_stays(key, dtype):
    ps, st = fl.setup(key, MODEL, dtype)
    values = fl.constrained(MODEL, ps)
    assert {leaf.dtype for leaf in jax.tree.leaves(values)} == {jnp.dtype(dtype)}
    assert MODEL(X.astype(dtype), ps, st)[0].dtype == dtype


@pytest.mark.parametrize(("initial", "shown"), [(0.0, "0"), (1.0, "1"), (1.5, "1.5"), (np.nan, "nan")])
def test_initial_values_on_or_outside_of_the_bounds(key, initial, shown):
    param = fl.Param((2,), lambda key, shape, dtype: jnp.full(shape, initial, dtype), bounds=(0, 1))
    for declared, path in (({"a": {"b": param}}, "a.b"), ({"s": fl.Stacked(param, 2)}, "s")):
        with pytest.raises(ValueError, match=rf"'{path}': expected .*Interval\(0.0, 1.0\), found {shown}$"):
            fl.setup(key, declared)
    # Under `jit` the numbers are not known.
    assert not np.isfinite(jax.jit(lambda key: fl.setup(key, {"a": param})[0].data)(key)).any()


def test_bad_declarations():
    ones = fl.initializers.ones
    with pytest.raises(TypeError, match=r"Param.bounds: expected a pair \(low, high\), found 3"):
        fl.Param((), ones, bounds=3)
    with pytest.raises(ValueError, match="low < high"):
        fl.Param((), ones, bounds=(1, 0))
    with pytest.raises(ValueError, match="expected bounds or a transform, found both"):
        fl.Param((), ones, bounds=(0, 1), transform=fl.transforms.exp)
    with pytest.raises(TypeError, match="expected a transform, found"):
        fl.Param((), ones, transform=jnp.exp)
    for bounds in ((None, None), [None, None]):
        with pytest.raises(ValueError, match=r"Param.bounds: .* upper bound, found \(None, None\)"):
            fl.Param((), ones, bounds=bounds)
    assert repr(fl.Param((), ones, bounds=[0, 10])) == "Param((), ones, bounds=(0, 10))"
    text = "Param((), ones, transform=Bijection(exp, log))"
    assert repr(fl.Param((), ones, transform=fl.transforms.exp)) == text


def test_bad_transforms_and_vectors(key):
    summed = fl.transforms.Bijection(lambda x: x.sum(), lambda x: x)
    model = {"a": fl.Param((3,), fl.initializers.ones, transform=summed)}
    ps, _ = fl.setup(key, model)
    with pytest.raises(
        ValueError, match=r"'a': expected Bijection\(.*\) to keep float32\[3\], found float32\[\]"
    ):
        fl.constrained(model, ps)
    with pytest.raises(TypeError, match="expected a ComponentVector, found"):
        fl.constrained(model, ps.unpack())
    with pytest.raises(TypeError, match="whose numbers are free ones"):
        fl.unconstrained(model, ps)
    with pytest.raises(ValueError, match="of another one: a:"):
        fl.constrained(model, fl.ComponentVector.of({"a": 1.0}))
    with pytest.raises(ValueError, match="'growth': expected values inside of"):
        fl.unconstrained({"growth": fl.Param((), fl.initializers.ones, bounds=(0, 10))}, {"growth": -1.0})
    with pytest.raises(TypeError, match="'a': expected real numbers"):
        fl.setup(key, {"a": fl.Param((), fl.initializers.ones, bounds=(0, 10))}, complex)


# Wrappers


def test_frozen(key):
    ps, st = fl.setup(key, MODEL, float)
    ps = moved(ps)
    frozen, rest, states = fl.freeze_parameters(MODEL, ("growth", "inner.*"), ps, st)
    assert_close(states.frozen.growth, 10 / (1 + np.exp(-ps.growth)))
    assert_close(frozen(X, rest, states)[0], by_hand(ps))
    _, back, _ = fl.unfreeze_parameters(frozen, rest, states)
    assert_close(back, ps)
    _, by_values, _ = fl.freeze_parameters(MODEL, "growth", fl.constrained(MODEL, ps), st)
    assert_close(by_values.gains, ps.gains)
    _, drawn = fl.setup(key, fl.freeze(MODEL, "growth"), float)
    assert_close(drawn.frozen.growth, 2.5)


def test_shared(key):
    one, other = (fl.Param((), fl.initializers.constant(0.5), bounds=bounds) for bounds in ((0, 1), (0, 2)))

    @fl.compact(a=one, b=one)
    def same(m, x):
        return (m.a + m.b) * x

    @fl.compact(a=one, b=other)
    def different(m, x):
        return (m.a + m.b) * x

    model = fl.share_parameters(same, {"b": "a"})
    ps, st = fl.setup(key, model, float)
    assert ps.size == 1
    assert_close(model(2.0, ps, st)[0], 2.0)
    assert_close(fl.unconstrained(model, fl.constrained(model, ps)), ps)
    with pytest.raises(ValueError, match="cannot tie 'b' to 'a': expected the same bounds"):
        fl.share_parameters(different, {"b": "a"})


def test_compact(key):
    @fl.compact(rate=fl.Param((), fl.initializers.constant(0.1), bounds=(0, 10)), inner=MODEL)
    def outer(m, x):
        return m.rate * m.inner(x)

    ps, st = fl.setup(key, outer, float)
    assert_close(outer(X, ps, st)[0], 0.1 * by_hand(ps.inner))
    assert "rate=Param((), constant(value=0.1), bounds=(0, 10))" in repr(outer)
    m = fl.StatefulLayer(outer, ps, st)
    assert_close(m(X), 0.1 * by_hand(ps.inner))


def test_other_precision(key):
    ps, st = fl.setup(key, MODEL, jnp.float32)
    ps = moved(ps)
    half = fl.AlternatePrecision(MODEL, jnp.bfloat16)
    expected = by_hand(fl.cast(ps, float))
    assert_close(half(X.astype(np.float32), ps, st)[0], expected, rtol=0.1, atol=0.5)
    found, _ = MODEL(X, fl.cast(ps, float), st)
    assert_close(found, by_hand(fl.cast(ps, float)))


def test_weights_with_a_norm_have_no_bounds(key):
    class Bounded(fl.Layer):
        def parameters(self):
            weight = fl.Param((2, 2), fl.initializers.constant(0.5), bounds=(0, 1))
            return {"weight": weight, "gain": fl.Param((), fl.initializers.ones, bounds=(0, 2))}

        def forward(self, x, ps, st):
            return ps.gain * (ps.weight @ x), st

    for wrapper in (fl.WeightNorm, fl.SpectralNorm):
        with pytest.raises(ValueError, match="names: expected a parameter without bounds, found weight="):
            wrapper(Bounded(), "weight")


def test_layer_map_shows_values_and_keeps_free_numbers(key):
    model = fl.Chain(fl.Dense(2, 2), MODEL)
    ps, st = fl.setup(key, model, float)
    seen = []

    def f(layer, ps, st, path):
        if hasattr(ps, "growth"):
            seen.append(ps.growth)
        return layer, ps, st

    leaf = fl.Chain(Leaf(), fl.Dense(2, 2))
    ps, st = fl.setup(key, leaf, float)
    ps = moved(ps)
    _, same, _ = fl.layer_map(f, leaf, ps, st)
    assert_same(same, ps)
    assert_close(seen[0], 10 / (1 + np.exp(-ps.layer_0.growth)))
    _, halved, _ = fl.layer_map(
        lambda layer, ps, st, path: (layer, ps.replace(growth=ps.growth / 2) if "growth" in ps else ps, st),
        leaf,
        ps,
        st,
    )
    assert_close(fl.constrained(leaf, halved).layer_0.growth, seen[0] / 2)
    _, by_values, _ = fl.layer_map(f, leaf, fl.constrained(leaf, ps), st)
    assert_close(by_values.layer_0.growth, seen[0])


class Leaf(fl.Layer):
    def parameters(self):
        return {"growth": fl.Param((), fl.initializers.ones, bounds=(0, 10))}

    def forward(self, x, ps, st):
        return -ps.growth * x, st


@pytest.mark.long
@pytest.mark.parametrize("adjoint", ["default", "gauss"])
def test_in_a_solve(key, adjoint):
    options = {} if adjoint == "default" else {"adjoint": fl.GaussAdjoint()}
    controller = diffrax.PIDController(rtol=1e-9, atol=1e-9)
    node = fl.NeuralODE(Leaf(), t1=0.5, stepsize_controller=controller, **options)
    ps, st = fl.setup(key, node, float)
    ps = ps.at["growth"].set(logit(0.2))
    y, _ = node(jnp.ones(1), ps, st)
    assert_close(y, np.exp([-1.0]), rtol=1e-7)
    gradient = jax.grad(lambda ps: node(jnp.ones(1), ps, st)[0].sum())(ps)
    # dy/dgrowth = -t y, and dgrowth/dfree = 10 * 0.2 * 0.8.
    assert_close(gradient.growth, -0.5 * np.exp(-1.0) * 1.6, rtol=1e-6)
