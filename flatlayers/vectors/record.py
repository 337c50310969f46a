"""`Record`: an immutable mapping with attribute access."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .names import NamedArray, UnknownNameError, as_path, check_name, describe, unknown_name


class Record(Mapping[str, Any]):
    """An immutable mapping of names to values, read as `r.a`, `r["a"]` or `r["a.b"]`.

    What `ComponentVector.unpack` returns and what states are made of. A `bool`, `str` or
    `None` given here is *static*: part of the pytree's structure, so that a flag such as
    `training` is known when a function is compiled. Every other value is a child, and
    stays one whatever `jax.tree.map` puts in its place. Nested mappings become records.

    **Arguments:**

    - `values`: a mapping of names to values.
    - `**named`: more of them. The names follow the rules of `Layout`.

    **Raises:** `ValueError` for a name that is reserved or no identifier, `KeyError` or
    `AttributeError` with the nearest names for one that is not there.

    >>> import flatlayers as fl
    >>> st = fl.Record(count=3, training=True, inner={"mean": 0.5})
    >>> st.inner.mean, st["inner.mean"], st.replace(count=4).count
    (0.5, 0.5, 4)
    >>> import jax
    >>> jax.tree.leaves(st)
    [3, 0.5]
    """

    __slots__ = ("_static", "_values")
    _values: dict[str, Any]
    _static: frozenset[str]

    def __init__(self, values: Mapping[str, Any] = {}, /, **named: Any):
        fields = {check_name(name): as_record(value) for name, value in {**values, **named}.items()}
        static = frozenset(name for name, value in fields.items() if _is_static(value))
        _fill(self, fields, static)

    def replace(self, /, **named: Any) -> "Record":
        """A new record with the values of some names changed.

        **Raises:** `KeyError` for a name that the record does not have.
        """
        for name in named:
            if name not in self._values:
                raise UnknownNameError(unknown_name(name, self._values))
        new = Record(named)
        static = (self._static - new._values.keys()) | new._static
        return _fill(object.__new__(Record), {**self._values, **new._values}, static)

    def to_dict(self) -> dict[str, Any]:
        """The same names and values as nested dictionaries."""
        return {
            name: value.to_dict() if isinstance(value, Record) else value
            for name, value in self._values.items()
        }

    def __getitem__(self, key: str | tuple[str, ...]) -> Any:
        value = self
        for name in as_path(key).split("."):
            if not isinstance(value, Record) or name not in value._values:
                known = value._values if isinstance(value, Record) else ()
                raise UnknownNameError(unknown_name(name, known))
            value = value._values[name]
        return value

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and super().__contains__(key)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in self._values:
            raise AttributeError(unknown_name(name, () if name.startswith("_") else self._values))
        return self._values[name]

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"records are immutable; use `record.replace({name}=...)`")

    def __delattr__(self, name: str) -> None:
        raise AttributeError("records are immutable")

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

    def __reduce__(self) -> Any:
        return _fill_new, (self._values, self._static)


def as_record(value: Any) -> Any:
    """A mapping as a `Record`; anything else as it is."""
    return Record(value) if isinstance(value, Mapping) and not isinstance(value, Record) else value


def _fill(record: Record, values: dict[str, Any], static: frozenset[str]) -> Record:
    object.__setattr__(record, "_values", values)
    object.__setattr__(record, "_static", static)
    return record


def _fill_new(values: dict[str, Any], static: frozenset[str]) -> Record:
    return _fill(object.__new__(Record), values, static)


def _is_static(value: Any) -> bool:
    return value is None or isinstance(value, bool | str)


def _equal(a: Any, b: Any) -> bool:
    """Whether two values are equal as a whole: arrays by dtype, shape and content."""
    if type(a) in (tuple, list):
        return type(a) is type(b) and len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, NamedArray) and isinstance(b, NamedArray):
        return a.layout == b.layout and _equal(a.data, b.data)
    return _equal_arrays(a, b)


def _equal_arrays(a: Any, b: Any) -> bool:
    if not (isinstance(a, jax.Array | np.ndarray) or isinstance(b, jax.Array | np.ndarray)):
        return bool(a == b)
    if hasattr(a, "dtype") and hasattr(b, "dtype"):
        if a.dtype != b.dtype:
            return False
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
    elif any(jnp.issubdtype(getattr(x, "dtype", bool), jax.dtypes.prng_key) for x in (a, b)):
        return False
    return np.array_equal(np.asarray(a), np.asarray(b))


def _flatten_with_keys(record: Record) -> tuple[Any, Any]:
    values, static = record._values, record._static
    children = [(jax.tree_util.GetAttrKey(name), values[name]) for name in values if name not in static]
    return children, _structure(record)


def _flatten(record: Record) -> tuple[Any, Any]:
    values, static = record._values, record._static
    return [values[name] for name in values if name not in static], _structure(record)


def _structure(record: Record) -> tuple[Any, ...]:
    return tuple(
        (name, name in record._static, value if name in record._static else None)
        for name, value in record._values.items()
    )


def _unflatten(structure: tuple[Any, ...], children: Any) -> Record:
    rest = iter(children)
    values = {name: value if static else next(rest) for name, static, value in structure}
    return _fill_new(values, frozenset(name for name, static, _ in structure if static))


jax.tree_util.register_pytree_with_keys(Record, _flatten_with_keys, _unflatten, _flatten)
