"""`synchronize` and `check_synchronized`: the same arrays in all processes."""

import zlib
from typing import Any

import jax
import numpy as np

from ..types import Array, PyTree
from .meshes import is_key


def synchronize(tree: PyTree) -> PyTree:
    """Return the arrays of the first process, in all processes, each of which has to call it.

    **Arguments:**

    - `tree`: a pytree of arrays, numbers and typed keys; structure, shapes and dtypes are the same in all.

    **Returns:** the tree, as arrays of this process. With one process it is the tree itself.

    >>> import jax.numpy as jnp
    >>> import flatlayers as fl
    >>> fl.synchronize({"a": jnp.ones(2)})
    {'a': Array([1., 1.], dtype=float32)}
    """
    if jax.process_count() == 1:
        return tree
    from jax.experimental import multihost_utils

    numbers = jax.tree.map(_numbers, tree)
    received = multihost_utils.broadcast_one_to_all(numbers)
    return jax.tree.map(_like, received, tree)


def check_synchronized(tree: PyTree) -> None:
    """Raise unless all processes have the same arrays, bit for bit. Each has to call it.

    **Arguments:**

    - `tree`: a pytree of arrays, numbers and typed keys. Arrays in parts on several devices are not looked
        at: there is one of them for all processes.

    **Raises:** `ValueError` that names the first array that differs.

    >>> import jax.numpy as jnp
    >>> import flatlayers as fl
    >>> fl.check_synchronized({"a": jnp.ones(2)})
    """
    if jax.process_count() == 1:
        return
    from jax.experimental import multihost_utils

    leaves = jax.tree_util.tree_leaves_with_path(tree)
    sums = np.array([_checksum(path, x) for path, x in leaves], np.uint32)
    # The number of leaves first: arrays of other lengths could not be compared.
    counts = multihost_utils.process_allgather(np.array([sums.size], np.uint32))
    if (counts != counts[0]).any():
        raise ValueError(
            f"expected the same arrays in all processes, found {counts.ravel().tolist()} of them in processes "
            f"0 to {counts.size - 1}"
        )
    found = multihost_utils.process_allgather(sums).reshape(-1, sums.size)
    if differs := [i for i in range(sums.size) if (found[:, i] != found[0, i]).any()]:
        place = jax.tree_util.keystr(leaves[differs[0]][0], simple=True, separator=".")
        others = np.flatnonzero(found[:, differs[0]] != found[0, differs[0]]).tolist()
        raise ValueError(
            f"expected the same numbers in all processes, found others{f' at {place}' if place else ''} in "
            f"process {others[0]} than in process 0: were they drawn from different seeds? "
            "`fl.synchronize(tree)` gives those of process 0"
        )


def _numbers(x: Any) -> np.ndarray:
    return np.asarray(jax.random.key_data(x) if is_key(x) else x)


def _like(received: Any, x: Any) -> Array:
    array = jax.numpy.asarray(received)
    return jax.random.wrap_key_data(array, impl=jax.random.key_impl(x)) if is_key(x) else array


def _checksum(path: Any, x: Any) -> int:
    if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
        return 0
    numbers = _numbers(x)
    text = f"{jax.tree_util.keystr(path)} {numbers.shape} {numbers.dtype}".encode()
    return zlib.crc32(np.ascontiguousarray(numbers).tobytes(), zlib.crc32(text))
