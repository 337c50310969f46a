"""Calling a layer, and saying where in a model an exception comes from."""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import jax

from ..vectors.names import describe, join_path
from ..vectors.record import as_record
from ..vectors.vector import ComponentVector
from .matching import check_parameters, check_state


if TYPE_CHECKING:
    from .layer import Layer

# A method of a layer that takes and returns what `forward` does: `(x, ps, st)` → `(y, st)`.
Method = Callable[[Any, Any, Any], tuple[Any, Any]]


def apply(layer: "Layer", x: Any, ps: Any, st: Any) -> tuple[Any, Any]:
    """Call a layer: `layer(x, ps, st)` is `apply(layer, x, ps, st)`.

    **Arguments:**

    - `layer`: the layer.
    - `x`: its input.
    - `ps`: its parameters: a `ComponentVector`, which is unpacked once, a mapping, or any object
        with the right attributes, such as a `Record` or a named tuple.
    - `st`: its state, a `Record` or a mapping.

    With a vector, the names and shapes that the layer declares have to be in its layout and in `st`; more
    names are allowed. Parameters of any other kind are taken as they are, and the state with them.

    **Returns:** `(y, st)`, the output and the new state.

    **Raises:** `ValueError` for the vector or the state of another model; what `forward` raises. A note
    names the path of the layer that failed, its display line and the shape of its input.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import flatlayers as fl
    >>> model = fl.Dense(3, 2)
    >>> ps, st = fl.setup(jax.random.key(0), model)
    >>> y, st = fl.apply(model, jnp.ones(3), ps, st)
    >>> y.shape
    (2,)
    """
    return call(layer, layer.forward, x, ps, st)


def call(layer: "Layer", method: Method, x: Any, ps: Any, st: Any) -> tuple[Any, Any]:
    """Call a method of a layer as `apply` calls `forward`: parameters unpacked once, errors with a note."""
    st = as_record(st)
    try:
        if isinstance(ps, ComponentVector):
            check_parameters(layer, ps.layout)
            check_state(layer, st)
            ps = ps.unpack()
        else:
            ps = as_record(ps)
        with jax.named_scope(display_name(layer)):
            result = method(x, ps, st)
        if not isinstance(result, tuple) or len(result) != 2:
            raise TypeError(f"expected `forward` to return (y, st), found {describe(result)}")
        return result[0], as_record(result[1])
    except Exception as error:
        _note_place(error, layer, x, ps)
        raise


def display_name(layer: "Layer") -> str:
    """The name that displays and messages use: the field `name` if it is a string, else the class.

    >>> import flatlayers as fl
    >>> fl.display_name(fl.Dense(3, 2))
    'Dense'
    """
    name = getattr(layer, "name", None)
    return name if isinstance(name, str) else type(layer).__name__


class _Place(str):
    """The note on an exception: where in the model it was raised."""

    layer: "Layer"
    ps: Any
    innermost: tuple[str, str, str]

    @staticmethod
    def of(layer: "Layer", ps: Any, path: str, innermost: tuple[str, str, str]) -> "_Place":
        name, line, x = innermost
        place = _Place(f"in the layer {path or name}: {line}\n  called with x: {x}")
        place.layer, place.ps, place.path, place.innermost = layer, ps, path, innermost
        return place

    path: str = ""

    def __reduce__(self) -> Any:
        return str, (str(self),)


def _note_place(error: Exception, layer: "Layer", x: Any, ps: Any) -> None:
    """Note where an exception comes from. Each enclosing layer puts its child's name in front."""
    notes = getattr(error, "__notes__", [])
    for position, note in enumerate(notes):
        if isinstance(note, _Place):
            path = join_path(_name_of_child(layer, ps, note), note.path)
            notes[position] = _Place.of(layer, ps, path, note.innermost)
            return
    innermost = (display_name(layer), _one_line(repr(layer)), describe(x))
    error.add_note(_Place.of(layer, ps, "", innermost))


def _name_of_child(layer: "Layer", ps: Any, inner: _Place) -> str:
    # By its parameters, which tell apart two uses of one layer; else by the layer itself.
    if inner.ps is ps:
        return ""
    children = list(sublayers(layer))
    for path, _ in children:
        if functools.reduce(lambda part, name: getattr(part, name, None), path.split("."), ps) is inner.ps:
            return path
    return next((path for path, child in children if child is inner.layer), "")


def _one_line(text: str) -> str:
    return text if len(text) <= 160 else text[:157] + "..."


def sublayers(layer: "Layer") -> "Iterator[tuple[str, Layer]]":
    """The layers directly inside as `(path, layer)`; the path of a wrapper's child is empty."""
    yield from _flat_layers(layer.children(), "")


def _flat_layers(children: Mapping[str, Any], prefix: str) -> "Iterator[tuple[str, Layer]]":
    for name, child in children.items():
        path = join_path(prefix, name)
        if isinstance(child, Mapping):
            yield from _flat_layers(child, path)
        else:
            yield path, child
