"""How a layout reads: as plain values for JSON, and what differs between two."""

from typing import TYPE_CHECKING, Any

from .names import listing


if TYPE_CHECKING:
    from .layout import Layout


def to_plain(layout: "Layout") -> dict[str, Any]:
    """The names, shapes and stacks of a layout as dictionaries and lists."""
    names = {
        name: list(child) if isinstance(child, tuple) else to_plain(child)
        for name, child in layout.entries.items()
    }
    return {"names": names, "copies": list(layout.copies)} if layout.copies else {"names": names}


def differences(old: "Layout", new: "Layout") -> list[str]:
    """What changed from one layout to another, a readable line each."""
    if old == new:
        return []
    before, after = old.view_shapes, new.view_shapes
    lines = []
    for path, shape in before.items():
        if path not in after:
            lines.append(f"{path}: {shape} is gone")
        elif shape != after[path]:
            lines.append(f"{path}: {shape} became {after[path]}")
        elif old.ties.get(path) != new.ties.get(path):
            lines.append(f"{path}: {_tie(old, path)} became {_tie(new, path)}")
    lines += [f"{path}: {shape} is new" for path, shape in after.items() if path not in before]
    return lines or [_first_difference_of_places(old, new)]


def _first_difference_of_places(old: "Layout", new: "Layout") -> str:
    """The same leaves and ties, so the order, an empty group or a stack is different."""
    for path, group in old.groups.items():
        before, after = group.names, new.groups[path].names if path in new.groups else ()
        if before != after:
            where = f"{path}: " if path else ""
            return f"{where}{listing(before)} became {listing(after)}"
    slots = zip(old.slots(), new.slots(), strict=True)
    moved = [f"{path}: {slot} became {other}" for (path, slot), (_, other) in slots if slot != other]
    return moved[0] if moved else "the copies of an empty stack differ"


def _tie(layout: "Layout", path: str) -> str:
    return f"tied to {layout.ties[path]}" if path in layout.ties else "a place of its own"
