"""Vectors as datasets of xarray, as ArviZ takes them. xarray is optional."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..types import ArrayLike
from .layout import Layout
from .names import NamedArray, describe
from .pieces import pieces
from .tables import imported, names_of_axes, numbers_of


if TYPE_CHECKING:
    import xarray


def to_dataset(
    v: NamedArray,
    dims: Sequence[str] = ("chain", "draw"),
    coords: Mapping[str, ArrayLike | Sequence[object]] | None = None,
) -> "xarray.Dataset":
    """Return an xarray `Dataset` of a vector with leading axes: draws of a sampler, a solution, an ensemble.

    It has a variable for each leaf, under its name, with the leading axes and one of its own that is called
    `name[i]` and counts the numbers: its coordinates are their indices as `layout.labels()` has them,
    `"0,1"`. So the tables of ArviZ have exactly the names of `labels()`, in their order: `w[0,1]`. Copies of
    a stack are variables of their own, `blocks[2].w`; of tied names there is the one that has the place.

    **Arguments:**

    - `v`: the `ComponentVector`, of shape `(..., n)`. Half precisions that NumPy does not have, such as
        bfloat16, become float32.
    - `dims`: a name for each leading axis. ArviZ asks for `"chain"` and `"draw"`.
    - `coords`: values along leading axes, by their names; without them 0, 1, 2, ...

    **Returns:** a dataset whose variables have shape `(..., size)`, or `(...)` for a leaf that is one number.

    **Raises:** `ImportError` without xarray; `ValueError` for another number of `dims`, for one that is the
    name of a variable, and for unknown `coords`; `TypeError` for what is no vector, and for numbers that are
    not known, as under `jax.jit`.

    >>> import jax.numpy as jnp
    >>> import flatlayers as fl
    >>> draws = fl.ComponentVector(jnp.ones((4, 100, 3)), fl.Layout({"rate": (), "w": (1, 2)}))
    >>> dataset = fl.to_dataset(draws)
    >>> dataset["w"].dims, dataset["w[i]"].values.tolist()
    (('chain', 'draw', 'w[i]'), ['0,0', '0,1'])
    """
    xarray = imported("xarray", "fl.to_dataset")
    if not isinstance(v, NamedArray):
        raise TypeError(f"fl.to_dataset: expected a ComponentVector, found {describe(v)}")
    numbers = numbers_of(v.data, v.layout, "fl.to_dataset")
    axes = [str(name) for name in names_of_axes(() if dims is None else dims, numbers.shape[:-1])]
    if unknown := set(coords or {}) - set(axes):
        raise ValueError(f"fl.to_dataset: expected coords of {axes}, found {sorted(unknown)}")
    values = {name: np.arange(n) for name, n in zip(axes, numbers.shape, strict=False)} | dict(coords or {})
    variables = {}
    for name, start, indices in _leaves(v.layout):
        if taken := {name, f"{name}[i]"} & {*axes}:
            raise ValueError(
                f"fl.to_dataset: expected dims that are no names of the vector, found {taken.pop()!r}"
            )
        if indices is None:
            variables[name] = (axes, numbers[..., start])
        else:
            variables[name] = ([*axes, f"{name}[i]"], numbers[..., start : start + len(indices)])
            values[f"{name}[i]"] = indices
    return xarray.Dataset(variables, coords=values)


def _leaves(layout: Layout) -> Iterator[tuple[str, int, list[str] | None]]:
    """Return name, start and the indices as labels have them, of each leaf and copy that has numbers.

    A leaf that is one number without an axis has no indices.
    """
    labels = layout.labels()
    for _, start, shape in pieces(layout):
        if not shape:
            yield labels[start], start, None
        elif math.prod(shape):
            own = labels[start : start + math.prod(shape)]
            name = own[0].rpartition("[")[0]
            yield name, start, [label[len(name) + 1 : -1] for label in own]
