"""Layouts as JSON text: read with care, since a file can come from anywhere. Without JAX."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Set
from typing import Any, NoReturn, TypeVar

from .names import check_name, join_path
from .places import Places
from .segments import Shape


MAX_DEPTH = 100  # groups inside each other
MAX_AXES = 64  # as NumPy
MAX_SIZE = 2**63

Kind = TypeVar("Kind", bound=Places)


def strict_json(text: str | bytes) -> Any:
    """Return the content of JSON. **Raises:** `ValueError` for a name twice, for NaN, for another text."""
    try:
        return json.loads(text, object_pairs_hook=_no_name_twice, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("expected JSON that is not nested so deep") from None


def is_size(value: object) -> bool:
    """Tell whether it is an integer, no bool, that a size can be."""
    return type(value) is int and 0 <= value < MAX_SIZE


def is_shape(value: object) -> bool:
    """Tell whether it is a list of sizes that NumPy has axes for."""
    return isinstance(value, list) and len(value) <= MAX_AXES and all(map(is_size, value))


def to_text(places: Places) -> str:
    """Return the layout as JSON text."""
    return json.dumps(to_plain(places))


def from_text(text: str, kind: type[Kind]) -> Kind:
    """Return the layout, of the class `kind`, that `to_text` wrote. **Raises:** `ValueError`."""
    try:
        if not isinstance(text, str):
            raise ValueError(f"expected a text, found {type(text).__name__}")
        return from_plain(strict_json(text), kind, room=1_000_000 + 64 * len(text))
    except ValueError as error:
        raise ValueError(f"this is not the JSON text of a Layout: {error}") from None


def to_plain(places: Places) -> dict[str, Any]:
    """Return the layout as dictionaries, lists and integers."""
    return {"flatlayers_layout": 1, "tree": _group_to_plain(places, 0), "ties": dict(places.ties)}


def _group_to_plain(group: Places, depth: int) -> dict[str, Any]:
    if depth > MAX_DEPTH:
        raise ValueError(f"expected a layout of at most {MAX_DEPTH} groups inside each other, found more")
    names = {
        name: list(child) if isinstance(child, tuple) else _group_to_plain(child, depth + 1)
        for name, child in group.entries.items()
    }
    return {"names": names, "copies": list(group.copies)} if group.copies else {"names": names}


def from_plain(plain: object, kind: type[Kind], room: int) -> Kind:
    """Return the layout of the class `kind` that `to_plain` wrote.

    `room` bounds the letters of all paths together: a long name around many leaves would fill the memory.

    **Raises:** `ValueError` for anything else.
    """
    content = _mapping(plain, {"flatlayers_layout", "tree", "ties"})
    version = content["flatlayers_layout"]
    if type(version) is not int or version != 1:
        raise ValueError(f"expected version 1, found {version!r}")
    reader = _Reader(kind._of, room)
    tree = reader.group(content["tree"], "", (), 0)
    return kind._of(tree.entries, tree.copies, _checked_ties(content["ties"], reader.shapes))


@dataclasses.dataclass
class _Reader:
    """Makes the groups of a layout, and notes the shapes of all views by path."""

    make: Callable[..., Any]
    room: int
    shapes: dict[str, Shape] = dataclasses.field(default_factory=dict)

    def group(self, plain: object, path: str, copies: Shape, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise ValueError(f"expected at most {MAX_DEPTH} groups inside each other, found more")
        content = _mapping(plain, {"names"}, {"copies"})
        own = _shape(content.get("copies", []), f"copies of {path!r}")
        names = _mapping(content["names"])
        entries = {check_name(name): self.child(join_path(path, name), copies + own, child, depth)
                   for name, child in names.items()}  # fmt: skip
        return self.make(entries, own, {})

    def child(self, path: str, copies: Shape, plain: object, depth: int) -> Any:
        self.room -= len(path)
        if self.room < 0:
            raise ValueError("expected shorter names, or fewer groups inside each other")
        if isinstance(plain, Mapping):
            return self.group(plain, path, copies, depth + 1)
        shape = _shape(plain, path)
        self.shapes[path] = copies + shape
        return shape


def _checked_ties(plain: object, shapes: Mapping[str, Shape]) -> dict[str, str]:
    """Return the ties: each leaf with the leaf that has the place, as a layout keeps them."""
    ties = _mapping(plain)
    for path, place in ties.items():
        if not isinstance(place, str) or path not in shapes or place not in shapes:
            raise ValueError(f"expected ties between leaves, found {path!r}: {place!r}")
        if place in ties:
            raise ValueError(f"expected a tie to a leaf with a place of its own, found {path!r}: {place!r}")
        if shapes[path] != shapes[place]:
            raise ValueError(f"expected ties of equal shapes, found {path!r}: {place!r}")
    return ties


def _mapping(value: object, names: Set[str] | None = None, more: Set[str] = frozenset()) -> dict[str, Any]:
    """Return a JSON object, which has to have `names` and may have `more`, if they are given."""
    if not isinstance(value, dict):
        raise ValueError(f"expected an object, found {type(value).__name__}")
    if names is not None and not (names <= set(value) <= names | more):
        raise ValueError(f"expected the names {sorted(names)}, found {sorted(value)[:8]}")
    return value


def _shape(value: object, where: str) -> Shape:
    if not is_shape(value):
        raise ValueError(f"{where}: expected a list of sizes, found {str(value)[:80]}")
    return tuple(value)  # pyright: ignore[reportArgumentType]


def _no_name_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"the name {name[:80]!r} is there twice")
            seen.add(name)
    return content


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"expected numbers, found {text}")
