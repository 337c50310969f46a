"""A griffe extension: docstrings with their examples fenced, and the signatures that dataclasses have."""

import dataclasses
import importlib
import inspect
import re
from typing import Any

import griffe


DOCTEST = re.compile(r"^>>> .*(?:\n.+)*", re.MULTILINE)


class Docstrings(griffe.Extension):
    """Fence the examples in docstrings, and give dataclasses the signature of their constructor.

    A layer is a dataclass by subclassing, which its source does not tell.
    """

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = DOCTEST.sub(r"```pycon\n\g<0>\n```", obj.docstring.value)

    def on_class(self, *, cls: griffe.Class, **_: Any) -> None:
        found = getattr(importlib.import_module(cls.module.path), cls.name, None)
        if isinstance(found, type) and dataclasses.is_dataclass(found):
            init = griffe.Function("__init__", parameters=_parameters(found), parent=cls)
            cls.set_member("__init__", init)


def _parameters(cls: type) -> griffe.Parameters:
    given = list(inspect.signature(cls).parameters.values())
    return griffe.Parameters(
        griffe.Parameter("self", kind=griffe.ParameterKind.positional_or_keyword),
        *(
            griffe.Parameter(
                one.name,
                kind=getattr(griffe.ParameterKind, one.kind.name.lower()),
                default=None if one.default is one.empty else _text(one.default),
            )
            for one in given
        ),
    )


def _text(value: Any) -> str:
    return value.__name__ if inspect.isroutine(value) else repr(value)
