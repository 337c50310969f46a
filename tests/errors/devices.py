"""Several devices, and several processes."""

import pickle
import types

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import multihost_utils
from jax.sharding import AxisType

import flatlayers as fl
from flatlayers.core.data_axis import data_axis
from flatlayers.fitting.placing import OnMesh
from flatlayers.io import _processes
from tests.parallel.meshes import mesh_of

from .values import DENSE, KEY, ONES, VECTOR, called, squares


def _shard():
    return fl.shard(VECTOR, mesh_of(2))


def _on_mesh():
    """Return what places the values of a training loop."""
    return OnMesh(mesh_of(2), "data", per_device=False, gathers=True)


def _in_two_processes(differences, call, *args, **options):
    """Call a function as the first of two processes, with what the other has more in each exchange."""
    exchanges = iter(differences)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "process_count", lambda: 2)
        patch.setattr(
            multihost_utils, "process_allgather", lambda mine: np.stack([mine, mine + next(exchanges)])
        )
        return call(*args, **options)


def arithmetic_of_a_shard():
    return _shard() * 2.0


def pickled_shard():
    return pickle.dumps(_shard())


def view_of_a_shard():
    return _shard().a


def shard_of_a_shard():
    return fl.shard(_shard(), mesh_of(2))


def compiled_setup():
    return jax.eval_shape(lambda key: fl.setup_sharded(key, DENSE, mesh_of(2)), KEY)


def number_for_a_mesh():
    return fl.shard(VECTOR, 8)


def mesh_with_explicit_axes():
    with jax.set_mesh(mesh_of(2, AxisType.Explicit)):
        return _shard()


def shard_without_a_mesh():
    return fl.train_loop(squares, _shard(), {}, optax.sgd(0.1), steps=1, progress=False)


def vector_for_a_shard():
    return fl.sharded_value_and_grad(squares, mesh_of(2))(VECTOR, {}, jnp.ones(4))


def times_in_a_batch():
    return fl.sharded_value_and_grad(squares, mesh_of(2))(_shard(), {}, (jnp.ones(4), jnp.ones(3)))


def batch_that_does_not_divide():
    return _on_mesh().batch(jnp.ones(3))


def checkpoints_of_a_divided_batch():
    with data_axis("data"):
        return called(fl.NeuralODE(DENSE, adjoint=diffrax.RecursiveCheckpointAdjoint()), ONES)


def unrolled_steps_of_a_divided_batch():
    with data_axis("data"):
        return called(fl.DeepEquilibriumNetwork(lambda zx: 0.5 * zx[0] + zx[1], adjoint="unroll"), ONES)


def other_seeds():
    # Of the number of arrays and their types, and of the number of arrays and theirs.
    return _in_two_processes([0, 0, 0, 1], fl.check_synchronized, VECTOR)


def file_that_one_process_has():
    return _in_two_processes([1], _on_mesh().expect_same_plan, start=0)


def array_without_a_mesh():
    array = types.SimpleNamespace(
        is_fully_addressable=False, is_fully_replicated=False, sharding=jax.devices()[0]
    )
    return _processes.on_host(array, "st.mean")
