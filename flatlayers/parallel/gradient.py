"""`sharded_value_and_grad`: each device the gradient of its part of the batch, one sum over all devices."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from ..core.data_axis import data_axis
from ..types import Array, Key, Params, PyTree, State
from ..vectors.names import describe
from ..vectors.sharded import ShardedVector
from .meshes import auto_mesh, is_key, spec_along


# `loss(ps, st, batch)` gives `(value, st)` or `(value, (st, metrics))`.
Loss = Callable[[Params, State, PyTree], tuple[Array, Any]]
ValueAndGrad = Callable[[ShardedVector, State, PyTree], tuple[tuple[Array, Any], ShardedVector]]


def sharded_value_and_grad(loss: Loss, mesh: Mesh, axis: str = "data") -> ValueAndGrad:
    """Return the function that gives a loss and its gradient, the batch divided over devices.

    Each device gathers the vector, evaluates the loss for its part of the batch, and takes part in one sum
    after which it has its part of the gradient: one all-gather and one reduce-scatter, however many layers
    there are. A solver takes its own steps on each device. The loss is the mean over the devices of what they
    find: of a mean over the batch, that of the whole batch. A ratio of sums, such as a mean with a mask, needs
    its sums over all devices, `jax.lax.psum(x, axis)`, inside the loss.

    An optimiser belongs outside: in plain `jax.jit` norms of the whole vector are right.

    **Arguments:**

    - `loss`: `loss(ps, st, batch)` that returns `(value, st)` or `(value, (st, metrics))`; `ps` is the whole
        `ComponentVector`, `batch` this device's part.
    - `mesh`: the devices.
    - `axis`: the axis of the mesh along which the batch and the vector are cut.

    **Returns:** a function `(ps, st, batch) -> ((value, st), gradient)`, or with `(st, metrics)` for `st`.
    `ps` and `gradient` are `ShardedVector`s. Arrays of the batch have samples in front, a number of them that
    the devices divide; single numbers are for all. States are the same on each device: floating ones are
    means over them, integers and flags those of the first. A key is another one on each device, and comes
    back as one that is the same.

    **Raises:** `ValueError` for a batch that does not divide, for a `BatchNorm` in training whose `axis_name`
    is not `axis`, for an adjoint that has no gradient here; `TypeError` for a vector that is not sharded on
    this mesh, and for metrics that are no floating numbers.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import flatlayers as fl
    >>> mesh = jax.make_mesh((1,), ("data",))
    >>> model = fl.Dense(3, 1)
    >>> ps, st = fl.setup(jax.random.key(0), model)
    >>> def loss(ps, st, x):
    ...     y, st = model(x, ps, st)
    ...     return jnp.mean(y**2), st
    >>> value_and_grad = jax.jit(fl.sharded_value_and_grad(loss, mesh))
    >>> (value, st), gradient = value_and_grad(fl.shard(ps, mesh), st, jnp.ones((4, 3)))
    >>> gradient
    ShardedVector(float32[4], weight=(1, 3), bias=(1,), 1 part along 'data')
    """
    mesh = auto_mesh(mesh, axis, "sharded_value_and_grad")

    def value_and_grad(ps: ShardedVector, st: State, batch: PyTree) -> Any:
        _check_vector(ps, mesh, axis)
        vector = spec_along(axis, ps.data.ndim - 1)
        all_devices = PartitionSpec()
        run = jax.shard_map(
            lambda ps, st, batch: _on_a_device(loss, axis, ps, st, batch),
            mesh=mesh,
            in_specs=(vector, all_devices, batch_specs(batch, axis, ps.parts)),
            out_specs=((all_devices, all_devices), vector),
            # Solves cannot be traced with it, and gradients of replicated arrays have another meaning.
            check_vma=False,
        )
        return run(ps, st, batch)

    return value_and_grad


def _on_a_device(loss: Loss, axis: str, ps: ShardedVector, st: State, batch: PyTree) -> Any:
    own = jax.tree.map(lambda x: jax.random.fold_in(x, jax.lax.axis_index(axis)) if is_key(x) else x, st)

    def evaluate(ps: ShardedVector) -> tuple[Array, Any]:
        with data_axis(axis):
            value, rest = loss(ps.gather(), own, batch)
        return _floating(value), rest

    (value, rest), gradient = jax.value_and_grad(evaluate, has_aux=True)(ps)
    # What all devices find was summed, since each of them needs the parameters of all.
    gradient = jax.tree.map(lambda x: x / jnp.asarray(ps.parts, x.dtype), gradient)
    has_metrics = isinstance(rest, tuple) and len(rest) == 2
    new, metrics = rest if has_metrics else (rest, {})
    new = _same_states(axis, ps.parts, st, own, new)
    metrics = {name: jax.lax.pmean(_floating(x, name), axis) for name, x in metrics.items()}
    return (jax.lax.pmean(value, axis), (new, metrics) if has_metrics else new), gradient


def _same_states(axis: str, parts: int, st: State, own: State, new: State) -> State:
    """Return the states that devices found as ones that are the same on all of them."""
    before = dict(jax.tree_util.tree_leaves_with_path(st))
    given = dict(jax.tree_util.tree_leaves_with_path(own))

    def one(path: Any, x: Any) -> Any:
        if is_key(x):
            return _same_key(axis, parts, before.get(path), given.get(path), x)
        return jax.lax.pmean(x, axis) if jnp.issubdtype(jnp.result_type(x), jnp.inexact) else x

    return jax.tree_util.tree_map_with_path(one, new)


def _same_key(axis: str, parts: int, before: Key | None, given: Key | None, new: Key) -> Key:
    """Return one key for all devices: that of before if it was not used, else the next one."""
    if before is None:
        numbers = jax.lax.all_gather(jax.random.key_data(new), axis)
        return jax.random.wrap_key_data(numbers[0], impl=jax.random.key_impl(new))
    # The devices' own are those folded with 0 to `parts - 1`.
    return before if new is given else jax.random.fold_in(before, parts)


def _floating(x: Any, name: str = "the loss") -> Array:
    x = jnp.asarray(x)
    if x.shape or not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            f"sharded_value_and_grad: expected {name} to be one floating number, of which the mean over "
            f"devices is taken, found {describe(x)}"
        )
    return x


def _check_vector(ps: object, mesh: Mesh, axis: str) -> None:
    if not isinstance(ps, ShardedVector):
        raise TypeError(
            f"sharded_value_and_grad: expected a ShardedVector, as `fl.shard(ps, mesh)` gives one, found "
            f"{describe(ps)}"
        )
    if (ps.mesh, ps.axis) != (mesh, axis):
        raise TypeError(
            f"sharded_value_and_grad: expected a vector in parts along {axis!r} of {mesh}, found one along "
            f"{ps.axis!r} of {ps.mesh}"
        )


def batch_specs(batch: PyTree, axis: str, parts: int, lead: int = 0) -> PyTree:
    """Return how a batch lies: cut along its samples, which come behind so many leading axes.

    **Raises:** `ValueError` for a number of samples that the devices do not divide.
    """

    def one(path: Any, x: Any) -> PartitionSpec:
        shape = jnp.shape(x)[lead:]
        if not shape:
            return PartitionSpec()
        if shape[0] % parts:
            place = jax.tree_util.keystr(path)
            raise ValueError(
                f"expected a batch whose number of samples {parts} devices divide, found {shape[0]} samples"
                f"{f' at {place}' if place else ''}, shape {shape}"
            )
        return spec_along(axis, lead)

    return jax.tree_util.tree_map_with_path(one, batch)
