"""The same value with other fields, for frozen dataclasses whose constructors take something else."""

import dataclasses
import functools
import inspect
from typing import Any, Self

from ..vectors.names import unknown_name


def seal(layer: "Replaceable") -> None:
    """Let a layer check its fields, and bring them into their final form: from now on it is immutable."""
    layer._complete()
    vars(layer)["_ready"] = True


def check_declared(layer: "Replaceable") -> None:
    """Raise `TypeError` for an attribute of an `__init__` of one's own that is no field.

    It would not count where layers are compared, and a program be run that was compiled for another layer.
    """
    fields = {field.name for field in dataclasses.fields(layer)}  # pyright: ignore[reportArgumentType]
    for name, value in vars(layer).items():
        # Others are of Python, such as `__doc__`, or follow from the fields, as cached properties do.
        if not (name in fields or name.startswith("__") or _is_cached_property(type(layer), name)):
            raise TypeError(
                f"{type(layer).__name__}: expected fields alone, found the attribute {name!r}; declare it by "
                f"`{name}: {type(value).__name__}` in the class, which then needs no `__init__`"
            )


def _is_cached_property(kind: type, name: str) -> bool:
    return isinstance(inspect.getattr_static(kind, name, None), functools.cached_property)


class Replaceable:
    """The base of what has `replace`: a dataclass that checks its fields and makes them final."""

    def _complete(self) -> None:
        raise NotImplementedError

    def replace(self, /, **fields: Any) -> Self:
        """Return the same layer with other values of some fields, checked as by the constructor.

        Parameters and states fit as long as what is declared stays the same: a solver layer with other times
        or tolerances takes those that were trained, without another `fl.setup`.

        **Raises:** `TypeError` for a name that is no field, and what the constructor raises.

        >>> import flatlayers as fl
        >>> node = fl.NeuralODE(fl.Dense(2, 2), t1=1.0)
        >>> node.replace(t1=3.0)
        NeuralODE(Dense(2, 2), t1=3.0)
        """
        names = [field.name for field in dataclasses.fields(self)]  # pyright: ignore[reportArgumentType]
        for name in fields:
            if name not in names:
                raise TypeError(f"{type(self).__name__}.replace: {unknown_name(name, names)}")
        copy = object.__new__(type(self))
        for name in names:
            setattr(copy, name, fields.get(name, getattr(self, name)))
        seal(copy)
        return copy
