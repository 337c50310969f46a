"""`Layout`: names to places in one contiguous vector."""

import fnmatch
import functools
import json
import operator
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from . import packing, places as plan
from .layout_text import differences, to_plain
from .names import (
    NamedArray,
    UnknownNameError,
    UnknownPatternError,
    as_path,
    check_name,
    join_path,
    listing,
    unknown_name,
)
from .places import Segment, Shape, Slot
from .record import Record


if TYPE_CHECKING:
    from .vector import ComponentVector


class Layout:
    """Names, shapes and places of the parts of one vector. A value: hashable, no arrays.

    Declared order is vector order, arrays are row-major, a scalar is one slot, and there
    is no padding.

    **Arguments:**

    - `names`: a mapping of names to shapes (tuples of integers), layouts or mappings.

    Names are Python identifiers without a leading underscore. Reserved are the attributes
    of `ComponentVector` and the methods of a mapping: `at, data, dtype, get, items, keys,
    layout, lead, map, ndim, of, pick, replace, shape, size, to_dict, unpack, values`.

    **Raises:** `ValueError` for a bad name or a negative size, `TypeError` for a shape that
    is no tuple of integers.

    >>> import flatlayers as fl
    >>> layout = fl.Layout({"weight": (4, 2), "inner": {"bias": (4,), "gain": ()}})
    >>> layout.length, layout.names
    (13, ('weight', 'inner'))
    >>> layout["inner.gain"]
    Slot(offset=12, shape=(), size=1, copies=(), strides=())
    >>> layout["inner"]
    Layout(bias=(4,), gain=())
    """

    def __init__(self, names: "Mapping[str, Any] | Layout"):
        entries, ties = {}, {}
        for name, part in names.entries.items() if isinstance(names, Layout) else names.items():
            child = _as_child(name, part)
            if isinstance(child, Layout):
                ties |= {join_path(name, a): join_path(name, b) for a, b in child.ties.items()}
                child = child._untied()
            entries[name] = child
        if isinstance(names, Layout):
            self._set(entries, names.copies, names.ties)
        else:
            self._set(entries, (), ties)

    def _set(
        self, entries: "Mapping[str, Shape | Layout]", copies: Shape, ties: Mapping[str, str]
    ) -> "Layout":
        # `entries` hold no ties: all of them are kept here, by path, each leaf with the leaf
        # that has the place. So layouts that mean the same are equal.
        self.__dict__.update(
            entries=MappingProxyType(dict(entries)),
            copies=copies,
            ties=MappingProxyType(dict(sorted(ties.items()))),
        )
        return self

    entries: "Mapping[str, Shape | Layout]"
    copies: Shape
    ties: Mapping[str, str]

    @staticmethod
    def _new(entries: "Mapping[str, Shape | Layout]", copies: Shape, ties: Mapping[str, str]) -> "Layout":
        return object.__new__(Layout)._set(entries, copies, ties)

    def _untied(self) -> "Layout":
        return Layout._new(self.entries, self.copies, {})

    @staticmethod
    def of(tree: Any) -> "Layout":
        """The layout of a nested mapping of arrays, numbers and vectors, which keep their names.

        **Raises:** `TypeError` for what is none of these, such as a list of mappings.

        >>> import flatlayers as fl
        >>> fl.Layout.of({"a": 1.0, "b": {"c": [1.0, 2.0]}})
        Layout(a=(), b=(c=(2,)))
        """
        if isinstance(tree, NamedArray):
            return tree.layout
        if not isinstance(tree, Mapping):
            raise TypeError(f"expected a mapping of names to arrays, found {type(tree).__name__}")
        return Layout({name: _part_of(str(name), part) for name, part in tree.items()})

    # Asking

    @functools.cached_property
    def length(self) -> int:
        """The length of the vector."""
        return sum(segment.size for segment in self._segments)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of this level, in vector order."""
        return tuple(self.entries)

    def slots(self) -> tuple[tuple[str, Slot], ...]:
        """All leaves as `(path, Slot)`, depth-first. Tied names are listed with the same place."""
        return tuple(self._slots.items())

    def __getitem__(self, key: str | tuple[str, ...]) -> "Slot | Layout":
        path = as_path(key)
        if path in self._slots:
            return self._slots[path]
        return self._group(path)

    def __contains__(self, key: Any) -> bool:
        return isinstance(key, str) and (key in self._slots or key in self.groups)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def labels(self) -> list[str]:
        """A name for each number: `inner.w[0,1]`, or `blocks[2].w[0,1]` inside a stack.

        >>> import flatlayers as fl
        >>> fl.Layout({"w": (1, 2), "gain": ()}).labels()
        ['w[0,0]', 'w[0,1]', 'gain']
        """
        return list(plan.labels(self._segments, "", 0))

    def indices(self, path: str | tuple[str, ...]) -> np.ndarray:
        """The positions of a leaf or a group, such that `v.data[..., indices(path)]` are its numbers."""
        part = self[path]
        if isinstance(part, Slot):
            return part.positions().ravel()
        path = as_path(path)
        values = {leaf: self._view_positions(join_path(path, leaf)) for leaf in part._slots}
        return packing.join(part._segments, values, (), int, np.concatenate)

    def span(self, path: str) -> slice | np.ndarray:
        """`indices(path)`, as a slice if the numbers lie next to each other."""
        if path not in self._spans:
            where = self.indices(path)
            start = int(where[0]) if where.size else 0
            if np.array_equal(where, np.arange(start, start + where.size)):
                where = slice(start, start + where.size)
            else:
                where.setflags(write=False)
            self._spans[path] = where
        return self._spans[path]

    def mask(self, *patterns: str) -> np.ndarray:
        """Which numbers the patterns name, as a bool vector of shape `(length,)`.

        **Arguments:**

        - `*patterns`: shell-style patterns (`fnmatch`) over dotted paths, where `*` crosses
            dots. The name of a group means all below it, and either name of a tie counts.

        **Raises:** `KeyError` (also a `ValueError`) for a pattern that matches nothing.

        >>> import flatlayers as fl
        >>> fl.Layout({"a": {"weight": (2,), "bias": ()}}).mask("*.bias")
        array([False, False,  True])
        """
        mask = np.zeros(self.length, bool)
        for pattern in patterns:
            for path in self._matching(pattern):
                mask[self._slots[path].positions()] = True
        return mask

    def diff(self, other: "Layout") -> list[str]:
        """What changed from this layout to the other, a readable line each; empty if they are equal.

        >>> import flatlayers as fl
        >>> fl.Layout({"w": (2,), "b": ()}).diff(fl.Layout({"w": (3,), "gain": ()}))
        ['w: (2,) became (3,)', 'b: () is gone', 'gain: () is new']
        """
        return differences(self, other)

    def fits_into(self, other: "Layout") -> bool:
        """Whether the other layout has all the names of this one, with their shapes."""
        if self is other or other in self._fitting:
            return True
        shapes, found = self.view_shapes, other.view_shapes
        same = all(path in found and found[path] == shape for path, shape in shapes.items())
        if same and all(path in other.groups for path in self.groups):
            self._fitting.add(other)
            return True
        return False

    # Making others

    def stack(self, n: int) -> "Layout":
        """`n` copies one after another; a view has shape `(n, *shape)`. What a repeated layer scans over.

        >>> import flatlayers as fl
        >>> blocks = fl.Layout({"w": (2, 2), "b": (2,)}).stack(3)
        >>> blocks.length, blocks["b"].stride, blocks.zeros().w.shape
        (18, 6, (3, 2, 2))
        """
        n = operator.index(n)
        if n < 0:
            raise ValueError(f"expected a number of copies of 0 or more, found {n}")
        return Layout._new(self.entries, (n, *self.copies), self.ties)

    def tie(self, names: Mapping[str, str]) -> "Layout":
        """Give two names one place: the vector gets shorter, and gradients add.

        **Arguments:**

        - `names`: which name goes to the place of which other, for leaves or whole groups of
            the same shapes.

        **Raises:** `KeyError` for an unknown name, `ValueError` for shapes that differ or a cycle.

        >>> import flatlayers as fl
        >>> layout = fl.Layout({"encoder": {"weight": (4, 2)}, "decoder": {"weight": (4, 2)}})
        >>> layout.tie({"decoder.weight": "encoder.weight"}).length
        8
        """
        places = dict(self.ties)
        for name, target in names.items():
            for leaf, target_leaf in self._pairs(as_path(name), as_path(target)):
                place, new_place = places.get(leaf, leaf), places.get(target_leaf, target_leaf)
                if place == new_place and leaf == place:
                    raise ValueError(f"cannot tie {leaf!r} to {target_leaf!r}: that is a cycle")
                if place != new_place:
                    places = {a: new_place if b == place else b for a, b in places.items()}
                    places[place] = new_place
        return Layout._new(self.entries, self.copies, places)

    def pick(self, *paths: str) -> "Layout":
        """The layout of some of the parts alone, in the order given, under their paths.

        **Raises:** `KeyError` for an unknown name, `ValueError` for one that is inside another.

        >>> import flatlayers as fl
        >>> layout = fl.Layout({"a": (2,), "b": {"c": (), "d": (3,)}})
        >>> layout.pick("b.d", "a")
        Layout(b=(d=(3,)), a=(2,))
        """
        wanted: dict[str, Any] = {}
        for path in paths:
            *above, name = self._known(as_path(path)).split(".")
            group: dict[str, Any] | None = wanted
            for part in above:
                group = None if group is None else group.setdefault(part, {})
            if group is None or name in group:
                raise ValueError(f"pick: expected parts that do not overlap, found {path!r} twice")
            group[name] = None
        layout = _only(self, wanted)
        ties = self._ties_among({path: path for path in layout.view_shapes})
        return Layout._new(layout.entries, layout.copies, ties)

    def _pairs(self, name: str, target: str) -> list[tuple[str, str]]:
        shapes = [
            {leaf: shape for leaf, shape in self.view_shapes.items() if _is_below(leaf, path)}
            for path in (self._known(name), self._known(target))
        ]
        mine = {leaf[len(name) :]: shape for leaf, shape in shapes[0].items()}
        theirs = {leaf[len(target) :]: shape for leaf, shape in shapes[1].items()}
        if mine != theirs:
            raise ValueError(
                f"cannot tie {name!r} to {target!r}: expected the same shapes, found "
                f"{listing(shapes[0].items())} and {listing(shapes[1].items())}"
            )
        return list(zip(shapes[0], (target + leaf for leaf in mine), strict=True))

    # Vectors

    def vector(self, data: Any) -> "ComponentVector":
        """The array `data` of shape `(..., length)` with this layout.

        **Raises:** `ValueError` for another length.
        """
        from .vector import ComponentVector

        return ComponentVector(
            data if isinstance(data, jax.Array | jax.ShapeDtypeStruct) else jnp.array(data), self
        )

    def zeros(self, dtype: Any = None) -> "ComponentVector":
        """A vector of zeros, of JAX's default float dtype if none is given."""
        return self.vector(jnp.zeros(self.length, dtype))

    def pack(self, tree: Mapping[str, Any], dtype: Any = None) -> "ComponentVector":
        """The vector with the numbers of a nested mapping. The inverse of `unpack`.

        **Arguments:**

        - `tree`: a nested mapping (or `Record` or `ComponentVector`) of arrays or numbers with
            the names and shapes of this layout. All arrays may have the same leading axes.
        - `dtype`: the dtype of the vector. Without it nothing is converted: floating arrays keep
            their dtype, which has to be the same for all, and Python numbers follow them (alone
            they take JAX's default float dtype).

        Tied names need equal values; where those are traced, the one that has the place counts.

        **Raises:** `KeyError` for a missing or unknown name, `ValueError` for a wrong shape or for
        two different values of tied names, `TypeError` for mixed dtypes or integers without `dtype`.

        >>> import flatlayers as fl
        >>> fl.Layout({"a": (), "b": (2,)}).pack({"a": 1.0, "b": [2.0, 3.0]}).data
        Array([1., 2., 3.], dtype=float32)
        """
        leaves = packing.leaves_of(self, tree)
        arrays = packing.same_dtype(leaves, dtype)
        lead = packing.leading_axes(arrays, self.view_shapes)
        for path, place in self.ties.items():
            packing.check_tied(path, leaves[path], arrays[path], place, leaves[place], arrays[place])
        dtype = next((array.dtype for array in arrays.values()), dtype)
        return self.vector(packing.join(self._segments, arrays, lead, dtype, jnp.concatenate))

    def unpack(self, data: Any) -> Record:
        """All leaves of `data`, of shape `(..., length)`, as a nested `Record`, in one split.

        Its transpose is one concatenation, whatever the number of leaves: what hot code uses.

        **Raises:** `ValueError` for another length.
        """
        if isinstance(data, NamedArray):
            check_same_layout(self, data.layout)
            data = data.data
        self.check_length(data)
        leaves: dict[str, Any] = {}
        packing.split(self._segments, data, leaves)
        for path, place in self.ties.items():
            leaves[path] = leaves[place]
        return self.nest(leaves)

    def check_length(self, data: Any) -> None:
        if not hasattr(data, "shape"):
            raise TypeError(f"expected an array of shape (..., {self.length}), found {type(data).__name__}")
        if not data.shape or data.shape[-1] != self.length:
            raise ValueError(
                f"expected data of shape (..., {self.length}), found shape {tuple(data.shape)}; "
                f"the layout is {self!r}"
            )

    def view(self, data: Any, path: str) -> jax.Array:
        """The one leaf at `path`, by a slice of `data`."""
        return packing.view(self._segments, data, self.ties.get(path, path)).reshape(
            (*data.shape[:-1], *self.view_shapes[path])
        )

    # Text and JSON

    def to_json(self) -> str:
        """The layout as JSON text, to be stored beside a saved vector."""
        return json.dumps({"flatlayers_layout": 1, "tree": to_plain(self), "ties": dict(self.ties)})

    @staticmethod
    def from_json(text: str) -> "Layout":
        """The layout that `to_json` wrote. **Raises:** `ValueError` for any other text."""
        try:
            content = json.loads(text)
            if content["flatlayers_layout"] != 1:
                raise ValueError(f"expected version 1, found {content['flatlayers_layout']}")
            return Layout._from_plain(content["tree"]).tie(content["ties"])
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise ValueError(f"this is not the JSON text of a Layout: {error}") from error

    @staticmethod
    def _from_plain(plain: Mapping[str, Any]) -> "Layout":
        names = plain["names"].items()
        layout = Layout({name: Layout._from_plain(c) if isinstance(c, Mapping) else c for name, c in names})
        for n in reversed(plain.get("copies", ())):
            layout = layout.stack(n)
        return layout

    def __repr__(self) -> str:
        inside = ", ".join(
            f"{name}={child!r}".replace("=Layout(", "=(") for name, child in self.entries.items()
        )
        stacks = "".join(f".stack({n})" for n in reversed(self.copies))
        ties = f".tie({dict(self.ties)})" if self.ties else ""
        return f"Layout({inside}){stacks}{ties}"

    # A value

    @functools.cached_property
    def _identity(self) -> Any:
        return tuple(self.entries.items()), self.copies, tuple(self.ties.items())

    @functools.cached_property
    def _hash(self) -> int:
        return hash(self._identity)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return isinstance(other, Layout) and self._hash == other._hash and self._identity == other._identity

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError("layouts are immutable")

    def __delattr__(self, name: str) -> None:
        raise AttributeError("layouts are immutable")

    def __reduce__(self) -> Any:
        return Layout._new, (dict(self.entries), self.copies, dict(self.ties))

    # The plan: computed once, from which everything above is read off

    @functools.cached_property
    def _segments(self) -> tuple[Segment, ...]:
        """What the vector is made of, in order."""
        segments = plan.place(self, "", self.ties)
        if not self.copies:
            return segments
        return (plan.block("", 0, self.copies, segments),)

    @functools.cached_property
    def _slots(self) -> dict[str, Slot]:
        own = dict(plan.slots(self._segments, 0, (), ()))
        return {path: own[self.ties.get(path, path)] for path in self.view_shapes}

    @functools.cached_property
    def view_shapes(self) -> Mapping[str, Shape]:
        """The shapes that views have, by path in declared order; stacks included."""
        shapes: dict[str, Shape] = {}
        for name, child in self.entries.items():
            if isinstance(child, Layout):
                below = child.view_shapes.items()
                shapes |= {join_path(name, path): self.copies + shape for path, shape in below}
            else:
                shapes[name] = self.copies + child
        return MappingProxyType(shapes)

    @functools.cached_property
    def groups(self) -> "Mapping[str, Layout]":
        """The untied sub-layouts by path, the root under `""`; a stack has its own copies only."""
        groups: dict[str, Layout] = {"": self}
        for name, child in self.entries.items():
            if isinstance(child, Layout):
                groups |= {join_path(name, path): group for path, group in child.groups.items()}
        return MappingProxyType(groups)

    @functools.cached_property
    def _spans(self) -> dict[str, slice | np.ndarray]:
        return {}

    @functools.cached_property
    def _fitting(self) -> "set[Layout]":
        """The layouts that this one was found to fit into: a call asks for the same one each time."""
        return set()

    @functools.cached_property
    def _parts(self) -> dict[str, "Layout"]:
        return {}

    def _group(self, path: str) -> "Layout":
        """The sub-layout at `path` on its own, as many times as it is stacked."""
        if path not in self._parts:
            self._known(path)
            parts = path.split(".")
            above = [self.groups[".".join(parts[:depth])] for depth in range(len(parts))]
            copies = sum((group.copies for group in above), ())
            group = self.groups[path]
            names = {join_path(path, leaf): leaf for leaf in group.view_shapes}
            self._parts[path] = Layout._new(group.entries, copies + group.copies, self._ties_among(names))
        return self._parts[path]

    def _ties_among(self, names: Mapping[str, str]) -> dict[str, str]:
        """The ties of a part of this layout, whose leaves are `names`: the path here to the path there.

        A place outside of the part goes to the first of its names that shares it.
        """
        holders = {path: name for path, name in names.items() if path not in self.ties}
        ties = {}
        for path, name in names.items():
            place = self.ties.get(path, path)
            if holders.setdefault(place, name) != name:
                ties[name] = holders[place]
        return ties

    def _known(self, path: str) -> str:
        if not path or path not in self:
            parts = path.split(".")
            for depth, name in enumerate(parts):
                group = self.groups.get(".".join(parts[:depth]))
                if group is None or name not in group.entries:
                    known = group.entries if group is not None else ()
                    where = f" in {'.'.join(parts[:depth])!r}" if depth else ""
                    raise UnknownNameError(f"{path!r}: {unknown_name(name, known)}{where}")
        return path

    def _view_positions(self, path: str) -> np.ndarray:
        return self._slots[path].positions().reshape(self.view_shapes[path])

    def _matching(self, pattern: str) -> list[str]:
        named = [path for path in (*self.groups, *self._slots) if path and fnmatch.fnmatchcase(path, pattern)]
        if not named:
            known = [*self._slots, *(path for path in self.groups if path)]
            raise UnknownPatternError(
                f"the pattern {pattern!r} matches nothing: {unknown_name(pattern, known)}"
            )
        return [leaf for leaf in self._slots if any(_is_below(leaf, path) for path in named)]

    def nest(self, leaves: Mapping[str, Any], prefix: str = "") -> Record:
        return Record(
            {
                name: child.nest(leaves, join_path(prefix, name))
                if isinstance(child, Layout)
                else leaves[join_path(prefix, name)]
                for name, child in self.entries.items()
            }
        )


def check_same_layout(expected: Layout, found: Layout) -> None:
    if expected != found:
        raise TypeError(f"expected the same layout for both, found: {expected.diff(found)[0]}")


def _only(layout: Layout, wanted: Mapping[str, Any]) -> Layout:
    """The entries of a layout that a nested mapping names, whole where it has no names below."""
    entries: dict[str, Shape | Layout] = {}
    for name, below in wanted.items():
        child = layout.entries[name]
        entries[name] = _only(child, below) if below is not None and isinstance(child, Layout) else child
    return Layout._new(entries, layout.copies, {})


def _part_of(path: str, part: Any) -> "Shape | Layout":
    if isinstance(part, NamedArray):
        return part.layout
    if isinstance(part, Mapping):
        return Layout({name: _part_of(f"{path}.{name}", below) for name, below in part.items()})
    if isinstance(part, list | tuple) and any(isinstance(below, Mapping | NamedArray) for below in part):
        raise TypeError(
            f"{path!r}: expected an array, a number or a mapping, found a list of mappings; give each a "
            "name, as in {'layer_0': ..., 'layer_1': ...}, or stack their arrays under one (`Layout.stack`)"
        )
    if part is None or isinstance(part, str | bytes):
        raise TypeError(f"{path!r}: expected an array, a number or a mapping, found {part!r}")
    return tuple(np.shape(part))


def _as_child(name: Any, part: Any) -> "Shape | Layout":
    check_name(name)
    if isinstance(part, Layout):
        return part
    if isinstance(part, Mapping):
        try:
            return Layout(part)
        except (TypeError, ValueError) as error:
            raise type(error)(f"below {name!r}: {error}") from None
    try:
        shape = (
            (operator.index(part),) if not isinstance(part, Sequence) else tuple(map(operator.index, part))
        )
    except TypeError:
        raise TypeError(
            f"{name!r}: expected a shape (a tuple of integers), a Layout or a mapping, found {part!r}"
        ) from None
    if any(size < 0 for size in shape):
        raise ValueError(f"{name!r}: expected sizes of 0 or more, found the shape {shape}")
    return shape


def _is_below(path: str, group: str) -> bool:
    return path == group or path.startswith(group + ".")
