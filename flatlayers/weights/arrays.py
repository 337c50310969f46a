"""Their arrays into a vector and a state."""

import functools
import operator
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ..core.constraints import free_leaves
from ..core.layer import Layer
from ..io.errors import LayoutMismatchError
from ..types import Array, DType, Shape, State
from ..vectors.layout import check_same_layout
from ..vectors.names import describe
from ..vectors.packing import pack
from ..vectors.record import Record, as_record
from ..vectors.vector import ComponentVector
from .entries import Entry, Library, Unit
from .foreign import Numbers


class Target:
    """The parameters and the state that are filled, or read: what each entry is to be like."""

    def __init__(self, library: Library, model: Layer, ps: ComponentVector, st: State):
        if not isinstance(model, Layer):
            raise TypeError(f"expected a layer, found {describe(model)}")
        if not isinstance(ps, ComponentVector):
            raise TypeError(f"expected the parameters of the model, a ComponentVector, found {describe(ps)}")
        check_same_layout(model.layout, ps.layout)
        if ps.data.ndim != 1:
            raise ValueError(f"expected one vector, without leading axes, found {describe(ps)}")
        self.library, self.model, self.ps, self.st = library, model, ps, as_record(st)

    def is_parameter(self, entry: Entry) -> bool:
        return entry.place in self.model.layout.view_shapes

    def like(self, entry: Entry) -> tuple[Shape, DType]:
        """Return the shape and dtype of one copy. **Raises:** `ValueError` if the state has no such name."""
        if self.is_parameter(entry):
            shape, dtype = self.model.layout.view_shapes[entry.place], self.ps.dtype
        else:
            value = state_at(self.st, entry.place)
            shape, dtype = value.shape, value.dtype
        return shape[len(entry.index) :], dtype

    def their_shape(self, entry: Entry) -> Shape | None:
        return entry.foreign.their_shape(self.like(entry)[0])

    def filled(self, units: Sequence[Unit], arrays: Mapping[str, Numbers]) -> tuple[ComponentVector, Record]:
        """Return the vector and the state with all of their arrays.

        **Raises:** `LayoutMismatchError` with a line for each array that is missing, left over, or of another
        shape or dtype.
        """
        entries = [entry for unit in units for entry in unit.entries]
        read_as, lines = self.read_as(entries, arrays), []
        values: dict[str, Numbers] = {}
        known: dict[tuple[str, tuple[int, ...]], Numbers] = {}
        for entry in entries:
            array = self._read(read_as.get(entry, entry), arrays, lines)
            if array is not None:
                first = known.setdefault((entry.place, entry.index), array)
                if not np.array_equal(first, array, equal_nan=True):
                    lines.append(f"{entry.keys[0]}: expected the numbers that it is tied to, found others")
                shape, dtype = self.like(entry)
                lead = self._full_shape(entry)[: len(entry.index)]
                values.setdefault(entry.place, np.empty((*lead, *shape), dtype))[entry.index] = array
        used = {key for entry in entries for key in entry.keys}
        lines += [f"{key}: {arrays[key].shape} is left over" for key in arrays if key not in used]
        if lines:
            raise LayoutMismatchError(f"expected arrays of {self.library.name} that fit this model:", lines)
        return self._packed(values), self._with_states(values)

    def read_as(self, entries: Sequence[Entry], arrays: Mapping[str, Numbers]) -> dict[Entry, Entry]:
        """Return, for names without arrays that are tied to one that has them, the entry of that one."""
        ties = self.model.layout.ties
        there = {
            (ties.get(entry.place, entry.place), entry.index): entry
            for entry in entries
            if all(key in arrays for key in entry.keys)
        }
        found = {}
        for entry in entries:
            same = there.get((ties.get(entry.place, entry.place), entry.index))
            if same is not None and not any(key in arrays for key in entry.keys):
                found[entry] = same
        return found

    def _full_shape(self, entry: Entry) -> Shape:
        if self.is_parameter(entry):
            return self.model.layout.view_shapes[entry.place]
        return state_at(self.st, entry.place).shape

    def _read(self, entry: Entry, arrays: Mapping[str, Numbers], lines: list[str]) -> Numbers | None:
        """Return our array; or add lines that say what is wrong with theirs."""
        (shape, dtype), theirs = self.like(entry), self.their_shape(entry)
        wanted = f"{shape if theirs is None else theirs} for {entry.text}"
        missing = [key for key in entry.keys if key not in arrays]
        lines += [f"{key}: expected {wanted}, found none" for key in missing]
        if missing:
            return None
        given = tuple(arrays[key] for key in entry.keys)
        found = ", ".join(str(array.shape) for array in given)
        try:
            array = entry.foreign.ours(given)
            fits = array.shape == shape and theirs in (None, given[0].shape)
        except (ValueError, IndexError):
            array, fits = None, False
        as_read = "" if array is None else f", read as {describe(array)}"
        if not fits:
            turned = as_read if theirs in (None, given[0].shape) else ""
            lines.append(f"{', '.join(entry.keys)}: expected {wanted}, found {found}{turned}")
            return None
        if array is None or not holds(dtype, array.dtype):
            turned = as_read if array is not None and array.dtype != given[0].dtype else ""
            lines.append(
                f"{entry.keys[0]}: expected {dtype} or less for {entry.text}, found {given[0].dtype}{turned}"
            )
            return None
        return array

    def _packed(self, values: Mapping[str, Numbers]) -> ComponentVector:
        layout, dtype = self.model.layout, self.ps.dtype
        if not layout.length:
            return self.ps
        known = {path: values[path] for path in layout.view_shapes}
        return ComponentVector(
            pack(layout, free_leaves(self.model.declared_transforms(), known, dtype), dtype), layout
        )

    def _with_states(self, values: Mapping[str, Numbers]) -> Record:
        st = self.st
        for path, value in values.items():
            if path not in self.model.layout.view_shapes:
                st = _replaced(st, path.split("."), jnp.asarray(value))
        return st


def holds(wanted: DType, found: DType) -> bool:
    """Tell whether a dtype has all numbers of another one."""
    with jax.numpy_dtype_promotion("standard"):
        return bool(jnp.issubdtype(found, jnp.inexact)) and jnp.promote_types(wanted, found) == wanted


def state_at(st: Record, path: str) -> Array:
    """Return the array of a state at a path. **Raises:** `ValueError` if there is none."""
    try:
        value = functools.reduce(operator.getitem, path.split("."), st)
    except (KeyError, TypeError):
        value = None
    if not hasattr(value, "shape"):
        raise ValueError(f"expected the state of the model, with {path!r}, found {st!r}")
    return value  # pyright: ignore[reportReturnType]


def _replaced(st: Record, path: list[str], value: Array) -> Record:
    name, *below = path
    return st.replace(**{name: _replaced(st[name], below, value) if below else value})
