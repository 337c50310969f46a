"""`shard`: a vector in even parts over devices; `optimizer_state`: the state of an optimiser beside it."""

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from ..dtypes import is_traced
from ..types import Array, Params, PyTree
from ..vectors.names import describe
from ..vectors.sharded import ShardedVector, cut, padded_length
from ..vectors.vector import ComponentVector
from .meshes import auto_mesh, replicated, spec_along
from .synchronize import check_synchronized


if TYPE_CHECKING:
    import optax


def shard(ps: ComponentVector, mesh: Mesh, axis: str = "data") -> ShardedVector:
    """Cut a vector into even parts, one for each device along an axis of a mesh.

    The numbers are copied, so that a step that gives up its arguments leaves `ps` as it is.

    **Arguments:**

    - `ps`: the vector, of shape `(..., n)`. With several processes each has the same one.
    - `mesh`: the devices. Its axes may be of any type; along those other than `axis` the parts are repeated.
    - `axis`: the name of the axis.

    **Returns:** a `ShardedVector` whose parts have `ceil(n / devices)` numbers each, the last ones zeros.

    **Raises:** `TypeError` for what is no `ComponentVector` or no mesh, `ValueError` for an axis that the
    mesh has not, and for processes with different vectors.

    >>> import jax
    >>> import flatlayers as fl
    >>> ps = fl.initial_parameters(jax.random.key(0), fl.Dense(3, 2))
    >>> shards = fl.shard(ps, jax.make_mesh((1,), ("data",)))
    >>> bool((shards.gather() == ps).data.all())
    True
    """
    if isinstance(ps, ShardedVector):
        raise TypeError("shard: expected a ComponentVector, found a ShardedVector; `.gather()` gives one")
    if not isinstance(ps, ComponentVector) or not isinstance(ps.data, jax.Array | np.ndarray):
        raise TypeError(f"shard: expected a ComponentVector, found {describe(ps)}")
    mesh, data = auto_mesh(mesh, axis, "shard"), ps.data
    if isinstance(data, np.ndarray) or (jax.process_count() > 1 and _is_on_host(data)):
        check_synchronized(ps)
        return cut(np.asarray(data), ps.layout, mesh, axis)
    sharding = NamedSharding(mesh, spec_along(axis, data.ndim - 1))
    padding = padded_length(ps.layout.length, mesh.shape[axis]) - ps.layout.length
    if is_traced(data):
        data = jax.lax.with_sharding_constraint(_padded(data, padding), sharding)
    elif jax.process_count() > 1:
        data = jax.jit(_padded, static_argnums=1, out_shardings=sharding)(data, padding)
    else:
        # The copy is what is given away: one that lies right already would be shared.
        data = jax.device_put(_padded(data, padding), sharding)
    return ShardedVector(data, ps.layout, mesh, axis)


def _padded(data: Array, padding: int) -> Array:
    """Return a copy with so many zeros behind it."""
    return jnp.pad(data, [(0, 0)] * (data.ndim - 1) + [(0, padding)]) if padding else jnp.copy(data)


def _is_on_host(data: Array) -> bool:
    """Tell whether this process has all of the numbers."""
    return not is_traced(data) and (data.is_fully_addressable or data.is_fully_replicated)


def optimizer_state(optimizer: "optax.GradientTransformation", ps: Params) -> PyTree:
    """Make the state of an optimiser, with its moments where the parameters are.

    `jax.jit(optimizer.init)` would put them whole on one device.

    **Arguments:**

    - `optimizer`: an optax optimiser. One that works leaf by leaf has no leaves here, see `fl.per_leaf`.
    - `ps`: the parameters. Of a `ShardedVector`, moments are cut alike and all else is on each device.

    **Returns:** the state, as `optimizer.init(ps)` gives it.

    >>> import jax
    >>> import optax
    >>> import flatlayers as fl
    >>> ps = fl.initial_parameters(jax.random.key(0), fl.Dense(3, 2))
    >>> ps = fl.shard(ps, jax.make_mesh((1,), ("data",)))
    >>> fl.optimizer_state(optax.adam(1e-3), ps)[0].mu
    ShardedVector(float32[8], weight=(2, 3), bias=(2,), 1 part along 'data')
    """
    if not isinstance(ps, ShardedVector):
        return optimizer.init(ps)
    types = jax.eval_shape(optimizer.init, ps)
    return jax.jit(optimizer.init, out_shardings=shardings_of(types, ps.mesh))(ps)


def shardings_of(tree: PyTree, mesh: Mesh) -> PyTree:
    """Return how the leaves of a tree lie: those of sharded vectors in parts, all others on each device."""

    def one(node: PyTree) -> Any:
        if not isinstance(node, ShardedVector):
            return replicated(mesh)

        def of_data(data: Array) -> NamedSharding:
            # An optimiser may have something else in the place of the numbers, such as one number for all.
            is_whole = node.with_data(data).is_whole
            return node.sharding(len(data.shape) - 1) if is_whole else replicated(mesh)

        return node.with_data(jax.tree.map(of_data, node.data))

    return jax.tree.map(one, tree, is_leaf=lambda node: isinstance(node, ShardedVector))
