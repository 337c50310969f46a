"""Models as text."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import wadler_lindig as wl

from .core.layer import Layer, Param, contains_layer, value_text
from .core.setup import parameter_length


# Between a line and its comment until all lines are known and the comments can be aligned.
_MARK = "\0"


def pformat(model: Any) -> str:
    """The model as the tree of its layers, with names and numbers of parameters.

    **Arguments:**

    - `model`: a layer, or a mapping of layers and `Param`s as `fl.setup` takes it.

    >>> import jax.numpy as jnp
    >>> import flatlayers as fl
    >>> print(fl.pformat(fl.Chain(fl.Dense(2, 16, jnp.tanh), fl.Dense(16, 1))))
    Chain(
        layer_0=Dense(2, 16, activation=tanh),  # 48 parameters
        layer_1=Dense(16, 1),                   # 17 parameters
    )                                           # 65 parameters
    """
    # The only places to break a line are between children, and a width of 1 breaks all of them.
    lines = [line.split(_MARK) for line in wl.pformat(_Tree(model), width=1).split("\n")]
    column = max((len(text) for text, *comment in lines if comment), default=0)
    return "\n".join(
        text.ljust(column) + "  # " + comment[0] if comment else text for text, *comment in lines
    )


class _Tree:
    """What wadler-lindig lays out."""

    def __init__(self, model: Any):
        self.model = model

    def __pdoc__(self, **kwargs: Any) -> wl.AbstractDoc:
        return _doc("", self.model, "")


def _doc(name: str, part: Any, end: str) -> wl.AbstractDoc:
    label = f"{name}=" if name else ""
    length = math.prod(part.shape) if isinstance(part, Param) else parameter_length(part)
    comment = f"{_MARK}{_count(length)}" if length else ""
    if not isinstance(part, Mapping) and not _children(part):
        return wl.TextDoc(f"{label}{part!r}{end}{comment}")
    title = type(part).__name__ if isinstance(part, Layer) else ""
    inside = [_doc(child_name, child, ",") for child_name, child in _children(part).items()]
    inside += [wl.TextDoc(f"{text},") for text in _arguments(part)]
    lines = [doc for item in inside for doc in (wl.BreakDoc(""), item)]
    body = wl.NestDoc(wl.ConcatDoc(*lines), 4)
    return wl.ConcatDoc(wl.TextDoc(f"{label}{title}("), body, wl.BreakDoc(""), wl.TextDoc(f"){end}{comment}"))


def _children(part: Any) -> Mapping[str, Any]:
    if isinstance(part, Mapping):
        return part
    return part.children() if isinstance(part, Layer) else {}


def _arguments(part: Any) -> Iterator[str]:
    """The hyper-parameters of a layer with children."""
    if isinstance(part, Layer):
        for field in dataclasses.fields(part):  # pyright: ignore[reportArgumentType]
            value = getattr(part, field.name)
            if value is not None and value != field.default and not contains_layer(value):
                yield f"{field.name}={value_text(value)}"


def _count(length: int) -> str:
    return f"{length:_} parameter{'s' * (length != 1)}"
