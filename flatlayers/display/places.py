"""The places of the parts of a model in its vector, and which parts are alike."""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ..vectors.layout import Layout
from ..vectors.places import Slot


Run = tuple[int, int]


def runs_of(slot: Slot) -> Iterator[Run]:
    """Give the places `(start, stop)` of a leaf: one, or one in each copy of a stack."""
    for copy in itertools.product(*map(range, slot.copies)):
        start = slot.offset + sum(i * stride for i, stride in zip(copy, slot.strides, strict=True))
        yield start, start + slot.size


def leaves_in_order(layout: Layout) -> list[tuple[Run, str]]:
    """Return all places of a vector with the path of the leaf that has them, from first to last."""
    return sorted(
        (run, path)
        for path, slot in layout.slots()
        if path not in layout.ties and slot.size
        for run in runs_of(slot)
    )


def joined(runs: Iterable[Run]) -> tuple[Run, ...]:
    """Return the same places in order, each once, neighbours as one."""
    merged: list[Run] = []
    for start, stop in sorted(runs):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(stop, merged[-1][1])
        elif start < stop:
            merged.append((start, stop))
    return tuple(merged)


def alike(parts: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """Give the names in order, those of three or more equal neighbours together."""
    for _, run in itertools.groupby(parts, key=parts.__getitem__):
        names = tuple(run)
        yield from [names] if len(names) > 2 else [(name,) for name in names]


def span_text(names: tuple[str, ...]) -> str:
    """Write `layer_1..layer_3` for names that are numbered, else all of them."""
    stem = names[0].rstrip("0123456789")
    first = names[0].removeprefix(stem)
    if len(names) > 1 and first and names == tuple(f"{stem}{int(first) + i}" for i in range(len(names))):
        return f"{names[0]}..{names[-1]}"
    return ", ".join(names)
