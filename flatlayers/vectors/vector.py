"""`ComponentVector`: one array with named views."""

import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from ..devices import gathered
from ..dtypes import is_number
from ..types import Array, DType, Shape
from . import exports, vector_text
from ._arithmetic import Arithmetic, Operation
from .indices import Index, Key, along_last, check_no_lead, is_path
from .layout import Layout, check_same_layout, leaves_of
from .names import NamedArray, UnknownAttributeError, UnknownNameError, as_path, describe
from .packing import broadcast_to_part, pack
from .parts import (
    changed_at,
    changed_part,
    leaf_of,
    leaves_one_by_one,
    numbers_at,
    of_arrays,
    of_numbers,
    part_of,
    pick_of,
)
from .places import Slot
from .record import Record
from .tables import Tables
from .text import as_html


class ComponentVector(Arithmetic, Tables, NamedArray):
    """An array of shape `(..., n)` whose last axis has a `Layout`: names for its parts.

    `v.a.b`, `v["a.b"]` and `v["a", "b"]` are views: a `jax.Array` for a leaf, a
    `ComponentVector` for a group; `v.pick("a", "c")` is a vector of some parts. `v[3]`, `v[2:5]` and
    `v[mask]` index the numbers. It is a pytree with one leaf, so `jax.jit`, `jax.grad`, optax, diffrax
    and optimistix take it as it is; `jnp` functions take it as its flat array and return arrays.
    Arithmetic, comparisons, `& | ^ ~`, `//`, `%` and `round` are those of the array and keep the names; one
    number is taken by `float(v)`. Of an abstract vector, as `jax.eval_shape` gives it, views and what is
    computed are `jax.ShapeDtypeStruct`s.

    Leading axes belong to every view: the time axis of a solution, the members of an ensemble. With them,
    `v[..., i]` indexes the numbers along the last axis and `v.lead[i]` the leading axes; `v[i]` would not
    say which, and raises.

    **Arguments:**

    - `data`: the numbers, of shape `(..., layout.length)`. A NumPy array is copied.
    - `layout`: the `Layout` of the last axis.

    **Raises:** `ValueError` for another length; `KeyError` or `AttributeError` with the nearest
    names for a path that is not there; `TypeError` for an operation on two different layouts, and for an
    index or `len` of a vector with leading axes.

    >>> import flatlayers as fl
    >>> v = fl.ComponentVector.of({"a": 100.0, "b": {"c": [4.0, 1.5]}})
    >>> v.b.c
    Array([4. , 1.5], dtype=float32)
    >>> (2 * v).data
    Array([200.,   8.,   3.], dtype=float32)
    >>> v.at["b.c"].add(1.0).b
    ComponentVector(float32[2], c=(2,))
    """

    __slots__ = ("data", "layout")
    data: Any
    layout: Layout

    def __init__(self, data: "Array | np.ndarray | jax.ShapeDtypeStruct", layout: Layout):
        if not isinstance(layout, Layout):
            raise TypeError(f"expected a Layout, found {type(layout).__name__}")
        layout.check_length(data)
        self._fill(data=jnp.array(data) if isinstance(data, np.ndarray) else data, layout=layout)

    @staticmethod
    def of(
        tree: Mapping[str, object] | NamedArray, layout: Layout | None = None, dtype: DType | None = None
    ) -> "ComponentVector":
        """Return the vector with the numbers of a nested mapping. The inverse of `unpack`.

        **Arguments:**

        - `tree`: a nested mapping (or `Record` or `ComponentVector`) of arrays or numbers. All arrays may
            have the same leading axes in front of the shapes of the layout.
        - `layout`: the `Layout`, whose names and shapes the mapping has to have, in any order. Without it,
            it is `Layout.of(tree)`: all axes belong to the shapes.
        - `dtype`: the dtype of the vector. Without it nothing is converted: floating arrays keep
            their dtype, which has to be the same for all, and Python numbers follow them (alone
            they take JAX's default float dtype).

        Tied names need equal values; where those are traced, the one that has the place counts.

        **Raises:** `KeyError` for a missing or unknown name, `ValueError` for a wrong shape or for
        two different values of tied names, `TypeError` for mixed dtypes or integers without `dtype`.

        >>> import flatlayers as fl
        >>> fl.ComponentVector.of({"a": 1.0, "b": [2.0, 3.0]}).data
        Array([1., 2., 3.], dtype=float32)
        >>> fl.ComponentVector.of({"b": [2.0, 3.0], "a": 1.0}, fl.Layout({"a": (), "b": (2,)})).data
        Array([1., 2., 3.], dtype=float32)
        """
        if layout is None:
            layout = Layout.of(tree)
        if not isinstance(layout, Layout):
            raise TypeError(f"expected a Layout, found {layout!r}; a dtype is `dtype=`")
        return ComponentVector(pack(layout, leaves_of(layout, tree), dtype), layout)

    @staticmethod
    def zeros(layout: Layout, dtype: DType | None = None) -> "ComponentVector":
        """Return a vector of zeros, of JAX's default float dtype if none is given.

        >>> import flatlayers as fl
        >>> fl.ComponentVector.zeros(fl.Layout({"a": (), "b": (2,)})).b
        Array([0., 0.], dtype=float32)
        """
        return ComponentVector(jnp.zeros(layout.length, dtype), layout)

    # The array

    def __len__(self) -> int:
        check_no_lead(self._known_shape(), "len(v)", "`len(v.lead)`, or `v.layout.length`")
        return self.layout.length

    def __iter__(self) -> Iterator[Array]:
        """Go through the numbers, as an array of JAX does."""
        check_no_lead(self._known_shape(), "iter(v)", "`iter(v.lead)`")
        return iter(self.data)

    def _known_shape(self) -> Shape:
        # Data that is no array, such as an axis under `jax.vmap`, has none.
        return getattr(self.data, "shape", ())

    # Views

    def __getitem__(self, key: Key) -> Any:
        if is_path(key):
            return self._view(as_path(key))
        index = along_last(key, self._known_shape())
        return of_numbers(lambda data: numbers_at(data, index), self.data)

    @property
    def lead(self) -> "_Lead":
        """The vectors at an index of the leading axes, `v.lead[i]`, which keep their names.

        >>> import jax.numpy as jnp
        >>> import flatlayers as fl
        >>> ys = fl.ComponentVector(jnp.arange(6.0).reshape(3, 2), fl.Layout({"q": (), "p": ()}))
        >>> ys.lead[-1].q, len(ys.lead)
        (Array(4., dtype=float32), 3)
        """
        return _Lead(self)

    def pick(self, *paths: str) -> "ComponentVector":
        """Return the vector of some of the parts alone, in the order given, under their paths.

        **Raises:** `KeyError` for an unknown name, `ValueError` for one that is inside another.

        >>> import flatlayers as fl
        >>> v = fl.ComponentVector.of({"a": 1.0, "b": [2.0, 3.0], "c": 4.0})
        >>> v.pick("c", "a").data
        Array([4., 1.], dtype=float32)
        """
        layout = self.layout.pick(*paths)
        data = of_numbers(lambda data: pick_of(self.layout, data, layout), self.data)
        return self._new(data=data, layout=layout)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        try:
            return self._view(name)
        except UnknownNameError as error:
            raise UnknownAttributeError(error.__str__) from None

    def _view(self, path: str) -> Any:
        part = self.layout[path]
        if isinstance(self.data, ComponentVector):
            raise TypeError("a vector of vectors, as jax.hessian gives, has no views: use fl.hessian")
        self.layout.check_length(self.data)
        if isinstance(part, Slot):
            return of_numbers(lambda data: leaf_of(self.layout, data, path), self.data)
        return self._new(
            data=of_numbers(lambda data: part_of(self.layout, data, path), self.data), layout=part
        )

    def unpack(self) -> Record:
        """Return all leaves as a nested `Record`, in one split. Hot code uses it.

        The numbers are those of the vector: of a model with bounds, `fl.constrained` gives what layers see.
        """
        # Such as the numbers of NumPy that `jax.device_get` leaves: the parts are arrays of JAX all the same.
        data = jnp.asarray(self.data) if isinstance(self.data, np.ndarray) else self.data
        self.layout.check_length(data)
        leaves = leaves_one_by_one(self.layout, data)
        if leaves is not None:
            return self.layout._of_places(leaves)
        return of_numbers(lambda data: self.layout._unpack(gathered(data), jax.lax), data)

    def to_dict(self) -> dict[str, Any]:
        """Return all leaves as nested dictionaries."""
        return self.unpack().to_dict()

    def __contains__(self, path: object) -> bool:
        return path in self.layout

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self.layout.names]

    # New vectors

    @property
    def at(self) -> "_At":
        """The way to a new vector with one part changed: `v.at["a.b"].set(x)`, `add`, `multiply`, and `get`.

        `x` is broadcast to the part. A group takes a mapping or a vector with all its names, or a
        scalar. Positions work too: `v.at[2:5].set(0.0)`, and `v.at[..., 2:5]` with leading axes.
        """
        return _At(self)

    def replace(self, /, **named: object) -> "ComponentVector":
        """Return a new vector with new values for some names, broadcast to their shapes."""
        vector = self
        for name, value in named.items():
            vector = vector.at[name].set(value)
        return vector

    def map(self, f: Callable[[Array], Array]) -> "ComponentVector":
        """Apply the elementwise function `f` to the numbers and keep the layout.

        **Raises:** `ValueError` if `f` changes the shape.
        """
        data = of_numbers(f, self.data)
        if jnp.shape(data) != self.shape:
            raise ValueError(
                f"expected an elementwise function that keeps the shape {self.shape}, found {jnp.shape(data)}"
            )
        return self._with(data)

    # Arithmetic, what there is of it beside that of matrices

    def _with(self, data: Any) -> "ComponentVector":
        return ComponentVector._new(data=data, layout=self.layout)

    def _layouts(self) -> tuple[Layout, ...]:
        return (self.layout,)

    def _check_shape(self, shape: Shape) -> None:
        if shape[-1:] not in ((), (1,), (self.layout.length,)):
            raise ValueError(
                f"expected a scalar or an array whose last axis has length {self.layout.length}, "
                f"found shape {shape}"
            )

    def _reflected(self, op: Operation, other: object) -> Any:
        # An array on the left gives an array, as it does where JAX decides.
        if isinstance(other, np.ndarray | jax.Array) and np.ndim(other):
            return of_numbers(lambda data: op(other, data), self.data)
        return super()._reflected(op, other)

    def __matmul__(self, other: object) -> Any:
        if isinstance(other, ComponentVector):
            check_same_layout(self.layout, other.layout)
            return of_arrays(jnp.vecdot, self.data, other.data)
        if isinstance(other, np.ndarray | jax.Array):
            return of_numbers(lambda data: data @ other, self.data)
        return NotImplemented

    def __rmatmul__(self, other: object) -> Any:
        return other @ self.data if isinstance(other, np.ndarray | jax.Array) else NotImplemented

    def __eq__(self, other: object) -> Any:
        return self._binary(operator.eq, other)

    def __ne__(self, other: object) -> Any:
        return self._binary(operator.ne, other)

    def __lt__(self, other: object) -> Any:
        return self._binary(operator.lt, other)

    def __le__(self, other: object) -> Any:
        return self._binary(operator.le, other)

    def __gt__(self, other: object) -> Any:
        return self._binary(operator.gt, other)

    def __ge__(self, other: object) -> Any:
        return self._binary(operator.ge, other)

    # Comparing gives a vector, so a vector has no hash.
    __hash__: ClassVar[None] = None  # pyright: ignore[reportIncompatibleMethodOverride]

    # Text

    def _repr_html_(self) -> str | None:
        return as_html(self)

    def __repr__(self) -> str:
        return vector_text.in_a_line(self.data, self.layout)

    def __str__(self) -> str:
        return vector_text.in_lines(self.data, self.layout)


class _Lead:
    """`v.lead`, which waits for an index of the leading axes."""

    def __init__(self, vector: ComponentVector):
        if vector.ndim < 2:
            raise TypeError(f"expected a vector with leading axes, found shape {vector.shape}")
        self.vector = vector

    def __getitem__(self, index: Index) -> ComponentVector:
        index = index if isinstance(index, tuple) else (index,)
        return self.vector._with(of_numbers(lambda data: data[(*index, slice(None))], self.vector.data))

    def __len__(self) -> int:
        return self.vector.shape[0]

    def __iter__(self) -> Iterator[ComponentVector]:
        return (self[i] for i in range(len(self)))


class _At:
    """`v.at`, which waits for a path or an index."""

    def __init__(self, vector: ComponentVector):
        self.vector = vector

    def __getitem__(self, key: Key) -> "_AtPart":
        return _AtPart(self.vector, key)


class _AtPart:
    """`v.at[key]`, which waits for a change to make there."""

    def __init__(self, vector: ComponentVector, key: Key):
        self.vector = vector
        self.path: str | None = as_path(key) if is_path(key) else None
        self.key = key

    def get(self) -> Any:
        """Return the part itself."""
        return self.vector[self.key]

    def set(self, value: object) -> ComponentVector:
        """Return a new vector with `value` there."""
        return self._apply("set", value)

    def add(self, value: object) -> ComponentVector:
        """Return a new vector with `value` added there."""
        return self._apply("add", value)

    def multiply(self, value: object) -> ComponentVector:
        """Return a new vector multiplied by `value` there."""
        return self._apply("multiply", value)

    def _apply(self, method: str, value: object) -> ComponentVector:
        vector, path, data = self.vector, self.path, self.vector.data
        if path is None:
            number: Any = jnp.asarray(value, vector.dtype) if is_number(value) else value
            index = along_last(self.key, vector._known_shape())
            return vector._with(of_numbers(lambda v: changed_at(jnp.asarray(v), index, method, number), data))
        flat, layout = self._flat(path, value), vector.layout
        return vector._with(
            of_numbers(lambda v: changed_part(layout, jnp.asarray(v), path, method, flat), data)
        )

    def _flat(self, path: str, value: object) -> Any:
        """Return the numbers that `value` means for the part at `path`, along the last axis."""
        lead, dtype = self.vector.shape[:-1], self.vector.dtype
        part = self.vector.layout[path]
        if isinstance(part, Slot):
            shape = self.vector.layout.view_shapes[path]
            return broadcast_to_part(value, lead + shape, dtype, path).reshape(*lead, math.prod(shape))
        if isinstance(value, ComponentVector):
            check_same_layout(part, value.layout)
            return broadcast_to_part(value.data, (*lead, part.length), dtype, path)
        if isinstance(value, Mapping):
            leaves = {
                leaf: broadcast_to_part(number, lead + part.view_shapes[leaf], dtype, f"{path}.{leaf}")
                for leaf, number in leaves_of(part, value, path).items()
            }
            return pack(part, leaves, dtype)
        if np.shape(value) == ():  # pyright: ignore[reportArgumentType, reportCallIssue]
            return value
        raise TypeError(
            f"{path!r} is a group: expected a mapping, a ComponentVector or a scalar, found {describe(value)}"
        )


# Pytrees. The children of a vector are not checked: transformations put shapes, axes and other stand-ins in
# the place of the data. Records are told here, too, since their own file does without JAX.


def _unflatten(layout: Layout, children: Iterable[Any]) -> ComponentVector:
    (data,) = children
    return ComponentVector._new(data=data, layout=layout)


jax.tree_util.register_pytree_with_keys(
    ComponentVector,
    lambda vector: (((jax.tree_util.GetAttrKey("data"), vector.data),), vector.layout),
    _unflatten,
    lambda vector: ((vector.data,), vector.layout),
)
exports.register(ComponentVector, Layout.to_json, Layout.from_json)


def _record_with_keys(record: Record) -> tuple[Any, Any]:
    children, structure = record._flat()
    return list(zip(map(jax.tree_util.GetAttrKey, structure[1]), children, strict=True)), structure


jax.tree_util.register_pytree_with_keys(Record, _record_with_keys, Record._unflat, Record._flat)
exports.register(Record, exports.structure_to_text, exports.structure_from_text)
