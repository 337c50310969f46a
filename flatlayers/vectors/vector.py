"""`ComponentVector`: one array with named views."""

import math
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from .layout import Layout, check_same_layout
from .names import NamedArray, UnknownNameError, as_path, describe
from .packing import is_number, leaves_of
from .places import Slot
from .record import Record
from .text import as_html


class ComponentVector(NamedArray):
    """An array of shape `(..., n)` whose last axis has a `Layout`: names for its parts.

    `v.a.b`, `v["a.b"]` and `v["a", "b"]` are views: a `jax.Array` for a leaf, a
    `ComponentVector` for a group; `v.pick("a", "c")` is a vector of some parts. `v[3]`, `v[2:5]` and
    `v[mask]` index the numbers. It is a pytree with one leaf, so `jax.jit`, `jax.grad`, optax, diffrax
    and optimistix take it as it is; `jnp` functions take it as its flat array and return arrays.

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

    # NumPy leaves `array + v` to `__radd__`, as it does for JAX's arrays.
    __array_priority__ = 100
    __iter__ = None

    def __init__(self, data: Any, layout: Layout):
        if not isinstance(layout, Layout):
            raise TypeError(f"expected a Layout, found {type(layout).__name__}")
        layout.check_length(data)
        _fill(self, jnp.array(data) if isinstance(data, np.ndarray) else data, layout)

    @staticmethod
    def of(tree: Mapping[str, Any], dtype: Any = None) -> "ComponentVector":
        """A vector from a nested mapping of arrays or numbers, as `Layout.of(tree).pack(tree)`."""
        return Layout.of(tree).pack(tree, dtype)

    # The array

    @property
    def size(self) -> int:
        """How many numbers there are, leading axes included."""
        return self.data.size

    @property
    def ndim(self) -> int:
        """The number of axes of `data`: 1 without leading axes."""
        return self.data.ndim

    def __len__(self) -> int:
        self._check_no_lead("len(v)", "`len(v.lead)`, or `v.layout.length`")
        return self.layout.length

    def __bool__(self) -> bool:
        if self.size != 1:
            raise ValueError(
                f"expected one number for a truth value, found {self.size}: use `jnp.all(v)` or `jnp.any(v)`"
            )
        return bool(self.data.reshape(()))

    def __jax_array__(self) -> jax.Array:
        return self.data

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        array = np.asarray(self.data, dtype=dtype)
        return array.copy() if copy else array

    # Views

    def __getitem__(self, key: Any) -> Any:
        if _is_path(key):
            return self._view(as_path(key))
        return self.data[self._index(key)]

    def _index(self, key: Any) -> Any:
        """The index into `data` that an index along the last axis means."""
        if isinstance(key, tuple) and len(key) == 2 and key[0] is Ellipsis:
            return key
        if isinstance(key, tuple):
            raise TypeError(
                f"expected a name, or one index along the last axis, found {key!r}; `v.data` takes more"
            )
        if isinstance(key, list | slice) and any(isinstance(part, str) for part in _parts(key)):
            raise TypeError(f'expected a name or an index, found {key!r}; several names: `v.pick("a", "b")`')
        if key is Ellipsis:
            return key
        if not self._is_mask(key):
            self._check_no_lead("v[i]", "`v[..., i]` for numbers, `v.lead[i]` for leading axes")
        return (..., key)

    def _is_mask(self, key: Any) -> bool:
        """Whether it is a mask of the numbers, such as `layout.mask` gives."""
        return isinstance(key, np.ndarray | jax.Array) and key.dtype == bool and key.shape == self.shape[-1:]

    def _check_no_lead(self, call: str, way_out: str) -> None:
        # Data that is no array, such as an axis under `jax.vmap`, has none.
        lead = getattr(self.data, "shape", ())[:-1]
        if lead:
            raise TypeError(
                f"{call} of a vector with leading axes {tuple(lead)} has two meanings: use {way_out}"
            )

    @property
    def lead(self) -> "_Lead":
        """`v.lead[i]`: the vectors at an index of the leading axes, which keep their names.

        >>> import jax.numpy as jnp
        >>> import flatlayers as fl
        >>> ys = fl.ComponentVector(jnp.arange(6.0).reshape(3, 2), fl.Layout({"q": (), "p": ()}))
        >>> ys.lead[-1].q, len(ys.lead)
        (Array(4., dtype=float32), 3)
        """
        return _Lead(self)

    def pick(self, *paths: str) -> "ComponentVector":
        """The vector of some of the parts alone, in the order given, under their paths.

        **Raises:** `KeyError` for an unknown name, `ValueError` for one that is inside another.

        >>> import flatlayers as fl
        >>> v = fl.ComponentVector.of({"a": 1.0, "b": [2.0, 3.0], "c": 4.0})
        >>> v.pick("c", "a").data
        Array([4., 1.], dtype=float32)
        """
        layout = self.layout.pick(*paths)
        where = np.empty(layout.length, int)
        for path, slot in layout.slots():
            mine = self.layout[path]
            assert isinstance(mine, Slot)
            where[slot.positions()] = mine.positions()
        return _new(jnp.take(self.data, where, axis=-1), layout)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        try:
            return self._view(name)
        except UnknownNameError as error:
            raise AttributeError(str(error)) from None

    def _view(self, path: str) -> Any:
        part = self.layout[path]
        if isinstance(self.data, ComponentVector):
            raise TypeError("a vector of vectors, as jax.hessian gives, has no views: use fl.hessian")
        self.layout.check_length(self.data)
        if isinstance(part, Slot):
            return self.layout.view(self.data, path)
        span = self.layout.span(path)
        if isinstance(span, slice):
            return _new(jax.lax.slice_in_dim(self.data, span.start, span.stop, axis=-1), part)
        return _new(jnp.take(self.data, span, axis=-1), part)

    def unpack(self) -> Record:
        """All leaves as a nested `Record`, in one split: what hot code uses."""
        return self.layout.unpack(self.data)

    def to_dict(self) -> dict[str, Any]:
        """All leaves as nested dictionaries."""
        return self.unpack().to_dict()

    def __contains__(self, path: Any) -> bool:
        return path in self.layout

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self.layout.names]

    # New vectors

    @property
    def at(self) -> "_At":
        """`v.at["a.b"].set(x)`, and `add`, `multiply`, `get`: a new vector with one part changed.

        `x` is broadcast to the part. A group takes a mapping or a vector with all its names, or a
        scalar. Positions work too: `v.at[2:5].set(0.0)`, and `v.at[..., 2:5]` with leading axes.
        """
        return _At(self)

    def replace(self, /, **named: Any) -> "ComponentVector":
        """A new vector with new values for some names, broadcast to their shapes."""
        vector = self
        for name, value in named.items():
            vector = vector.at[name].set(value)
        return vector

    def map(self, f: Callable[[Any], Any]) -> "ComponentVector":
        """Apply the elementwise function `f` to the numbers and keep the layout.

        **Raises:** `ValueError` if `f` changes the shape.
        """
        data = f(self.data)
        if jnp.shape(data) != self.shape:
            raise ValueError(
                f"expected an elementwise function that keeps the shape {self.shape}, found {jnp.shape(data)}"
            )
        return _new(data, self.layout)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"component vectors are immutable; use `v = v.replace({name}=...)`")

    def __delattr__(self, name: str) -> None:
        raise AttributeError("component vectors are immutable")

    def __reduce__(self) -> Any:
        return _new, (self.data, self.layout)

    # Arithmetic

    def _binary(self, op: Callable[[Any, Any], Any], other: Any) -> Any:
        if isinstance(other, ComponentVector):
            check_same_layout(self.layout, other.layout)
            return _new(op(self.data, other.data), self.layout)
        if not isinstance(other, int | float | complex | np.generic | np.ndarray | jax.Array):
            return NotImplemented
        if np.shape(other)[-1:] not in ((), (1,), (self.layout.length,)):
            raise ValueError(
                f"expected a scalar or an array whose last axis has length {self.layout.length}, "
                f"found shape {np.shape(other)}"
            )
        return _new(op(self.data, other), self.layout)

    def _reflected(self, op: Callable[[Any, Any], Any], other: Any) -> Any:
        # An array on the left gives an array, as it does where JAX decides.
        if isinstance(other, np.ndarray | jax.Array) and np.ndim(other):
            return op(other, self.data)
        return self._binary(lambda a, b: op(b, a), other)

    def __add__(self, other: Any) -> Any:
        return self._binary(operator.add, other)

    def __radd__(self, other: Any) -> Any:
        return self._reflected(operator.add, other)

    def __sub__(self, other: Any) -> Any:
        return self._binary(operator.sub, other)

    def __rsub__(self, other: Any) -> Any:
        return self._reflected(operator.sub, other)

    def __mul__(self, other: Any) -> Any:
        return self._binary(operator.mul, other)

    def __rmul__(self, other: Any) -> Any:
        return self._reflected(operator.mul, other)

    def __truediv__(self, other: Any) -> Any:
        return self._binary(operator.truediv, other)

    def __rtruediv__(self, other: Any) -> Any:
        return self._reflected(operator.truediv, other)

    def __pow__(self, other: Any) -> Any:
        return self._binary(operator.pow, other)

    def __rpow__(self, other: Any) -> Any:
        return self._reflected(operator.pow, other)

    def __matmul__(self, other: Any) -> Any:
        if isinstance(other, ComponentVector):
            check_same_layout(self.layout, other.layout)
            return jnp.vecdot(self.data, other.data)
        if isinstance(other, np.ndarray | jax.Array):
            return self.data @ other
        return NotImplemented

    def __rmatmul__(self, other: Any) -> Any:
        return other @ self.data if isinstance(other, np.ndarray | jax.Array) else NotImplemented

    def __neg__(self) -> "ComponentVector":
        return self.map(operator.neg)

    def __pos__(self) -> "ComponentVector":
        return self

    def __abs__(self) -> "ComponentVector":
        return self.map(jnp.abs)

    def __eq__(self, other: Any) -> Any:
        return self._binary(operator.eq, other)

    def __ne__(self, other: Any) -> Any:
        return self._binary(operator.ne, other)

    def __lt__(self, other: Any) -> Any:
        return self._binary(operator.lt, other)

    def __le__(self, other: Any) -> Any:
        return self._binary(operator.le, other)

    def __gt__(self, other: Any) -> Any:
        return self._binary(operator.gt, other)

    def __ge__(self, other: Any) -> Any:
        return self._binary(operator.ge, other)

    # Comparing gives a vector, so a vector has no hash.
    __hash__: ClassVar[None] = None  # pyright: ignore[reportIncompatibleMethodOverride]

    # Text

    def _repr_html_(self) -> str | None:
        return as_html(self)

    def __repr__(self) -> str:
        names = repr(self.layout).removeprefix("Layout(").removesuffix(")")
        if getattr(self.data, "shape", (self.layout.length,))[-1:] != (self.layout.length,):
            names = f"not the {self.layout.length} numbers of its layout {names}"
        if len(names) > 400:
            names = names[:400].rsplit(", ", 1)[0] + ", ..."
        return f"ComponentVector({describe_data(self.data)}{', ' if names else ''}{names})"

    def __str__(self) -> str:
        if not isinstance(self.data, jax.Array | np.ndarray) or isinstance(self.data, Tracer):
            return repr(self)
        slots = self.layout.slots()
        shown, numbers = slots[:_MOST_LINES], np.asarray(self.data)
        width = max((len(path) for path, _ in shown), default=0)
        lines = [f"ComponentVector({describe_data(self.data)})"]
        lines += [
            f"  {path.ljust(width)}  {self._value_text(path, slot.take(numbers))}" for path, slot in shown
        ]
        if len(slots) > len(shown):
            lines.append(f"  ... and {len(slots) - len(shown)} more")
        return "\n".join(lines)

    def _value_text(self, path: str, value: np.ndarray) -> str:
        if path in self.layout.ties:
            return f"the same as {self.layout.ties[path]}"
        long = value.size > 12
        text = np.array2string(
            value.ravel() if long else value, precision=4, separator=", ", threshold=12, edgeitems=3
        )
        return f"{describe(value)} " * long + " ".join(text.split())


_MOST_LINES = 24


def describe_data(data: Any) -> str:
    return describe(data) if hasattr(data, "shape") else type(data).__name__


def _fill(vector: ComponentVector, data: Any, layout: Layout) -> ComponentVector:
    object.__setattr__(vector, "data", data)
    object.__setattr__(vector, "layout", layout)
    return vector


def _new(data: Any, layout: Layout) -> ComponentVector:
    # Unchecked: transformations put shapes, axes and other stand-ins in the place of the data.
    return _fill(object.__new__(ComponentVector), data, layout)


def _unflatten(layout: Layout, children: Any) -> ComponentVector:
    (data,) = children
    return _new(data, layout)


jax.tree_util.register_pytree_with_keys(
    ComponentVector,
    lambda vector: (((jax.tree_util.GetAttrKey("data"), vector.data),), vector.layout),
    _unflatten,
    lambda vector: ((vector.data,), vector.layout),
)


def _is_path(key: Any) -> bool:
    return isinstance(key, str) or (isinstance(key, tuple) and any(isinstance(part, str) for part in key))


def _parts(key: list[Any] | slice) -> list[Any]:
    return key if isinstance(key, list) else [key.start, key.stop]


class _Lead:
    """`v.lead`: waits for an index of the leading axes."""

    def __init__(self, vector: ComponentVector):
        if vector.ndim < 2:
            raise TypeError(f"expected a vector with leading axes, found shape {vector.shape}")
        self.vector = vector

    def __getitem__(self, index: Any) -> ComponentVector:
        index = index if isinstance(index, tuple) else (index,)
        return _new(self.vector.data[(*index, slice(None))], self.vector.layout)

    def __len__(self) -> int:
        return self.vector.shape[0]

    def __iter__(self) -> Iterator[ComponentVector]:
        return (self[i] for i in range(len(self)))


class _At:
    """`v.at`: waits for a path or an index."""

    def __init__(self, vector: ComponentVector):
        self.vector = vector

    def __getitem__(self, key: Any) -> "_AtPart":
        return _AtPart(self.vector, key)


class _AtPart:
    """`v.at[key]`: waits for what to do there."""

    def __init__(self, vector: ComponentVector, key: Any):
        self.vector = vector
        self.path = as_path(key) if _is_path(key) else None
        self.key = key

    def get(self) -> Any:
        """The part itself."""
        return self.vector[self.key]

    def set(self, value: Any) -> ComponentVector:
        """A new vector with `value` there."""
        return self._apply("set", value)

    def add(self, value: Any) -> ComponentVector:
        """A new vector with `value` added there."""
        return self._apply("add", value)

    def multiply(self, value: Any) -> ComponentVector:
        """A new vector multiplied by `value` there."""
        return self._apply("multiply", value)

    def _apply(self, method: str, value: Any) -> ComponentVector:
        vector = self.vector
        if self.path is not None:
            index = (..., vector.layout.span(self.path))
            value = self._flat(self.path, value)
        else:
            index = vector._index(self.key)
            value = jnp.asarray(value, vector.dtype) if is_number(value) else value
        data = getattr(jnp.asarray(vector.data).at[index], method)(value)
        return _new(data, vector.layout)

    def _flat(self, path: str, value: Any) -> Any:
        """The numbers that `value` means for the part at `path`, along the last axis."""
        lead, dtype = self.vector.shape[:-1], self.vector.dtype
        part = self.vector.layout[path]
        if isinstance(part, Slot):
            shape = self.vector.layout.view_shapes[path]
            return _broadcast(value, lead + shape, dtype, path).reshape(*lead, math.prod(shape))
        if isinstance(value, ComponentVector):
            check_same_layout(part, value.layout)
            return _broadcast(value.data, (*lead, part.length), dtype, path)
        if isinstance(value, Mapping):
            leaves = {
                leaf: _broadcast(number, lead + part.view_shapes[leaf], dtype, f"{path}.{leaf}")
                for leaf, number in leaves_of(part, value, path).items()
            }
            return part.pack(part.nest(leaves), dtype).data
        if np.ndim(value) == 0:
            return value
        raise TypeError(
            f"{path!r} is a group: expected a mapping, a ComponentVector or a scalar, found {describe(value)}"
        )


def _broadcast(value: Any, shape: tuple[int, ...], dtype: Any, path: str | None) -> jax.Array:
    array = jnp.asarray(value, dtype if is_number(value) else None)
    try:
        return jnp.broadcast_to(array, shape)
    except ValueError:
        raise ValueError(
            f"expected a value that broadcasts to {shape} for {path!r}, found shape {array.shape}"
        ) from None
