import diffrax
import jax
import numpy as np
import pytest

import flatlayers as fl
from tests.equations.test_ode import TIGHT, Scaled
from tests.helpers import assert_close, central_difference


TS = np.linspace(1.0, 3.0, 9)
RATE = 0.5


def data(ts):
    return np.exp(-RATE * ts)[:, None] * np.array([[1.0, -2.0]])


def node(**options):
    return fl.NeuralODE(Scaled(), stepsize_controller=TIGHT, **options)


def by_hand(starts, wanted, continuity):
    """Each segment decays from its start, so that predictions and loss are known in closed form."""
    decay = np.exp(-RATE * np.array([0.0, 0.25, 0.5])).reshape(3, *[1] * (starts.ndim - 1))
    predictions = np.stack([start * decay for start in np.asarray(starts)])
    wanted = np.stack([wanted[2 * i : 2 * i + 3] for i in range(4)])
    gaps = predictions[:-1, -1] - starts[1:]
    return np.mean((predictions - wanted) ** 2) + continuity * np.mean(gaps**2), predictions


@pytest.mark.long
def test_the_loss_is_the_formula(key):
    ps, st = fl.setup(key, node(), float)
    starts = jax.random.normal(key, (4, 2))
    found = jax.jit(lambda s: fl.multiple_shooting(node(), TS, data(TS), s, ps, st, continuity=7.0))(starts)
    assert_close(found, by_hand(starts, data(TS), 7.0), rtol=1e-8)


@pytest.mark.long
@pytest.mark.parametrize(("ts", "segments"), [(TS, 1), (TS[::-1], 4)], ids=["forward", "backward"])
def test_the_truth_has_no_loss(key, ts, segments):
    ps, st = fl.setup(key, node(), float)
    starts = data(ts)[: -1 : 8 // segments]
    loss, predictions = jax.jit(lambda s: fl.multiple_shooting(node(), ts, data(ts), s, ps, st))(starts)
    assert predictions.shape == (segments, 8 // segments + 1, 2)
    assert loss < 1e-14


@pytest.mark.slow
def test_the_gradient_and_batches(key):
    """By the one vector that has the parameters and the starts."""
    steps = {"dt0": 0.05, "stepsize_controller": diffrax.ConstantStepSize(), "max_steps": 16}
    each = fl.NeuralODE(Scaled(), batching="each", **steps)
    st = fl.initial_states(key, each)
    layout = fl.Layout({"net": each.layout, "starts": (4, 3, 2)})
    v = fl.ComponentVector(jax.random.normal(key, (layout.length,)), layout).replace(net=fl.Record(rate=RATE))
    batch = np.stack([data(TS)] * 3, axis=1)

    @jax.jit
    @jax.value_and_grad
    def loss(v):
        return fl.multiple_shooting(each, TS, batch, v.starts, v.net, st)[0]

    value, gradient = loss(v)
    np.testing.assert_allclose(value, by_hand(np.asarray(v.starts), batch, 100.0)[0], rtol=1e-8)
    direction = fl.ComponentVector(jax.random.normal(jax.random.key(1), v.shape), layout)
    np.testing.assert_allclose(
        gradient @ direction, central_difference(lambda v: loss(v)[0], v, direction), rtol=1e-6
    )


NODE = node()


def test_wrong_arguments(key):
    ps, st = fl.setup(key, node(), float)
    ys = data(TS)

    def shoot(model=NODE, ts=TS, ys=ys, starts=ys[:4]):
        return fl.multiple_shooting(model, ts, ys, starts, ps, st)

    for wrong in (fl.Dense(2, 2), fl.SecondOrderNeuralODE(Scaled())):
        with pytest.raises(TypeError, match="model to be a NeuralODE, found"):
            shoot(model=wrong)
    with pytest.raises(ValueError, match=r"times that 3 segments of equal length share.* found 9"):
        shoot(starts=ys[:3])
    with pytest.raises(ValueError, match=r"starts of shape \(segments, n\), found.*float64\[4,1\]"):
        shoot(starts=ys[:4, :1])
    with pytest.raises(ValueError, match="increase or decrease"):
        shoot(ts=np.abs(TS - 2))
    with pytest.raises(ValueError, match="finite numbers"):
        shoot(starts=np.nan * ys[:4])
    with pytest.raises(ValueError, match="is like y0"):
        shoot(model=fl.NeuralODE(lambda y: y[:1]))
