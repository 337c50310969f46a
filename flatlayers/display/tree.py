"""`tree`: the numbers of a vector or a state, leaf by leaf."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from ..types import DType, PyTree
from ..vectors.names import describe, join_path
from ..vectors.record import is_static
from ..vectors.text import as_html
from ..vectors.vector import ComponentVector
from ..vectors.vector_text import is_other
from .table import table


def tree(ps: PyTree) -> "Tree":
    """Show the numbers of a vector or a state: the range, the mean and the spread of each leaf.

    Only finite numbers count; how many are not finite is shown, too. Leaves whose numbers are not known,
    because they are traced, or that are no real numbers, are shown by shape and dtype alone.

    **Arguments:**

    - `ps`: a `ComponentVector`, with leading axes or without, or a mapping of arrays, such as a `Record` of
        states; also tuples of them, as the state of an optimiser has.

    **Returns:** a `Tree`: printed, a table, in a notebook a picture of it. `rows` has the leaves in order,
    each with `path`, `shape`, `dtype`, `min`, `max`, `mean`, `std` (the standard deviation; `None` where
    numbers are not known), `nan` and `inf` (how many of them there are).

    >>> import flatlayers as fl
    >>> fl.tree(fl.ComponentVector.of({"rate": 0.5, "net": {"weight": [[3.0, -1.0]], "bias": [0.0]}}))
    ComponentVector(float32[4])
    name        shape   dtype    min  max  mean  std
    ────────────────────────────────────────────────
    rate        ()      float32  0.5  0.5   0.5    0
    net.weight  (1, 2)  float32   -1    3     1    2
    net.bias    (1,)    float32    0    0     0    0
    """
    title = describe(ps) if isinstance(ps, ComponentVector) else type(ps).__name__
    return Tree(title, tuple(_leaves(ps, "")))


@dataclasses.dataclass(frozen=True)
class LeafRow:
    """A row of a `Tree`: the numbers of one leaf; `note` is what else there is to say."""

    path: str
    shape: tuple[int, ...] = ()
    dtype: str = ""
    min: float | None = None
    max: float | None = None
    mean: float | None = None
    std: float | None = None
    nan: int = 0
    inf: int = 0
    note: str = ""


@dataclasses.dataclass(frozen=True, repr=False)
class Tree:
    """A table of the leaves of a vector or a state, made by `fl.tree`."""

    title: str
    rows: tuple[LeafRow, ...]

    def _repr_html_(self) -> str | None:
        return as_html(self)

    def __repr__(self) -> str:
        if not self.rows:
            return self.title
        notes = ("",) if any(notes_of(row) for row in self.rows) else ()
        cells = [
            (row.path, row.shape if row.dtype else "", row.dtype, *map(number_text, numbers_of(row)))
            + ((notes_of(row),) if notes else ())
            for row in self.rows
        ]
        head = ("name", "shape", "dtype", *NUMBERS, *notes)
        return f"{self.title}\n{table(head, cells, right=' '.join(NUMBERS))}"


NUMBERS = ("min", "max", "mean", "std")


def numbers_of(row: LeafRow) -> tuple[float | None, ...]:
    """Return the numbers of a row in the order of `NUMBERS`."""
    return row.min, row.max, row.mean, row.std


def number_text(number: float | None) -> str:
    """Write a number with four digits, nothing if it is not known."""
    return "" if number is None else f"{number:.4g}"


def notes_of(row: LeafRow) -> str:
    """Tell how many numbers are not finite, and the note."""
    bad = [f"{n:_} {name}" for n, name in ((row.nan, "nan"), (row.inf, "inf")) if n]
    return ", ".join([*bad, *([row.note] if row.note else [])])


def _leaves(part: PyTree, path: str) -> Iterator[LeafRow]:
    if isinstance(part, ComponentVector) and is_other(part.data, part.layout):
        note = f"not the {part.layout.length} numbers of the layout"
        yield dataclasses.replace(_statistics(part.data, path), note=note)
        return
    if isinstance(part, ComponentVector) and hasattr(part.data, "shape"):
        yield from _leaves_of_vector(part, path)
        return
    inside = _inside(part)
    if inside is None:
        yield _statistics(part, path)
        return
    for name, child in inside.items():
        yield from _leaves(child, join_path(path, name))


def _leaves_of_vector(vector: ComponentVector, path: str) -> Iterator[LeafRow]:
    data, layout = vector.data, vector.layout
    known = not isinstance(data, Tracer | jax.ShapeDtypeStruct)
    numbers = np.asarray(data) if known else None
    for name, slot in layout.slots():
        shape = (*data.shape[:-1], *slot.copies, *slot.shape)
        leaf = jax.ShapeDtypeStruct(shape, data.dtype) if numbers is None else slot.take(numbers)
        row = _statistics(leaf, join_path(path, name))
        yield dataclasses.replace(row, note=f"is {layout.ties[name]}") if name in layout.ties else row


def _inside(part: PyTree) -> Mapping[str, Any] | None:
    """Return the parts of a mapping or a tuple by name, `None` for anything else."""
    if isinstance(part, Mapping):
        return {str(name): child for name, child in part.items()}
    if isinstance(part, tuple | list):
        names = getattr(part, "_fields", map(str, range(len(part))))
        return dict(zip(names, part, strict=True))
    return None


def _statistics(leaf: PyTree, path: str) -> LeafRow:
    if is_static(leaf):
        return LeafRow(path, note=repr(leaf))
    if not hasattr(leaf, "shape") and isinstance(leaf, int | float | complex):
        leaf = np.asarray(leaf)
    if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
        return LeafRow(path, note=describe(leaf))
    bare = LeafRow(path, tuple(leaf.shape), str(leaf.dtype))
    if isinstance(leaf, Tracer | jax.ShapeDtypeStruct) or not _is_real(leaf.dtype):
        return bare
    numbers = np.asarray(leaf).astype(np.float64)
    finite = numbers[np.isfinite(numbers)]
    bare = dataclasses.replace(bare, nan=int(np.isnan(numbers).sum()), inf=int(np.isinf(numbers).sum()))
    if not finite.size:
        return bare
    with np.errstate(over="ignore"):
        mean, std = float(finite.mean()), float(finite.std())
    return dataclasses.replace(bare, min=float(finite.min()), max=float(finite.max()), mean=mean, std=std)


def _is_real(dtype: DType) -> bool:
    return any(jax.numpy.issubdtype(dtype, kind) for kind in (np.floating, np.integer, np.bool_))
