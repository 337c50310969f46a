"""The text of a vector: its numbers with their names."""

import jax
import numpy as np

from ..dtypes import is_traced
from .layout import Layout
from .names import describe


_MOST_LINES = 24


def in_a_line(data: object, layout: Layout) -> str:
    """Return the dtype and the shapes, of the first names where there are many."""
    other = is_other(data, layout)
    names = names_in_a_line(layout, f"not the {layout.length} numbers of its layout " if other else "")
    return f"ComponentVector({describe_data(data)}{', ' if names else ''}{names})"


def is_other(data: object, layout: Layout) -> bool:
    """Tell whether the data are a number or an array of another length, such as the norm of the numbers."""
    if isinstance(data, int | float | complex):
        return True
    return getattr(data, "shape", (layout.length,))[-1:] != (layout.length,)


def names_in_a_line(layout: Layout, before: str = "") -> str:
    """Return the names with their shapes, the first ones where there are many."""
    names = before + repr(layout).removeprefix("Layout(").removesuffix(")")
    return names if len(names) <= 400 else names[:400].rsplit(", ", 1)[0] + ", ..."


def in_lines(data: object, layout: Layout) -> str:
    """Return a line for each name with its numbers, some of them where there are many."""
    if not isinstance(data, jax.Array | np.ndarray) or is_traced(data):
        return in_a_line(data, layout)
    if is_other(data, layout):
        return f"{in_a_line(data, layout)}\n  {_numbers(np.asarray(data))}"
    slots = layout.slots()
    shown, numbers = slots[:_MOST_LINES], np.asarray(data)
    width = max((len(path) for path, _ in shown), default=0)
    lines = [f"ComponentVector({describe_data(data)})"]
    for path, slot in shown:
        tie = layout.ties.get(path)
        lines.append(
            f"  {path.ljust(width)}  {f'the same as {tie}' if tie else _numbers(slot.take(numbers))}"
        )
    if len(slots) > len(shown):
        lines.append(f"  ... and {len(slots) - len(shown)} more")
    return "\n".join(lines)


def describe_data(data: object) -> str:
    """Return dtype and shape, a number itself, or the type of a stand-in that a transformation has put."""
    known = hasattr(data, "shape") or isinstance(data, int | float | complex)
    return describe(data) if known else type(data).__name__


def _numbers(value: np.ndarray) -> str:
    long = value.size > 12
    text = np.array2string(
        value.ravel() if long else value, precision=4, separator=", ", threshold=12, edgeitems=3
    )
    return f"{describe(value)} " * long + " ".join(text.split())
