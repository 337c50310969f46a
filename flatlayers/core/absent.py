"""Names that a layer looks for in its parameters or its state, and that are not there."""

import functools
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from ..types import Params
from ..vectors.names import UnknownAttributeError
from ..vectors.record import Record
from .declaration import contains_layer


class _Holder(Protocol):
    def children(self) -> Mapping[str, Any]: ...


def tell_where(error: Exception, layer: _Holder, ps: Params, st: Record) -> None:
    """Let an error for a name that `forward` looked for say in which of the two it did.

    If the name is that of a layer inside, say how it is declared. The error knows the record, and is told of
    it in the innermost layer that has it.
    """
    if not isinstance(error, UnknownAttributeError) or error.told:
        return
    for path, record in (*_records("ps", ps), *_records("st", st)):
        if record is error.obj:
            error.tell(functools.partial(_text, layer, path, str(error.name)))
            return


def _records(path: str, value: object) -> Iterator[tuple[str, object]]:
    if isinstance(value, Record):
        yield path, value
        for name, part in value.items():
            yield from _records(f"{path}.{name}", part)


def _text(layer: _Holder, path: str, name: str) -> str:
    kind = type(layer).__name__
    where = f"; looked for in `{path}` of {kind}"
    if path not in ("ps", "st") or not contains_layer(getattr(layer, name, None)):
        return where
    method, call = ("parameters", "parameters()") if path == "ps" else ("states", "states(key)")
    base = "" if _is_container(layer, name) else "derive from fl.Container and "
    return (
        f"{where}. `{name}` is a layer of {kind}, but `{method}` does not declare it: {base}write "
        f"{{**super().{call}, ...}}"
    )


def _is_container(layer: _Holder, name: str) -> bool:
    """Tell whether the fields of a layer are its children, whatever it declares."""
    return name in layer.children()
