import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flatlayers as fl
from tests.helpers import assert_close, assert_same, central_difference, count_primitives
from tests.layers.recurrent import CELLS, fold, run


TIME_AXES = [(-2, (2, 5, 3)), (0, (5, 2, 3)), (-1, (2, 3, 5))]


class Noisy(fl.Container):
    """A cell with dropout before it, and a mask that stays, so that its state has all kinds of things."""

    inner: fl.Layer
    drop: fl.Layer = fl.Dropout(0.5)
    hold: fl.Layer = fl.VariationalHiddenDropout(0.5)

    def forward(self, x, ps, st):
        x, *carry = x if isinstance(x, tuple) else (x,)
        x, drop = self.drop(x, ps.drop, st.drop)
        x, hold = self.hold(x, ps.hold, st.hold)
        y, inner = self.inner((x, *carry) if carry else x, ps.inner, st.inner)
        return y, st.replace(inner=inner, drop=drop, hold=hold)


@pytest.mark.long
@pytest.mark.parametrize("make", CELLS)
def test_gradient(key, make):
    layer = fl.Recurrence(make(3, 4, learn_initial_state=True), return_sequence=True)
    ps, st = fl.setup(key, layer, float)
    x = jax.random.normal(key, (2, 5, 3))

    @jax.jit
    def loss(ps, x):
        return jnp.sum(layer(x, ps, st)[0] ** 2)

    slope_ps, slope_x = jax.jit(jax.grad(loss, argnums=(0, 1)))(ps, x)
    direction = fl.ComponentVector(jax.random.normal(jax.random.key(2), ps.shape), ps.layout)
    numeric = central_difference(lambda ps: loss(ps, x), ps, direction)
    np.testing.assert_allclose(slope_ps @ direction, numeric, rtol=1e-6)
    direction = jax.random.normal(jax.random.key(3), x.shape)
    numeric = central_difference(lambda x: loss(ps, x), x, direction)
    np.testing.assert_allclose(jnp.vdot(slope_x, direction), numeric, rtol=1e-6)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    ("time_axis", "shape"), [(-2, (2, 5, 3)), (0, (5, 2, 3)), (1, (2, 5, 3)), (-1, (2, 3, 5))]
)
def test_time_axis_and_reverse(key, reverse, time_axis, shape):
    cell = fl.GRUCell(3, 4)
    ps, st = fl.setup(key, cell, float)
    x = jax.random.normal(key, shape)
    xs = list(jnp.moveaxis(x, time_axis, 0))
    ys, _, _ = fold(cell, xs[::-1] if reverse else xs, ps, st)
    layer = fl.Recurrence(cell, time_axis=time_axis, reverse=reverse)
    assert_close(run(layer, x, ps, st)[0], ys[-1])
    layer = fl.Recurrence(cell, time_axis=time_axis, reverse=reverse, return_sequence=True)
    expected = jnp.stack(ys[::-1] if reverse else ys, axis=time_axis)
    y, _ = run(layer, x, ps, st)
    assert_close(y, expected)
    assert y.shape == fl.output_shape(layer, x)


@pytest.mark.parametrize("reverse", [False, True])
def test_one_step_and_a_given_carry(key, reverse):
    cell = fl.LSTMCell(3, 4)
    layer = fl.Recurrence(cell, return_sequence=True, reverse=reverse)
    ps, st = fl.setup(key, layer, float)
    x = jax.random.normal(key, (2, 1, 3))
    assert_close(layer(x, ps, st)[0][:, 0], cell(x[:, 0], ps, st)[0][0])
    carry = (jnp.full((2, 4), 0.3), jnp.full((2, 4), -0.7))
    assert_close(layer((x, carry), ps, st)[0][:, 0], cell((x[:, 0], carry), ps, st)[0][0])


def test_a_carry_joins_two_halves(key):
    cell = fl.LSTMCell(3, 4)
    layer = fl.Recurrence(cell, return_sequence=True)
    ps, st = fl.setup(key, layer, float)
    x = jax.random.normal(key, (2, 6, 3))
    whole, _ = run(layer, x, ps, st)
    _, carry, _ = fold(cell, [x[:, t] for t in range(3)], ps, st)
    assert_close(run(layer, (x[:, 3:], carry), ps, st)[0], whole[:, 3:])


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("make", CELLS)
def test_the_carry_that_is_returned(key, make, reverse):
    """It is that of the cell after the last step, with the sequence or its last step alone."""
    cell = make(3, 4)
    ps, st = fl.setup(key, cell, float)
    x = jax.random.normal(key, (2, 5, 3))
    xs = [x[:, t] for t in range(5)]
    ys, expected, _ = fold(cell, xs[::-1] if reverse else xs, ps, st)
    for whole in (False, True):
        layer = fl.Recurrence(cell, return_sequence=whole, reverse=reverse, return_carry=True)
        (y, carry), _ = run(layer, x, ps, st)
        assert_close(carry, expected)
        assert isinstance(carry, tuple)
        assert_close(y[:, 0 if reverse else -1] if whole else y, ys[-1])
        assert fl.output_shape(layer, x) == (y.shape, jax.tree.map(jnp.shape, carry))


def test_the_carry_of_any_layer_and_from_piece_to_piece(key):
    """A cell with a state of its own, and a sequence of which the pieces are read one after another."""
    layer = fl.Recurrence(Noisy(fl.LSTMCell(3, 4)), return_sequence=True, return_carry=True)
    ps, st = fl.setup(key, layer, float)
    x = jax.random.normal(key, (6, 3))
    (whole, end), _ = run(layer, x, ps, st)
    (first, carry), between = run(layer, x[:2], ps, st)
    (second, last), _ = run(layer, (x[2:], carry), ps, between)
    assert_close(jnp.concatenate([first, second]), whole)
    assert_close(last, end)


def test_the_gradient_goes_through_the_carry(key):
    """From the end of a decoder to the input and the weights of its encoder, against finite differences."""
    encoder, decoder = fl.LSTM(3, 4, return_carry=True), fl.LSTM(1, 4)
    assert repr(encoder) == "Recurrence(LSTMCell(3, 4), return_carry=True)"
    ps, st = fl.setup(key, {"encoder": encoder, "decoder": decoder}, float)
    x, later = jax.random.normal(key, (5, 3)), jnp.linspace(0.0, 1.0, 3)[:, None]

    @jax.jit
    def loss(ps, x):
        (_, carry), _ = encoder(x, ps.encoder, st.encoder)
        return jnp.sum(decoder((later, carry), ps.decoder, st.decoder)[0] ** 2)

    of_ps, of_x = jax.jit(jax.grad(loss, (0, 1)))(ps, x)
    direction = fl.ComponentVector(jax.random.normal(jax.random.key(2), ps.shape), ps.layout)
    numeric = central_difference(lambda ps: loss(ps, x), ps, direction)
    np.testing.assert_allclose(of_ps @ direction, numeric, rtol=1e-6)
    numeric = central_difference(lambda x: loss(ps, x), x, jnp.ones_like(x))
    np.testing.assert_allclose(of_x.sum(), numeric, rtol=1e-6)
    assert (of_ps.encoder.weight_ih != 0).any()


def test_bidirectional_carries(key):
    cell = fl.LSTMCell(3, 4)
    layer = fl.BidirectionalRNN(cell, return_carry=True)
    ps, st = fl.setup(key, layer, float)
    x = jax.random.normal(key, (5, 3))
    (y, (forward, backward)), _ = run(layer, x, ps, st)
    assert_close(y, run(fl.BidirectionalRNN(cell), x, ps, st)[0])
    assert_close(forward, fold(cell, list(x), ps.forward, {})[1])
    assert_close(backward, fold(cell, list(x)[::-1], ps.backward, {})[1])
    (again, _), _ = run(layer, (x, (backward, forward)), ps, st)
    there, _ = fl.Recurrence(cell, return_sequence=True)((x, backward), ps.forward, {})
    back, _ = fl.Recurrence(cell, return_sequence=True, reverse=True)((x, forward), ps.backward, {})
    assert_close(again, jnp.concatenate([there, back], -1))
    with pytest.raises(TypeError, match=r"expected a pair of carries.*, found float64\[5,3\]"):
        layer((x, x), ps, st)


def test_there_is_one_scan(key):
    layer = fl.LSTM(3, 4, return_sequence=True)
    ps, st = fl.setup(key, layer, float)
    assert count_primitives(lambda x: layer(x, ps, st)[0], jnp.ones((50, 3)))["scan"] == 1


@pytest.mark.parametrize("training", [True, False])
def test_the_state_of_the_cell_goes_from_step_to_step(key, training):
    cell = Noisy(fl.RNNCell(3, 4))
    layer = fl.Recurrence(cell, return_sequence=True)
    ps, st = fl.setup(key, layer, float)
    assert layer.layout.names == cell.layout.names
    assert not fl.preserves_state_type(layer)
    st = st if training else fl.testmode(st)
    x = jax.random.normal(key, (5, 3))
    ys, _, expected = fold(cell, list(x), ps, st)
    y, new = run(layer, x, ps, st)
    assert_close(y, jnp.stack(ys))
    assert jax.tree.structure(new) == jax.tree.structure(expected)
    assert_same(jax.random.key_data(new.drop.key), jax.random.key_data(expected.drop.key))
    assert (new.drop == st.drop) is not training


@pytest.mark.slow
def test_bidirectional(key):
    cell = fl.GRUCell(3, 4)
    layer = fl.BidirectionalRNN(cell)
    ps, st = fl.setup(key, layer, float)
    assert layer.layout.names == ("forward", "backward")
    assert (ps.forward.data != ps.backward.data).all()
    assert fl.parameter_length(layer) == ps.size == 2 * fl.parameter_length(cell)
    for x in (jax.random.normal(key, (4, 3)), jax.random.normal(key, (2, 6, 4, 3))):
        xs = list(jnp.moveaxis(x, -2, 0))
        there, _, _ = fold(cell, xs, ps.forward, st.forward)
        back, _, _ = fold(cell, xs[::-1], ps.backward, st.backward)
        there, back = jnp.stack(there, -2), jnp.stack(back[::-1], -2)
        y, new = run(layer, x, ps, st)
        assert_close(y, jnp.concatenate([there, back], -1))
        assert new == st
        assert y.shape == fl.output_shape(layer, x)
    assert_close(run(fl.BidirectionalRNN(cell, merge=None), x, ps, st)[0], (there, back))
    assert_close(run(fl.BidirectionalRNN(cell, merge=jnp.subtract), x, ps, st)[0], there - back)
    direction = fl.ComponentVector(jax.random.normal(jax.random.key(2), ps.shape), ps.layout)

    @jax.jit
    def loss(ps):
        return jnp.sum(layer(x[0, :2], ps, st)[0] ** 2)

    np.testing.assert_allclose(
        jax.jit(jax.grad(loss))(ps) @ direction, central_difference(loss, ps, direction), rtol=1e-6
    )


def test_bidirectional_with_two_kinds_of_cells(key):
    layer = fl.BidirectionalRNN(Noisy(fl.LSTMCell(3, 4)), fl.RNNCell(3, 2))
    ps, st = fl.setup(key, layer, float)
    assert ps.backward.weight_hh.shape == (2, 2)
    y, new = layer(jnp.ones((5, 3)), ps, st)
    assert y.shape == (5, 6)
    assert new.forward.drop != st.forward.drop
    plain = fl.BidirectionalRNN(fl.LSTMCell(3, 4), fl.RNNCell(3, 2))
    assert repr(plain) == "BidirectionalRNN(LSTMCell(3, 4), backward_cell=RNNCell(3, 2))"
    assert eval(repr(plain), vars(fl)) == plain
    with pytest.raises(
        TypeError, match="BidirectionalRNN.merge: expected a function of two sequences or None, found 3"
    ):
        fl.BidirectionalRNN(fl.RNNCell(3, 4), merge=3)


@pytest.mark.parametrize("make", CELLS)
def test_stateful_cell(key, make):
    cell = make(3, 4)
    layer = fl.StatefulRecurrentCell(cell)
    ps, st = fl.setup(key, layer, float)
    assert (dict(st), fl.state_length(layer)) == ({"carry": None}, 1)
    assert layer.layout == cell.layout
    assert not fl.preserves_state_type(layer)
    assert not fl.preserves_state_type(fl.Chain(fl.StatefulRecurrentCell(cell)))
    assert fl.preserves_state_type(cell)
    assert fl.preserves_state_type(fl.Recurrence(cell))
    xs = list(jax.random.normal(key, (4, 2, 3)))
    ys, carry, _ = fold(cell, xs, ps, {})
    call = jax.jit(layer)
    for _ in range(2):
        for x, expected in zip(xs, ys, strict=True):
            y, st = call(x, ps, st)
            assert_close(y, expected)
        assert_close(st.carry, carry)
        assert isinstance(st.carry, tuple)
        st = fl.update_state(st, "carry", None)
        assert st == {"carry": None}


def test_stateful_cell_beside_the_state_of_the_cell(key):
    model = fl.Chain(fl.StatefulRecurrentCell(Noisy(fl.LSTMCell(3, 4))), fl.Dense(4, 1))
    ps, st = fl.setup(key, model, float)
    assert list(st.layer_0) == ["inner", "drop", "hold", "carry"]
    x = jnp.ones((2, 3))
    y, first = run(model, x, ps, st)
    assert y.shape == (2, 1)
    _, second = run(model, x, ps, first)
    assert jax.tree.structure(first) == jax.tree.structure(second)
    assert first.layer_0.drop != st.layer_0.drop
    assert (first.layer_0.carry[1] != second.layer_0.carry[1]).any()
    quiet = fl.testmode(fl.update_state(second, "carry", None))
    assert_same(model(x, ps, quiet)[0], model(x, ps, fl.testmode(st))[0])
    with pytest.raises(ValueError, match=r"expected a carry \(h, c\) of arrays of shape \(5, 4\)"):
        model(jnp.ones((5, 3)), ps, fl.testmode(second))


def test_under_vmap_and_over_an_ensemble(key):
    layer = fl.LSTM(3, 4)
    ps, st = fl.setup(key, layer, float)
    x = jax.random.normal(key, (6, 5, 3))
    y = run(layer, x, ps, st)[0]
    assert_close(y, jax.jit(jax.vmap(lambda x: layer(x, ps, st)[0]))(x))
    members = jnp.stack([2 * ps.data, ps.data])
    ys = jax.jit(jax.vmap(lambda data: layer(x, fl.ComponentVector(data, ps.layout), st)[0]))(members)
    assert_close(ys[1], y)


def test_promotion_happens_before_the_scan():
    def output(make, x_dtype, ps_dtype):
        layer = fl.Recurrence(make(3, 4, learn_initial_state=True), return_sequence=True)
        ps, st = fl.ComponentVector.zeros(layer.layout, ps_dtype), {}
        return jax.eval_shape(lambda x: layer(x, ps, st)[0], jnp.ones((5, 3), x_dtype))

    with jax.numpy_dtype_promotion("standard"):
        for make in CELLS:
            assert output(make, jnp.float64, jnp.float32).dtype == jnp.float64
            assert output(make, jnp.float32, jnp.float64).dtype == jnp.float64
            assert output(make, jnp.int64, jnp.float32).dtype == jnp.float32
            assert output(make, jnp.bfloat16, jnp.bfloat16).dtype == jnp.bfloat16


@pytest.mark.parametrize("make", CELLS)
def test_input_that_does_not_fit(key, make):
    cell = make(3, 4)
    model = fl.Chain(rnn=fl.Recurrence(cell))
    ps, st = fl.setup(key, model, float)
    with pytest.raises(ValueError, match=r"expected x of shape \(..., 3\), found shape \(2, 5\)") as info:
        model(jnp.ones((2, 4, 5)), ps, st)
    assert "in the layer rnn" in info.value.__notes__[0]
    with pytest.raises(ValueError, match=r"with an axis -2, found shape \(3,\)"):
        model(jnp.ones(3), ps, st)
    with pytest.raises(ValueError, match=r"at least one step along the time axis -2, found shape \(0, 3\)"):
        model(jnp.ones((0, 3)), ps, st)
    with pytest.raises(ValueError, match=r"a tuple \(x, carry\), found a tuple of 3"):
        cell((jnp.ones(3),) * 3, ps.rnn, {})
    with pytest.raises(TypeError, match=r"a carry that is a tuple \(h.*\), found float64\[4\]"):
        cell((jnp.ones(3), jnp.ones(4)), ps.rnn, {})
    with pytest.raises(ValueError, match=r"of arrays of shape \(4,\), found \(float64\[5\]"):
        cell((jnp.ones(3), (jnp.ones(5),) * (1 + (make is fl.LSTMCell))), ps.rnn, {})
    with pytest.raises(ValueError, match=r"found \(float64\[4\], float64\[4\], float64\[4\]\)"):
        cell((jnp.ones(3), (jnp.ones(4),) * 3), ps.rnn, {})


def test_what_is_no_cell(key):
    for inner in (fl.Dense(3, 2), fl.StatefulRecurrentCell(fl.GRUCell(3, 2))):
        layer = fl.Recurrence(inner)
        ps, st = fl.setup(key, layer, float)
        with pytest.raises(TypeError, match=r"\(\(y, carry\), st\), found \(y, st\) with y: float64\[2\]"):
            layer(jnp.ones((5, 3)), ps, st)
