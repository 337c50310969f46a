"""Checks of the fields of layers: said by an annotation, done when the field is assigned.

    class Smooth(fl.Layer):
        width: Size                # an integer of at least 1, NumPy's too
        rate: Positive = 0.1       # a finite number above 0, kept as a Python float
        padding: Size | tuple[Size, ...] | None = None
        kind: Literal["mean", "sum"] = "mean"

Other annotations are not checked. A function checks its arguments with `checked(Size, "steps", steps)`.
"""

import dataclasses
import inspect
import math
import operator
import types
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin

import jax
import numpy as np
from jax.core import Tracer

from ..vectors.names import describe


@dataclasses.dataclass(frozen=True, repr=False)
class Check:
    """A condition on a value.

    **Arguments:**

    - `expected`: what is expected, in words that follow "expected".
    - `accept`: returns the value in its final form, or raises `TypeError` for another kind of value and
        `ValueError` for a value out of range. The message is made by `__call__`.
    """

    expected: str
    accept: Callable[[Any], Any]

    def __call__(self, where: str, value: object) -> Any:
        try:
            return self.accept(value)
        except (TypeError, ValueError) as error:
            kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{where}: expected {self.expected}, found {_found(value)}")

    def __repr__(self) -> str:
        """Return what is shown in the signature of a layer by `help`."""
        return f"Check({self.expected!r})"


def integer(low: int | None = None) -> Check:
    """An integer, of at least `low`; no `bool`."""

    def accept(value: Any) -> int:
        if isinstance(value, float | np.floating):
            raise ValueError
        if isinstance(value, bool | np.bool_):
            raise TypeError
        number = operator.index(value)
        if low is not None and number < low:
            raise ValueError
        return number

    return Check("an integer" if low is None else f"an integer of at least {low}", accept)


def number(
    *,
    above: float = -math.inf,
    low: float = -math.inf,
    high: float = math.inf,
    below: float = math.inf,
) -> Check:
    """A finite number: `above < number`, `low <= number <= high`, `number < below`; no `bool`."""

    def accept(value: Any) -> float:
        if isinstance(value, bool | np.bool_ | str | Tracer) or np.ndim(value):
            raise TypeError
        number = float(value)
        if not (math.isfinite(number) and above < number < below and low <= number <= high):
            raise ValueError
        return number

    bounds = {"above": above, "of at least": low, "of at most": high, "below": below}
    words = [f"{word} {bound:g}" for word, bound in bounds.items() if math.isfinite(bound)]
    return Check(" ".join(["a finite number", *" and ".join(words).split()]), accept)


def a_callable(value: object) -> object:
    """Return a function, or another object that can be called; a class is none."""
    if not callable(value) or isinstance(value, type):
        raise TypeError
    return value


def _flag(value: object) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise TypeError
    return bool(value)


Integer = Annotated[int, integer()]
Count = Annotated[int, integer(0)]
Size = Annotated[int, integer(1)]
Finite = Annotated[float, number()]
NonNegative = Annotated[float, number(low=0)]
Positive = Annotated[float, number(above=0)]
Fraction = Annotated[float, number(low=0, high=1)]
Flag = Annotated[bool, Check("True or False", _flag)]
Function = Annotated[Callable[[Any], Any], Check("a function", a_callable)]


def checked(annotation: object, where: str, value: object) -> Any:
    """Return the value in the final form that an annotation asks for.

    **Arguments:**

    - `annotation`: one of the types above, or a `Literal`, union or tuple of them.
    - `where`: what an error begins with, such as `"Dense.in_dims"`.
    - `value`: the value.

    **Raises:** `TypeError` for another kind of value, `ValueError` for one out of range.

    >>> from flatlayers.core.fields import Size, checked
    >>> checked(Size | None, "steps", 3)
    3
    >>> checked(Size | None, "steps", 2.5)
    Traceback (most recent call last):
        ...
    ValueError: steps: expected an integer of at least 1 or None, found 2.5
    """
    check = check_of(annotation)
    return value if check is None else check(where, value)


def checks_of(cls: type) -> Mapping[str, Check]:
    """Return the checks that the annotations of a class itself, not of its bases, ask for, by field."""
    found = {name: check_of(_evaluated(kind, cls)) for name, kind in inspect.get_annotations(cls).items()}
    return {name: check for name, check in found.items() if check is not None}


def check_module_fields(instance: object) -> None:
    """Check the fields of an object that is no layer, such as an `equinox.Module`, by its annotations."""
    for cls in reversed(type(instance).__mro__):
        for name, check in checks_of(cls).items():
            check(f"{type(instance).__name__}.{name}", getattr(instance, name))


def check_of(annotation: Any) -> Check | None:
    """Return the check that an annotation asks for; `None` if it asks for none."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return next((part for part in annotation.__metadata__ if isinstance(part, Check)), None)
    if origin is Literal:
        return _one_of(arguments)
    if origin in (Union, types.UnionType):
        return _any_of(arguments)
    if origin is tuple and any(map(check_of, arguments)):
        return _tuple_of(arguments)
    return None


def _one_of(values: tuple[object, ...]) -> Check:
    def accept(value: object) -> object:
        if not any(type(value) is type(known) and value == known for known in values):
            raise ValueError
        return value

    *first, last = map(repr, values)
    return Check(f"{', '.join(first)} or {last}" if first else last, accept)


def _any_of(kinds: tuple[Any, ...]) -> Check | None:
    """Accept what one of the kinds of a union does. One that is neither checked nor a class accepts all."""
    checks = {kind: check_of(kind) for kind in kinds}
    if not any(checks.values()) or any(c is None and not isinstance(k, type) for k, c in checks.items()):
        return None

    def accept(value: Any) -> Any:
        errors = []
        for kind, check in checks.items():
            if check is None and isinstance(value, kind):
                return value
            try:
                if check is not None:
                    return check.accept(value)
            except (TypeError, ValueError) as error:
                errors.append(error)
        # A value out of range for one kind is of that kind.
        raise next((error for error in errors if isinstance(error, ValueError)), TypeError())

    names = [check.expected if check else _class_text(kind) for kind, check in checks.items()]
    return Check(" or ".join(names), accept)


def _tuple_of(kinds: tuple[Any, ...]) -> Check:
    endless = kinds[-1] is Ellipsis
    inside = [check_of(kind) for kind in (kinds[:1] if endless else kinds)]

    def accept(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, tuple | list):
            raise TypeError
        if not endless and len(value) != len(inside):
            raise ValueError
        pairs = zip(inside * len(value) if endless else inside, value, strict=True)
        return tuple(part if check is None else check.accept(part) for check, part in pairs)

    each = " or ".join(dict.fromkeys(check.expected for check in inside if check))
    return Check(f"a tuple{'' if endless else f' of {len(inside)}'}, each part {each}", accept)


def _class_text(kind: type) -> str:
    return "None" if kind is types.NoneType else f"a {kind.__name__}"


def is_class_variable(annotation: object, cls: type) -> bool:
    """Tell whether an annotation of a class declares a variable of the class: `ClassVar`, not a field."""
    if isinstance(annotation, str):  # what stands in brackets may be unknown here
        annotation = _evaluated(annotation.partition("[")[0], cls)
    return annotation is ClassVar or get_origin(annotation) is ClassVar


def _evaluated(annotation: Any, cls: type) -> Any:
    """An annotation that was written as a string; `None` if it names what only a function body knows."""
    if not isinstance(annotation, str):
        return annotation
    module = inspect.getmodule(cls)
    try:
        return eval(annotation, vars(module) if module else {}, dict(vars(cls)))
    except Exception:
        return None


def _found(value: object) -> str:
    if isinstance(value, jax.Array | np.ndarray) and not isinstance(value, np.generic):
        return ("a traced " if isinstance(value, Tracer) else "") + describe(value)
    text = f"{value!r}; write {value.__name__}(...)" if isinstance(value, type) else repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
