"""`transfer`: the numbers of one vector in a vector of another layout."""

import dataclasses
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from ..types import DType
from ..vectors.names import UnknownNameError, is_below, join_path, unknown_name
from ..vectors.vector import ComponentVector
from .errors import LayoutMismatchError


def transfer(
    old: ComponentVector,
    into: ComponentVector,
    *,
    rename: Mapping[str, str] = {},
    missing: Literal["keep", "error"] = "keep",
    changed: Literal["error", "keep", "corner"] = "error",
    gone: Literal["error", "ignore"] = "error",
    dtype: DType | None = None,
) -> tuple[ComponentVector, list[str]]:
    """Take over into a vector of a changed model what an old vector has for it, by name.

    **Arguments:**

    - `old`: the old vector, as loaded.
    - `into`: the vector of the new model, as set up. Its numbers stay where nothing is taken over. Leading
        axes have to be those of `old`.
    - `rename`: the new names of old leaves or groups, by path: `{"hidden": "encoder.hidden"}`. The path of
        a whole vector is empty: `{"": "encoder"}` if all of it is a group of the new model now, and
        `{"encoder": ""}` for the other way round.
    - `missing`: for a leaf of the new model that the old one has not, `"keep"` the numbers of `into`, or
        raise (`"error"`).
    - `changed`: for a leaf of another shape, raise (`"error"`), `"keep"` the numbers of `into`, or take over
        the `"corner"` that both shapes have. A leaf that has become tied to another one counts as changed:
        the other one's numbers are taken.
    - `gone`: for a leaf that the new model has not, raise (`"error"`) or `"ignore"` it.
    - `dtype`: the dtype of the result. Without it, both vectors need the same one.

    **Returns:** `(vector, lines)`, a vector with the layout of `into`, and a line for each leaf that was not
    taken over as it was.

    **Raises:** `fl.LayoutMismatchError` with a line for each leaf that is refused; `KeyError` for a name in
    `rename` that is not there, `TypeError` for two dtypes, `ValueError` for other leading axes and options.

    >>> import flatlayers as fl
    >>> old = fl.ComponentVector.of({"hidden": {"weight": [1.0, 2.0]}, "gain": 3.0})
    >>> new = fl.ComponentVector.of({"encoder": {"weight": [0.0, 0.0, 0.0], "bias": 0.5}, "gain": 0.0})
    >>> vector, lines = fl.transfer(old, new, rename={"hidden": "encoder"}, changed="corner")
    >>> vector.data
    Array([1. , 2. , 0. , 0.5, 3. ], dtype=float32)
    >>> lines
    ['encoder.weight: (2,) became (3,)', 'encoder.bias: () is new']
    """
    _check_options(missing=missing, changed=changed, gone=gone)
    if old.dtype != into.dtype and dtype is None:
        raise TypeError(f"expected one dtype, found {old.dtype} and {into.dtype}; `dtype=` converts both")
    wanted = into.dtype if dtype is None else jnp.dtype(dtype)
    if jax.dtypes.canonicalize_dtype(wanted) != wanted:
        raise TypeError(f"expected a dtype that JAX has, found {wanted}, which needs x64")
    if old.shape[:-1] != into.shape[:-1]:
        raise ValueError(f"expected the same leading axes, found the shapes {old.shape} and {into.shape}")
    match = _Match.of(old, into, rename)
    refused = [
        *(match.changed if changed == "error" else match.no_corner if changed == "corner" else []),
        *(match.new if missing == "error" else []),
        *(match.gone if gone == "error" else []),
    ]
    if refused:
        raise LayoutMismatchError("expected a vector that fits, found another one:", refused)
    # A copy in any case: the numbers of `into` stay.
    numbers = np.array(into.data, dtype=wanted)
    leaves = {path: np.asarray(leaf) for path, leaf in _leaves(old).items()}
    for path, source in match.sources.items():
        _take(numbers, into, path, leaves[source], corner=changed == "corner")
    return ComponentVector(jnp.asarray(numbers), into.layout), [*match.changed, *match.new, *match.gone]


@dataclasses.dataclass(frozen=True)
class _Match:
    """The old leaf for each new one, by path, and a line for each leaf that differs."""

    sources: Mapping[str, str]
    changed: list[str]
    no_corner: list[str]
    new: list[str]
    gone: list[str]

    @staticmethod
    def of(old: ComponentVector, into: ComponentVector, rename: Mapping[str, str]) -> "_Match":
        names = _renamed(old, rename)
        before, after, ties = old.layout.view_shapes, into.layout.view_shapes, into.layout.ties
        aliases: dict[str, list[str]] = {path: [path] for path in after if path not in ties}
        for path, place in ties.items():
            aliases[place].append(path)
        match = _Match({}, [], [], [], [])
        sources: dict[str, str] = {}
        for path, own in aliases.items():
            source = next((names[name] for name in own if name in names), None)
            if source is None:
                match.new.append(f"{path}: {after[path]} is new")
                continue
            sources[path] = source
            if before[source] != after[path]:
                line = f"{path}: {before[source]} became {after[path]}"
                match.changed.append(line)
                if len(before[source]) != len(after[path]):
                    match.no_corner.append(line)
            for name in own:
                if name in names and old.layout[names[name]] != old.layout[source]:
                    match.changed.append(f"{name}: a place of its own became tied to {path}")
        lost = [path for name, path in names.items() if name not in after]
        match.gone.extend(f"{path}: {before[path]} is gone" for path in lost)
        return dataclasses.replace(match, sources=sources)


def _renamed(old: ComponentVector, rename: Mapping[str, str]) -> dict[str, str]:
    """Return the old path of each leaf by its new one."""
    for path in rename:
        if path and path not in old.layout:
            raise UnknownNameError(f"rename: {unknown_name(path, old.layout.view_shapes)}")
    names: dict[str, str] = {}
    for path in old.layout.view_shapes:
        # The longest name that it is below is the one that means it most closely.
        above = max((name for name in rename if not name or is_below(path, name)), key=len, default=None)
        name = path if above is None else join_path(rename[above], path[len(above) :].lstrip("."))
        if not name:
            raise ValueError(f"rename: expected a name for the leaf {path!r}, found ''")
        if name in names:
            raise ValueError(f"rename: expected different new names, found {name!r} twice")
        names[name] = path
    return names


def _leaves(vector: ComponentVector) -> dict[str, np.ndarray]:
    """Return the numbers of each leaf by path, with leading axes in front."""
    record = vector.layout.unpack(np.asarray(vector.data))
    return {path: record[path] for path in vector.layout.view_shapes}


def _take(numbers: np.ndarray, into: ComponentVector, path: str, leaf: np.ndarray, corner: bool) -> None:
    """Write an old leaf to the place of a new one, if the shapes agree or their corner is asked for."""
    positions = into.layout.indices(path).reshape(into.layout.view_shapes[path])
    shape = leaf.shape[numbers.ndim - 1 :]
    if shape != positions.shape and not corner:
        return
    cut = tuple(slice(min(sizes)) for sizes in zip(shape, positions.shape, strict=True))
    numbers[..., positions[cut]] = leaf[(..., *cut)]


def _check_options(**options: str) -> None:
    known = {
        "missing": ("keep", "error"),
        "changed": ("error", "keep", "corner"),
        "gone": ("error", "ignore"),
    }
    for name, value in options.items():
        if value not in known[name]:
            raise ValueError(f"{name}: expected one of {', '.join(known[name])}, found {value!r}")
