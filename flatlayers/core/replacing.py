"""The same value with other fields, for frozen dataclasses whose constructors take something else."""

import dataclasses
from typing import Any, Self

from ..vectors.names import unknown_name


def seal(layer: "Replaceable") -> None:
    """Let a layer check its fields, and bring them into their final form: from now on it is immutable."""
    layer._complete()
    vars(layer)["_ready"] = True


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
