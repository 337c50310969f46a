"""Names: the strings that may be one, and the words of errors for names, paths and arrays."""

import dataclasses
import difflib
import keyword
from collections.abc import Callable, Iterable, Mapping
from typing import Any


# The attributes of `ComponentVector` and the methods of a mapping: a parameter with
# one of these names could not be read as `ps.name`.
_OF_ARRAYS = {"at", "data", "dtype", "ndim", "shape", "size"}
_OF_VECTORS = {"layout", "lead", "map", "of", "pick", "replace", "to_dict", "unpack", "zeros"}
_OF_TABLES = {"to_frame", "to_series"}
_OF_MAPPINGS = {"get", "items", "keys", "values"}
RESERVED_NAMES = frozenset(_OF_ARRAYS | _OF_VECTORS | _OF_TABLES | _OF_MAPPINGS)


class NamedArray:
    """The base of arrays with a `Layout`, by which the files below `ComponentVector` know one.

    An attribute called `layout` would not do: JAX's own arrays have one, that of their memory.
    """

    __slots__ = ()
    data: Any
    layout: Any


class _LateText(Exception):
    """An error whose text may be a function that makes it, and is shown as it was written.

    Whoever asks by `hasattr` or `in` does not read it, and the nearest of many names take long to find.
    """

    args: tuple[Any, ...]

    def __str__(self) -> str:
        (text,) = self.args
        if callable(text):
            text = text()
            self.args = (text,)
        return str(text)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self)!r})"

    def __reduce__(self) -> tuple[type, tuple[str]]:
        return type(self), (str(self),)


class UnknownNameError(_LateText, KeyError):
    """A path that leads nowhere."""


class UnknownAttributeError(_LateText, AttributeError):
    """A name that is no attribute. `tell` adds to the text, once."""

    args: tuple[Any, ...]
    told: bool = False

    def tell(self, more: Callable[[], str]) -> None:
        text, self.told = self.args[0], True
        self.args = (lambda: f"{text() if callable(text) else text}{more()}",)


class UnknownPatternError(UnknownNameError, ValueError):
    """A pattern that matches no name."""


def check_name(name: object) -> str:
    """Return `name`, or say why it cannot be one."""
    if not isinstance(name, str):
        raise TypeError(f"names are strings, found {name!r} of type {type(name).__name__}")
    if not name.isidentifier() or name.startswith("_"):
        raise ValueError(f"names are Python identifiers without a leading underscore, found {name!r}")
    if name in RESERVED_NAMES:
        raise ValueError(
            f"the name {name!r} is reserved: it is an attribute of ComponentVector or a method of "
            f"a mapping, so `ps.{name}` could not mean a parameter; for example use '{name}_'"
        )
    if keyword.iskeyword(name):
        raise ValueError(
            f"the name {name!r} is a keyword of Python, so `ps.{name}` cannot be written; for example use "
            f"'{name}_'"
        )
    if not name.isascii() and (read := _as_python_reads(name)) != name:
        raise ValueError(
            f"the name {name!r} ({_code_points(name)}) cannot be read as `ps.{name}`, where Python takes it "
            f"for {read!r} ({_code_points(read)}): use that one"
        )
    return name


def _as_python_reads(name: str) -> str:
    import unicodedata  # here, so that importing the library does not load it

    return unicodedata.normalize("NFKC", name)


def _code_points(name: str) -> str:
    return " ".join(f"U+{ord(letter):04X}" for letter in name)


def as_path(key: object) -> str:
    """Return `"a.b"` or `("a", "b")` as the dotted path `"a.b"`, and `("a", 0)` as `"a.layer_0"`."""
    if isinstance(key, str):
        return key
    if isinstance(key, tuple) and all(map(_is_step, key)) and any(isinstance(part, str) for part in key):
        return ".".join(part if isinstance(part, str) else child_name(part) for part in key)
    raise TypeError(f'a path is a string such as "a.b" or a tuple such as ("a", "b"), found {key!r}')


def child_name(index: int) -> str:
    """Return the name of the child at a place in a tuple of layers."""
    return f"layer_{index}"


def _is_step(part: object) -> bool:
    return isinstance(part, str) or (type(part) is int and part >= 0)


def join_path(*parts: str) -> str:
    return ".".join(filter(None, parts))


def is_below(path: str, group: str) -> bool:
    """Tell whether a path is that of a group or leads into it."""
    return path == group or path.startswith(group + ".")


def unknown_name(name: str, known: Iterable[str]) -> str:
    """Return the message for a name that is not there: the nearest ones, or all of a few."""
    known = list(known)
    if close := difflib.get_close_matches(name, known, n=3, cutoff=0.5):
        return f"no name {name!r}; the nearest: {', '.join(close)}"
    if known:
        more = f", ... ({len(known)} in all)" if len(known) > 8 else ""
        return f"no name {name!r}; there are: {', '.join(known[:8])}{more}"
    return f"no name {name!r}; there are no names here"


def listing(names: Iterable[str | tuple[str, object]]) -> str:
    """Write out the first few names, or pairs of a name and its value."""
    shown = [name if isinstance(name, str) else f"{name[0]}: {name[1]}" for name in names]
    return ", ".join(shown[:8]) + (", ..." if len(shown) > 8 else "") if shown else "no names"


def describe(value: object) -> str:
    """Write arrays by dtype and shape, containers by their parts: `(float32[5,7], int32[])`."""
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    if shape is not None and dtype is not None:
        numbers = f"{dtype}[{','.join(map(str, shape))}]"
        return f"{type(value).__name__}({numbers})" if isinstance(value, NamedArray) else numbers
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name}: {describe(part)}" for name, part in value.items()) + "}"
    if isinstance(value, tuple | list):
        parts = ", ".join(map(describe, value))
        return f"[{parts}]" if isinstance(value, list) else f"({parts})"
    if value is None or isinstance(value, bool | int | float | complex | str):
        return repr(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = (field.name for field in dataclasses.fields(value))
        inside = ", ".join(f"{name}: {describe(getattr(value, name, None))}" for name in fields)
        return f"{type(value).__name__}({inside})"
    return type(value).__name__
