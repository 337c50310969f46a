"""The data of the training loop: one batch, `batches` of arrays on the device, iterators, other iterables."""

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator, Sized
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from ..core.fields import Flag, Size, checked
from ..types import Array, ArrayLike, Key, PyTree
from ..vectors.names import describe
from .checks import check_key
from .placing import Placing


@dataclasses.dataclass(frozen=True, eq=False)
class Batches:
    """Mini-batches of arrays on the device, as `fl.batches` makes them.

    `len(b)` is the number of batches in an epoch, `b.at(step)` the batch of a step, counted from 0 through
    all epochs, and iterating goes through the first epoch.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import flatlayers as fl
    >>> batches = fl.batches(jnp.arange(10), 5, key=jax.random.key(0))
    >>> isinstance(batches, fl.Batches), len(batches), batches.at(0).shape
    (True, 2, (5,))
    """

    arrays: PyTree
    size: int
    key: Key | None
    shuffle: bool
    drop_last: bool
    length: int

    def __len__(self) -> int:
        return self.length // self.size if self.drop_last else -(-self.length // self.size)

    @property
    def repeats(self) -> bool:
        """Tell whether the last batch of an epoch is filled up with samples of others."""
        return not self.drop_last and self.length % self.size > 0

    def at(self, step: int) -> PyTree:
        """Return the batch of a step."""
        rows = self.rows(step, 1)[0]
        return jax.tree.map(lambda x: x[rows], self.arrays)

    def rows(self, step: int, count: int, sharding: NamedSharding | None = None) -> Array:
        """Return the rows of so many batches from a step on, of shape `(count, size)`; over devices."""
        places = (self.length, self.size, len(self), count)
        # Of several processes none has an array of its own here.
        first = jnp.asarray(step) if sharding is None else np.asarray(step)
        return _rows(self.key if self.shuffle else None, first, places, sharding)

    def __iter__(self) -> Iterator[PyTree]:
        return map(self.at, range(len(self)))


@functools.partial(jax.jit, static_argnums=(2, 3))
def _rows(
    key: Key | None, step: ArrayLike, places: tuple[int, int, int, int], sharding: NamedSharding | None
) -> Array:
    rows = _rows_of(key, jnp.asarray(step), *places)
    return rows if sharding is None else jax.lax.with_sharding_constraint(rows, sharding)


def _rows_of(key: Key | None, step: Array, length: int, size: int, in_epoch: int, count: int) -> Array:
    steps = step + jnp.arange(count)
    # A short last batch is filled up with the first rows of its epoch.
    row = ((steps % in_epoch)[:, None] * size + jnp.arange(size)[None, :]) % length
    if key is None:
        return row
    epochs = step // in_epoch + jnp.arange((count - 1) // in_epoch + 2)
    orders = jax.vmap(lambda epoch: jax.random.permutation(jax.random.fold_in(key, epoch), length))(epochs)
    return orders[(steps // in_epoch - epochs[0])[:, None], row]


def batches(
    arrays: PyTree, size: int, *, key: Key | None = None, shuffle: bool = True, drop_last: bool = True
) -> Batches:
    """Divide arrays into mini-batches, on the device: data for `fl.train_loop`.

    Epoch `e` is in the order of a permutation drawn with `jax.random.fold_in(key, e)`, and a batch is found
    from the number of its step. So a run that goes on from a step sees the batches that it would have seen.
    Nothing is copied but the rows of a batch, in the compiled step that uses it.

    **Arguments:**

    - `arrays`: a pytree of arrays with the same first axis, of the samples.
    - `size`: the number of samples in a batch.
    - `key`: a PRNG key, which is needed to shuffle.
    - `shuffle`: whether each epoch has an order of its own; else all have that of the arrays.
    - `drop_last`: whether the samples that do not fill a batch are left out of the epoch. Otherwise the last
        batch is filled up with the first samples of the epoch: compiled steps need batches of one shape.

    **Returns:** a `Batches`.

    **Raises:** `ValueError` for arrays of different lengths, for fewer samples than `size` and for a missing
    key; `TypeError` for what are no arrays and for what is no key.

    >>> import jax.numpy as jnp
    >>> import flatlayers as fl
    >>> batches = fl.batches((jnp.arange(6), jnp.ones((6, 2))), 4, shuffle=False, drop_last=False)
    >>> [x.tolist() for x, _ in batches]
    [[0, 1, 2, 3], [4, 5, 0, 1]]
    """
    size = checked(Size, "batches: size", size)
    shuffle = checked(Flag, "batches: shuffle", shuffle)
    drop_last = checked(Flag, "batches: drop_last", drop_last)
    arrays = on_device(arrays, "batches: expected arrays")
    lengths = {x.shape[0] if x.ndim else None for x in jax.tree.leaves(arrays)}
    length = lengths.pop() if len(lengths) == 1 else None
    if length is None:
        raise ValueError(
            f"batches: expected arrays with the same number of samples in front, found {describe(arrays)}"
        )
    if length < size:
        raise ValueError(f"batches: expected at least {size} samples for a batch, found {length}")
    if shuffle and key is None:
        raise ValueError("batches: expected a key to shuffle with, found none; shuffle=False needs none")
    if key is not None:
        check_key("batches: key", key)
    return Batches(arrays, size, key, shuffle, drop_last, length)


def on_device(tree: PyTree, expected: str) -> PyTree:
    """Return a tree of arrays as JAX's own. **Raises:** `TypeError`, which starts with `expected`."""
    return jax.tree.map(jnp.asarray, as_arrays(tree, expected))


def as_arrays(tree: PyTree, expected: str) -> PyTree:
    """Return a tree whose leaves are arrays of JAX and NumPy; those of PyTorch become NumPy's."""

    def one(path: tuple[Any, ...], leaf: Any) -> Any:
        if isinstance(leaf, jax.Array):
            return leaf
        is_known = is_array(leaf) or isinstance(leaf, int | float | complex)
        # A masked array has numbers under its mask.
        array = np.asarray(leaf) if is_known and not isinstance(leaf, np.ma.MaskedArray) else None
        if array is None or array.dtype.kind not in "biufcV":
            place = f" at {jax.tree_util.keystr(path)}" if path else ""
            raise TypeError(f"{expected}, found {_found(leaf)}{place}")
        return array

    return jax.tree_util.tree_map_with_path(one, tree)


def _found(leaf: object) -> str:
    text = describe(leaf)
    return text if len(text) <= 60 else f"{text[:57]}..."


def is_array(leaf: object) -> bool:
    """Tell whether it is an array: of JAX, of NumPy, or of a library that can give NumPy's."""
    return hasattr(leaf, "__array__") and hasattr(leaf, "shape")


@dataclasses.dataclass(frozen=True)
class Chunk:
    """The data of a call of the compiled steps: for `count` of them, the wanted number or fewer."""

    data: PyTree
    count: int


class OneBatch:
    """One batch, the same in each step."""

    def __init__(self, batch: PyTree, placing: Placing):
        arrays = as_arrays(batch, "train_loop: expected data to be arrays, batches or None")
        self._batch = placing.batch(arrays)

    @staticmethod
    def pick(data: PyTree, _: Array) -> PyTree:
        """Return it."""
        return data

    def take(self, step: int, count: int, size: int) -> Chunk:
        """Return the data of `count` steps from `step` on, with `size` places."""
        return Chunk(self._batch, count)


class FromBatches:
    """Batches that are gathered in the compiled steps."""

    def __init__(self, batches: Batches, placing: Placing):
        self._rows = placing.rows(batches.size)
        everywhere = placing.everywhere({"arrays": batches.arrays, "key": batches.key}, copied=False)
        self._batches = dataclasses.replace(batches, **everywhere)

    @staticmethod
    def pick(data: PyTree, i: Array) -> PyTree:
        """Return the rows of the step."""
        arrays, rows = data
        return jax.tree.map(lambda x: x[rows[i]], arrays)

    def take(self, step: int, count: int, size: int) -> Chunk:
        """Return the data of `count` steps from `step` on, with `size` places."""
        return Chunk((self._batches.arrays, self._batches.rows(step, size, self._rows)), count)


class Stacked:
    """Batches that come one by one, `size` of which are stacked at a time.

    An iterator is consumed as it comes. Any other iterable is gone through again when it ends.
    """

    def __init__(self, source: Iterable[PyTree], step: int, skip: bool, placing: Placing):
        self._source, self._placing = source, placing
        self._again = not isinstance(source, Iterator)
        self._batches = self._endless() if self._again else iter(source)
        self._first: PyTree = None
        if self._again and isinstance(source, Sized) and len(source):
            step %= len(source)
        if self._again or skip:
            next(itertools.islice(self._batches, step, step), None)

    @staticmethod
    def pick(data: PyTree, i: Array) -> PyTree:
        """Return the batch of the step."""
        return jax.tree.map(lambda x: x[i], data)

    def take(self, step: int, count: int, size: int) -> Chunk:
        """Return the data of `count` steps from `step` on, or of fewer, with `size` places."""
        found = []
        for number, batch in enumerate(itertools.islice(self._batches, count)):
            found.append(self._checked(batch, step + number))
        if not found:
            return Chunk(None, 0)
        # In full length also for fewer, so that there is one program for all.
        full = found + found[-1:] * (size - len(found))
        stack = self._placing.stack
        return Chunk(
            jax.tree_util.tree_map_with_path(lambda path, *leaves: stack(path, leaves), *full), len(found)
        )

    def _checked(self, batch: PyTree, step: int) -> PyTree:
        """Return the batch as arrays. **Raises:** unless it is like the first."""
        if isinstance(batch, int | float | complex | str | bytes) and not isinstance(batch, np.generic):
            raise TypeError(
                f"train_loop: expected batches of arrays, found {_found(batch)} for step {step}. A list is "
                "taken for a list of batches; one batch is an array, a tuple or a mapping"
            )
        batch = as_arrays(batch, f"train_loop: expected a batch of arrays for step {step}")
        # A source may fill one buffer again and again.
        batch = jax.tree.map(lambda x: x if isinstance(x, jax.Array) else np.array(x), batch)
        if self._first is None:
            self._first = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (batch,))
        (first,) = self._first
        if describe(first) != describe(batch) or jax.tree.structure(first) != jax.tree.structure(batch):
            raise ValueError(
                f"train_loop: expected batches of the same shapes, found {describe(first)} and, for step "
                f"{step}, {describe(batch)}. A list is taken for a list of batches, a tuple for one batch; "
                "a DataLoader leaves out a short last batch with `drop_last=True`"
            )
        return batch

    def _endless(self) -> Iterator[PyTree]:
        while True:
            some = False
            for batch in self._source:
                some = True
                yield batch
            if not some:
                return


Source = OneBatch | FromBatches | Stacked


def source_of(data: PyTree, step: int, skip: bool, placing: Placing) -> Source:
    """Return the source of batches that data are, from `step` on.

    A list is a list of batches. An array, a tuple, a mapping and any other registered pytree is one batch.
    `skip` says whether an iterator starts with batches of steps that were taken before.
    """
    if isinstance(data, Batches):
        return FromBatches(data, placing)
    if several(data):
        return Stacked(data, step, skip, placing)
    return OneBatch(data, placing)


def several(data: PyTree) -> bool:
    """Tell whether data are to be gone through, one batch after another."""
    if isinstance(data, list | Batches | Iterator):
        return True
    opaque = jax.tree.structure(data) == jax.tree.structure(0) and not is_array(data)
    return opaque and isinstance(data, Iterable) and not isinstance(data, str | bytes)
