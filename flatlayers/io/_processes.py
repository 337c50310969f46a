"""Several processes: all of them see the numbers, the first one writes, and all know how that ended."""

from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from ..types import Array, PyTree


_ROOM = 1000  # bytes for the text of an error


def is_first() -> bool:
    """Tell whether this process is the one that writes."""
    return jax.process_index() == 0


def on_host(array: Array, path: str) -> np.ndarray:
    """Return the numbers of an array, gathered if they are spread over several processes.

    In processes that do not write it, a spread array is zeros, for which the system takes no room.

    **Raises:** `ValueError` with the path of an array that is spread in a way without a name.
    """
    if array.is_fully_addressable:
        return np.asarray(array)
    if not array.is_fully_replicated:
        if not isinstance(array.sharding, NamedSharding):
            raise ValueError(
                f"cannot save {path!r}: expected an array with a NamedSharding, found one that a "
                f"{type(array.sharding).__name__} spreads over several processes; "
                "`jax.jit(lambda x: x, out_shardings=...)` gives it one, and Orbax writes it as it is"
            )
        everywhere = NamedSharding(array.sharding.mesh, PartitionSpec())
        array = jax.jit(_same, out_shardings=everywhere)(array)
    return np.asarray(array) if is_first() else np.zeros(array.shape, array.dtype)


def is_spread(tree: PyTree) -> bool:
    """Tell whether a tree has arrays on devices of other processes."""
    return any(isinstance(x, jax.Array) and not x.is_fully_addressable for x in jax.tree.leaves(tree))


def first_does(write: Callable[[], None]) -> None:
    """Call `write` in the first process alone; return in all of them when it is done.

    **Raises:** the error of `write` there, and in the others an `OSError` with its text.
    """
    error: BaseException | None = None
    if is_first():
        try:
            write()
        except BaseException as found:  # an interrupt, too: the others would wait forever
            error = found
    text = _from_first("" if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    if text:
        raise OSError(f"process 0 could not write the file: {text}")
    return


def _from_first(text: str) -> str:
    """Return the text of the first process, in all of them."""
    from jax.experimental import multihost_utils

    sent = np.frombuffer(text.encode()[:_ROOM].ljust(_ROOM, b"\0"), np.uint8)
    received = np.asarray(multihost_utils.broadcast_one_to_all(sent))
    return received.tobytes().rstrip(b"\0").decode(errors="replace")


def _same(x: Array) -> Array:
    return x
