"""Keys of a vector: a name, or an index of its numbers along the last axis."""

from typing import Any, TypeAlias

import jax
import numpy as np

from ..types import Array, Shape


# An index along the last axis, or along leading axes.
Index: TypeAlias = "int | slice | list[int] | np.ndarray | Array | tuple[object, ...]"
Key: TypeAlias = "str | tuple[str | int, ...] | Index"


def is_path(key: object) -> bool:
    """Tell whether a key is a name."""
    return isinstance(key, str) or (isinstance(key, tuple) and any(isinstance(part, str) for part in key))


def along_last(key: object, shape: Shape) -> Any:
    """Return the index into an array of a `shape` that an index along its last axis means."""
    if isinstance(key, tuple) and len(key) == 2 and key[0] is Ellipsis:
        return key
    if isinstance(key, tuple):
        raise TypeError(
            f"expected a name, or one index along the last axis, found {key!r}; `v.data` takes more"
        )
    if isinstance(key, list | slice) and any(isinstance(part, str) for part in _parts(key)):
        raise TypeError(f'expected a name or an index, found {key!r}; several names: `v.pick("a", "b")`')
    if key is Ellipsis:
        return key
    if not _is_mask(key, shape):
        check_no_lead(shape, "v[i]", "`v[..., i]` for numbers, `v.lead[i]` for leading axes")
    return (..., key)


def check_no_lead(shape: Shape, call: str, way_out: str) -> None:
    """Raise `TypeError` for leading axes, with which a call has two meanings."""
    if lead := shape[:-1]:
        raise TypeError(f"{call} of a vector with leading axes {tuple(lead)} has two meanings: use {way_out}")


def _parts(key: list[Any] | slice) -> list[Any]:
    return key if isinstance(key, list) else [key.start, key.stop]


def _is_mask(key: object, shape: Shape) -> bool:
    """Tell whether it is a mask of the numbers, such as `layout.mask` gives."""
    return isinstance(key, np.ndarray | jax.Array) and key.dtype == bool and key.shape == shape[-1:]
