"""Arrays on several devices: cut along an axis, or other ones on each device."""

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from .dtypes import is_traced
from .types import Array, PyTree


def varying_like(tree: PyTree, like: PyTree) -> PyTree:
    """Return `tree`, said to differ between the devices between which `like` does.

    In `jax.shard_map` the carry of a loop has to from its start on: zeros are the same on all devices, but
    what comes of them is not. Elsewhere nothing is done.
    """
    axes = _varying_axes(like)
    return jax.tree.map(lambda x: _varying(x, axes), tree) if axes else tree


def _varying(x: Array, axes: frozenset[str]) -> Array:
    return jax.lax.pcast(x, tuple(sorted(axes - _varying_axes(x))), to="varying")


def _varying_axes(tree: PyTree) -> frozenset[str]:
    kinds: list[PyTree] = [jax.typeof(x) for x in jax.tree.leaves(tree) if isinstance(x, jax.Array)]
    # Older JAX has them in another place.
    axes = [kind.mat.varying if hasattr(kind, "mat") else kind.vma for kind in kinds]
    return frozenset().union(*axes)


def gathered(x: Array) -> Array:
    """Return `x`, whose last axis each device has as a whole.

    A vector that is cut along it has to be gathered before it is split into leaves. Else the compiler sends
    the pieces of each leaf from device to device, by several permutations a leaf. Without a mesh of devices
    nothing is done.
    """
    sharding = jax.typeof(x).sharding
    kinds = set(sharding.mesh.axis_types)
    if sharding.mesh.empty or AxisType.Manual in kinds:
        return x
    free = [PartitionSpec.UNCONSTRAINED] * (x.ndim - 1)
    if kinds == {AxisType.Auto}:
        if not is_traced(x) and x.sharding.is_fully_replicated:
            return x
        return jax.lax.with_sharding_constraint(x, NamedSharding(sharding.mesh, PartitionSpec(*free, None)))
    spec = tuple(sharding.spec)
    if len(spec) < x.ndim or spec[-1] is None:
        return x
    return jax.sharding.reshard(x, NamedSharding(sharding.mesh, PartitionSpec(*spec[:-1], None)))
