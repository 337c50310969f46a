"""`synchronize` and `check_synchronized`: the same arrays in all processes."""

import zlib
from typing import Any

import jax
import numpy as np

from ..dtypes import is_key
from ..types import Array, ArrayLike, PyTree


def synchronize(tree: PyTree) -> PyTree:
    """Return the arrays of the first process, in all processes, each of which has to call it.

    **Arguments:**

    - `tree`: a pytree of arrays, numbers and typed keys, of the same names, shapes and dtypes in all.

    **Returns:** the tree with the numbers of process 0, arrays where they were. Arrays in parts on several
    processes, such as those of a `ShardedVector`, stay: there is one of them for all. With one process it is
    the tree itself.

    **Raises:** `ValueError` for other names, shapes or dtypes than in process 0.

    >>> import jax.numpy as jnp
    >>> import flatlayers as fl
    >>> fl.synchronize({"a": jnp.ones(2)})
    {'a': Array([1., 1.], dtype=float32)}
    """
    if jax.process_count() == 1:
        return tree
    from jax.experimental import multihost_utils

    leaves = _own_leaves(tree)
    _compare([(path, _kind_checksum(path, x)) for path, x in leaves], "shapes and dtypes", "")
    # As bytes: what JAX computes with would be converted where x64 is off.
    sent = [_numbers(x).reshape(-1).view(np.uint8) for _, x in leaves]
    received = iter(multihost_utils.broadcast_one_to_all(sent))
    return jax.tree.map(lambda x: x if _is_in_parts(x) else _like(next(received), x), tree)


def check_synchronized(tree: PyTree) -> None:
    """Raise unless all processes have the same arrays, bit for bit. Each has to call it.

    **Arguments:**

    - `tree`: a pytree of arrays, numbers and typed keys. Arrays in parts on several processes are not looked
        at: there is one of them for all.

    **Raises:** `ValueError` that names the first array that differs, in all processes.

    >>> import jax.numpy as jnp
    >>> import flatlayers as fl
    >>> fl.check_synchronized({"a": jnp.ones(2)})
    """
    if jax.process_count() == 1:
        return
    leaves = _own_leaves(tree)
    _compare([(path, _kind_checksum(path, x)) for path, x in leaves], "shapes and dtypes", "")
    ending = ": were they drawn from different seeds? `fl.synchronize(tree)` gives those of process 0"
    _compare([(path, _checksum(_numbers(x))) for path, x in leaves], "numbers", ending)


def _compare(sums: list[tuple[str, int]], kind: str, ending: str) -> None:
    """Raise if a process has other checksums, with the path of the first one that differs."""
    from jax.experimental import multihost_utils

    # The number of leaves first: arrays of different lengths cannot be exchanged.
    counts = multihost_utils.process_allgather(np.array([len(sums)], np.uint32)).ravel()
    if (counts != counts[0]).any():
        other = int(np.flatnonzero(counts != counts[0])[0])
        raise ValueError(
            f"expected the same arrays in all processes, found {counts[0]} of them in process 0 and "
            f"{counts[other]} in process {other}"
        )
    mine = np.array([found for _, found in sums], np.uint32)
    others = multihost_utils.process_allgather(mine).reshape(counts.size, mine.size)
    for (path, _), found in zip(sums, others.T, strict=True):
        if (found != found[0]).any():
            other = int(np.flatnonzero(found != found[0])[0])
            place = f" at {path}" if path else ""
            raise ValueError(
                f"expected the same {kind} in all processes, found others{place} in process {other} than in "
                f"process 0{ending}"
            )


def _own_leaves(tree: PyTree) -> list[tuple[str, Any]]:
    """Return the leaves that each process has for itself, with their paths."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [
        (jax.tree_util.keystr(path, simple=True, separator="."), x)
        for path, x in leaves
        if not _is_in_parts(x)
    ]


def _is_in_parts(x: object) -> bool:
    return isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated)


def _numbers(x: ArrayLike) -> np.ndarray:
    return np.asarray(jax.random.key_data(x) if is_key(x) else x, order="C")


def _like(received: np.ndarray, x: ArrayLike) -> Any:
    """Return the bytes of an array as one of its kind, on the devices where it is."""
    old = _numbers(x)
    numbers = np.array(received).view(old.dtype).reshape(old.shape)
    if is_key(x):
        keys = jax.random.key_data(x)
        return jax.random.wrap_key_data(_placed(numbers, keys), impl=jax.random.key_impl(x))
    if isinstance(x, jax.Array):
        return _placed(numbers, x)
    return numbers if isinstance(x, np.ndarray) else type(x)(numbers[()])


def _placed(numbers: np.ndarray, x: Array) -> Array:
    if x.is_fully_addressable:
        return jax.device_put(numbers, x.sharding)
    return jax.make_array_from_callback(numbers.shape, x.sharding, lambda index: numbers[index])


def _kind_checksum(path: str, x: ArrayLike) -> int:
    numbers = _numbers(x)
    return zlib.crc32(f"{path} {numbers.shape} {numbers.dtype}".encode())


def _checksum(numbers: np.ndarray) -> int:
    return zlib.crc32(numbers.reshape(-1).view(np.uint8).data)
