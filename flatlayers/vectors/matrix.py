"""`ComponentMatrix`, `jacobian` and `hessian`: matrices with named rows and columns."""

import operator
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from .layout import Layout, check_same_layout
from .names import describe
from .places import Slot
from .vector import ComponentVector


class ComponentMatrix:
    """A matrix of shape `(..., m, n)` with a `Layout` for its rows and one for its columns.

    `H["a.b", "c"]` is the block of `a.b` and `c`: an array of shape `(*shape_ab, *shape_c)` for
    two leaves, a `ComponentMatrix` where one is a group, or `:`, which is all of them. `H @ v` with a vector
    of the columns' layout is a vector of the rows' layout, `v @ H` the reverse; with an array they are
    arrays. `+ - * /` work with a matrix of the same layouts and with what broadcasts to its shape. `H.T`,
    `H.data` and `np.asarray(H)` work, and so do `jnp` functions, which take it as its array.

    **Arguments:**

    - `data`: the numbers, of shape `(..., rows.length, cols.length)`. A NumPy array is copied.
    - `rows`, `cols`: the layouts.

    **Raises:** `ValueError` for another shape, `KeyError` for a path that is not there, `TypeError`
    for a product with a vector of another layout.

    >>> import jax.numpy as jnp
    >>> import flatlayers as fl
    >>> v = fl.ComponentVector.of({"a": 2.0, "b": [1.0, 3.0]})
    >>> H = fl.hessian(lambda v: v.a**2 * jnp.sum(v.b))(v)
    >>> H["a", "b"]
    Array([4., 4.], dtype=float32)
    >>> (H @ v).a
    Array(32., dtype=float32)
    """

    __slots__ = ("cols", "data", "rows")
    data: Any
    rows: Layout
    cols: Layout

    __array_priority__ = 100
    __iter__ = None

    def __init__(self, data: Any, rows: Layout, cols: Layout):
        if tuple(data.shape[-2:]) != (rows.length, cols.length):
            raise ValueError(
                f"expected data of shape (..., {rows.length}, {cols.length}), found shape {tuple(data.shape)}"
            )
        _fill(self, jnp.array(data) if isinstance(data, np.ndarray) else data, rows, cols)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of `data`."""
        return tuple(self.data.shape)

    @property
    def dtype(self) -> Any:
        """The dtype of `data`."""
        return self.data.dtype

    @property
    def ndim(self) -> int:
        """The number of axes of `data`."""
        return self.data.ndim

    @property
    def T(self) -> "ComponentMatrix":
        """The transpose, rows and columns exchanged."""
        return _new(jnp.swapaxes(self.data, -1, -2), self.cols, self.rows)

    def __getitem__(self, key: Any) -> Any:
        if not isinstance(key, tuple) or len(key) != 2 or not all(map(_is_part, key)):
            raise TypeError(
                f'expected two paths, or `:` for all, as in H["a.b", "c"] and H["a", :], found {key!r}; '
                "`H.data` takes indices"
            )
        if key == (slice(None), slice(None)):
            return self
        (row, rows), (col, cols) = _part(self.rows, key[0]), _part(self.cols, key[1])
        block = jnp.take(jnp.take(self.data, row, -2), col, -1)
        if isinstance(rows, Layout) and isinstance(cols, Layout):
            return _new(block, rows, cols)
        if isinstance(rows, Layout) or isinstance(cols, Layout):
            return _new(block, _as_layout(rows, key[0]), _as_layout(cols, key[1]))
        return block.reshape(*self.shape[:-2], *rows, *cols)

    def __matmul__(self, other: Any) -> Any:
        if isinstance(other, ComponentVector):
            check_same_layout(self.cols, other.layout)
            return ComponentVector(jnp.matvec(self.data, other.data), self.rows)
        if isinstance(other, ComponentMatrix):
            check_same_layout(self.cols, other.rows)
            return _new(self.data @ other.data, self.rows, other.cols)
        if isinstance(other, np.ndarray | jax.Array):
            return self.data @ other
        return NotImplemented

    def __rmatmul__(self, other: Any) -> Any:
        if isinstance(other, ComponentVector):
            check_same_layout(self.rows, other.layout)
            return ComponentVector(jnp.vecmat(jnp.conj(other.data), self.data), self.cols)
        return other @ self.data if isinstance(other, np.ndarray | jax.Array) else NotImplemented

    def _binary(self, op: Callable[[Any, Any], Any], other: Any) -> Any:
        if isinstance(other, ComponentMatrix):
            check_same_layout(self.rows, other.rows)
            check_same_layout(self.cols, other.cols)
            return _new(op(self.data, other.data), self.rows, self.cols)
        if not isinstance(other, int | float | complex | np.generic | np.ndarray | jax.Array):
            return NotImplemented
        shape = np.shape(other)
        if len(shape) > self.ndim or any(
            n not in (1, m) for n, m in zip(shape[::-1], self.shape[::-1], strict=False)
        ):
            raise ValueError(f"expected a number or an array that broadcasts to {self.shape}, found {shape}")
        return _new(op(self.data, other), self.rows, self.cols)

    def __add__(self, other: Any) -> Any:
        return self._binary(operator.add, other)

    def __radd__(self, other: Any) -> Any:
        return self._binary(lambda a, b: b + a, other)

    def __sub__(self, other: Any) -> Any:
        return self._binary(operator.sub, other)

    def __rsub__(self, other: Any) -> Any:
        return self._binary(lambda a, b: b - a, other)

    def __mul__(self, other: Any) -> Any:
        return self._binary(operator.mul, other)

    def __rmul__(self, other: Any) -> Any:
        return self._binary(lambda a, b: b * a, other)

    def __truediv__(self, other: Any) -> Any:
        return self._binary(operator.truediv, other)

    def __neg__(self) -> "ComponentMatrix":
        return _new(-self.data, self.rows, self.cols)

    def __jax_array__(self) -> jax.Array:
        return self.data

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        array = np.asarray(self.data, dtype=dtype)
        return array.copy() if copy else array

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError("component matrices are immutable")

    def __delattr__(self, name: str) -> None:
        raise AttributeError("component matrices are immutable")

    def __reduce__(self) -> Any:
        return _new, (self.data, self.rows, self.cols)

    def __repr__(self) -> str:
        data = describe(self.data) if hasattr(self.data, "shape") else type(self.data).__name__
        return f"ComponentMatrix({data}, rows={self.rows!r}, cols={self.cols!r})"


def jacobian(f: Callable[..., Any], *, mode: Literal["rev", "fwd"] = "rev") -> Callable[..., Any]:
    """The Jacobian of a function of a `ComponentVector`, with names.

    **Arguments:**

    - `f`: a function `f(v, *args)` of a `ComponentVector` without leading axes. Its result is a
        `ComponentVector` or an array.
    - `mode`: `"rev"` is reverse mode, which everything supports, the default adjoints of diffrax
        included; `"fwd"` is forward mode, faster where the result is longer than the vector.

    **Returns:** a function `(v, *args)`. If `f` returns a vector it gives a `ComponentMatrix` with
    `J["y.a", "x.b"]`; if `f` returns an array of shape `s`, a `ComponentVector` with data of shape
    `(*s, n)`, whose views have shape `(*s, *shape)`.

    **Raises:** `TypeError` if `v` is no `ComponentVector`, `ValueError` if it has leading axes.

    >>> import flatlayers as fl
    >>> v = fl.ComponentVector.of({"a": 2.0, "b": [1.0, 3.0]})
    >>> fl.jacobian(lambda v: v.a * v.b)(v).a
    Array([1., 3.], dtype=float32)
    >>> fl.jacobian(lambda v: 2 * v)(v)["b", "b"]
    Array([[2., 0.],
           [0., 2.]], dtype=float32)
    """

    def jacobian_of_f(v: ComponentVector, *args: Any) -> Any:
        flat = _function_of_data(f, v, args)
        out = jax.eval_shape(flat, v.data)
        out_data = out.data if isinstance(out, ComponentVector) else out
        if not hasattr(out_data, "shape"):
            raise TypeError(
                f"expected a function that returns a ComponentVector or an array, found {describe(out)}"
            )
        if isinstance(out, ComponentVector) and out.ndim != 1:
            raise ValueError(f"expected a result without leading axes, found shape {out.shape}; use jax.vmap")
        transform = {"rev": jax.jacrev, "fwd": jax.jacfwd}[mode]
        data = transform(lambda data: _data(flat(data)))(v.data)
        if isinstance(out, ComponentVector):
            return ComponentMatrix(data, out.layout, v.layout)
        return ComponentVector(data, v.layout)

    return jacobian_of_f


def hessian(f: Callable[..., Any]) -> Callable[..., ComponentMatrix]:
    """The Hessian of a scalar function of a `ComponentVector`, with names, by forward over reverse.

    **Arguments:**

    - `f`: a function `f(v, *args)` of a `ComponentVector` without leading axes that returns a scalar.

    **Returns:** a function `(v, *args)` that gives a `ComponentMatrix` with `H["a.b", "c"]` of shape
    `(*shape_ab, *shape_c)`.

    **Raises:** `TypeError` if `v` is no `ComponentVector`, `ValueError` if it has leading axes or `f`
    returns no scalar.

    >>> import flatlayers as fl
    >>> v = fl.ComponentVector.of({"a": 2.0, "b": 3.0})
    >>> fl.hessian(lambda v: v.a * v.b**2)(v)["a", "b"]
    Array(6., dtype=float32)
    """

    def hessian_of_f(v: ComponentVector, *args: Any) -> ComponentMatrix:
        flat = _function_of_data(f, v, args)
        out = jax.eval_shape(flat, v.data)
        if getattr(out, "shape", None) != ():
            raise ValueError(f"expected a function that returns a scalar, found {describe(out)}")
        return ComponentMatrix(jax.hessian(flat)(v.data), v.layout, v.layout)

    return hessian_of_f


def _function_of_data(f: Callable[..., Any], v: Any, args: tuple[Any, ...]) -> Callable[[jax.Array], Any]:
    if not isinstance(v, ComponentVector):
        raise TypeError(
            f"expected a ComponentVector, found {type(v).__name__}; use jax.jacobian and jax.hessian"
        )
    if v.ndim != 1:
        raise ValueError(f"expected a vector without leading axes, found shape {v.shape}; use jax.vmap")
    return lambda data: f(ComponentVector(data, v.layout), *args)


def _is_part(key: Any) -> bool:
    return isinstance(key, str) or key == slice(None)


def _part(layout: Layout, key: Any) -> tuple[Any, Any]:
    """The indices of a part, and its layout, or its shape if it is a leaf."""
    if not isinstance(key, str):
        return np.arange(layout.length), layout
    part = layout[key]
    return layout.indices(key), layout.view_shapes[key] if isinstance(part, Slot) else part


def _as_layout(part: Any, path: str) -> Layout:
    """The layout of a part; a leaf (beside a group) is under its own name."""
    return part if isinstance(part, Layout) else Layout({path.split(".")[-1]: part})


def _data(value: Any) -> Any:
    return value.data if isinstance(value, ComponentVector) else value


def _fill(matrix: ComponentMatrix, data: Any, rows: Layout, cols: Layout) -> ComponentMatrix:
    object.__setattr__(matrix, "data", data)
    object.__setattr__(matrix, "rows", rows)
    object.__setattr__(matrix, "cols", cols)
    return matrix


def _new(data: Any, rows: Layout, cols: Layout) -> ComponentMatrix:
    return _fill(object.__new__(ComponentMatrix), data, rows, cols)


def _unflatten(layouts: tuple[Layout, Layout], children: Any) -> ComponentMatrix:
    (data,) = children
    return _new(data, *layouts)


jax.tree_util.register_pytree_with_keys(
    ComponentMatrix,
    lambda m: (((jax.tree_util.GetAttrKey("data"), m.data),), (m.rows, m.cols)),
    _unflatten,
    lambda m: ((m.data,), (m.rows, m.cols)),
)
