"""Solutions of differential equations as tables. pandas is optional."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import jax.numpy as jnp
import numpy as np

from ..types import Y
from .layout import Layout
from .names import describe
from .tables import frame_of, names_of_axes, numbers_of
from .vector import ComponentVector


if TYPE_CHECKING:
    import pandas


class Solved(Protocol):
    """Times and states at them, as in a `diffrax.Solution`."""

    @property
    def ts(self) -> Any: ...
    @property
    def ys(self) -> Any: ...


def solution_frame(solution: Solved, dims: Sequence[str] | None = None) -> "pandas.DataFrame":
    """Return a pandas `DataFrame` of a solution: a row for each time, a column for each number of the state.

    The rows are under their times, in an index called `t`, and the columns have the names of
    `layout.labels()`. Rows that were not filled, where `diffrax.SaveAt(steps=True)` has infinite times, are
    left out. For several solutions at once, as `jax.vmap` gives them, the other leading axes are levels of
    the index, too.

    **Arguments:**

    - `solution`: a `diffrax.Solution`, or any object with `ts` of shape `(..., times)`, and `ys`: a
        `ComponentVector` of shape `(..., times, *batch, n)`, or a mapping of names to arrays of shape
        `(..., times, *shape)`. The numbers of a plain array are called `y`.
    - `dims`: a name for each leading axis of `ys`; without it time is `t`, and the others have none.

    **Raises:** `ImportError` without pandas, `ValueError` for a solution without saved states, for times and
    states of other shapes and for another number of `dims`, `TypeError` for what is no solution and for
    states that have no names.

    >>> import diffrax, jax.numpy as jnp
    >>> import flatlayers as fl
    >>> decay = diffrax.ODETerm(lambda t, y, args: -0.5 * y)
    >>> y0 = fl.ComponentVector.of({"prey": 4.0, "hunters": [1.0, 2.0]})
    >>> saveat = diffrax.SaveAt(ts=jnp.linspace(0.0, 1.0, 5))
    >>> solution = diffrax.diffeqsolve(decay, diffrax.Tsit5(), 0.0, 1.0, 0.1, y0, saveat=saveat)
    >>> frame = fl.solution_frame(solution)
    >>> list(frame.columns), frame.index.name, list(frame.index)
    (['prey', 'hunters[0]', 'hunters[1]'], 't', [0.0, 0.25, 0.5, 0.75, 1.0])
    """
    if not hasattr(solution, "ts") or not hasattr(solution, "ys"):
        raise TypeError(f"solution_frame: expected a solution with `ts` and `ys`, found {describe(solution)}")
    if not hasattr(solution.ts, "shape") or solution.ys is None:
        raise ValueError(
            f"solution_frame: expected times and states, found {describe(solution.ts)} and "
            f"{describe(solution.ys)}; `diffrax.SaveAt` says what is saved, and one `SubSaveAt` is a solution"
        )
    ts, ys = np.asarray(solution.ts), _named(solution.ys, jnp.ndim(solution.ts))
    numbers = numbers_of(ys.data, ys.layout, "solution_frame")
    lead = numbers.shape[:-1]
    if not ts.ndim or lead[: ts.ndim] != ts.shape:
        raise ValueError(
            f"solution_frame: expected states of shape (*{ts.shape}, ...), times first, found {numbers.shape}"
        )
    time, spread = ts.ndim - 1, ts.reshape(ts.shape + (1,) * (len(lead) - ts.ndim))
    names = tuple("t" if i == time else None for i in range(len(lead)))
    axes = [spread if i == time else np.arange(n) for i, n in enumerate(lead)]
    names = names if dims is None else names_of_axes(dims, lead)
    frame = frame_of(numbers, ys.layout, axes, names, "solution_frame")
    filled = np.isfinite(np.broadcast_to(spread, lead)).ravel()
    return frame if filled.all() else frame.loc[filled]


def _named(ys: Y, axes: int) -> ComponentVector:
    """Return states, whose arrays have so many axes for times and solutions, as a vector."""
    if isinstance(ys, ComponentVector):
        return ys
    if hasattr(ys, "shape"):
        ys = {"y": ys}
    if not isinstance(ys, Mapping):
        raise TypeError(
            f"solution_frame: expected states that are a ComponentVector, a mapping or an array, found "
            f"{describe(ys)}"
        )
    return ComponentVector.of(ys, Layout({name: _shapes(part, axes) for name, part in ys.items()}))


def _shapes(part: Y, axes: int) -> object:
    if isinstance(part, ComponentVector):
        return part.layout
    if isinstance(part, Mapping):
        return {name: _shapes(inner, axes) for name, inner in part.items()}
    return jnp.shape(part)[axes:]
