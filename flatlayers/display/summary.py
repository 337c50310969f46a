"""`summary`: a table of what each layer of a model does to one input."""

import dataclasses
import math
import re
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import jax

from ..core.composite import Wrapper
from ..core.layer import Layer, constructor_name
from ..core.rebuild import replaceable, shared_names, with_children
from ..core.setup import traced_output
from ..layers.containers import Chain
from ..types import ArrayLike, Input, Output, Params, PyTree, State
from ..vectors.names import join_path
from ..vectors.text import as_html
from ..vectors.vector import ComponentVector
from ..wrappers.transparent import Transparent
from .flops import as_struct, flops
from .model import one_line, sees_through, totals
from .places import Run, alike, joined, runs_of, span_text
from .table import filled, scaled, table


def summary(model: Layer, x: Input) -> "Summary":
    """Show what each layer does to one input: a table of shapes, parameters and floating-point operations.

    Nothing is computed: shapes are traced, and operations are those that XLA counts in the program before it
    is compiled. It counts one for an addition, a multiplication or a comparison of numbers and none for
    `tanh`, `exp` and the like. A `scan` counts as often as it runs, a loop of unknown length, such as a
    solver's, once. A layer is seen as it is first called: inside of a solver or a scan, in one step.

    A layer that makes the layers inside of it by itself, such as `fl.MLP`, has one row; so has one that
    takes two of them from one field, such as `fl.BidirectionalRNN`. Three or more equal neighbours with
    equal rows are printed as one.

    **Arguments:**

    - `model`: a layer.
    - `x`: its input: arrays or `jax.ShapeDtypeStruct`s, or a pytree of them.

    **Returns:** a `Summary`: printed, a table within 100 columns, in a notebook a picture of it. `rows` has
    the layers inside in order, `total` the model. A row has `path`, `layer`, `output_shape`, `parameters`,
    `places` (where they are in the vector, as pairs of start and stop), `share` (per cent of the vector),
    `flops` (of one call; `None` where XLA does not tell) and `children`, the rows inside of it.

    **Raises:** what the model raises for `x`; and what a layer raises that accepts no wrapper around a layer
    inside of it.

    >>> import jax.numpy as jnp
    >>> import flatlayers as fl
    >>> fl.summary(fl.Chain(fl.Dense(2, 16, jnp.tanh), fl.Dense(16, 1)), jnp.ones((5, 2)))
    path     layer                          output shape  parameters  place   share  FLOPs
    ──────────────────────────────────────────────────────────────────────────────────────
    layer_0  Dense(2, 16, activation=tanh)  (5, 16)               48   0:48   73.8%    400
    layer_1  Dense(16, 1)                   (5, 1)                17  48:65   26.2%    165
    ──────────────────────────────────────────────────────────────────────────────────────
    total    Chain                          (5, 1)                65   0:65  100.0%    565
    65 parameters, 260 bytes
    """
    root = _Seen(model, "")
    traced_output(root.watch(), x)
    return Summary(_Rows(model).row(root))


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of a summary: one layer, its output and its part of the vector."""

    path: str
    layer: Layer
    output_shape: Any
    parameters: int
    places: tuple[Run, ...]
    share: float
    flops: float | None
    children: "tuple[Row, ...]"

    @property
    def place(self) -> str:
        """Tell where the parameters are in the vector: `0:48`, or the first of several places."""
        first = [f"{start}:{stop}" for start, stop in self.places[:2]]
        return ", ".join(first) if len(self.places) < 3 else f"{first[0]}, ..."

    @property
    def below(self) -> "Iterator[Row]":
        """Give the rows inside, in order."""
        for child in self.children:
            yield child
            yield from child.below


@dataclasses.dataclass(frozen=True, repr=False)
class Summary:
    """A table of the layers of a model, made by `fl.summary`."""

    total: Row

    @property
    def rows(self) -> tuple[Row, ...]:
        """Return the layers inside in order; the model itself if there are none."""
        return tuple(self.total.below) or (self.total,)

    @property
    def grouped(self) -> Row:
        """Return the total with equal neighbours joined, as it is printed."""
        return _grouped(self.total)

    def _repr_html_(self) -> str | None:
        return as_html(self)

    def __repr__(self) -> str:
        head = ("path", "layer", "output shape", *_NUMBERS)
        foot = _cells(self.total, "total")
        body = table(head, [_cells(row, row.path) for row in self.grouped.below], foot, " ".join(_NUMBERS))
        return f"{body}\n{totals(self.total.layer)}"


# Watching a model being traced


class _Seen:
    """A layer of a model, and what it was first called with."""

    def __init__(self, layer: Layer, path: str):
        self.layer = layer
        self.path = path
        self.children: list[_Seen] = []
        self.arguments: tuple[PyTree, PyTree, PyTree] | None = None
        self.output: PyTree = None

    def watch(self) -> "_Watched":
        """Return a layer that calls this one and notes what with; so do those inside.

        Children that share a field cannot be told apart, and are not watched.
        """
        parts = replaceable(self.layer)
        if len(set(shared_names(self.layer).values())) < len(parts):
            parts = {}
        if isinstance(self.layer, Wrapper) and not sees_through(self.layer):
            parts = {}
        inside = {name: _Seen(part, join_path(self.path, name)) for name, part in parts.items()}
        self.children = list(inside.values())
        watched = {name: seen.watch() for name, seen in inside.items()}
        try:
            return _Watched(with_children(self.layer, watched), self)
        except Exception as error:
            name = self.path or constructor_name(self.layer)
            error.add_note(
                f"summary: puts a wrapper around each layer in {name!r}, to see what it is called with"
            )
            raise

    def note(self, arguments: tuple[Input, Params, State], output: Output) -> None:
        if self.arguments is None:
            self.arguments, self.output = jax.tree.map(_type_of, (arguments, output))


class _Watched(Transparent):
    seen: _Seen

    def __call__(self, x: Input, ps: Params, st: State) -> tuple[Output, State]:
        # Not by `apply`, as the layer inside is: its frames would halve the depth that Python allows.
        return self.forward(x, ps, st)

    def forward(self, x: Input, ps: Params, st: State) -> tuple[Output, State]:
        y, new = self.layer(x, ps, st)
        self.seen.note((x, ps, st), y)
        return y, new

    def __repr__(self) -> str:
        return repr(self.layer)  # in the note of an error


def _type_of(leaf: ArrayLike) -> jax.ShapeDtypeStruct:
    return as_struct(jax.typeof(leaf))


class _Rows:
    """The rows of a model, for which equal calls of equal layers are counted once."""

    def __init__(self, model: Layer):
        self.runs = {path: tuple(runs_of(slot)) for path, slot in model.layout.slots()}
        self.length = model.layout.length
        self.known: dict[Hashable, float | None] = {}

    def row(self, seen: _Seen) -> Row:
        names = (join_path(seen.path, name) for name in seen.layer.layout.view_shapes)
        places = joined(run for name in names for run in self.runs.get(name, ()))
        size = sum(stop - start for start, stop in places)
        children = tuple(map(self.row, seen.children))
        return Row(
            path=seen.path,
            layer=seen.layer,
            output_shape=None if seen.arguments is None else _shapes(seen.output),
            parameters=size,
            places=places,
            share=100 * size / self.length if self.length else 0.0,
            flops=self.flops(seen, children),
            children=children,
        )

    def flops(self, seen: _Seen, children: Sequence[Row]) -> float | None:
        if seen.arguments is None:
            return 0.0
        # A chain does nothing of its own. Counted with all that is inside, chains in chains would take a time
        # that grows with the square of their depth.
        if type(seen.layer) is Chain and children:
            return _sum_of_flops(children)
        leaves, structure = jax.tree.flatten(seen.arguments)
        call = seen.layer, structure, tuple(leaves)
        if call not in self.known:
            self.known[call] = flops(seen.layer, *seen.arguments)
        return self.known[call]


def _shapes(y: Output) -> PyTree:
    def is_array(part: object) -> bool:
        return isinstance(part, ComponentVector)

    return jax.tree.map(lambda leaf: tuple(leaf.shape), y, is_leaf=is_array)


# Text


_NUMBERS = ("parameters", "place", "share", "FLOPs")


def _cells(row: Row, path: str) -> list[Any]:
    # A path may break after a dot, but not within `layer_1..layer_3`.
    return [filled(re.split(r"(?<=[^.]\.)(?=[^.])", path), ""), *texts_of(row)]


def texts_of(row: Row) -> list[str]:
    """Write a row: the layer, the shape of its output, its parameters, place, share and operations."""
    return [
        constructor_name(row.layer) if row.children else one_line(row.layer),
        "not called" if row.output_shape is None else str(row.output_shape),
        f"{row.parameters:_}" if row.parameters else "",
        row.place,
        f"{row.share:.1f}%" if row.parameters else "",
        flops_text(row.flops),
    ]


def flops_text(number: float | None) -> str:
    """Write a number of operations: `8_485`, `128 M`, `?` if it is not known."""
    if number is None:
        return "?"
    return f"{round(number):_}" if number < 1e6 else scaled(number / 1e6, ("M", "G", "T", "P"))


def _grouped(row: Row) -> Row:
    children = {child.path: _grouped(child) for child in row.children}
    groups = alike({path: _without_place(child) for path, child in children.items()})
    return dataclasses.replace(
        row, children=tuple(_together([children[path] for path in paths]) for paths in groups)
    )


def _without_place(row: Row) -> tuple[Any, ...]:
    inside = tuple(map(_without_place, row.children))
    return row.layer, row.output_shape, row.parameters, row.flops, inside


def _together(rows: Sequence[Row]) -> Row:
    """Join equal neighbours to one row."""
    if len(rows) == 1:
        return rows[0]
    around = rows[0].path.rpartition(".")[0]
    return _sum(rows, join_path(around, span_text(tuple(row.path.rpartition(".")[2] for row in rows))))


def _sum_of_flops(rows: Sequence[Row]) -> float | None:
    known = all(row.flops is not None for row in rows)
    return math.fsum(row.flops or 0.0 for row in rows) if known else None


def _sum(rows: Sequence[Row], path: str) -> Row:
    return dataclasses.replace(
        rows[0],
        path=path,
        parameters=sum(row.parameters for row in rows),
        places=joined(run for row in rows for run in row.places),
        share=math.fsum(row.share for row in rows),
        flops=_sum_of_flops(rows),
        children=tuple(
            _sum(inside, path + inside[0].path.removeprefix(rows[0].path))
            for inside in zip(*(row.children for row in rows), strict=True)
        ),
    )
