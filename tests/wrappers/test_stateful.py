import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flatlayers as fl
from tests.helpers import assert_close, assert_same


MODEL = fl.Chain(fl.Dense(2, 4, jnp.tanh), fl.Dropout(0.5), fl.Dense(4, 2))


class Counter(fl.Layer):
    """Counts its calls, in a state of the given kind."""

    change: object

    def states(self, key):
        return {"count": 0, "inner": {"training": True, "mean": jnp.zeros(2)}}

    def forward(self, x, ps, st):
        return x, self.change(st.replace(count=st.count + 1))


def counter(change=lambda st: st):
    layer = fl.Chain(fl.Dense(2, 2), Counter(change))
    return layer, *fl.setup(jax.random.key(0), layer, float)


def test_each_call_returns_y_and_keeps_the_state(key):
    ps, st = fl.setup(key, MODEL, float)
    x = jnp.ones((3, 2))
    m = fl.StatefulLayer(MODEL, ps, st)
    assert (m.layer, m.fixed_state) == (MODEL, True)
    assert m.ps is ps
    assert m.st is st
    expected = st
    for _ in range(3):
        y, expected = MODEL(x, ps, expected)
        assert_same(m(x), y)
        assert m.st == expected
    assert m.st != st


def test_other_parameters_serve_for_one_call(key):
    layer = fl.Dense(2, 2)
    ps, st = fl.setup(key, layer, float)
    m = fl.StatefulLayer(layer, ps, st)
    x = jnp.ones(2)
    for other in (2 * ps, (2 * ps).unpack(), (2 * ps).to_dict()):
        assert_same(m(x, other), layer(x, 2 * ps, st)[0])
    assert m.ps is ps
    assert_same(m(x), layer(x, ps, st)[0])


def test_parts_may_be_assigned_and_given_as_mappings(key):
    layer, ps, st = counter()
    m = fl.StatefulLayer(layer, ps.to_dict(), st.to_dict())
    assert_same(m(jnp.ones(2)), layer(jnp.ones(2), ps, st)[0])
    assert m.st.layer_1.count == 1
    m.st, m.ps = st, 0 * ps
    assert_same(m(jnp.ones(2)), jnp.zeros(2))
    assert m.st.layer_1.count == 1
    assert fl.StatefulLayer(jnp.sin, {}, {})(0.0) == 0.0
    with pytest.raises(TypeError, match="expected a layer or a function"):
        fl.StatefulLayer(3, ps, st)


# Inside transformations


@pytest.mark.long
def test_inside_jit_grad_and_vmap(key):
    ps, st = fl.setup(key, MODEL, float)
    x = jax.random.normal(key, (5, 2))

    def boxed(ps, x):
        m = fl.StatefulLayer(MODEL, ps, st)
        return jnp.sum(m(m(x)) ** 2), m.st

    def plain(ps, x):
        y, new = MODEL(x, ps, st)
        y, new = MODEL(y, ps, new)
        return jnp.sum(y**2), new

    gradients = [jax.jit(jax.value_and_grad(f, has_aux=True))(ps, x) for f in (boxed, plain)]
    assert_same(*(gradient for _, gradient in gradients))
    assert gradients[0][0][1] == gradients[1][0][1]
    assert_close(*(jax.vmap(f, (None, 0))(ps, x)[0] for f in (boxed, plain)))
    with jax.checking_leaks():
        jax.jit(boxed)(ps, x)


def test_in_a_scan(key):
    layer, ps, st = counter()

    def step(st, x):
        m = fl.StatefulLayer(layer, ps, st)
        y = m(x)
        return m.st, y

    st, ys = jax.lax.scan(step, st, jnp.ones((4, 2)))
    assert st.layer_1.count == 4
    assert_close(ys, np.ones((4, 2)) @ np.asarray(ps.layer_0.weight).T)


@pytest.mark.long
def test_in_the_vector_field_of_a_solve(key):
    """Closed over, with a state that does not change, and made inside, where each call sees one state."""
    model = fl.Chain(fl.Dense(2, 2, jnp.tanh), fl.Dropout(0.5))
    ps, st = fl.setup(key, model, float)
    still = fl.testmode(st)

    def boxed(ps):
        m, y0 = fl.StatefulLayer(model, ps, still), jnp.array([1.0, -1.0])
        term = diffrax.ODETerm(lambda t, y, ps: m(y) + fl.StatefulLayer(model, ps, st)(y))
        solution = diffrax.diffeqsolve(term, diffrax.Euler(), 0.0, 1.0, 0.25, y0, args=ps, max_steps=4)
        return jnp.sum(solution.ys[-1] ** 2)

    def by_hand(ps):
        y = jnp.array([1.0, -1.0])
        for _ in range(4):
            y = y + 0.25 * (model(y, ps, still)[0] + model(y, ps, st)[0])
        return jnp.sum(y**2)

    assert_close(*(jax.jit(jax.value_and_grad(f))(ps) for f in (boxed, by_hand)))


def test_a_state_that_leaves_a_transformation_is_an_error():
    layer, ps, st = counter()
    m = fl.StatefulLayer(layer, ps, st)
    jax.jit(m)(jnp.ones(2))
    with pytest.raises(jax.errors.UnexpectedTracerError) as info:
        m(jnp.ones(2))
    assert any("make the StatefulLayer there" in note for note in info.value.__notes__)


# A state of fixed type


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda st: st.replace(count=st.count / 2),
            r"'layer_1.count': .* int\d*\[\], found float",
        ),
        (
            lambda st: st.replace(inner=st.inner.replace(mean=jnp.zeros(3))),
            r"'layer_1.inner.mean': expected float64\[2\], found float64\[3\]",
        ),
        (lambda st: fl.testmode(st), r"'layer_1.inner.training': expected True, found False"),
        (lambda st: {**st, "more": 1}, r"'layer_1.more': expected no such field, found 1"),
        (lambda st: {"inner": st.inner}, r"'layer_1.count': expected int64\[\], found no such field"),
        (
            lambda st: {"inner": st.inner, "count": st.count},
            r"'layer_1': expected the order count, inner, found inner, count",
        ),
        (lambda st: st.replace(inner=None), r"'layer_1.inner': expected .*mean: float64\[2\].* found None"),
        (
            lambda st: st.replace(count=(st.count,)),
            r"'layer_1.count': expected int64\[\], found \(int64\[\]\)",
        ),
    ],
)
def test_a_change_of_type_is_an_error(change, message):
    layer, ps, st = counter(change)
    m = fl.StatefulLayer(layer, ps, st)
    with pytest.raises(ValueError, match="state of Chain changed its type at " + message):
        m(jnp.ones(2))
    with pytest.raises(ValueError, match=message):
        jax.jit(lambda x: fl.StatefulLayer(layer, ps, st)(x))(jnp.ones(2))
    assert m.st is st
    free = fl.StatefulLayer(layer, ps, st, fixed_state=False)
    free(jnp.ones(2))
    assert jax.tree.structure(free.st) == jax.tree.structure(layer(jnp.ones(2), ps, st)[1])


def test_weak_types_and_numbers_are_no_change():
    layer, ps, st = counter(lambda st: st.replace(count=jnp.asarray(3)))
    m = fl.StatefulLayer(layer, ps, st)
    m(jnp.ones(2))
    m = fl.StatefulLayer(layer, ps, fl.update_state(st, "count", 0))
    m(jnp.ones(2))
    assert m.st.layer_1.count == 3


def test_a_mask_that_is_drawn_at_the_first_call(key):
    layer = fl.VariationalHiddenDropout(0.5)
    ps, st = fl.setup(key, layer, float)
    with pytest.raises(
        ValueError, match="HiddenDropout changed its type at 'update_mask': .*True, found False"
    ):
        fl.StatefulLayer(layer, ps, st)(jnp.ones(3))
    m = fl.StatefulLayer(layer, ps, st, fixed_state=False)
    assert_same(m(jnp.ones(9)), m(jnp.ones(9)))


def test_an_error_in_the_layer_leaves_the_box_as_it_was():
    layer, ps, st = counter()
    m = fl.StatefulLayer(layer, ps, st)
    with pytest.raises(ValueError, match=r"expected x of shape \(..., 2\)") as info:
        m(jnp.ones(3))
    assert "in the layer layer_0: Dense(2, 2)" in info.value.__notes__[0]
    assert m.st is st


def test_text(key):
    layer = fl.Dense(3, 2)
    ps, st = fl.setup(key, layer)
    text = "StatefulLayer(Dense(3, 2), ComponentVector(float32[8], weight=(2, 3), bias=(2,)), Record()"
    assert repr(fl.StatefulLayer(layer, ps, st)) == text + ")"
    assert repr(fl.StatefulLayer(layer, ps, st, fixed_state=False)) == text + ", fixed_state=False)"
    traced = []
    jax.eval_shape(lambda ps: traced.append(repr(fl.StatefulLayer(layer, ps, st))), ps)
    assert traced == [text + ")"]
