"""Names that are not there: in the parameters or the state of a layer, or among its options."""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from ..types import Params
from ..vectors.names import UnknownAttributeError
from ..vectors.record import Record
from .declaration import contains_layer


_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


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


def construct(init: Callable[..., None], /, *args: object, **kwargs: object) -> None:
    """Call a constructor. An error for an option that it does not have names those that it has."""
    try:
        init(*args, **kwargs)
    except TypeError as error:
        # Raised by the call itself, not by what the constructor calls.
        is_of_call = error.__traceback__ is not None and error.__traceback__.tb_next is None
        if is_of_call and "unexpected keyword argument" in str(error):
            _, *options = (
                name for name, one in inspect.signature(init).parameters.items() if one.kind not in _VARIADIC
            )
            error.args = (f"{error}; the options are: {', '.join(options)}",)
        raise
