"""Annotations for the fields of layers, besides the numbers of `core.fields`."""

from collections.abc import Callable, Iterable
from typing import Annotated, Any

from ..core.fields import Check, Integer, Size, check_of, number
from ..core.layer import Layer, as_layer


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def a_function(value: Any) -> Any:
    # A layer is none: it takes parameters and a state, too.
    if not callable(value) or isinstance(value, type | Layer):
        raise TypeError
    return value


Text = Annotated[str, Check("a string", _text)]
Probability = Annotated[float, Check("a probability from 0 to 1", number(low=0, high=1).accept)]
Exponent = Annotated[float, Check("a finite exponent p of at least 1", number(low=1).accept)]
Activation = Annotated[Callable[[Any], Any], Check("an elementwise function", a_function)]
Initial = Annotated[Callable[..., Any], Check("an initializer `init(key, shape, dtype)`", a_function)]
# An argument that becomes a layer.
LayerLike = Layer | Callable[[Any], Any]
AnyLayer = Annotated[Layer, Check("a layer or a function", as_layer)]

# One axis or several.
Axes = Integer | tuple[Integer, ...]
# One size or several: of features, or along the spatial axes.
Sizes = Size | tuple[Size, ...]


def sequence_of(kind: object) -> Check:
    """A sequence, a range or an array, kept as a tuple, with each part of a kind that `core.fields` knows."""
    check = check_of(tuple[kind, ...])  # pyright: ignore[reportInvalidTypeForm]
    assert check is not None

    def accept(value: Any) -> tuple[Any, ...]:
        is_sequence = isinstance(value, Iterable) and not isinstance(value, str)
        return check.accept(tuple(value) if is_sequence else value)

    return Check(check.expected, accept)
