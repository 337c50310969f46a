"""Placing the values of a training loop: on one device, or over the devices of a mesh."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ..dtypes import is_key
from ..parallel.gradient import sharded_value_and_grad
from ..parallel.meshes import auto_mesh, replicated, spec_along
from ..parallel.shard import shard, shardings_of
from ..parallel.synchronize import check_synchronized
from ..types import Array, Params, PyTree, Shape, State
from ..vectors.names import describe
from ..vectors.sharded import ShardedVector
from ..vectors.vector import ComponentVector
from .per_leaf import Optimizer


# Of `(ps, st, batch)`: the value, with the state and the metrics.
Evaluate = Callable[[Params, State, PyTree], tuple[Array, Any]]


@dataclasses.dataclass(frozen=True)
class OneDevice:
    """One device, where JAX puts everything by itself: nothing is moved, and no program is another one."""

    processes = 1
    is_first = True

    def parameters(self, tree: PyTree) -> Any:
        """Return parameters, or a tree with moments of them, where they belong."""
        return tree

    def everywhere(self, tree: PyTree, *, copied: bool = True) -> Any:
        """Return arrays that each device has; not `copied` if no step gives them up."""
        return tree

    def optimizer_state(self, optimizer: Optimizer, ps: Params) -> Any:
        """Return the first state of an optimiser."""
        return optimizer.init(ps)

    def types_shown(self, tree: PyTree) -> Any:
        """Return the types of a tree as those that an optimiser sees."""
        return tree

    def given_back(self, tree: PyTree) -> Any:
        """Return a tree with vectors of the kind that was given."""
        return tree

    def settled(self, tree: PyTree) -> Any:
        """Return what a program computes, before another one is started where this could block both."""
        return tree

    def agreed(self, stop: bool) -> bool:
        """Tell whether any of the processes wants to stop."""
        return stop

    def expect_same_plan(self, **numbers: int | None) -> None:
        """Raise unless all processes have the same numbers of steps."""

    def batch(self, tree: PyTree) -> Any:
        """Return a batch of arrays, on the devices."""
        return jax.tree.map(jnp.asarray, tree)

    def to_validate(self, tree: PyTree, *, is_whole: bool = False) -> Any:
        """Return a batch to validate with; `is_whole`: each process has all of it."""
        return self.batch(tree)

    def stack(self, path: Any, leaves: Sequence[Any]) -> Array:
        """Return arrays of batches as one, on the devices; keys have no numbers for NumPy."""
        return jnp.stack(leaves) if is_key(leaves[0]) else jnp.asarray(np.stack(leaves))

    def rows(self, size: int) -> NamedSharding | None:
        """Return how the rows of batches of this size lie."""
        return None

    # In compiled steps

    def value(self, evaluate: Evaluate) -> Evaluate:
        """Return the function that evaluates for a vector as it lies."""
        return evaluate

    def value_and_grad(self, evaluate: Evaluate) -> Callable[..., Any]:
        """Return the function that also gives the gradient, which lies as the vector does."""
        return jax.value_and_grad(evaluate, has_aux=True)

    def shown(self, tree: PyTree) -> Any:
        """Return a tree as an optimiser sees it on one device."""
        return tree

    def hidden(self, tree: PyTree) -> Any:
        """Return what an optimiser made as it lies."""
        return tree


@dataclasses.dataclass(frozen=True)
class OnMesh:
    """The devices along an axis of a mesh: vectors in even parts, batches cut, all else on each device.

    `gathers` says whether vectors are given back as a whole, `per_device` whether each device evaluates the
    loss for its part of the batch. All methods but those of the data are for all processes together.
    """

    mesh: Mesh
    axis: str
    per_device: bool
    gathers: bool

    @property
    def processes(self) -> int:
        """The number of processes."""
        return jax.process_count()

    @property
    def is_first(self) -> bool:
        """Tell whether this process is the one that shows and writes."""
        return jax.process_index() == 0

    def parameters(self, tree: PyTree) -> Any:
        """Return copies of parameters, or of a tree with moments of them, in parts."""
        return jax.tree.map(self._placed, tree, is_leaf=_is_vector)

    def _placed(self, part: Any) -> Any:
        if isinstance(part, ShardedVector):
            if (part.mesh, part.axis) != (self.mesh, self.axis):
                raise TypeError(
                    f"train_loop: expected vectors in parts along {self.axis!r} of {self.mesh}, found one "
                    f"along {part.axis!r} of {part.mesh}"
                )
            return part.with_data(_placed(part.data, part.data.sharding))
        if _is_full(part):
            return shard(part, self.mesh, self.axis)
        return self.everywhere(part)

    def everywhere(self, tree: PyTree, *, copied: bool = True) -> Any:
        """Return arrays on each device. Processes have to have the same ones."""
        check_synchronized(tree)
        return jax.tree.map(lambda x: _placed(x, replicated(self.mesh), copied=copied), tree)

    def optimizer_state(self, optimizer: Optimizer, ps: Params) -> Any:
        """Return the first state of an optimiser, with moments in parts."""

        def init(ps: Params) -> PyTree:
            return self.hidden(optimizer.init(self.shown(ps)))

        types = jax.eval_shape(init, ps)
        return jax.jit(init, out_shardings=shardings_of(types, self.mesh))(ps)

    def types_shown(self, tree: PyTree) -> Any:
        """Return the types of a tree as those that an optimiser sees."""
        return jax.eval_shape(self.shown, tree)

    def given_back(self, tree: PyTree) -> Any:
        """Return a tree with vectors of the kind that was given."""
        return _gathered(tree) if self.gathers else tree

    def settled(self, tree: PyTree) -> Any:
        """Return what a program computes, before another one is started.

        Devices of a host share its threads: programs that wait for each other's numbers could take them all.
        """
        return jax.block_until_ready(tree)

    def agreed(self, stop: bool) -> bool:
        """Tell whether any of the processes wants to stop."""
        if self.processes == 1:
            return stop
        from jax.experimental import multihost_utils

        return bool(multihost_utils.process_allgather(np.array(stop)).any())

    def expect_same_plan(self, **numbers: int | None) -> None:
        """Raise unless all processes have the same numbers of steps: else they would wait for each other."""
        if self.processes == 1:
            return
        from jax.experimental import multihost_utils

        mine = np.array([-1 if number is None else number for number in numbers.values()], np.int64)
        # In halves, since without x64 integers have 32 bits.
        others = np.asarray(multihost_utils.process_allgather(mine.view(np.uint32))).view(np.int64)
        for name, found in zip(numbers, others.T, strict=True):
            if (found != found[0]).any():
                of_each = ["none" if number == -1 else number for number in found]
                listed = ", ".join(f"{number} in process {index}" for index, number in enumerate(of_each))
                file = "; the file to resume has to be there for all of them" if name == "start" else ""
                raise ValueError(
                    f"train_loop: expected the same {name} in all processes, found {listed}{file}"
                )

    # The data

    def batch(self, tree: PyTree) -> Any:
        """Return a batch cut along its samples. Of several processes each has its own part."""
        return jax.tree_util.tree_map_with_path(lambda path, x: self._cut(path, x, 0), tree)

    def to_validate(self, tree: PyTree, *, is_whole: bool = False) -> Any:
        """Return a batch to validate with, on each device where it cannot be cut.

        `is_whole`: each process has all of it.
        """
        sizes = [x.shape[0] for x in jax.tree.leaves(tree) if np.ndim(x)]
        undivided = any(size % self._parts for size in sizes) and not self.per_device
        if undivided and (is_whole or self.processes == 1):
            return jax.tree.map(lambda x: _placed(x, replicated(self.mesh)), tree)
        if is_whole and self.processes > 1:
            return jax.tree.map(lambda x: _placed(x, self._along(0 if np.ndim(x) else None)), tree)
        return self.batch(tree)

    def stack(self, path: Any, leaves: Sequence[Any]) -> Array:
        """Return arrays of batches as one: on the devices if they are there, else straight from the host."""
        if self._is_here(leaves[0]):
            return _stack_on(NamedSharding(self.mesh, PartitionSpec(None, *self._spec(leaves[0]))))(*leaves)
        stacked = jnp.stack(leaves) if is_key(leaves[0]) else np.stack(leaves)
        return self._cut(path, stacked, 1)

    def rows(self, size: int) -> NamedSharding:
        """Return how the rows of batches of this size lie: so that a device gathers those of its part."""
        if size % self._parts:
            raise ValueError(
                f"train_loop: expected batches of a size that {self._parts} devices divide, found {size}"
            )
        return self._along(1)

    @property
    def _parts(self) -> int:
        return self.mesh.shape[self.axis]

    def _along(self, lead: int | None) -> NamedSharding:
        """Return how arrays lie that are cut behind so many leading axes; `None`: that are not."""
        return NamedSharding(self.mesh, PartitionSpec() if lead is None else spec_along(self.axis, lead))

    def _is_here(self, x: object) -> bool:
        """Tell whether it is an array over all devices of the mesh, which is taken as it is."""
        return isinstance(x, jax.Array) and x.sharding.device_set == set(self.mesh.devices.flat)

    def _spec(self, x: Array) -> PartitionSpec:
        """Return how an array over the devices is cut."""
        sharding = x.sharding
        if isinstance(sharding, NamedSharding) and sharding.mesh.axis_names == self.mesh.axis_names:
            return sharding.spec
        return self._along(0 if x.ndim else None).spec

    def _cut(self, path: Any, x: Any, lead: int) -> Array:
        """Return an array of a batch, with its samples behind so many leading axes, on the devices."""
        is_here, shape = self._is_here(x), np.shape(x)[lead:]
        if not is_here and self.processes > 1:
            self._expect_same_shapes(path, shape)
        parts = self._parts if is_here else self._parts_here()
        if shape and shape[0] % parts and (self.per_device or not is_here):
            raise ValueError(_does_not_divide(path, shape, parts, self.processes))
        if is_here:
            # The axes of its mesh may be of other types.
            return jax.device_put(x, NamedSharding(self.mesh, self._spec(x)))
        return _from_process(x, self._along(lead if shape else None))

    def _expect_same_shapes(self, path: Any, shape: Shape) -> None:
        """Raise unless the parts of all processes are alike: each would take another size for the whole."""
        try:
            check_synchronized(np.array(shape, np.int64))
        except ValueError:
            place = jax.tree_util.keystr(path)
            raise ValueError(
                "train_loop: expected batches of the same shape in all processes, found "
                f"{shape}{f' at {place}' if place else ''} in process {jax.process_index()} and another one "
                "elsewhere"
            ) from None

    def _parts_here(self) -> int:
        """Return the number of parts that lie on the devices of this process."""
        places = NamedSharding(self.mesh, PartitionSpec(self.axis)).addressable_devices_indices_map(
            (self._parts,)
        )
        return len(set(map(str, places.values())))

    # In compiled steps

    def value(self, evaluate: Evaluate) -> Evaluate:
        """Return the function that evaluates for a vector in parts, or as an optimiser sees it."""
        if self.per_device:
            of_parts = _differentiable(self.value_and_grad(evaluate))
            return lambda ps, st, batch: of_parts(self.hidden(ps), st, batch)
        return lambda ps, st, batch: self._on_each(evaluate(self._gathered(ps), st, batch))

    def value_and_grad(self, evaluate: Evaluate) -> Callable[..., Any]:
        """Return the function that also gives the gradient, in parts."""
        if self.per_device:
            return sharded_value_and_grad(evaluate, self.mesh, self.axis)
        of_whole = jax.value_and_grad(evaluate, has_aux=True)

        def value_and_grad(ps: Params, st: State, batch: PyTree) -> Any:
            # Nothing between the two ends is in parts of a vector, which end anywhere in a leaf.
            found, gradient = of_whole(self._gathered(ps), st, batch)
            return found, self.hidden(self._on_each(gradient))

        return value_and_grad

    def shown(self, tree: PyTree) -> Any:
        """Return a tree as an optimiser sees it on one device: vectors without the zeros behind them."""

        def one(part: Any) -> Any:
            if not isinstance(part, ShardedVector):
                return part
            return ComponentVector._new(data=part.data[..., : part.layout.length], layout=part.layout)

        return jax.tree.map(one, tree, is_leaf=_is_vector)

    def hidden(self, tree: PyTree) -> Any:
        """Return what an optimiser made as it lies, with vectors in parts."""
        tree = jax.tree.map(
            lambda part: shard(part, self.mesh, self.axis) if _is_full(part) else part,
            tree,
            is_leaf=_is_vector,
        )
        return self._on_each(tree)

    def _gathered(self, ps: Params) -> Any:
        """Return whole vectors, each on all devices."""
        return self._on_each(_gathered(self.hidden(ps)))

    def _on_each(self, tree: PyTree) -> Any:
        """Return a tree whose vectors are in parts, and all else on each device."""
        return jax.lax.with_sharding_constraint(tree, shardings_of(tree, self.mesh))


Placing: TypeAlias = OneDevice | OnMesh


def placing_of(mesh: Mesh | None, axis: str, per_device: bool, ps: Params) -> Placing:
    """Return the way to place the values of a training loop. **Raises:** for what does not go together."""
    parts = jax.tree.leaves(ps, is_leaf=_is_vector)
    in_parts = [part for part in parts if isinstance(part, ShardedVector)]
    if mesh is None:
        if per_device:
            raise ValueError("train_loop: expected a mesh with per_device=True, found none")
        if in_parts:
            raise ValueError(f"train_loop: expected mesh= with the {in_parts[0]!r}, found none")
        return OneDevice()
    if per_device and not isinstance(ps, ComponentVector | ShardedVector):
        raise TypeError(
            "train_loop: expected ps to be a ComponentVector or a ShardedVector with per_device=True, found "
            f"{describe(ps)}"
        )
    return OnMesh(auto_mesh(mesh, axis, "train_loop"), axis, per_device, gathers=not in_parts)


def _is_vector(part: object) -> bool:
    return isinstance(part, ComponentVector | ShardedVector)


def _is_full(part: object) -> bool:
    """Tell whether it is a whole vector: optimisers put other things in its place."""
    shape = getattr(part.data, "shape", ()) if isinstance(part, ComponentVector) else ()
    return bool(shape) and isinstance(part, ComponentVector) and shape[-1] == part.layout.length


def _gathered(tree: PyTree) -> Any:
    return jax.tree.map(
        lambda part: part.gather() if isinstance(part, ShardedVector) else part, tree, is_leaf=_is_vector
    )


def _differentiable(value_and_grad: Callable[..., Any]) -> Evaluate:
    """Return a function that evaluates, whose derivative by the parameters is the gradient found with it."""

    @jax.custom_vjp
    def value(ps: Params, st: State, batch: PyTree) -> Any:
        return value_and_grad(ps, st, batch)[0]

    def backward(gradient: Params, by: Any) -> Any:
        return jax.tree.map(lambda x: x * by[0].astype(x.dtype), gradient), None, None

    value.defvjp(lambda ps, st, batch: value_and_grad(ps, st, batch), backward)
    return value


def _does_not_divide(path: Any, shape: Shape, parts: int, processes: int) -> str:
    place = jax.tree_util.keystr(path)
    whose = " of this process" if processes > 1 else ""
    return (
        f"train_loop: expected a batch whose number of samples {parts} devices{whose} divide, found "
        f"{shape[0]} samples{f' at {place}' if place else ''}, shape {shape}; an array without samples in "
        "front can be closed over by the loss"
    )


def _placed(x: Any, sharding: NamedSharding, *, copied: bool = True) -> Array:
    """Return an array, of which each process has all, on the devices: one that a step can give up."""
    if is_key(x):
        numbers = _placed(jax.random.key_data(x), sharding, copied=copied)
        return jax.random.wrap_key_data(numbers, impl=jax.random.key_impl(x))
    if isinstance(x, jax.Array) and x.sharding.device_set == sharding.device_set:
        return _copy_to(sharding)(x)
    if jax.process_count() == 1:
        return jax.device_put(jnp.copy(x) if copied else x, sharding)
    numbers = np.asarray(x)
    return jax.make_array_from_callback(numbers.shape, sharding, lambda index: numbers[index])


def _from_process(x: Any, sharding: NamedSharding) -> Array:
    """Return an array of which each process has its part, on the devices."""
    if jax.process_count() == 1:
        return jax.device_put(x, sharding)
    if is_key(x):
        numbers = _from_process(jax.random.key_data(x), sharding)
        return jax.random.wrap_key_data(numbers, impl=jax.random.key_impl(x))
    numbers = np.asarray(x, jax.dtypes.canonicalize_dtype(np.asarray(x).dtype))
    return jax.make_array_from_process_local_data(sharding, numbers)


@functools.lru_cache(maxsize=16)
def _copy_to(sharding: NamedSharding) -> Callable[[Array], Array]:
    return jax.jit(jnp.copy, out_shardings=sharding)


@functools.lru_cache(maxsize=16)
def _stack_on(sharding: NamedSharding) -> Callable[..., Array]:
    return jax.jit(lambda *leaves: jnp.stack(leaves), out_shardings=sharding)
