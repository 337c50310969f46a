"""Training."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest

import flatlayers as fl
from flatlayers.equations.failures import require
from flatlayers.fitting import collocation, loop, result
from tests.parallel.meshes import mesh_of

from .values import ONES, STACKED, VECTOR, squares


def _sgd_loop(loss=squares, data=None, **options):
    return fl.train_loop(loss, VECTOR, {}, optax.sgd(0.1), data, steps=2, progress=False, **options)


def _minimize(loss=lambda ps: (ps.data**2).sum(), **options):
    pytest.importorskip("scipy")
    return fl.minimize(loss, VECTOR, **options)


def loss_that_is_not_finite():
    return _sgd_loop(lambda ps, st, batch: (jnp.log(-ps.data.sum()), st))


def gradient_that_is_not_finite():
    return _sgd_loop(lambda ps, st, batch: (jnp.sqrt(0 * ps.data.sum()), st))


def optimiser_that_is_not_called():
    return fl.train_loop(squares, VECTOR, {}, optax.adam, steps=1, progress=False)


def optimiser_of_leaves():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "_sees_no_leaves", lambda *_: True)  # as it is for `optax.lamb`
        return _sgd_loop()


def failure_of_what_is_trained_in_place():
    error = RuntimeError("NeuralODE: The maximum number of solver steps was reached.")
    result.attach(error, None)
    raise error


def integer_parameters():
    def loss(ps, st, batch):
        return ps["w"].sum(), st

    return fl.train_loop(loss, {"w": jnp.arange(3)}, {}, optax.sgd(0.1), steps=1, progress=False)


def list_for_one_batch():
    return _sgd_loop(data=[3.0, "x"])


def batches_of_two_shapes():
    return _sgd_loop(lambda ps, st, x: ((ps.a * x.sum()).sum(), st), data=[jnp.ones(3), jnp.ones(2)])


def no_key_to_shuffle_with():
    return fl.batches(jnp.ones((6, 2)), 2)


def validation_by_an_iterator():
    return _sgd_loop(validate=(squares, iter([jnp.ones(2)]), 1))


def validation_with_samples_twice():
    batches = fl.batches(jnp.ones((5, 2)), 2, shuffle=False, drop_last=False)
    return _sgd_loop(validate=(squares, batches, 1))


def state_of_another_optimiser():
    opt_state = optax.sgd(0.1).init(VECTOR)
    return fl.train_loop(squares, VECTOR, {}, optax.adam(0.1), steps=1, progress=False, opt_state=opt_state)


def bounds_by_a_method_without():
    return _minimize(method="BFGS", bounds={"a": (0.0, 1.0)})


def fixed_numbers_by_cobyla():
    return _minimize(method="COBYLA", bounds={"a": (1.0, 1.0)}, callback=print)


def minimum_of_what_is_not_finite():
    return _minimize(lambda ps: jnp.log(-ps.data.sum()))


def ensemble_by_leaf():
    return fl.per_leaf(optax.adam(0.1)).init(STACKED)


def complex_collocation():
    return fl.collocate(jnp.linspace(0, 1, 5), jnp.ones((5, 2), complex))


def narrow_kernel():
    said = []
    jax.eval_shape(lambda x: said.append(collocation._enough_times(x[0], x)[1]), jnp.eye(3))
    return require(jnp.array(False), *said, ONES)


def file_of_a_longer_run():
    run = functools.partial(fl.train_loop, squares, VECTOR, {}, optax.sgd(0.1), progress=False)
    run(steps=2, save="run.safetensors")
    return run(steps=1, resume="run.safetensors")


def shard_by_leaf():
    return fl.per_leaf(optax.adam(0.1)).init(fl.shard(VECTOR, mesh_of(2)))
