"""Values with arrays in them as fields of a layer: hashable, whatever is in them."""

import dataclasses
from typing import Any

import jax
import numpy as np

from .identity import Value


@dataclasses.dataclass(frozen=True, eq=False)
class Hashable(Value):
    """A pytree (an array, a `SaveAt` with times, an adjoint with keywords) with a hash by content.

    Arrays inside are kept as NumPy data; `value` gives the pytree back.
    """

    leaves: tuple[Any, ...]
    structure: Any

    @property
    def value(self) -> Any:
        leaves = [leaf.array() if isinstance(leaf, _Numbers) else leaf for leaf in self.leaves]
        return jax.tree.unflatten(self.structure, leaves)

    def __repr__(self) -> str:
        return repr(self.value)


@dataclasses.dataclass(frozen=True)
class _Numbers:
    shape: tuple[int, ...]
    dtype: str
    content: bytes

    def array(self) -> np.ndarray:
        return np.frombuffer(self.content, np.dtype(self.dtype)).reshape(self.shape)


def hashable(tree: Any) -> Any:
    """The pytree as it is if it has a hash, else as `Hashable`."""
    leaves, structure = jax.tree.flatten(tree)
    if any(isinstance(leaf, jax.Array | np.ndarray) for leaf in leaves) or not _has_hash(tree):
        return Hashable(tuple(map(_as_numbers, leaves)), structure)
    return tree


def plain(tree: Any) -> Any:
    """The inverse of `hashable`."""
    return tree.value if isinstance(tree, Hashable) else tree


def _as_numbers(leaf: Any) -> Any:
    if not isinstance(leaf, jax.Array | np.ndarray):
        return leaf
    array = np.asarray(leaf)
    array = array.astype(array.dtype.newbyteorder("="))
    return _Numbers(array.shape, array.dtype.name, array.tobytes())


def _has_hash(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True
