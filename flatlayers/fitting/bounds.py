"""`bounds`: a box for a vector, by the names of its parts."""

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from ..transforms import inward
from ..types import DType
from ..vectors.layout import Layout
from ..vectors.vector import ComponentVector


# Pattern → `(low, high)`, either of which may be `None`.
Box = Mapping[str, tuple[float | None, float | None]]


def bounds(
    layout: Layout, numbers: Box, dtype: DType | None = None
) -> tuple[ComponentVector, ComponentVector]:
    """Return lower and upper bounds of the numbers of a vector, by name: infinite where there are none.

    They are what `optax.projections.projection_box(ps, lower, upper)` takes, and SciPy as
    `scipy.optimize.Bounds(lower.data, upper.data)`. They bound the numbers of the vector themselves.
    Parameters that are declared with bounds, `fl.Param(..., bounds=(low, high))`, have free numbers there and
    need none.

    **Arguments:**

    - `layout`: the layout of the vector.
    - `numbers`: pattern → `(low, high)`, with patterns as `Layout.mask` takes them; `None` is no bound.
    - `dtype`: the dtype of the vectors, JAX's default float if none is given. Bounds that it does not have
        are rounded inward.

    **Returns:** `(lower, upper)`.

    **Raises:** `ValueError` for `low > high`, for NaN, for a dtype that has no number between the two, and if
    two patterns name one number; `KeyError` for a pattern that matches nothing; `TypeError` for what is no
    pair.

    >>> import flatlayers as fl
    >>> layout = fl.Layout({"growth": (), "net": {"weight": (2,)}})
    >>> lower, upper = fl.bounds(layout, {"growth": (0, 10)})
    >>> lower.data, upper.data
    (Array([  0., -inf, -inf], dtype=float32), Array([10., inf, inf], dtype=float32))
    """
    kind = np.dtype(jnp.result_type(float) if dtype is None else dtype)
    lower, upper = (ComponentVector(end.astype(kind), layout) for end in box(layout, numbers, kind))
    return lower, upper


def box(layout: Layout, numbers: Box, dtype: DType) -> tuple[np.ndarray, np.ndarray]:
    """Return the bounds as numbers that a dtype has, in float64."""
    pairs = {pattern: _pair(pattern, pair) for pattern, pair in numbers.items()}
    lows = layout.values({pattern: low for pattern, (low, _) in pairs.items()}, -np.inf, float)
    highs = layout.values({pattern: high for pattern, (_, high) in pairs.items()}, np.inf, float)
    low, high = (end.astype(float) for end in inward(lows, highs, dtype))
    if (empty := low > high).any():
        i = int(np.argmax(empty))
        raise ValueError(
            f"bounds: {np.dtype(dtype)} has no number in ({lows[i]:g}, {highs[i]:g}) for {layout.label(i)!r}"
        )
    return low, high


def _pair(pattern: str, pair: object) -> tuple[float, float]:
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise TypeError(f"bounds: expected a pair (low, high) for {pattern!r}, found {pair!r}")
    low, high = pair
    ends = (-np.inf if low is None else float(low), np.inf if high is None else float(high))
    if not ends[0] <= ends[1]:  # nor NaN
        raise ValueError(f"bounds: expected low <= high for {pattern!r}, found ({low}, {high})")
    return ends
