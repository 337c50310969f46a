"""Vectors as tables of pandas, a column for each number. pandas is optional."""

import importlib
import math
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from ..dtypes import is_traced
from ..types import Shape
from .layout import Layout
from .vector_text import describe_data


if TYPE_CHECKING:
    import pandas


class Tables:
    """The tables of a vector, by the names of `layout.labels()`."""

    __slots__ = ()
    data: Any
    layout: Layout

    def to_series(self) -> "pandas.Series":
        """Return a pandas `Series` of the numbers, under the names of `layout.labels()`.

        Half precisions that NumPy does not have, such as bfloat16, become float32.

        **Raises:** `ImportError` without pandas, `TypeError` for a vector with leading axes and for numbers
        that are not known, as under `jax.jit`.

        >>> import flatlayers as fl
        >>> series = fl.ComponentVector.of({"rate": 0.5, "net": {"w": [[1.0, 2.0]]}}).to_series()
        >>> list(series.index), float(series["net.w[0,1]"])
        (['rate', 'net.w[0,0]', 'net.w[0,1]'], 2.0)
        """
        pandas = imported("pandas", "v.to_series()")
        numbers = numbers_of(self.data, self.layout, "v.to_series()")
        if numbers.ndim > 1:
            lead = numbers.shape[:-1]
            raise TypeError(
                f"v.to_series() of a vector with leading axes {lead}: `v.to_frame()` has them in its rows"
            )
        return pandas.Series(numbers, index=self.layout.labels())

    def to_frame(self, dims: Sequence[str] | None = None) -> "pandas.DataFrame":
        """Return a pandas `DataFrame`: leading axes in rows, a column for each name of `layout.labels()`.

        Without leading axes it has one row; several of them are a `MultiIndex`, first one outermost. Half
        precisions that NumPy does not have, such as bfloat16, become float32.

        **Arguments:**

        - `dims`: a name for each leading axis, such as `("chain", "draw")`.

        **Raises:** `ImportError` without pandas, `ValueError` for another number of `dims`, `TypeError` for
        `dims` that are no strings and for numbers that are not known, as under `jax.jit`.

        >>> import jax.numpy as jnp
        >>> import flatlayers as fl
        >>> chain = fl.ComponentVector(jnp.arange(6.0).reshape(3, 2), fl.Layout({"q": (), "p": ()}))
        >>> chain.to_frame().mean().to_dict()
        {'q': 2.0, 'p': 3.0}
        """
        numbers = numbers_of(self.data, self.layout, "v.to_frame()")
        lead = numbers.shape[:-1]
        axes = [np.arange(n) for n in lead]
        return frame_of(numbers, self.layout, axes, names_of_axes(dims, lead), "v.to_frame()")


def frame_of(
    numbers: np.ndarray,
    layout: Layout,
    axes: Sequence[np.ndarray],
    names: Sequence[str | None],
    call: str,
) -> "pandas.DataFrame":
    """Return the table of numbers of shape `(..., length)`: rows by the values along each leading axis.

    `axes` has an array for each, one-dimensional or of the shape of all of them.
    """
    pandas = imported("pandas", call)
    lead = numbers.shape[:-1]
    rows = [_broadcast_along(i, values, lead).ravel() for i, values in enumerate(axes)]
    if len(rows) > 1:
        index = pandas.MultiIndex.from_arrays(rows, names=list(names))
    else:
        index = pandas.Index(*rows, name=names[0]) if rows else None
    return pandas.DataFrame(
        numbers.reshape(math.prod(lead), layout.length), index=index, columns=layout.labels()
    )


def _broadcast_along(axis: int, values: np.ndarray, lead: Shape) -> np.ndarray:
    if values.ndim == 1:
        values = values.reshape([-1 if i == axis else 1 for i in range(len(lead))])
    return np.broadcast_to(values, lead)


def names_of_axes(dims: Sequence[str] | str | None, lead: Shape) -> tuple[str | None, ...]:
    """Return a name for each leading axis.

    **Raises:** `ValueError` for too many or too few of them, `TypeError` for what are no strings.
    """
    if dims is None:
        return (None,) * len(lead)
    dims = (dims,) if isinstance(dims, str) else dims
    if not isinstance(dims, Sequence) or not all(isinstance(name, str) for name in dims):
        raise TypeError(f"expected a name for each of the leading axes {lead}, found dims={dims!r}")
    dims = tuple(dims)
    if len(dims) != len(lead) or len(set(dims)) < len(dims):
        raise ValueError(f"expected a name for each of the leading axes {lead}, found dims={dims}")
    return dims


def numbers_of(data: object, layout: Layout, call: str) -> np.ndarray:
    """Return the numbers of a vector in a dtype of NumPy.

    **Raises:** `TypeError` for a stand-in of a transformation, such as a tracer or a shape; `ValueError` for
    another length.
    """
    if not isinstance(data, jax.Array | np.ndarray) or is_traced(data):
        kind = "numbers that are known only when it runs" if is_traced(data) else describe_data(data)
        raise TypeError(f"{call}: expected numbers, found {kind}")
    layout.check_length(data)
    numbers = np.asarray(data)
    return numbers.astype(np.float32) if numbers.dtype.kind == "V" else numbers


def imported(name: str, call: str) -> ModuleType:
    """Return an optional package. **Raises:** `ImportError` that names it."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise ImportError(f"{call} needs {name}, which is not installed: `pip install {name}`") from None
