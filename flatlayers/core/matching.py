"""Whether parameters and a state are those that a layer declares: its names, with their shapes."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from ..vectors.layout import Layout
from ..vectors.names import join_path
from ..vectors.places import Shape
from ..vectors.record import Record
from .declaration import Param


if TYPE_CHECKING:
    from .layer import Layer

# The shapes of the arrays of a state by path; `None` for what may be anything, such as a flag.
Shapes = Mapping[str, tuple[Shape, ...] | None]


def check_parameters(layer: "Layer", found: Layout) -> None:
    """Raise `ValueError` unless a vector with the layout `found` has all that the layer declares.

    More names are allowed: a slice of a `Chain` takes the vector of the whole.
    """
    declared = layer.layout
    if not declared.fits_into(found):
        lines = [line for line in declared.diff(found) if not line.endswith("is new")]
        raise ValueError(
            f"expected the parameters of this layer, found a vector of another one: {_listed(lines)}"
        )


def check_state(layer: "Layer", found: Any) -> None:
    """Raise `ValueError` unless a state has all that the layer declares, more names allowed."""
    lines = list(_differences(layer.state_shapes, found))
    if lines:
        raise ValueError(f"expected the state of this layer, found that of another one: {_listed(lines)}")


def shapes_of_state(st: Any, prefix: str = "") -> dict[str, tuple[Shape, ...] | None]:
    """The shapes of the arrays of a state, by path."""
    shapes: dict[str, tuple[Shape, ...] | None] = {}
    for name, value in st.items():
        path = join_path(prefix, name)
        if isinstance(value, Record):
            shapes |= shapes_of_state(value, path)
        else:
            shapes[path] = None if value is None or isinstance(value, bool | str) else _shapes(value)
    return shapes


def _differences(declared: Shapes, st: Any) -> Iterator[str]:
    for path, shapes in declared.items():
        try:
            value = _at(st, path)
        except (KeyError, TypeError):
            yield f"{path}: {_text(shapes)} is gone"
            continue
        if shapes is not None and (found := _shapes(value)) != shapes:
            yield f"{path}: {_text(shapes)} became {_text(found)}"


def _at(st: Any, path: str) -> Any:
    for name in path.split("."):
        st = st[name]
    return st


def _shapes(value: Any) -> tuple[Shape, ...]:
    if isinstance(value, jax.Array):
        return (value.shape,)
    return tuple(
        leaf.shape if isinstance(leaf, Param) else tuple(np.shape(leaf)) for leaf in jax.tree.leaves(value)
    )


def _text(shapes: tuple[Shape, ...] | None) -> str:
    if shapes is None:
        return "its value"
    return str(shapes[0]) if len(shapes) == 1 else str(shapes)


def _listed(lines: list[str]) -> str:
    return "; ".join(lines[:8]) + (f"; and {len(lines) - 8} more" if len(lines) > 8 else "")
