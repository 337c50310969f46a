"""The same layer with other layers in its fields."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from .layer import Layer, sublayers
from .replacing import seal
from .values import FrozenDict


# The place of a value in a layer: the name of its field, then indices and keys.
FieldPath = tuple[Any, ...]


def replaceable(layer: Layer) -> dict[str, Layer]:
    """Return the children that stand in fields of a layer, by path; the path of a wrapper's child is empty.

    Children that a layer makes itself are not among them: only the layer knows how.
    """
    return {path: child for path, (_, child) in _places(layer).items()}


def with_children(layer: Layer, new: Mapping[str, Layer]) -> Layer:
    """Make the same layer with some of its children replaced, by the paths that `replaceable` gives.

    **Raises:** `ValueError` if two names of one field would get different layers.
    """
    places, changes = _places(layer), {}
    for path, child in new.items():
        place, _ = places[path]
        if changes.setdefault(place, child) != child:
            raise ValueError(
                f"{path!r}: expected {changes[place]!r}, which the same field has, found {child!r}"
            )
    copy = object.__new__(type(layer))
    for field in dataclasses.fields(layer):  # pyright: ignore[reportArgumentType]
        vars(copy)[field.name] = _replaced(getattr(layer, field.name), (field.name,), changes)
    if hasattr(copy, "__post_init__"):
        copy.__post_init__()  # pyright: ignore[reportAttributeAccessIssue]
    seal(copy)
    return copy


def shared_names(layer: Layer) -> dict[str, str]:
    """Return the names of each child by its path: several, as `forward|backward`, if they share a field."""
    together: dict[FieldPath, list[str]] = {}
    for path, (place, _) in _places(layer).items():
        together.setdefault(place, []).append(path)
    return {path: "|".join(paths) for paths in together.values() for path in paths}


def _places(layer: Layer) -> dict[str, tuple[FieldPath, Layer]]:
    """Find the field of each child: a layer used twice, in two fields, is told apart by order."""
    fields = {f.name: getattr(layer, f.name) for f in dataclasses.fields(layer)}  # pyright: ignore
    free = list(_layers_in(fields, ()))
    places: dict[str, tuple[FieldPath, Layer]] = {}
    for path, child in sublayers(layer):
        same = [place for place, found in free if found is child]
        used = [place for place, found in places.values() if found is child]
        if same:
            places[path] = (same[0], child)
            free.remove((same[0], child))
        elif used:
            places[path] = (used[-1], child)
    return places


def _layers_in(value: object, place: FieldPath) -> Iterator[tuple[FieldPath, Layer]]:
    if isinstance(value, Layer):
        yield place, value
    elif isinstance(value, Mapping):
        for name, part in value.items():
            yield from _layers_in(part, (*place, name))
    elif isinstance(value, tuple):
        for i, part in enumerate(value):
            yield from _layers_in(part, (*place, i))


def _replaced(value: object, place: FieldPath, changes: Mapping[FieldPath, Layer]) -> Any:
    if isinstance(value, Layer):
        return changes.get(place, value)
    if isinstance(value, FrozenDict):
        return FrozenDict({name: _replaced(part, (*place, name), changes) for name, part in value.items()})
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return tuple(_replaced(part, (*place, i), changes) for i, part in enumerate(value))
    return value
