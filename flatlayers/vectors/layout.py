"""`Layout`: names to places in one contiguous vector. Neither this file nor any below it needs JAX."""

import functools
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from . import json_text
from .names import (
    NamedArray,
    UnknownNameError,
    as_path,
    check_name,
    join_path,
    listing,
    unknown_name,
)
from .places import Places
from .record import Record
from .segments import ByNamespace, Numbers, Shape, Splitting, join, split


class Layout(Places):
    """Names, shapes and places of the parts of one vector. A value: hashable, no arrays.

    Declared order is vector order, arrays are row-major, a scalar is one slot, and there
    is no padding.

    **Arguments:**

    - `names`: a mapping of names to shapes (tuples of integers), layouts or mappings.

    Names are Python identifiers, as Python reads them (`lambda` it does not), without a leading underscore.
    Reserved are the attributes of `ComponentVector` and the methods of a mapping: `at, data, dtype, get,
    items, keys, layout, lead, map, ndim, of, pick, replace, shape, size, to_dict, to_frame, to_series,
    unpack, values, zeros`.

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

    def __init__(self, names: "Mapping[str, object] | Layout"):
        if isinstance(names, Layout):
            self._set(names.entries, names.copies, names.ties)
            return
        entries: dict[str, Shape | Layout] = {}
        ties: dict[str, str] = {}
        for name, part in names.items():
            child = _as_child(check_name(name), part)
            if isinstance(child, Layout):
                ties |= {join_path(name, a): join_path(name, b) for a, b in child.ties.items()}
                child = Layout._of(child.entries, child.copies, {})
            entries[name] = child
        self._set(entries, (), ties)

    @staticmethod
    def of(tree: Mapping[str, object] | NamedArray) -> "Layout":
        """Return the layout of a nested mapping of arrays, numbers and vectors, which keep their names.

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

    # Comparing

    def diff(self, other: "Layout") -> list[str]:
        """Return what changed from this layout to the other, one readable line per change.

        >>> import flatlayers as fl
        >>> fl.Layout({"w": (2,), "b": ()}).diff(fl.Layout({"w": (3,), "gain": ()}))
        ['w: (2,) became (3,)', 'b: () is gone', 'gain: () is new']
        """
        if self == other:
            return []
        before, after = self.view_shapes, other.view_shapes
        lines = []
        for path, shape in before.items():
            if path not in after:
                lines.append(f"{path}: {shape} is gone")
            elif shape != after[path]:
                lines.append(f"{path}: {shape} became {after[path]}")
            elif self.ties.get(path) != other.ties.get(path):
                lines.append(f"{path}: {self._tie_text(path)} became {other._tie_text(path)}")
        lines += [f"{path}: {shape} is new" for path, shape in after.items() if path not in before]
        return lines or [self._first_move(other)]

    def _tie_text(self, path: str) -> str:
        return f"tied to {self.ties[path]}" if path in self.ties else "a place of its own"

    def _first_move(self, other: "Layout") -> str:
        """Return the first difference in order, empty groups or stacks: leaves and ties are the same."""
        for path, group in self.groups.items():
            before, after = group.names, other.groups[path].names if path in other.groups else ()
            if before != after:
                where = f"{path}: " if path else ""
                return f"{where}{listing(before)} became {listing(after)}"
        slots = zip(self.slots(), other.slots(), strict=True)
        moved = [f"{path}: {slot} became {new}" for (path, slot), (_, new) in slots if slot != new]
        return moved[0] if moved else "the copies of an empty stack differ"

    def fits_into(self, other: "Layout") -> bool:
        """Tell whether the other layout has all the names of this one, with their shapes."""
        if self is other or other in self._fitting:
            return True
        shapes, found = self.view_shapes, other.view_shapes
        same = all(path in found and found[path] == shape for path, shape in shapes.items())
        if same and all(path in other.groups for path in self.groups):
            self._fitting.add(other)
            return True
        return False

    @functools.cached_property
    def _fitting(self) -> "set[Layout]":
        """The layouts that this one was found to fit into: each call of a layer asks for the same one."""
        return set()

    # Making others

    def stack(self, n: int) -> "Layout":
        """Return `n` copies one after another, for a repeated layer: a view has shape `(n, *shape)`.

        >>> import flatlayers as fl
        >>> blocks = fl.Layout({"w": (2, 2), "b": (2,)}).stack(3)
        >>> blocks.length, blocks["b"].stride, fl.ComponentVector.zeros(blocks).w.shape
        (18, 6, (3, 2, 2))
        """
        n = operator.index(n)
        if n < 0:
            raise ValueError(f"expected a number of copies of 0 or more, found {n}")
        return Layout._of(self.entries, (n, *self.copies), self.ties)

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
        holders: dict[str, list[str]] = {}  # the names that are tied to a place
        for path, place in places.items():
            holders.setdefault(place, []).append(path)
        for name, target in names.items():
            for leaf, target_leaf in self._pairs(as_path(name), as_path(target)):
                place, new_place = places.get(leaf, leaf), places.get(target_leaf, target_leaf)
                if place == new_place and leaf == place:
                    raise ValueError(f"cannot tie {leaf!r} to {target_leaf!r}: that is a cycle")
                if place != new_place:
                    for path in (*holders.pop(place, ()), place):
                        places[path] = new_place
                        holders.setdefault(new_place, []).append(path)
        return Layout._of(self.entries, self.copies, places)

    def _pairs(self, name: str, target: str) -> list[tuple[str, str]]:
        shapes = [self._shapes_below(self._known(path)) for path in (name, target)]
        mine = {leaf[len(name) :]: shape for leaf, shape in shapes[0].items()}
        theirs = {leaf[len(target) :]: shape for leaf, shape in shapes[1].items()}
        if mine != theirs:
            raise ValueError(
                f"cannot tie {name!r} to {target!r}: expected the same shapes, found "
                f"{listing(shapes[0].items())} and {listing(shapes[1].items())}"
            )
        return list(zip(shapes[0], (target + leaf for leaf in mine), strict=True))

    def _shapes_below(self, path: str) -> Mapping[str, Shape]:
        """Return the shapes of views at a path and below it."""
        shapes = self.view_shapes
        if path in shapes:
            return {path: shapes[path]}
        return {
            leaf: shapes[leaf] for leaf in (join_path(path, inner) for inner in self.groups[path].view_shapes)
        }

    def pick(self, *paths: str) -> "Layout":
        """Return the layout of some of the parts alone, in the order given, under their paths.

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
        return Layout._of(layout.entries, layout.copies, ties)

    # Taking numbers apart

    def unpack(self, data: Numbers | NamedArray) -> Record:
        """Return all leaves of `data`, of shape `(..., length)`, as a nested `Record`, in one split.

        Hot code uses it: its transpose is one concatenation, whatever the number of leaves. An array of JAX
        gives arrays of JAX, and one of NumPy views of NumPy.

        **Raises:** `ValueError` for another length.
        """
        if isinstance(data, NamedArray):
            check_same_layout(self, data.layout)
            return self.unpack(data.data)
        self.check_length(data)
        # The array itself says whose functions take it apart, so that this file needs no JAX.
        return self._unpack(
            data, ByNamespace(np if isinstance(data, np.ndarray) else data.__array_namespace__())
        )

    def _unpack(self, data: Numbers, by: Splitting) -> Record:
        return self._of_places(split(self._segments, data, by))

    def _of_places(self, leaves: Mapping[str, Any]) -> Record:
        """Return the record of the leaves that have a place, given by path, and of those that are tied."""
        return self.nest({**leaves, **{path: leaves[place] for path, place in self.ties.items()}})

    def nest(self, leaves: Mapping[str, object], prefix: str = "") -> Record:
        """Return the values of all leaves, by path, as a nested `Record`. The inverse of `leaves_of`."""
        values = {}
        for name, child in self.entries.items():
            path = f"{prefix}.{name}" if prefix else name
            values[name] = leaves[path] if isinstance(child, tuple) else child.nest(leaves, path)
        return Record._of(values)

    def join(self, leaves: Mapping[str, Any], lead: Shape, dtype: Any, xp: Any) -> Any:
        """Return the array of all leaves, by path, behind leading axes. `xp` is `numpy` or `jax.numpy`."""
        return join(self._segments, leaves, lead, dtype, xp)

    def check_length(self, data: object) -> None:
        shape = getattr(data, "shape", None)
        if shape is None:
            raise TypeError(f"expected an array of shape (..., {self.length}), found {type(data).__name__}")
        if not shape or shape[-1] != self.length:
            raise ValueError(
                f"expected data of shape (..., {self.length}), found shape {tuple(shape)}; "
                f"the layout is {self!r}"
            )

    # Text and JSON

    def to_json(self) -> str:
        """Return the layout as JSON text, to be stored beside a saved vector.

        **Raises:** `ValueError` for more than 100 groups inside each other.
        """
        return json_text.to_text(self)

    @staticmethod
    def from_json(text: str) -> "Layout":
        """Return the layout that `to_json` wrote. **Raises:** `ValueError` for any other text."""
        return json_text.from_text(text, Layout)

    def __repr__(self) -> str:
        inside = ", ".join(
            f"{name}={child!r}".replace("=Layout()", "={}").replace("=Layout(", "=(")  # `()` is a number
            for name, child in self.entries.items()
        )
        stacks = "".join(f".stack({n})" for n in reversed(self.copies))
        ties = f".tie({dict(self.ties)})" if self.ties else ""
        return f"Layout({inside}){stacks}{ties}"


def check_same_layout(expected: Layout, found: Layout) -> None:
    if expected != found:
        raise TypeError(f"expected the same layout for both, found: {expected.diff(found)[0]}")


def leaves_of(layout: Layout, tree: object, prefix: str = "") -> dict[str, Any]:
    """Return the values of a nested mapping by path, if it has the names of the layout."""
    if isinstance(tree, NamedArray):
        tree = tree.layout.unpack(tree.data)
    if not isinstance(tree, Mapping):
        where = f" at {prefix!r}" if prefix else ""
        raise TypeError(
            f"expected a mapping{where} with the names {listing(layout)}, found {type(tree).__name__}"
        )
    for name in tree:
        if name not in layout.entries:
            path = join_path(prefix, str(name))
            raise UnknownNameError(f"{path!r}: {unknown_name(str(name), layout.entries)}")
    leaves = {}
    for name, child in layout.entries.items():
        path = join_path(prefix, name)
        if name not in tree:
            raise UnknownNameError(f"expected a value for {path!r}, found none; there are: {listing(tree)}")
        if isinstance(child, tuple):
            leaves[name] = tree[name]
        else:
            below = leaves_of(child, tree[name], path)
            leaves |= {join_path(name, inner): value for inner, value in below.items()}
    return leaves


def _only(layout: Layout, wanted: Mapping[str, Any]) -> Layout:
    """Return the entries of a layout that a nested mapping names, whole where it has no names below."""
    entries: dict[str, Shape | Layout] = {}
    for name, below in wanted.items():
        child = layout.entries[name]
        entries[name] = _only(child, below) if below is not None and isinstance(child, Layout) else child
    return Layout._of(entries, layout.copies, {})


def _part_of(path: str, part: object) -> "Shape | Layout":
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
    return tuple(np.shape(part))  # pyright: ignore[reportArgumentType, reportCallIssue]


def _as_child(name: str, part: Any) -> "Shape | Layout":
    if isinstance(part, Layout):
        return part
    if isinstance(part, Mapping):
        try:
            return Layout(part)
        except (TypeError, ValueError) as error:
            raise type(error)(f"below {name!r}: {error}") from None
    try:
        sizes = part if isinstance(part, Sequence) else (part,)
        shape = tuple(map(operator.index, sizes))
    except TypeError:
        raise TypeError(
            f"{name!r}: expected a shape (a tuple of integers), a Layout or a mapping, found {part!r}"
        ) from None
    if any(size < 0 for size in shape):
        raise ValueError(f"{name!r}: expected sizes of 0 or more, found the shape {shape}")
    return shape
