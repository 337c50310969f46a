"""What the fields of layers may be, besides the numbers of `core.fields`."""

from collections.abc import Callable, Iterable
from typing import Annotated, Any

from ..core.fields import Check, Integer, Size, checked, number
from ..core.layer import Layer, as_layer


def _text(value: Any) -> str:
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
AnyLayer = Annotated[Layer, Check("a layer or a function", as_layer)]

# One axis or several.
Axes = Integer | tuple[Integer, ...]
# One size or several: of features, or along the spatial axes.
Sizes = Size | tuple[Size, ...]


def as_tuple_of(kind: Any, where: str, values: Any) -> tuple[Any, ...]:
    """A sequence, a range or an array as a tuple, each part of a kind that `core.fields` knows."""
    is_sequence = isinstance(values, Iterable) and not isinstance(values, str)
    return checked(tuple[kind, ...], where, tuple(values) if is_sequence else values)
