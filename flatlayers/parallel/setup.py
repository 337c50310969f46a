"""`setup_sharded`: initial parameters in even parts, each drawn where it lies."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from ..core.drawing import Drawing, Keys
from ..core.setup import Model, drawings_of, initial_states, own_key
from ..dtypes import is_key, is_traced
from ..types import Array, DType, Key
from ..vectors.layout import Layout
from ..vectors.record import Record
from ..vectors.sharded import ShardedVector, padded_length
from .meshes import auto_mesh, replicated, spec_along
from .synchronize import check_synchronized


def setup_sharded(
    key: Key, layer: Model, mesh: Mesh, axis: str = "data", dtype: DType = jnp.float32
) -> tuple[ShardedVector, Record]:
    """Make the initial parameters and states of a layer over the devices of a mesh.

    The numbers are those of `fl.setup` with the same key, bit for bit. No process ever has the whole vector:
    each draws what lies in the parts of its devices, one part after another, beside which it has the leaf, or
    the million numbers of it, that it is drawing. A leaf whose initializer is not of `fl.initializers`, or is
    `orthogonal` or `sparse`, is drawn whole for each part that it reaches into.

    **Arguments:**

    - `key`: a PRNG key. With several processes each has the same one.
    - `layer`: a layer or a mapping, as for `fl.setup`.
    - `mesh`: the devices. Its axes may be of any type.
    - `axis`: the name of the axis along which the vector is cut.
    - `dtype`: the dtype of the vector and of floating states.

    **Returns:** `(ps, st)`: a `ShardedVector`, and a `Record` whose arrays are whole on each device.

    **Raises:** `TypeError` for what is no PRNG key, no layer or no mesh, and inside of `jax.jit`;
    `ValueError` for several keys, for an axis that the mesh has not, and for processes with different keys.

    >>> import jax
    >>> import flatlayers as fl
    >>> mesh = jax.make_mesh((1,), ("data",))
    >>> ps, st = fl.setup_sharded(jax.random.key(0), fl.Dense(3, 2), mesh)
    >>> ps
    ShardedVector(float32[8], weight=(2, 3), bias=(2,), 1 part along 'data')
    """
    mesh = auto_mesh(mesh, axis, "setup_sharded")
    keys = Keys(_one_key(key))
    layout, draws = drawings_of(layer, dtype)
    length = padded_length(layout.length, mesh.shape[axis])
    sharding = NamedSharding(mesh, spec_along(axis, 0))
    devices: dict[tuple[int, int], list[Any]] = {}
    for device, index in sharding.addressable_devices_indices_map((length,)).items():
        start, stop, _ = index[0].indices(length)  # pyright: ignore[reportOptionalSubscript]
        devices.setdefault((start, stop), []).append(device)
    arrays = []
    for (start, stop), where in sorted(devices.items()):
        part = _part(layout, draws, keys, dtype, start, stop)
        # Before the next one is drawn: until it is on its devices, the part is there twice.
        arrays += jax.block_until_ready([jax.device_put(part, device) for device in where])
    data = jax.make_array_from_single_device_arrays((length,), sharding, arrays)
    return ShardedVector(data, layout, mesh, axis), _on_each(initial_states(key, layer, dtype), mesh)


def _one_key(key: Key) -> Key:
    if is_traced(key):
        raise TypeError(f"setup_sharded: expected a PRNG key outside of jax.jit and jax.vmap, found {key!r}")
    own = own_key(key)
    if own.ndim:
        raise ValueError(
            f"setup_sharded: expected one PRNG key, found an array of them, of shape {own.shape}"
        )
    check_synchronized(own)
    return own


def _part(
    layout: Layout, draws: list[Drawing], keys: Keys, dtype: DType, start: int, stop: int
) -> np.ndarray:
    """Return the numbers from `start` to `stop` of the initial vector, with zeros behind its end."""
    part = np.zeros(stop - start, jax.dtypes.canonicalize_dtype(dtype))
    for draw in draws:
        for piece in draw.pieces(layout, keys, dtype):
            reaching = np.flatnonzero((piece.starts < stop) & (piece.starts + piece.size > start))
            if not reaching.size:
                continue
            rows = np.asarray(piece.rows(dtype))
            for row, first in zip(rows[reaching], piece.starts[reaching], strict=True):
                low, high = max(first, start), min(first + piece.size, stop)
                part[low - start : high - start] = row[low - first : high - first]
    return part


def _on_each(st: Record, mesh: Mesh) -> Record:
    """Return a state whose arrays are on each device of a mesh."""
    sharding = replicated(mesh)

    def placed(x: Array) -> Array:
        if jax.process_count() == 1:
            return jax.device_put(x, sharding)
        if is_key(x):
            return jax.random.wrap_key_data(placed(jax.random.key_data(x)), impl=jax.random.key_impl(x))
        numbers = np.asarray(x)
        return jax.make_array_from_callback(numbers.shape, sharding, lambda index: numbers[index])

    return jax.tree.map(placed, st)
