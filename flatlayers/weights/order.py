"""Names by order: their arrays for the layers of a model, where the user gives no names."""

import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence

from ..core.layer import display_name
from ..io.errors import LayoutMismatchError
from ..types import Shape
from .entries import Entry, Unit


# The shape of their array for each of ours; `None` if it is not known.
Expected = Mapping[Entry, Shape | None]

_HEAD = "expected the arrays of this model, in its order; `names={path: prefix}` gives others:"
# PyTorch has all layers of a recurrent network in one module, with `_l0`, `_l1` at the ends of the names.
_LEVEL = re.compile(r"_l(\d+)(?=(_reverse)?$)")


@dataclasses.dataclass(frozen=True)
class _Match:
    """A unit with its keys, the name of its module, and the shapes of its arrays by name.

    `is_named` tells whether its keys are those that it has by its own name.
    """

    unit: Unit
    module: str
    signature: frozenset[tuple[str, Shape]]
    is_named: bool


def by_order(units: Sequence[Unit], found: Mapping[str, Shape], expected: Expected) -> list[Unit]:
    """Return the units with the keys that come next, in order, each with its names and shapes.

    **Raises:** `LayoutMismatchError` for a layer whose names or shapes do not come next, for arrays that are
    left over, and for layers of equal shapes, unless numbers in the names say their order or a name is ours.
    """
    rest, matches = list(found), []
    for unit in units:
        match = _next(unit, rest, found, expected)
        matches.append(match)
        taken = {key for entry in match.unit.entries for key in entry.keys}
        rest = [key for key in rest if key not in taken]
        if more := [key for key in rest if key.rpartition(".")[0] == match.module]:
            raise LayoutMismatchError(_HEAD, [f"{key}: {found[key]} is left over" for key in more])
    if rest:
        raise LayoutMismatchError(_HEAD, [f"{key}: {found[key]} is left over" for key in rest])
    _check_order(matches)
    return [match.unit for match in matches]


def _next(unit: Unit, rest: list[str], found: Mapping[str, Shape], expected: Expected) -> _Match:
    level = _LEVEL.search(rest[0]) if rest else None
    names = {
        name: _LEVEL.sub(level.group() if level else "", name) if level else name
        for entry in unit.entries
        for name in entry.foreign.names
    }
    # The longest name first: `out_proj.weight` ends with another layer's `weight`.
    for name in sorted(names.values(), key=len, reverse=True) if rest else []:
        if f".{rest[0]}".endswith(f".{name}"):
            prefix = rest[0][: len(rest[0]) - len(name)]
            entries = [
                dataclasses.replace(entry, keys=tuple(prefix + names[own] for own in entry.foreign.names))
                for entry in unit.entries
            ]
            if all(_fits(entry, expected[old], found) for entry, old in _pairs(entries, unit)):
                signature = frozenset((own, found[prefix + name]) for own, name in names.items())
                module = prefix + f"l{level.group(1)}" if level else prefix.removesuffix(".")
                one = dataclasses.replace(unit, entries=tuple(entries))
                return _Match(one, module, signature, one == unit)
    wanted = ", ".join(f"{entry.foreign.name}: {expected[entry]}" for entry in unit.entries)
    line = f"{rest[0]}: {found[rest[0]]}" if rest else "none"
    raise LayoutMismatchError(_HEAD, [f"{_text(unit)}: expected {wanted} next, found {line}"])


def _pairs(entries: Sequence[Entry], unit: Unit) -> zip:
    return zip(entries, unit.entries, strict=True)


def _fits(entry: Entry, expected: Shape | None, found: Mapping[str, Shape]) -> bool:
    return all(key in found and expected in (None, found[key]) for key in entry.keys)


def _check_order(matches: Sequence[_Match]) -> None:
    """Raise if layers could be taken for each other: of equal shapes, and not numbered in their order."""
    alike: dict[object, list[_Match]] = {}
    for match in matches:
        if not match.is_named:
            alike.setdefault(match.signature, []).append(match)
    lines = []
    for group in alike.values():
        words = {re.sub(r"\d+", "", match.module) for match in group}
        numbers = [tuple(map(int, re.findall(r"\d+", match.module))) for match in group]
        if len(words) > 1 or any(a >= b for a, b in itertools.pairwise(numbers)):
            lines += [f"{_text(match.unit)}: perhaps {match.module!r}" for match in group]
    if lines:
        head = "layers of equal shapes could be in any order; `names={path: prefix}` says which is which:"
        raise LayoutMismatchError(head, lines)


def _text(unit: Unit) -> str:
    index = "".join(f"[{i}]" for i in unit.entries[0].index)
    return f"{unit.path}{index} ({display_name(unit.layer)})" if unit.path else display_name(unit.layer)
