"""The parameters and states of a model with their names in another library."""

import dataclasses
import re
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ..core.composite import Wrapper
from ..core.layer import Layer, display_name, sublayers
from ..io.errors import LayoutMismatchError
from ..types import Shape
from ..vectors.names import UnknownNameError, describe, is_below, join_path, unknown_name
from ..wrappers.freeze import FrozenLayer
from .foreign import Foreign, Names


# Tells whether their module has an array of a name.
Has = Callable[[str], bool]
# By class, the names of a layer in another library.
Table = Mapping[type[Layer], Callable[[Any, Has], Names]]


@dataclasses.dataclass(frozen=True)
class Library:
    """Another library: its name, the method by which a layer says its names there, a table for ours.

    `child` is their name of a child of a layer, by ours, unless the user gives one.
    """

    name: str
    method: str
    table: Table
    child: Callable[[Layer, str], str]

    def names_of(self, layer: Layer, has: Has) -> Mapping[str, Foreign]:
        """Return the names of a layer; none, if it says nothing."""
        known = {*layer.layout.view_shapes, *layer.state_shapes}
        # Asked of the class: a wrapper that stands for its layer would answer with the names of that one.
        if hasattr(type(layer), self.method):
            names = getattr(layer, self.method)()
            for path in names:
                if path not in known:
                    where = f"{display_name(layer)}.{self.method}"
                    raise UnknownNameError(f"{where}: {unknown_name(path, known)}")
        else:
            rules = next((self.table[kind] for kind in type(layer).__mro__ if kind in self.table), None)
            names = {} if rules is None else rules(layer, has)
        return {path: self._foreign(layer, path, name) for path, name in names.items() if path in known}

    def _foreign(self, layer: Layer, path: str, name: object) -> Foreign:
        if not isinstance(name, str | Foreign):
            where = f"{display_name(layer)}.{self.method}"
            raise TypeError(f"{where}: expected a string or a Foreign for {path!r}, found {describe(name)}")
        return Foreign(name) if isinstance(name, str) else name


@dataclasses.dataclass(frozen=True)
class Entry:
    """A parameter or state: its path, which copy it is of those in a stack, and their names of it.

    `place` is where its numbers are: the path of a parameter, or the place in the state, which a layer around
    may have put into a part of its own.
    """

    path: str
    place: str
    index: tuple[int, ...]
    foreign: Foreign
    keys: tuple[str, ...]

    @property
    def text(self) -> str:
        return self.path + "".join(f"[{i}]" for i in self.index)


@dataclasses.dataclass(frozen=True)
class Unit:
    """A layer with names of its own in another library."""

    layer: Layer
    path: str
    entries: tuple[Entry, ...]


def units_of(
    library: Library, model: Layer, names: Mapping[str, str] | None, keys: Container[str] = ()
) -> list[Unit]:
    """Return the layers of a model that have names in a library, in the order of the model.

    **Raises:** `KeyError` for a path in `names` that the model does not have, `TypeError` for names that are
    no mapping of strings. `LayoutMismatchError` unless each parameter, and each array with axes of the state,
    has a name, and each part of their arrays a parameter.
    """
    if not isinstance(model, Layer):
        raise TypeError(f"expected a layer, found {describe(model)}")
    walk = _Walk(library, model, _strings(names), keys)
    units = list(walk.below(model, "", "", _Place(walk.given("", (), ""), ()), frozenset()))
    entries = [entry for unit in units for entry in unit.entries]
    if unknown := [path for path in walk.names if path not in walk.used]:
        known = {*walk.seen, *model.layout.view_shapes} - {""}
        raise UnknownNameError(f"names: {unknown_name(unknown[0], sorted(known))}")
    named = {place for entry in entries for place in (entry.path, entry.place)}
    lines = [
        f"{path}: {shape} has no name there; its layer can give one in a method `{library.method}`"
        for path, shape in {**model.layout.view_shapes, **walk.arrays}.items()
        if path not in named
    ]
    if lines := lines or _missing_parts(entries):
        raise LayoutMismatchError(f"expected layers that {library.name} has, too:", lines)
    return units


def _strings(names: Mapping[str, str] | None) -> dict[str, str]:
    if names is None:
        return {}
    pairs = names.items() if isinstance(names, Mapping) else [(None, None)]
    if not all(isinstance(path, str) and isinstance(name, str) for path, name in pairs):
        raise TypeError(f"names: expected a mapping of paths to names, all strings, found {names!r}")
    return dict(names)


def _missing_parts(entries: Sequence[Entry]) -> list[str]:
    """Return a line for each part of an array of theirs that has no parameter."""
    parts: dict[str, set[tuple[int, int]]] = {}
    for entry in entries:
        for key in entry.keys:
            parts.setdefault(key, set()).add(entry.foreign.part)
    return [
        f"{key}: part {i} of {n} has no parameter or state here"
        for key, found in parts.items()
        for n in sorted({n for _, n in found})
        for i in range(n)
        if (i, n) not in found
    ]


@dataclasses.dataclass(frozen=True)
class _Place:
    """Their name of a module, and the indices of our copy."""

    prefix: str
    index: tuple[int, ...]

    def of_copy(self, index: tuple[int, ...]) -> "_Place":
        prefix = self.prefix
        for i in index:
            prefix = _numbered(prefix, (i,)) if "{}" in prefix else join_path(prefix, str(i))
        return _Place(prefix, (*self.index, *index))

    def key(self, name: str) -> str:
        return self.prefix.replace("*", name) if "*" in self.prefix else join_path(self.prefix, name)


class _Walk:
    """A walk through a model, with the names that a user gives: which of them were used, what was seen."""

    def __init__(self, library: Library, model: Layer, names: dict[str, str], keys: Container[str]):
        self.library, self.model, self.names, self.keys = library, model, names, keys
        self.used: set[str] = set()
        self.seen: set[str] = set()
        # The arrays with axes in the state, one copy of each, by their places.
        self.arrays: dict[str, Shape] = {}
        # The places in the state of parameters that have left the vector, by their paths.
        self.moved: dict[str, str] = {}

    def given(self, path: str, index: tuple[int, ...], default: str) -> str:
        """Return the name that the user gives for a path; else the default."""
        self.seen.add(path)
        if path not in self.names:
            return default
        self.used.add(path)
        return _numbered(self.names[path], index)

    def below(
        self, layer: Layer, path: str, state: str, place: _Place, covered: frozenset[str]
    ) -> Iterator[Unit]:
        """Yield the units of a layer, whose state is at `state`; what is covered has a name already."""
        entries = tuple(self._entries(layer, path, state, place, covered))
        if entries:
            yield Unit(layer, path, entries)
        covered = covered | {entry.path for entry in entries}
        own = {leaf: shapes[0] for leaf, shapes in layer.state_shapes.items() if shapes and shapes[0]}
        if isinstance(layer, FrozenLayer):
            moved = layer.places_of_frozen.items()
            self.moved |= {join_path(path, leaf): join_path(state, there) for leaf, there in moved}
        for name, child in sublayers(layer):
            inner, inside = join_path(path, name), _place_in_state(layer, name, child)
            own = {leaf: shape for leaf, shape in own.items() if not _is_of(child, inside, leaf)}
            default = join_path(place.prefix, self.library.child(layer, name)) if name else place.prefix
            prefix = self.given(inner, place.index, default) if name else default
            for index in np.ndindex(_copies(layer, name, inside, child)):
                there = _Place(prefix, place.index).of_copy(index)
                yield from self.below(child, inner, join_path(state, inside), there, covered)
        self.arrays |= {join_path(state, leaf): shape for leaf, shape in own.items()}

    def _entries(
        self, layer: Layer, path: str, state: str, place: _Place, covered: frozenset[str]
    ) -> Iterator[Entry]:
        if "*" in place.prefix and isinstance(layer, Wrapper):
            return  # The names in a template are those of the layer inside.
        names = self.library.names_of(layer, lambda name: place.key(name) in self.keys)
        for name, foreign in names.items():
            leaf = join_path(path, name)
            if leaf in covered or self._named_inside(leaf, path):
                continue
            where = self._place_of(leaf) if name in layer.layout.view_shapes else join_path(state, name)
            if where is None:
                continue  # A wrapper around it has other parameters in their place.
            keys = tuple(map(place.key, foreign.names))
            if leaf in self.names:
                keys = (self.given(leaf, place.index, ""),) * len(keys)
            yield Entry(leaf, where, place.index, foreign, keys)

    def _place_of(self, leaf: str) -> str | None:
        """Return where the numbers of a parameter are."""
        return leaf if leaf in self.model.layout.view_shapes else self.moved.get(leaf)

    def _named_inside(self, leaf: str, path: str) -> bool:
        """Tell whether the user gives a name for a layer inside of the one at `path` that has the leaf."""
        return any(name != leaf and len(name) > len(path) and is_below(leaf, name) for name in self.names)


def _place_in_state(layer: Layer, name: str, child: Layer) -> str:
    """Return where the state of a layer has that of a child: under its name, or in a part of the layer's own.

    A solver has the states of its models apart from its statistics, and a wrapper has those of its layer as
    its own, or so.
    """
    parts = dict.fromkeys(path.partition(".")[0] for path in layer.state_shapes)
    for place in (name, *parts):
        if all(join_path(place, leaf) in layer.state_shapes for leaf in child.state_shapes):
            return place
    return name


def _is_of(child: Layer, place: str, leaf: str) -> bool:
    """Tell whether a leaf of the state of a layer is that of a child, whose state is at a place."""
    return any(join_path(place, own) == leaf for own in child.state_shapes)


def _copies(layer: Layer, name: str, place: str, child: Layer) -> tuple[int, ...]:
    """Return how many copies of a child there are: the axes in front of its parameters, or of its states."""
    for leaf, shape in child.layout.view_shapes.items():
        full = layer.layout.view_shapes.get(join_path(name, leaf), shape)
        return full[: len(full) - len(shape)]
    for leaf, shapes in child.state_shapes.items():
        full = layer.state_shapes.get(join_path(place, leaf))
        if shapes and full:
            return full[0][: len(full[0]) - len(shapes[0])]
    return ()


def _numbered(prefix: str, index: tuple[int, ...]) -> str:
    for i in index:
        prefix = prefix.replace("{}", str(i), 1)
    return prefix


def numbers_for_names(name: str) -> str:
    """Return a path with the numbers of numbered layers alone: `blocks.0` for `blocks.layer_0`."""
    return re.sub(r"(^|\.)layer_(\d+)(?=\.|$)", r"\1\2", name)
