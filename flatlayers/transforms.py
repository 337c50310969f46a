"""Transforms of parameters: the free numbers that a vector holds, and the values that layers see.

A vector holds free numbers, which an optimiser may send anywhere. A parameter that is declared with bounds,
`fl.Param(shape, init, bounds=(low, high))`, or with a transform, `fl.Param(shape, init, transform=...)`, is
mapped where a layer is called with a vector: `ps.growth` in `forward` is the value, inside of its bounds.
"""

import abc
import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from .dtypes import as_floating, at_least_float32
from .types import Array, ArrayLike, DType


class Transform(abc.ABC):
    """The base of all transforms: increasing or decreasing, number by number, with a hash.

    A class of your own is best a frozen dataclass, so that equal ones make equal layers.

    >>> import flatlayers as fl
    >>> isinstance(fl.transforms.positive, fl.transforms.Transform)
    True
    """

    @abc.abstractmethod
    def forward(self, free: ArrayLike) -> Array:
        """Return the values of free numbers, in their shape and dtype."""

    @abc.abstractmethod
    def inverse(self, value: ArrayLike) -> Array:
        """Return the free numbers of values; what is not finite for a value that there is none for."""


@dataclasses.dataclass(frozen=True)
class Interval(Transform):
    """All numbers between two bounds, or on one side of one: what `fl.Param(..., bounds=(low, high))` means.

    With `sigmoid(x) = 1 / (1 + exp(-x))` and `softplus(x) = log(1 + exp(x))`, the value of a free number `x`
    is

        `low + (high - low) sigmoid(x)`    with both bounds,
        `low + softplus(x)`                with a lower one,
        `high - softplus(-x)`              with an upper one,

    and `x` is `log((v - low) / (high - v))`, `d + log(1 - exp(-d))` with `d = v - low`, and the negative of
    that with `d = high - v`. All of them increase. The distance from the nearer bound has the relative
    precision of the dtype: rates of 1e-6 in (0, 10) are as good as others. There and back, the rounding of
    the free number `x` in between costs up to `|x|` epsilons of it, 16 for such a rate. Values are never
    outside; where the dtype has no number between them and a bound, they are on it. Bounds that the dtype
    does not have are rounded inward.

    The first and the inverse are those of the Stan reference manual, "Constraint transforms" (its one-sided
    bounds take `exp`, under which a large free number overflows; for that see `fl.transforms.exp`).

    **Arguments:**

    - `low`, `high`: the bounds; `None` or an infinity where there is none.

    **Raises:** `ValueError` for bounds that are not increasing or NaN, or if there are none; `TypeError` for
    what is no number, and for complex parameters.

    >>> import flatlayers as fl
    >>> share = fl.transforms.Interval(0.0, 10.0)
    >>> share.forward(0.0), share.inverse(5.0)
    (Array(5., dtype=float32), Array(0., dtype=float32))
    """

    low: float | None
    high: float | None

    def __post_init__(self) -> None:
        ends = [_end(end, infinite) for end, infinite in ((self.low, -math.inf), (self.high, math.inf))]
        for name, end in zip(("low", "high"), ends, strict=True):
            object.__setattr__(self, name, end)
        low, high = ends
        if low is None and high is None:
            raise ValueError("expected a lower or an upper bound, found none")
        if low is not None and high is not None and not low < high:
            raise ValueError(f"expected bounds with low < high, found ({low}, {high})")

    def forward(self, free: ArrayLike) -> Array:
        free = as_floating(free)
        low, high = self._within(free.dtype)
        x = free.astype(at_least_float32(free.dtype))
        if high is None:
            value = low + jnp.logaddexp(x, jnp.zeros_like(x))
        elif low is None:
            value = high - jnp.logaddexp(-x, jnp.zeros_like(x))
        else:
            # Each end from its own side, so that what is close to it keeps its digits.
            width = high - low
            below, above = low + width * jax.nn.sigmoid(x), high - width * jax.nn.sigmoid(-x)
            value = jnp.where(x < 0, below, above)
        return value.astype(free.dtype)

    def inverse(self, value: ArrayLike) -> Array:
        value = as_floating(value)
        low, high = self._within(value.dtype)
        v = value.astype(at_least_float32(value.dtype))
        if high is None:
            free = _inverse_softplus(v - low)
        elif low is None:
            free = -_inverse_softplus(high - v)
        else:
            free = jnp.log((v - low) / (high - v))
        return free.astype(value.dtype)

    def _within(self, dtype: DType) -> tuple[float, float]:
        """Return the bounds, which the dtype has; an end that there is none of stays `None`."""
        found = inward(
            -np.inf if self.low is None else self.low, np.inf if self.high is None else self.high, dtype
        )
        low, high = map(float, found)
        if not low < high:
            raise ValueError(f"{self}: {np.dtype(dtype)} has no two numbers in these bounds")
        return _end(low, -math.inf), _end(high, math.inf)  # pyright: ignore[reportReturnType]

    def __repr__(self) -> str:
        return f"Interval({self.low}, {self.high})"


@dataclasses.dataclass(frozen=True)
class Bijection(Transform):
    """A transform of your own: a function and its inverse, which work number by number.

    **Arguments:**

    - `to_value`: from free numbers to values, of the same shape and dtype.
    - `to_free`: its inverse.

    **Raises:** `TypeError` for what is no function.

    >>> import jax.numpy as jnp
    >>> import flatlayers as fl
    >>> wide = fl.transforms.Bijection(jnp.sinh, jnp.arcsinh)
    >>> wide.forward(wide.inverse(2.0)).round(5)
    Array(2., dtype=float32)
    """

    to_value: Callable[[Array], Array]
    to_free: Callable[[Array], Array]

    def __post_init__(self) -> None:
        for name in ("to_value", "to_free"):
            if not callable(getattr(self, name)):
                raise TypeError(f"Bijection.{name}: expected a function, found {getattr(self, name)!r}")

    def forward(self, free: ArrayLike) -> Array:
        return self.to_value(jnp.asarray(free, jnp.result_type(free)))

    def inverse(self, value: ArrayLike) -> Array:
        return self.to_free(jnp.asarray(value, jnp.result_type(value)))

    def __repr__(self) -> str:
        names = (getattr(f, "__name__", repr(f)) for f in (self.to_value, self.to_free))
        return f"Bijection({', '.join(names)})"


def inward(low: ArrayLike, high: ArrayLike, dtype: DType) -> tuple[np.ndarray, np.ndarray]:
    """Return bounds as the nearest numbers of a dtype that are not outside of them."""
    ends = []
    for end, way in ((low, np.inf), (high, -np.inf)):
        exact = np.asarray(end, float)
        near = exact.astype(dtype)
        outside = near.astype(float) < exact if way > 0 else near.astype(float) > exact
        ends.append(np.where(outside, np.nextafter(near, np.asarray(way, near.dtype)), near))
    return ends[0], ends[1]


def _end(value: object, infinite: float) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool | np.bool_ | str) or np.ndim(value):  # pyright: ignore[reportArgumentType, reportCallIssue]
        raise TypeError(f"expected a bound that is a number or None, found {value!r}")
    number = float(value)  # pyright: ignore[reportArgumentType]
    if math.isnan(number) or number == -infinite:
        raise ValueError(f"expected a bound that is a number or None, found {number}")
    return None if number == infinite else number


def _inverse_softplus(d: Array) -> Array:
    return d + jnp.log(-jnp.expm1(-d))


# Above zero, by softplus: a large free number is its value.
positive = Interval(0.0, None)
# Above zero, by `exp`: for what varies by orders of magnitude, a step of the free number is a factor.
exp = Bijection(jnp.exp, jnp.log)
