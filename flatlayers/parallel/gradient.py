"""`sharded_value_and_grad`: each device the gradient of its part of the batch, one sum over all devices."""

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from ..core.data_axis import data_axis
from ..dtypes import is_key, promoted
from ..types import Array, ArrayLike, DType, Key, Params, PyTree, State
from ..vectors.names import describe
from ..vectors.sharded import ShardedVector
from .meshes import auto_mesh, spec_along


# `loss(ps, st, batch)` gives `(value, st)` or `(value, (st, metrics))`.
Loss = Callable[[Params, State, PyTree], tuple[Array, Any]]
ValueAndGrad = Callable[[ShardedVector, State, PyTree], tuple[tuple[Array, Any], ShardedVector]]
# The keys of JAX that lead to a leaf of a pytree.
Path: TypeAlias = tuple[Any, ...]


def sharded_value_and_grad(loss: Loss, mesh: Mesh, axis: str = "data") -> ValueAndGrad:
    """Return the function that gives a loss and its gradient, the batch divided over devices.

    Each device gathers the vector, evaluates the loss for its part of the batch, and takes part in one sum
    after which it has its part of the gradient: one all-gather and one reduce-scatter, however many layers
    there are. A solver takes its own steps on each device. The loss is the mean over the devices of what
    they find: of a mean over the batch, that of the whole batch. A ratio of sums, such as a mean with a mask,
    needs its sums over all devices, `jax.lax.psum(x, axis)`, inside the loss.

    An optimiser belongs outside: in plain `jax.jit` norms of the whole vector are right.

    **Arguments:**

    - `loss`: `loss(ps, st, batch)` that returns `(value, st)` or `(value, (st, metrics))`; `ps` is the whole
        `ComponentVector`, `batch` this device's part.
    - `mesh`: the devices.
    - `axis`: the axis of the mesh along which the batch and the vector are cut.

    **Returns:** a function `(ps, st, batch) -> ((value, st), gradient)`, or with `(st, metrics)` for `st`.
    `ps` and `gradient` are `ShardedVector`s. Arrays of the batch have samples in front, the same number of
    them, which the devices divide; single numbers are for all. States are the same on each device: floating
    ones are means over them, integers and flags those of the first. A typed key is another one on each
    device, and comes back as one that is the same.

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
    device = jax.lax.axis_index(axis)
    own = jax.tree.map(lambda x: fold_in(x, device) if is_key(x) else x, st)
    merge = _Merge(axis, ps.parts, st, own)

    def evaluate(ps: ShardedVector) -> tuple[Array, Any]:
        with data_axis(axis):
            found = loss(ps.gather(), own, batch)
        if not isinstance(found, tuple) or len(found) != 2:
            raise TypeError(
                "sharded_value_and_grad: expected the loss to return (value, st) or (value, (st, metrics)), "
                f"found {describe(found)}"
            )
        merge.see(found[1])
        return _floating(found[0]), found[1]

    (value, rest), gradient = jax.value_and_grad(evaluate, has_aux=True)(ps)
    # Devices' gradients were summed, since each of them needs the parameters of all.
    gradient = jax.tree.map(lambda x: x / jnp.asarray(ps.parts, x.dtype), gradient)
    return merge.results(value, rest), gradient


@dataclasses.dataclass
class _Merge:
    """From the states that devices find to those that all of them have.

    `before` are the states that came in, `own` those with the keys of this device. `same` has the paths of
    those that the loss handed on as they were.
    """

    axis: str
    parts: int
    before: State
    own: State
    same: set[Path] = dataclasses.field(default_factory=set)

    def see(self, rest: PyTree) -> None:
        """Take notice of what is handed on while the loss is traced: later it can no longer be told."""
        own = _by_path(self.own)
        self.same = {path for path, x in _by_path(_state_of(rest)).items() if x is own.get(path)}

    def results(self, value: Array, rest: PyTree) -> tuple[Array, Any]:
        """Return the value and the states, with metrics if there are any, as ones for all devices."""
        new, metrics = _state_of(rest), rest[1] if _has_metrics(rest) else {}
        if not isinstance(metrics, Mapping):
            raise TypeError(
                f"sharded_value_and_grad: expected metrics as a mapping of numbers, found {describe(metrics)}"
            )
        metrics = {name: _floating(x, f"the metric {name!r}") for name, x in metrics.items()}
        states = _by_path(new)
        changed = {path: jnp.asarray(x) for path, x in states.items() if path not in self.same}
        floats = [path for path, x in changed.items() if _is_inexact(x)]
        value, metrics, means = self._means((value, metrics, [changed[path] for path in floats]))
        merged = {**_by_path(self.before), **dict(zip(floats, means, strict=True))}
        for path, x in changed.items():
            if is_key(x):
                merged[path] = self._key(path, x)
            elif not _is_inexact(x):
                merged[path] = self._first(x)
        new = jax.tree.unflatten(jax.tree.structure(new), [merged[path] for path in states])
        return value, (new, metrics) if _has_metrics(rest) else new

    def _means(self, tree: PyTree) -> Any:
        """Return means over all devices, by one sum of one array, whatever the dtypes."""
        leaves, structure = jax.tree.flatten(tree)
        dtype = promoted(*(x.dtype for x in leaves))
        packed = jax.lax.pmean(jnp.concatenate([x.astype(dtype).reshape(-1) for x in leaves]), self.axis)
        places = itertools.accumulate((x.size for x in leaves), initial=0)
        parts = (packed[i : i + x.size].reshape(x.shape) for i, x in zip(places, leaves, strict=False))
        return jax.tree.unflatten(structure, [_cast(a, x.dtype) for a, x in zip(parts, leaves, strict=True)])

    def _first(self, x: Array) -> Array:
        """Return the numbers of the first device, in all of them."""
        numbers = x.astype(jnp.uint8) if x.dtype == bool else x
        mine = jnp.where(jax.lax.axis_index(self.axis) == 0, numbers, jnp.zeros_like(numbers))
        return jax.lax.psum(mine, self.axis).astype(x.dtype)

    def _key(self, path: Path, new: Key) -> Key:
        """Return one key for all devices: that of before if the loss did not use it, else the next one."""
        before = _by_path(self.before).get(path)
        if not is_key(before) or (before.shape, before.dtype) != (new.shape, new.dtype):
            first = self._first(jax.random.key_data(new))
            return jax.random.wrap_key_data(first, impl=jax.random.key_impl(new))
        own = _by_path(self.own)[path]
        unused = jnp.all(jax.random.key_data(new) == jax.random.key_data(own))
        # The devices' own keys are those folded with 0 to `parts - 1`.
        return jnp.where(unused, before, fold_in(before, self.parts))


def _has_metrics(rest: PyTree) -> bool:
    # A state is no tuple, but `None`, a record or another mapping.
    return isinstance(rest, tuple) and len(rest) == 2


def _state_of(rest: PyTree) -> State:
    return rest[0] if _has_metrics(rest) else rest


def _by_path(tree: PyTree) -> dict[Path, Any]:
    return dict(jax.tree_util.tree_leaves_with_path(tree))


def _is_inexact(x: Array) -> bool:
    return jnp.issubdtype(x.dtype, jnp.inexact)


def _cast(x: Array, dtype: DType) -> Array:
    if jnp.issubdtype(x.dtype, jnp.complexfloating) and not jnp.issubdtype(dtype, jnp.complexfloating):
        x = x.real
    return x.astype(dtype)


def fold_in(keys: Key, number: ArrayLike) -> Key:
    """Fold a number into a key, or into each of an array of them."""
    if not jnp.shape(keys):
        return jax.random.fold_in(keys, number)
    each = jax.vmap(jax.random.fold_in, in_axes=(0, None))
    return each(keys.reshape(-1), jnp.asarray(number)).reshape(keys.shape)


def _floating(x: ArrayLike, name: str = "the loss") -> Array:
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

    **Raises:** `ValueError` for a number of samples that the devices do not divide, and for different ones.
    """
    counts = {jnp.shape(x)[lead] for x in jax.tree.leaves(batch) if jnp.ndim(x) > lead}
    if len(counts) > 1:
        raise ValueError(
            "expected a batch of arrays with the same number of samples in front, which are cut together, "
            f"found {describe(batch)}; an array without samples, such as times, is one to close over"
        )

    def one(path: Path, x: ArrayLike) -> PartitionSpec:
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
