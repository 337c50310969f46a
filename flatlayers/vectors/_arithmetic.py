"""The base of `ComponentVector` and `ComponentMatrix`: an array for JAX and NumPy, with `+ - * / **`."""

import operator
from collections.abc import Callable
from typing import Any, Self

import jax
import numpy as np

from ..types import DType, Shape
from .immutable import Immutable
from .layout import Layout, check_same_layout


Operation = Callable[[Any, Any], Any]


class Arithmetic(Immutable):
    """An array whose names stay with it under arithmetic.

    A subclass gives its names to other numbers in `_with`, tells them in `_layouts`, which are to be the same
    for two of its kind, and refuses arrays of other shapes in `_check_shape`.
    """

    __slots__ = ()
    data: Any

    # NumPy leaves `array + v` to `__radd__`, as it does for JAX's arrays.
    __array_priority__ = 100
    __iter__ = None

    @property
    def shape(self) -> Shape:
        """The shape of `data`."""
        return tuple(self.data.shape)

    @property
    def dtype(self) -> np.dtype:
        """The dtype of `data`."""
        return self.data.dtype

    @property
    def ndim(self) -> int:
        """The number of axes of `data`: 1 for a vector without leading axes."""
        return self.data.ndim

    def __jax_array__(self) -> jax.Array:
        return self.data

    def __array__(self, dtype: DType | None = None, copy: bool | None = None) -> np.ndarray:
        array = np.asarray(self.data, dtype=dtype)
        return array.copy() if copy else array

    def _with(self, data: Any) -> Self:
        """Return other numbers of the same shape with the names of these."""
        raise NotImplementedError

    def _layouts(self) -> tuple[Layout, ...]:
        raise NotImplementedError

    def _check_shape(self, shape: Shape) -> None:
        raise NotImplementedError

    def _binary(self, op: Operation, other: object) -> Any:
        if isinstance(other, type(self)):
            if (mine := self._layouts()) != (theirs := other._layouts()):
                for expected, found in zip(mine, theirs, strict=True):
                    check_same_layout(expected, found)
            return self._with(op(self.data, other.data))
        if not isinstance(other, int | float | complex | np.generic | np.ndarray | jax.Array):
            return NotImplemented
        self._check_shape(np.shape(other))
        return self._with(op(self.data, other))

    def _reflected(self, op: Operation, other: object) -> Any:
        return self._binary(lambda a, b: op(b, a), other)

    def __add__(self, other: object) -> Any:
        return self._binary(operator.add, other)

    def __radd__(self, other: object) -> Any:
        return self._reflected(operator.add, other)

    def __sub__(self, other: object) -> Any:
        return self._binary(operator.sub, other)

    def __rsub__(self, other: object) -> Any:
        return self._reflected(operator.sub, other)

    def __mul__(self, other: object) -> Any:
        return self._binary(operator.mul, other)

    def __rmul__(self, other: object) -> Any:
        return self._reflected(operator.mul, other)

    def __truediv__(self, other: object) -> Any:
        return self._binary(operator.truediv, other)

    def __rtruediv__(self, other: object) -> Any:
        return self._reflected(operator.truediv, other)

    def __pow__(self, other: object) -> Any:
        return self._binary(operator.pow, other)

    def __rpow__(self, other: object) -> Any:
        return self._reflected(operator.pow, other)

    def __neg__(self) -> Self:
        return self._with(-self.data)

    def __pos__(self) -> Self:
        return self

    def __abs__(self) -> Self:
        return self._with(abs(self.data))
