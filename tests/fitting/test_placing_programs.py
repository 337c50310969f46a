"""The programs of runs over devices: what is sent in a step, and what each device holds."""

import jax
import jax.numpy as jnp
import optax
import pytest

import flatlayers as fl
from flatlayers.fitting.data import OneBatch
from flatlayers.fitting.placing import placing_of
from flatlayers.fitting.steps import Carry, Steps, compiled_steps
from flatlayers.vectors.record import as_record
from tests.fitting.placed import LOSSES, MODELS, OPTIMIZER, WHOLE, loss_of
from tests.helpers import compiled_by_default, count_primitives
from tests.parallel.hlo import collectives


pytestmark = pytest.mark.usefixtures("_standard")


def test_without_a_mesh_the_program_says_nothing_of_devices(key):
    ps, st = fl.setup(key, MODELS["Dropout"], float)
    steps = compiled_steps(LOSSES["Dropout"], OPTIMIZER, OneBatch.pick)
    carry = Carry(ps, as_record(st), OPTIMIZER.init(ps), (ps, as_record(st)))

    def step(carry, batch):
        (value, (st, metrics)), gradient = jax.value_and_grad(LOSSES["Dropout"], has_aux=True)(
            carry.ps, carry.st, batch
        )
        updates, opt_state = OPTIMIZER.update(gradient, carry.opt_state, carry.ps)
        ps, fine = optax.apply_updates(carry.ps, updates), jnp.isfinite(value)
        finite = fine & (jnp.max(jnp.abs(ps.data), initial=0) < jnp.inf)
        before = jax.tree.map(lambda a, b: jax.lax.select(fine, a, b), (carry.ps, carry.st), carry.before)
        failure = jnp.where(fine, jnp.where(finite, 0, 2), 1).astype(jnp.int8)
        return Carry(ps, st, opt_state, before), value, metrics, failure

    found = count_primitives(lambda carry, batch: steps._step(carry, batch), carry, WHOLE)
    expected = count_primitives(lambda carry, batch: jax.jit(step)(carry, batch), carry, WHOLE)
    assert found == expected
    assert not any("shard" in name for name in found)


def program(loss, ps, st, mesh, per_device):
    """The compiled loop over a mesh, and its arguments."""
    placing = placing_of(mesh, "data", per_device, ps)
    ps, st, data = placing.parameters(ps), placing.everywhere(as_record(st)), placing.batch(WHOLE)
    steps = Steps(loss, OPTIMIZER, OneBatch.pick, placing)
    carry = Carry(ps, st, placing.optimizer_state(OPTIMIZER, ps), (ps, st))
    return compiled_by_default(steps.beside.lower(carry, data, 0, 20, 20))


@pytest.mark.long
@pytest.mark.parametrize("layers", [1, 40])
def test_the_collectives_of_a_step(key, mesh, layers):
    model = fl.MLP(3, (5,) * layers, 1, jnp.tanh)
    ps, st = fl.setup(key, model, float)
    compiled = program(loss_of(model), ps, st, mesh, True)
    found = collectives(compiled.as_text())
    assert {kind: len(sizes) for kind, sizes in found.items() if kind != "all-reduce"} == {
        "all-gather": 1,
        "reduce-scatter": 1,
    }
    assert sum(found["all-reduce"]) <= 64
    # Parameters, those before them and two moments in parts, the batch in parts, numbers.
    part = -(-ps.size // 8) * 8
    room = 5 * part + 64 * 4 * 8 // 8 + 200
    assert compiled.memory_analysis().argument_size_in_bytes <= room
    compiled = program(loss_of(model), ps, st, mesh, False)
    found = collectives(compiled.as_text())
    assert len(found["all-gather"]) == 1
    assert set(found) <= {"all-gather", "all-reduce", "reduce-scatter"}
    assert compiled.memory_analysis().argument_size_in_bytes <= room
