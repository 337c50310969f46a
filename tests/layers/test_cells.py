import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flatlayers as fl
from tests.helpers import assert_close, assert_same
from tests.layers.recurrent import CELLS, fold, run


OVER_TIME = {fl.RNNCell: fl.RNN, fl.LSTMCell: fl.LSTM, fl.GRUCell: fl.GRU}


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def affine(weight, bias, rows, x):
    return x @ np.asarray(weight)[rows].T + np.asarray(bias)[rows]


def parts(ps, x, h, count):
    """Each gate's two products, one gate after another."""
    size = h.shape[-1]
    for gate in range(count):
        rows = slice(gate * size, (gate + 1) * size)
        yield affine(ps.weight_ih, ps.bias_ih, rows, x), affine(ps.weight_hh, ps.bias_hh, rows, h)


def rnn_step(ps, x, h):
    ((a, b),) = parts(ps, x, h, 1)
    return (np.tanh(a + b),)


def lstm_step(ps, x, h, c):
    i, f, g, o = (a + b for a, b in parts(ps, x, h, 4))
    c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
    return sigmoid(o) * np.tanh(c), c


def gru_step(ps, x, h):
    (rx, rh), (zx, zh), (nx, nh) = parts(ps, x, h, 3)
    r, z = sigmoid(rx + rh), sigmoid(zx + zh)
    n = np.tanh(nx + r * nh)
    return ((1 - z) * n + z * h,)


STEPS = {fl.RNNCell: rnn_step, fl.LSTMCell: lstm_step, fl.GRUCell: gru_step}


def written_out(make, ps, x, hidden):
    """The hidden states of all steps, `x` of shape `(..., time, in)`, from zero."""
    x = np.asarray(x)
    carry = (np.zeros((*x.shape[:-2], hidden), x.dtype),) * (2 if make is fl.LSTMCell else 1)
    ys = []
    for t in range(x.shape[-2]):
        carry = STEPS[make](ps, x[..., t, :], *carry)
        ys.append(carry[0])
    return np.stack(ys, axis=-2), carry


@pytest.mark.long
@pytest.mark.parametrize("make", CELLS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("lead", [(), (2, 3)])
def test_equations(key, make, dtype, lead):
    layer = OVER_TIME[make](3, 4, return_sequence=True)
    ps, st = fl.setup(key, layer, dtype)
    x = jax.random.normal(jax.random.key(1), (*lead, 5, 3), dtype)
    expected, carry = written_out(make, ps, x, 4)
    rtol = 1e-5 if dtype == jnp.float32 else 1e-12
    y, new = run(layer, x, ps, st)
    assert y.dtype == dtype
    assert new == st == {}
    np.testing.assert_allclose(y, expected, rtol=rtol, atol=rtol)
    assert y.shape == fl.output_shape(layer, x)
    last = run(fl.Recurrence(layer.cell), x, ps, st)[0]
    np.testing.assert_allclose(last, expected[..., -1, :], rtol=rtol, atol=rtol)
    ys, found, _ = fold(layer.cell, [x[..., t, :] for t in range(5)], ps, st)
    np.testing.assert_allclose(ys[-1], expected[..., -1, :], rtol=rtol, atol=rtol)
    assert isinstance(found, tuple)
    for a, b in zip(found, carry, strict=True):
        assert a.dtype == dtype
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol)


@pytest.mark.long
@pytest.mark.parametrize(("make", "gates"), [(fl.RNNCell, 1), (fl.LSTMCell, 4), (fl.GRUCell, 3)])
def test_parameters(key, make, gates):
    cell = make(3, 16)
    ps, _ = fl.setup(key, cell)
    n = gates * 16
    assert {name: slot.shape for name, slot in cell.layout.slots()} == {
        "weight_ih": (n, 3),
        "weight_hh": (n, 16),
        "bias_ih": (n,),
        "bias_hh": (n,),
    }
    assert fl.parameter_length(cell) == ps.size == n * (3 + 16 + 2)
    assert (jnp.abs(ps.data) <= 1 / 4).all()
    for part in (ps.weight_ih, ps.weight_hh, ps.bias_ih):
        assert jnp.abs(part).max() > 0.8 / 4
    assert abs(float(ps.data.mean())) < 0.03
    bare = make(3, 16, use_bias=False)
    ps, st = fl.setup(key, bare, float)
    assert bare.layout.names == ("weight_ih", "weight_hh")
    full = make(3, 16, init_bias=fl.initializers.zeros)
    ps_full, _ = fl.setup(key, full, float)
    assert_same(ps.weight_hh, ps_full.weight_hh)
    x = jax.random.normal(key, (2, 3))
    assert_close(run(bare, x, ps, st)[0], run(full, x, ps_full, st)[0])
    assert fl.state_length(cell) == fl.state_length(fl.Recurrence(cell)) == 0
    assert eval(repr(fl.Recurrence(bare, reverse=True)), vars(fl)) == fl.Recurrence(bare, reverse=True)


def test_activation_of_the_simple_cell(key):
    cell = fl.RNNCell(3, 2, activation=None)
    ps, st = fl.setup(key, cell, float)
    x, h = jnp.ones(3), jnp.arange(2.0)
    (y, carry), _ = cell((x, (h,)), ps, st)
    assert_close(y, ps.weight_ih @ x + ps.bias_ih + ps.weight_hh @ h + ps.bias_hh)
    assert_same(carry, (y,))
    relu = fl.RNNCell(3, 2, activation=jax.nn.relu)
    assert_close(relu((x, (h,)), ps, st)[0][0], jnp.maximum(y, 0.0))


@pytest.mark.long
@pytest.mark.parametrize("make", CELLS)
def test_the_initial_state_is_learned(key, make):
    cell = make(3, 4, learn_initial_state=True)
    names = ("initial_hidden", "initial_cell") if make is fl.LSTMCell else ("initial_hidden",)
    assert cell.layout.names[4:] == names
    ps, st = fl.setup(key, cell, float)
    plain = make(3, 4)
    x = jax.random.normal(key, (5, 3))
    for name in names:
        assert_same(ps[name], jnp.zeros(4))
    assert_same(cell(x, ps, st), plain(x, ps, st))
    ps = ps.replace(**{name: jnp.full(4, 0.1 * (i + 1)) for i, name in enumerate(names)})
    carry = tuple(jnp.broadcast_to(ps[name], (5, 4)) for name in names)
    assert_same(cell(x, ps, st), cell((x, carry), ps, st))
    g = jax.grad(lambda ps: cell(x, ps, st)[0][0].sum())(ps)
    assert all((g[name] != 0).any() for name in names)
    assert_close(run(fl.Recurrence(cell), x, ps, st)[0], fold(cell, list(x), ps, st)[0][-1])
