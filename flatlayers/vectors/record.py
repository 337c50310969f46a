"""`Record`: an immutable mapping with attribute access."""

import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from .immutable import Immutable
from .names import (
    NamedArray,
    UnknownAttributeError,
    UnknownNameError,
    as_path,
    check_name,
    child_name,
    describe,
    listing,
    unknown_name,
)


# All names, those of the children among them, and the static names with their values.
Structure = tuple[tuple[str, ...], tuple[str, ...], tuple[tuple[str, bool | str | None], ...]]


class Record(Immutable, Mapping[str, Any]):
    """An immutable mapping of names to values, read as `r.a`, `r["a"]` or `r["a.b"]`.

    `ComponentVector.unpack` returns one, and states are made of them. A `bool`, `str` or
    `None` given here is *static*: part of the pytree's structure, so that a flag such as
    `training` is known when a function is compiled. Every other value is a child, and
    stays one whatever `jax.tree.map` puts in its place. Nested mappings become records. Parameters and states
    of a tuple of layers are found by their places, too: `ps.experts[0]` is `ps.experts.layer_0`,
    `len(ps.experts)` is that of the tuple, and `ps.experts.values()` goes through it.

    **Arguments:**

    - `values`: a mapping of names to values.
    - `**named`: more of them. The names follow the rules of `Layout`.

    **Raises:** `ValueError` for a name that is reserved or no identifier, `KeyError` or
    `AttributeError` with the nearest names for one that is not there, `IndexError` for a place outside of a
    tuple, and `TypeError` for one in what is no tuple.

    >>> import flatlayers as fl
    >>> st = fl.Record(count=3, training=True, inner={"mean": 0.5})
    >>> st.inner.mean, st["inner.mean"], st.replace(count=4).count
    (0.5, 0.5, 4)
    >>> import jax
    >>> jax.tree.leaves(st)
    [3, 0.5]
    """

    __slots__ = ("_structure", "_values")
    _values: dict[str, Any]
    # Found at the first flattening and handed on by each unflattening: a compiled function meets the same
    # records again and again.
    _structure: Structure | None

    def __init__(self, values: Mapping[str, object] = {}, /, **named: object):
        fields = {check_name(name): as_record(value) for name, value in {**values, **named}.items()}
        self._fill(_values=fields, _structure=None)

    @staticmethod
    def _of(values: dict[str, Any], structure: Structure | None = None) -> "Record":
        """Make a record of names that were checked before, as those of a layout, and of no mappings."""
        return Record._new(_values=values, _structure=structure)

    def replace(self, /, **named: object) -> "Record":
        """Return a new record with the values of some names changed.

        A name may be a path, as in `st.replace(**{"inner.mean": 0.0})`.

        **Raises:** `KeyError` for a name that the record does not have.
        """
        new: dict[str, Any] = {}
        for path, value in named.items():
            name, _, below = path.partition(".")
            part = new.get(name, self[name])
            if below and not isinstance(part, Record):
                raise UnknownNameError(unknown_name(below, ()))
            new[name] = part.replace(**{below: value}) if below else as_record(value)
        static = [name for name, _ in self._flat()[1][2] if name not in new]
        values = {**self._values, **new}
        return Record._of(values, _structure(values, {*static, *filter(lambda n: is_static(new[n]), new)}))

    def to_dict(self) -> dict[str, Any]:
        """Return the same names and values as nested dictionaries."""
        return {
            name: value.to_dict() if isinstance(value, Record) else value
            for name, value in self._values.items()
        }

    def __getitem__(self, key: str | tuple[str | int, ...] | int) -> Any:
        if isinstance(key, int | np.integer) and not isinstance(key, bool):
            return self._values[self._child_at(int(key))]
        value = self
        for name in as_path(key).split("."):
            if not isinstance(value, Record) or name not in value._values:
                known = value._values if isinstance(value, Record) else ()
                raise UnknownNameError(functools.partial(unknown_name, name, known))
            value = value._values[name]
        return value

    def _child_at(self, index: int) -> str:
        """Return the name at a place in a tuple of layers."""
        names = [child_name(i) for i in range(len(self._values))]
        if set(names) != set(self._values):
            raise TypeError(
                f"an index is for a tuple of layers, with the names layer_0, layer_1, ...; found {index} for "
                f"the names {listing(self._values)}"
            )
        if not -len(names) <= index < len(names):
            raise IndexError(f"expected an index below {len(names)}, found {index}")
        return names[index]

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and super().__contains__(key)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in self._values:
            known = () if name.startswith("_") else self._values
            raise UnknownAttributeError(functools.partial(unknown_name, name, known), name=name, obj=self)
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self._values]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Mapping) or set(self) != set(other):
            return False
        return all(_equal(value, other[name]) for name, value in self.items())

    def __hash__(self) -> int:
        return hash(frozenset(self._values.items()))

    def __repr__(self) -> str:
        inside = ", ".join(
            f"{name}={value!r}" if isinstance(value, Record) else f"{name}={describe(value)}"
            for name, value in self._values.items()
        )
        return f"Record({inside})"

    # A pytree, which `vector.py` tells JAX: this file, as `Layout`, does without JAX.

    def _flat(self) -> tuple[list[Any], Structure]:
        """Return the children and the structure, of which `_unflat` makes the record again."""
        values, structure = self._values, self._structure
        if structure is None:
            static = {name for name, value in values.items() if is_static(value)}
            structure = _structure(values, static)
            self._fill(_structure=structure)
        _, children, static = structure
        return [values[name] for name in children] if static else list(values.values()), structure

    @staticmethod
    def _unflat(structure: Structure, children: Iterable[Any]) -> "Record":
        names, of_children, static = structure
        values = dict(zip(of_children, children, strict=True))
        if static:
            values |= static
            values = {name: values[name] for name in names}
        return Record._of(values, structure)


def as_record(value: Any) -> Any:
    """Return a mapping as a `Record`, and anything else as it is."""
    return Record(value) if isinstance(value, Mapping) and not isinstance(value, Record) else value


def _structure(values: Mapping[str, Any], static: set[str]) -> Structure:
    children = tuple(name for name in values if name not in static)
    return tuple(values), children, tuple((name, value) for name, value in values.items() if name in static)


def is_static(value: object) -> bool:
    """Tell whether a value in a record is a part of the pytree's structure."""
    return value is None or isinstance(value, bool | str)


def _equal(a: Any, b: Any) -> bool:
    """Tell whether two values are equal as a whole: arrays by dtype, shape and content."""
    if type(a) in (tuple, list):
        return type(a) is type(b) and len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, NamedArray) and isinstance(b, NamedArray):
        return a.layout == b.layout and _equal(a.data, b.data)
    return _equal_arrays(a, b) if _is_array(a) or _is_array(b) else bool(a == b)


def _equal_arrays(a: Any, b: Any) -> bool:
    dtypes = {x.dtype for x in (a, b) if hasattr(x, "dtype")}
    if len(dtypes) > 1:
        return False
    if all(isinstance(dtype, np.dtype) for dtype in dtypes):
        return np.array_equal(np.asarray(a), np.asarray(b))
    # The dtypes of JAX's PRNG keys are its own: they have no other numbers, and JAX compares them.
    if not (hasattr(a, "dtype") and hasattr(b, "dtype")):
        return False
    return a.shape == b.shape and bool((a == b).all())


def _is_array(value: object) -> bool:
    """Tell whether it is an array, of JAX or of NumPy. NumPy's scalars are numbers."""
    return hasattr(value, "__array__") and not isinstance(value, np.generic)
