"""The places of the parts of a vector: slots, segments, and `Places`, which has them by name."""

import dataclasses
import fnmatch
import functools
import math
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, Self

import numpy as np

from .immutable import Immutable
from .names import UnknownNameError, UnknownPatternError, as_path, join_path, unknown_name
from .segments import Block, Leaf, Segment, Shape, join, label_at, labels_of


# Names of so many numbers take about 10 GB.
MOST_LABELS = 10**8


@dataclasses.dataclass(frozen=True)
class Slot:
    """The place of one leaf: `size` numbers from `offset` on, in row-major order.

    A leaf inside a stack has one such place in every copy. `offset`, `shape` and `size` are
    those of copy 0, `copies` counts the copies of each enclosing stack, outermost first,
    and `strides` says how far apart they lie. `stride` is the outermost one, 0 without a stack.
    """

    offset: int
    shape: Shape
    size: int
    copies: Shape = ()
    strides: Shape = ()

    @property
    def stride(self) -> int:
        return self.strides[0] if self.strides else 0

    def positions(self) -> np.ndarray:
        """Return the positions in the vector, of shape `(*copies, *shape)`."""
        positions = np.arange(self.offset, self.offset + self.size).reshape(self.shape)
        for copies, stride in zip(reversed(self.copies), reversed(self.strides), strict=True):
            starts = stride * np.arange(copies).reshape(copies, *[1] * positions.ndim)
            positions = starts + positions
        return positions

    def take(self, data: np.ndarray) -> np.ndarray:
        """Return the numbers there, of shape `(..., *copies, *shape)`: displays compile nothing."""
        if self.copies:
            return data[..., self.positions()]
        return data[..., self.offset : self.offset + self.size].reshape((*data.shape[:-1], *self.shape))


class Places(Immutable):
    """Names and the places of their numbers in one vector: what there is to ask of a `Layout`.

    `entries` are the shapes and the groups of the first level, `copies` counts the copies if all of it is a
    stack, outermost first. `entries` hold no ties: all of them are in `ties`, by path, each leaf with the
    leaf that has the place. So places that mean the same are equal.
    """

    entries: "Mapping[str, Shape | Self]"
    copies: Shape
    ties: Mapping[str, str]

    def _set(self, entries: "Mapping[str, Shape | Places]", copies: Shape, ties: Mapping[str, str]) -> Self:
        return self._fill(
            entries=MappingProxyType(dict(entries)),
            copies=copies,
            ties=MappingProxyType(dict(sorted(ties.items()))),
        )

    @classmethod
    def _of(cls, entries: "Mapping[str, Shape | Places]", copies: Shape, ties: Mapping[str, str]) -> Self:
        return object.__new__(cls)._set(entries, copies, ties)

    @functools.cached_property
    def length(self) -> int:
        """The length of the vector."""
        return sum(segment.size for segment in self._segments)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of this level, in vector order."""
        return tuple(self.entries)

    def slots(self) -> tuple[tuple[str, Slot], ...]:
        """Return all leaves as `(path, Slot)`, depth-first. Tied names are listed with the same place."""
        return tuple(self._slots.items())

    def __getitem__(self, key: str | tuple[str | int, ...]) -> Slot | Self:
        path = as_path(key)
        if path in self._slots:
            return self._slots[path]
        return self._group(path)

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and (key in self._slots or key in self.groups)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def labels(self) -> list[str]:
        """Return a name for each number: `inner.w[0,1]`, or `blocks[2].w[0,1]` inside a stack.

        **Raises:** `ValueError` for more than 100 million numbers, whose names would take 10 GB.

        >>> import flatlayers as fl
        >>> fl.Layout({"w": (1, 2), "gain": ()}).labels()
        ['w[0,0]', 'w[0,1]', 'gain']
        """
        if self.length > MOST_LABELS:
            raise ValueError(
                f"labels: expected at most {MOST_LABELS} numbers, found {self.length}: `label(i)` gives "
                "the name of one of them, `slots()` has the leaves"
            )
        return list(labels_of(self._segments))

    def label(self, position: int) -> str:
        """Return the name of the number at a position, as `labels` has it.

        >>> import flatlayers as fl
        >>> fl.Layout({"w": (1, 2), "gain": ()}).label(1)
        'w[0,1]'
        """
        position = range(self.length)[position]
        return label_at(self._segments, position)

    def indices(self, path: str | tuple[str | int, ...]) -> np.ndarray:
        """Return the positions of a leaf or a group: `v.data[..., indices(path)]` are its numbers."""
        part = self[path]
        if isinstance(part, Slot):
            return part.positions().ravel()
        path = as_path(path)
        values = {leaf: self._view_positions(join_path(path, leaf)) for leaf in part._slots}
        return join(part._segments, values, (), int, np)

    def span(self, path: str) -> slice | np.ndarray:
        """Return `indices(path)`, as a slice if the numbers lie next to each other."""
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
        """Return which numbers the patterns name, as a bool vector of shape `(length,)`.

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

    def values(
        self, numbers: Mapping[str, complex], default: complex | None = None, dtype: Any = np.float32
    ) -> np.ndarray:
        """Return a number for each number of the vector, of shape `(length,)`: rates, decay, scales by name.

        **Arguments:**

        - `numbers`: pattern → number, with patterns as `mask` takes them.
        - `default`: the number of what no pattern names.
        - `dtype`: the dtype of the array.

        **Raises:** `ValueError` if two patterns name one number of the vector, and if none does and there is
            no `default`, with the label of the first; `KeyError` for a pattern that matches nothing;
            `TypeError` for what is no number.

        >>> import flatlayers as fl
        >>> layout = fl.Layout({"growth": (), "net": {"weight": (2,), "bias": ()}})
        >>> layout.values({"growth": 0.1, "net": 0.01})
        array([0.1 , 0.01, 0.01, 0.01], dtype=float32)
        >>> layout.values({"*.weight": 1e-4}, default=0.0)
        array([0.    , 0.0001, 0.0001, 0.    ], dtype=float32)
        """
        owner = np.full(self.length, -1)
        for i, (pattern, number) in enumerate(numbers.items()):
            if np.ndim(number) or isinstance(number, str) or number is None:
                raise TypeError(f"values: expected a number for {pattern!r}, found {number!r}")
            mask = self.mask(pattern)
            if (twice := mask & (owner >= 0)).any():
                position = int(np.argmax(twice))
                label, other = self.label(position), list(numbers)[owner[position]]
                raise ValueError(
                    f"values: expected one pattern for {label!r}, found {other!r} and {pattern!r}"
                )
            owner[mask] = i
        if default is None and (owner < 0).any():
            label = self.label(int(np.argmax(owner < 0)))
            raise ValueError(f"values: expected a pattern or a default for {label!r}, found none")
        found = [*numbers.values(), 0 if default is None else default]
        return np.array(found, dtype)[owner]

    # The plan: computed once, from which everything above is read off

    @functools.cached_property
    def _segments(self) -> tuple[Segment, ...]:
        """The parts of the vector, in order."""
        segments = _place(self, "", self.ties)
        return (_block("", self.copies, segments),) if self.copies else segments

    @functools.cached_property
    def _slots(self) -> dict[str, Slot]:
        own = dict(_slots(self._segments, 0, (), ()))
        return {path: own[self.ties.get(path, path)] for path in self.view_shapes}

    @functools.cached_property
    def view_shapes(self) -> Mapping[str, Shape]:
        """The shapes that views have, by path in declared order; stacks included."""
        shapes: dict[str, Shape] = {}
        for name, child in self.entries.items():
            below = {"": child} if isinstance(child, tuple) else child.view_shapes
            shapes |= {join_path(name, path): self.copies + shape for path, shape in below.items()}
        return MappingProxyType(shapes)

    @functools.cached_property
    def groups(self) -> Mapping[str, Self]:
        """The untied sub-layouts by path, the root under `""`; a stack has its own copies only."""
        groups: dict[str, Self] = {"": self}
        for name, child in self.entries.items():
            if not isinstance(child, tuple):
                groups |= {join_path(name, path): group for path, group in child.groups.items()}
        return MappingProxyType(groups)

    @functools.cached_property
    def _spans(self) -> dict[str, slice | np.ndarray]:
        return {}

    @functools.cached_property
    def _parts(self) -> dict[str, Self]:
        return {}

    def _group(self, path: str) -> Self:
        """Return the sub-layout at `path` on its own, as many times as it is stacked."""
        if path not in self._parts:
            parts = self._known(path).split(".")
            above = [self.groups[".".join(parts[:depth])] for depth in range(len(parts))]
            copies = sum((group.copies for group in above), ())
            group = self.groups[path]
            names = {join_path(path, leaf): leaf for leaf in group.view_shapes}
            self._parts[path] = self._of(group.entries, copies + group.copies, self._ties_among(names))
        return self._parts[path]

    def _ties_among(self, names: Mapping[str, str]) -> dict[str, str]:
        """Return the ties of a part, whose leaves are `names`: the path here to the path there.

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
        """Return `path`. **Raises:** `KeyError` with the nearest names if it leads nowhere."""
        parts = () if path and path in self else path.split(".")
        for depth, name in enumerate(parts):
            group = self.groups.get(".".join(parts[:depth]))
            if group is None or name not in group.entries:
                known = group.entries if group is not None else {}
                where = f" in {'.'.join(parts[:depth])!r}" if depth else ""
                raise UnknownNameError(functools.partial(_unknown_in, path, name, known, where))
        return path

    def _view_positions(self, path: str) -> np.ndarray:
        return self._slots[path].positions().reshape(self.view_shapes[path])

    def _matching(self, pattern: str) -> list[str]:
        # A set: many names may match.
        named = {path for path in (*self.groups, *self._slots) if path and fnmatch.fnmatchcase(path, pattern)}
        if not named:
            known = [*self._slots, *(path for path in self.groups if path)]
            raise UnknownPatternError(
                f"the pattern {pattern!r} matches nothing: {unknown_name(pattern, known)}"
            )
        return [leaf for leaf in self._slots if not named.isdisjoint(_path_and_above(leaf))]

    # A value

    @functools.cached_property
    def _identity(self) -> tuple[object, ...]:
        return tuple(self.entries.items()), self.copies, tuple(self.ties.items())

    @functools.cached_property
    def _hash(self) -> int:
        return hash(self._identity)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return isinstance(other, Places) and self._hash == other._hash and self._identity == other._identity

    def __reduce__(self) -> Any:
        return self._of, (dict(self.entries), self.copies, dict(self.ties))


def _unknown_in(path: str, name: str, known: Mapping[str, object], where: str) -> str:
    return f"{path!r}: {unknown_name(name, known)}{where}"


def _path_and_above(path: str) -> Iterator[str]:
    """Yield a path and those of the groups around it."""
    while path:
        yield path
        path = path.rpartition(".")[0]


def _place(group: Places, prefix: str, ties: Mapping[str, str]) -> tuple[Segment, ...]:
    """Return the segments of one copy of a group, one after another, nested groups flattened."""
    segments: list[Segment] = []
    start = 0
    for name, child in group.entries.items():
        path = join_path(prefix, name)
        if isinstance(child, tuple):
            new = [] if path in ties else [Leaf(path, 0, math.prod(child), child)]
        else:
            inner = _place(child, path, ties)
            new = [_block(path, child.copies, inner)] if child.copies else inner
        for segment in new:
            segments.append(dataclasses.replace(segment, start=start))
            start += segment.size
    return tuple(segments)


def _block(path: str, copies: Shape, segments: tuple[Segment, ...]) -> Block:
    length = sum(segment.size for segment in segments)
    return Block(path, 0, math.prod(copies) * length, copies, length, segments)


def _slots(
    segments: tuple[Segment, ...], offset: int, copies: Shape, strides: Shape
) -> Iterator[tuple[str, Slot]]:
    for segment in segments:
        start = offset + segment.start
        if isinstance(segment, Leaf):
            yield segment.path, Slot(start, segment.shape, segment.size, copies, strides)
        else:
            counts = segment.copies
            own = tuple(segment.length * math.prod(counts[i + 1 :]) for i in range(len(counts)))
            yield from _slots(segment.segments, start, copies + counts, strides + own)
