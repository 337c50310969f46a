"""`Foreign`: an array of another library that holds a parameter of ours."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np


Numbers = np.ndarray[Any, Any]


def same(array: Numbers) -> Numbers:
    return array


@dataclasses.dataclass(frozen=True)
class Foreign:
    """The array of another library that has the numbers of a parameter, and how they are turned.

    A layer of your own says so in a method `torch_names(self)`, a mapping of the names of its parameters
    and states, or of those of its children by path, to names in PyTorch: strings, or `Foreign` where the
    numbers lie otherwise. Names that it leaves out are asked of the layers inside. `equinox_names(self)` and
    `nnx_names(self)` are for the other two libraries.

    **Arguments:**

    - `name`: the name of their array below that of their module, or several names.
    - `read`: a function of these arrays, as NumPy has them, that returns ours.
    - `write`: its inverse, a function of ours that returns theirs; needed for `fl.to_torch` alone.
    - `part`: `(i, n)` if ours is the `i`-th of `n` parts of the same size of theirs, along its first axis,
        counted from 0. The others have to be parameters too.

    **Raises:** `TypeError` for names that are no strings, and for several without `read`; `ValueError` for a
    part that there is not.

    >>> import jax
    >>> import numpy as np
    >>> import flatlayers as fl
    >>> class Mix(fl.Layer):
    ...     dims: int
    ...
    ...     def parameters(self):
    ...         return {"matrix": fl.Param((self.dims, self.dims), fl.initializers.normal)}
    ...
    ...     def torch_names(self):
    ...         return {"matrix": fl.Foreign("weight", np.transpose, np.transpose)}
    >>> ps, st = fl.setup(jax.random.key(0), Mix(2))
    >>> weight = np.array([[1.0, 2.0], [3.0, 4.0]], np.float32)
    >>> fl.from_torch({"weight": weight}, Mix(2), ps, st)[0].matrix
    Array([[1., 3.],
           [2., 4.]], dtype=float32)
    """

    name: str | tuple[str, ...]
    read: Callable[..., Numbers] = same
    write: Callable[[Numbers], Numbers] | None = None
    part: tuple[int, int] = (0, 1)

    def __post_init__(self) -> None:
        if not self.names or not all(isinstance(name, str) for name in self.names):
            raise TypeError(f"Foreign.name: expected a string or a tuple of them, found {self.name!r}")
        if len(self.names) > 1 and self.read is same:
            raise TypeError(f"Foreign.read: expected a function of {len(self.names)} arrays, found none")
        i, n = self.part
        if not 0 <= i < n:
            raise ValueError(f"Foreign.part: expected (i, n) with i from 0 to n - 1, found {self.part}")
        if self.write is None and self.read is same:
            object.__setattr__(self, "write", same)

    @property
    def names(self) -> tuple[str, ...]:
        """Their names."""
        return self.name if isinstance(self.name, tuple) else (self.name,)

    def ours(self, arrays: tuple[Numbers, ...]) -> Numbers:
        """Return our array of theirs. **Raises:** `ValueError` or `IndexError` if it has another shape."""
        i, n = self.part
        return np.asarray(self.read(*(np.split(array, n)[i] if n > 1 else array for array in arrays)))

    def their_shape(self, shape: tuple[int, ...]) -> tuple[int, ...] | None:
        """Return the shape of their array for one of ours; `None` if there is no way back."""
        if self.write is None:
            return None
        first, *rest = self.write(np.broadcast_to(np.float32(0), shape)).shape or (None,)
        return () if first is None else (self.part[1] * first, *rest)


# The names of a layer's parameters and states in another library, by their paths.
Names = Mapping[str, str | Foreign]
