"""Members of an ensemble over devices are trained as alone, and no device sends anything."""

import functools

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import flatlayers as fl
from tests.helpers import compiled_by_default
from tests.parallel.hlo import collectives


pytestmark = pytest.mark.long


MEMBERS = 8
TIMES = np.linspace(0.0, 1.0, 5)
TARGET = np.stack([np.cos(2 * TIMES), np.sin(2 * TIMES)], axis=-1)
NODE = fl.NeuralODE(
    fl.MLP(2, (8,), 2, jnp.tanh),
    saveat=TIMES,
    t1=1.0,
    stepsize_controller=diffrax.PIDController(rtol=1e-5, atol=1e-7),
    max_steps=64,
)
NOISY = fl.Chain(fl.Dense(2, 8, jnp.tanh), fl.Dropout(0.2), fl.Dense(8, 2))


@pytest.fixture(autouse=True)
def _as_optax_has_it():
    with jax.numpy_dtype_promotion("standard"):
        yield


def train(predict, ps, st):
    """A few steps of Adam with clipping, which couples the numbers of a member."""
    optimizer = optax.chain(optax.clip_by_global_norm(0.1), optax.adam(1e-2))

    def loss(ps, st):
        found, st = predict(ps, st)
        return jnp.mean((found - TARGET) ** 2), st

    def step(carry, _):
        ps, st, state = carry
        (value, st), gradient = jax.value_and_grad(loss, has_aux=True)(ps, st)
        updates, state = optimizer.update(gradient, state)
        return (optax.apply_updates(ps, updates), st, state), value

    # Few: a solver's choice of steps makes what is rounding between them grow with each.
    (ps, st, _), losses = jax.lax.scan(step, (ps, st, optimizer.init(ps)), None, length=8)
    return ps, st, losses


PREDICT = {
    "neural ODE": (NODE, lambda ps, st: NODE(jnp.asarray(TARGET[0]), ps, st)),
    "dropout": (NOISY, lambda ps, st: NOISY(jnp.asarray(TARGET), ps, st)),
}


@pytest.mark.parametrize(("model", "predict"), PREDICT.values(), ids=PREDICT)
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_members_over_devices_are_those_trained_alone(key, model, predict, kind):
    keys = jax.random.split(key, MEMBERS)
    ps, st = fl.setup(keys, model, float)
    mesh = jax.make_mesh((MEMBERS,), ("member",), axis_types=(kind,))
    share = PartitionSpec("member")
    if kind is AxisType.Explicit:  # which takes arrays that lie so already
        ps, st = jax.device_put((ps, st), NamedSharding(mesh, share))
    one = functools.partial(train, predict)
    over_devices = jax.jit(
        jax.shard_map(jax.vmap(one), mesh=mesh, in_specs=share, out_specs=share, check_vma=False)
    )
    compiled = compiled_by_default(over_devices.lower(ps, st))
    text = compiled.as_text()
    assert "while" in text
    assert collectives(text) == {}
    trained, _, losses = over_devices(ps, st)
    assert len(trained.data.addressable_shards) == MEMBERS
    assert trained.data.addressable_shards[0].data.shape == (1, ps.layout.length)
    numbers, losses, alone = np.asarray(trained.data), np.asarray(losses), jax.jit(one)
    for i in (0, 3, 7):
        expected, _, expected_losses = alone(*fl.setup(keys[i], model, float))
        np.testing.assert_allclose(losses[i], expected_losses, rtol=1e-12)
        np.testing.assert_allclose(numbers[i], expected.data, rtol=1e-12, atol=1e-12)
    assert (losses[:, -1] < losses[:, 0]).all()
