"""`ComponentMatrix`: a matrix with named rows and columns."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..types import Shape
from . import exports
from ._arithmetic import Arithmetic
from .layout import Layout, check_same_layout
from .parts import of_numbers
from .places import Slot
from .vector import ComponentVector
from .vector_text import describe_data


class ComponentMatrix(Arithmetic):
    """A matrix of shape `(..., m, n)` with a `Layout` for its rows and one for its columns.

    `H["a.b", "c"]` is the block of `a.b` and `c`: an array of shape `(*shape_ab, *shape_c)` for
    two leaves, a `ComponentMatrix` where one is a group, or `:`, which is all of them. `H @ v` with a vector
    of the columns' layout is a vector of the rows' layout, `v @ H` the reverse; with an array they are
    arrays. `+ - * / **` work with a matrix of the same layouts and with what broadcasts to its shape. `H.T`,
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

    def __init__(self, data: Any, rows: Layout, cols: Layout):
        if tuple(data.shape[-2:]) != (rows.length, cols.length):
            raise ValueError(
                f"expected data of shape (..., {rows.length}, {cols.length}), found shape {tuple(data.shape)}"
            )
        self._fill(data=jnp.array(data) if isinstance(data, np.ndarray) else data, rows=rows, cols=cols)

    @property
    def T(self) -> "ComponentMatrix":
        """The transpose, rows and columns exchanged."""
        return _new(of_numbers(lambda data: jnp.swapaxes(data, -1, -2), self.data), self.cols, self.rows)

    def __getitem__(self, key: tuple[str | slice, str | slice]) -> Any:
        if not isinstance(key, tuple) or len(key) != 2 or not all(map(_is_part, key)):
            raise TypeError(
                f'expected two paths, or `:` for all, as in H["a.b", "c"] and H["a", :], found {key!r}; '
                "`H.data` takes indices"
            )
        if key == (slice(None), slice(None)):
            return self
        (row, rows), (col, cols) = _part(self.rows, key[0]), _part(self.cols, key[1])
        block = of_numbers(lambda data: jnp.take(jnp.take(data, row, -2), col, -1), self.data)
        if isinstance(rows, Layout) and isinstance(cols, Layout):
            return _new(block, rows, cols)
        if isinstance(rows, Layout) or isinstance(cols, Layout):
            return _new(block, _as_layout(rows, key[0]), _as_layout(cols, key[1]))
        return of_numbers(lambda block: block.reshape(*self.shape[:-2], *rows, *cols), block)

    def __matmul__(self, other: object) -> Any:
        if isinstance(other, ComponentVector):
            check_same_layout(self.cols, other.layout)
            return ComponentVector(jnp.matvec(self.data, other.data), self.rows)
        if isinstance(other, ComponentMatrix):
            check_same_layout(self.cols, other.rows)
            return _new(self.data @ other.data, self.rows, other.cols)
        if isinstance(other, np.ndarray | jax.Array):
            return self.data @ other
        return NotImplemented

    def __rmatmul__(self, other: object) -> Any:
        if isinstance(other, ComponentVector):
            check_same_layout(self.rows, other.layout)
            return ComponentVector(jnp.vecmat(jnp.conj(other.data), self.data), self.cols)
        return other @ self.data if isinstance(other, np.ndarray | jax.Array) else NotImplemented

    def _with(self, data: Any) -> "ComponentMatrix":
        return _new(data, self.rows, self.cols)

    def _layouts(self) -> tuple[Layout, ...]:
        return self.rows, self.cols

    def _check_shape(self, shape: Shape) -> None:
        if len(shape) > self.ndim or any(
            n not in (1, m) for n, m in zip(shape[::-1], self.shape[::-1], strict=False)
        ):
            raise ValueError(f"expected a number or an array that broadcasts to {self.shape}, found {shape}")

    def __repr__(self) -> str:
        return f"ComponentMatrix({describe_data(self.data)}, rows={self.rows!r}, cols={self.cols!r})"


def _is_part(key: object) -> bool:
    return isinstance(key, str) or key == slice(None)


def _part(layout: Layout, key: str | slice) -> tuple[np.ndarray, Layout | Shape]:
    """Return the indices of a part, and its layout, or its shape if it is a leaf."""
    if not isinstance(key, str):
        return np.arange(layout.length), layout
    part = layout[key]
    return layout.indices(key), layout.view_shapes[key] if isinstance(part, Slot) else part


def _as_layout(part: Layout | Shape, path: str | slice) -> Layout:
    """Return the layout of a part; a leaf (beside a group) is under its own name."""
    return part if isinstance(part, Layout) else Layout({str(path).split(".")[-1]: part})


def _new(data: Any, rows: Layout, cols: Layout) -> ComponentMatrix:
    return ComponentMatrix._new(data=data, rows=rows, cols=cols)


def _unflatten(layouts: tuple[Layout, Layout], children: Iterable[Any]) -> ComponentMatrix:
    (data,) = children
    return _new(data, *layouts)


jax.tree_util.register_pytree_with_keys(
    ComponentMatrix,
    lambda m: (((jax.tree_util.GetAttrKey("data"), m.data),), (m.rows, m.cols)),
    _unflatten,
    lambda m: ((m.data,), (m.rows, m.cols)),
)
exports.register(ComponentMatrix, exports.layouts_to_text, exports.layouts_from_text)
