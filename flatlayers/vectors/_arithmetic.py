"""The base of `ComponentVector` and `ComponentMatrix`: an array for JAX and NumPy, with its operators."""

import operator
from collections.abc import Callable
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from ..types import DType, Shape
from .immutable import Immutable
from .layout import Layout, check_same_layout
from .parts import of_arrays, of_numbers


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
            return self._with(of_arrays(op, self.data, other.data))
        if not isinstance(other, int | float | complex | np.generic | np.ndarray | jax.Array):
            return NotImplemented
        self._check_shape(np.shape(other))
        return self._with(of_numbers(lambda data: op(data, other), self.data))

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

    def __floordiv__(self, other: object) -> Any:
        return self._binary(operator.floordiv, other)

    def __rfloordiv__(self, other: object) -> Any:
        return self._reflected(operator.floordiv, other)

    def __mod__(self, other: object) -> Any:
        return self._binary(operator.mod, other)

    def __rmod__(self, other: object) -> Any:
        return self._reflected(operator.mod, other)

    def __divmod__(self, other: object) -> Any:
        return self // other, self % other

    def __rdivmod__(self, other: object) -> Any:
        return other // self, other % self  # pyright: ignore[reportOperatorIssue]

    def __pow__(self, other: object) -> Any:
        return self._binary(operator.pow, other)

    def __rpow__(self, other: object) -> Any:
        return self._reflected(operator.pow, other)

    def __and__(self, other: object) -> Any:
        return self._binary(operator.and_, other)

    def __rand__(self, other: object) -> Any:
        return self._reflected(operator.and_, other)

    def __or__(self, other: object) -> Any:
        return self._binary(operator.or_, other)

    def __ror__(self, other: object) -> Any:
        return self._reflected(operator.or_, other)

    def __xor__(self, other: object) -> Any:
        return self._binary(operator.xor, other)

    def __rxor__(self, other: object) -> Any:
        return self._reflected(operator.xor, other)

    def __neg__(self) -> Self:
        return self._with(of_numbers(operator.neg, self.data))

    def __pos__(self) -> Self:
        return self

    def __abs__(self) -> Self:
        return self._with(of_numbers(abs, self.data))

    def __invert__(self) -> Self:
        return self._with(of_numbers(operator.invert, self.data))

    def __round__(self, digits: int | None = None) -> Self:
        # As with JAX's arrays, without digits the numbers are integers. NumPy's arrays have no rounding.
        def rounded(data: Any) -> Any:
            return round(jnp.asarray(data), digits)  # pyright: ignore[reportCallIssue, reportArgumentType]

        return self._with(of_numbers(rounded, self.data))

    # One number

    @property
    def size(self) -> int:
        """The number of numbers, leading axes included."""
        return self.data.size

    def __bool__(self) -> bool:
        if self.size != 1:
            raise ValueError(
                f"expected one number for a truth value, found {self.size}: use `jnp.all(v)` or `jnp.any(v)`"
            )
        return bool(self._one_number("bool"))

    def __float__(self) -> float:
        return float(self._one_number("float"))

    def __int__(self) -> int:
        return int(self._one_number("int"))

    def __complex__(self) -> complex:
        return complex(self._one_number("complex"))

    def _one_number(self, call: str) -> Any:
        if self.size != 1:
            raise TypeError(
                f"{call}: expected one number, found {self.size}; `np.asarray(v)` has all of them"
            )
        if isinstance(self.data, jax.ShapeDtypeStruct):
            raise TypeError(f"{call}: expected a number that is known, found {self.data}")
        return self.data.reshape(())
