"""Compare parameters and a state with what a layer declares: its names, with their shapes."""

import functools
import operator
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import jax
import numpy as np

from ..types import Key, Shape, State
from ..vectors.layout import Layout
from ..vectors.names import join_path
from ..vectors.record import Record, is_static
from .declaration import Param


# The shapes of the arrays of a state by path; `None` for what may be anything, such as a flag.
Shapes = Mapping[str, tuple[Shape, ...] | None]


def check_parameters(declared: Layout, found: Layout) -> None:
    """Raise `ValueError` unless a vector with the layout `found` has all that is declared.

    More names are allowed: a slice of a `Chain` takes the vector of the whole.
    """
    if not declared.fits_into(found):
        lines = [line for line in declared.diff(found) if not line.endswith("is new")]
        raise ValueError(
            f"expected the parameters of this layer, found a vector of another one: {_listed(lines)}"
        )


def check_state(declared: Shapes, found: State) -> None:
    """Raise `ValueError` unless a state has all that is declared, more names allowed."""
    lines = list(_differences(declared, found))
    if lines:
        raise ValueError(f"expected the state of this layer, found that of another one: {_listed(lines)}")


def shapes_of_states(states: Callable[[Key], Mapping[str, Any]]) -> Shapes:
    """Return the shapes of the arrays that a function of a key makes, by path. Nothing is computed."""
    found: list[Shapes] = []

    def declared(key: Key) -> None:
        found.append(_shapes_in(Record(states(key))))

    try:  # with an abstract key, so that nothing is added to what is being traced
        jax.eval_shape(declared, jax.eval_shape(jax.random.key, 0))
    except jax.errors.JAXTypeError:  # the states are made of the numbers of a key
        with jax.ensure_compile_time_eval():
            declared(jax.random.key(0))
    return MappingProxyType(found[-1])


def _shapes_in(st: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[Shape, ...] | None]:
    shapes: dict[str, tuple[Shape, ...] | None] = {}
    for name, value in st.items():
        path = join_path(prefix, name)
        if isinstance(value, Record):
            shapes |= _shapes_in(value, path)
        else:
            shapes[path] = None if is_static(value) else _shapes(value)
    return shapes


def _differences(declared: Shapes, st: State) -> Iterator[str]:
    for path, shapes in declared.items():
        try:
            value = functools.reduce(operator.getitem, path.split("."), st)
        except (KeyError, TypeError):
            yield f"{path}: {_text(shapes)} is gone"
            continue
        if shapes is not None and (found := _shapes(value)) != shapes:
            yield f"{path}: {_text(shapes)} became {_text(found)}"


def _shapes(value: object) -> tuple[Shape, ...]:
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
