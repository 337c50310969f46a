"""`ShardedVector`: a vector cut evenly over the devices of a mesh."""

import copy
from collections.abc import Iterable
from typing import Any, ClassVar, NoReturn

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from ..dtypes import is_traced
from ..types import Array, DeviceMesh, Shape, Sharding
from .immutable import Immutable
from .layout import Layout
from .vector import ComponentVector
from .vector_text import names_in_a_line


class NoViewError(TypeError, AttributeError):
    """A name or an index that only the whole vector has. For `hasattr` it is an attribute that is missing."""


class ShardedVector(Immutable):
    """A vector in even parts, one for each device along an axis of a mesh, as `fl.shard` makes it.

    Its one leaf is `data`, of shape `(..., padded)`: the numbers, with zeros behind them up to a multiple of
    the number of devices. It is what an optimiser works on, number by number. Names are for the whole:
    `.gather()` gives the `ComponentVector`.

    **Arguments:**

    - `data`: the numbers and the zeros; inside of `jax.shard_map` over the axis, this device's part.
    - `layout`: the `Layout` of the numbers.
    - `mesh`: the devices, with axes of type `Auto`.
    - `axis`: the name of the axis along which the last axis of `data` is cut.

    **Raises:** `TypeError` for a name, an index, arithmetic and pickling; `ValueError` for data of another
    length.

    >>> import jax
    >>> import flatlayers as fl
    >>> mesh = jax.make_mesh((1,), ("data",))
    >>> ps = fl.shard(fl.ComponentVector.of({"a": 1.0, "b": [2.0, 3.0]}), mesh)
    >>> ps
    ShardedVector(float32[3], a=(), b=(2,), 1 part along 'data')
    >>> ps.gather().b
    Array([2., 3.], dtype=float32)
    """

    __slots__ = ("axis", "data", "layout", "mesh")
    data: Any
    layout: Layout
    mesh: DeviceMesh
    axis: str

    def __init__(self, data: Array, layout: Layout, mesh: DeviceMesh, axis: str):
        parts = mesh.shape[axis]
        padded = padded_length(layout.length, parts)
        if data.shape[-1:] not in ((padded,), (padded // parts,)):
            raise ValueError(
                f"expected data of shape (..., {padded}) for {layout.length} numbers in {parts} parts, found "
                f"shape {tuple(data.shape)}"
            )
        self._fill(data=data, layout=layout, mesh=mesh, axis=axis)

    def with_data(self, data: Any) -> "ShardedVector":
        """Return a vector of other numbers that is cut in the same way."""
        return ShardedVector._new(data=data, layout=self.layout, mesh=self.mesh, axis=self.axis)

    @property
    def parts(self) -> int:
        """The number of parts."""
        return self.mesh.shape[self.axis]

    @property
    def padding(self) -> int:
        """The number of zeros behind the numbers."""
        return padded_length(self.layout.length, self.parts) - self.layout.length

    @property
    def dtype(self) -> Any:
        """The dtype of the numbers."""
        return self.data.dtype

    @property
    def shape(self) -> Shape:
        """The shape of the whole vector, without the zeros."""
        return (*self.data.shape[:-1], self.layout.length)

    @property
    def is_whole(self) -> bool:
        """Tell whether the data are the numbers of all parts.

        They are not inside of `jax.shard_map`, and where an optimiser has one number in their place.
        """
        return self.data.shape[-1:] == (self.layout.length + self.padding,)

    def sharding(self, lead: int = 0) -> Sharding:
        """Return how such a vector lies, with so many leading axes."""
        return NamedSharding(self.mesh, PartitionSpec(*[None] * lead, self.axis))

    def gather(self) -> ComponentVector:
        """Return the whole vector, without the zeros, on each device.

        It works outside of `jax.jit`, inside of it, and inside of a `jax.shard_map` over the axis. Of several
        processes all have to call it.
        """
        data, length = self.data, self.layout.length
        is_mapped = self.axis in jax.sharding.get_abstract_mesh().manual_axes
        if is_mapped and data.shape[-1] * self.parts == length + self.padding:
            data = jax.lax.all_gather(data, self.axis, axis=data.ndim - 1, tiled=True)
        elif not self.is_whole:
            raise ValueError(
                f"expected data of shape (..., {length + self.padding}), or one part inside of a shard_map "
                f"over {self.axis!r}, found shape {tuple(data.shape)}"
            )
        elif is_traced(data) and not is_mapped:
            # In parts first, for the sake of the gradient: it comes back as it went in.
            data = _constrained(_constrained(data, self.mesh, self.axis), self.mesh, None)
        elif isinstance(data, jax.Array) and not is_mapped:
            # Compiled, since of several processes each has only its own parts.
            data = jax.jit(_same, out_shardings=NamedSharding(self.mesh, PartitionSpec()))(data)
        return ComponentVector._new(data=data[..., :length], layout=self.layout)

    # What there is not

    def __getattr__(self, name: str) -> Any:
        # A value that is being made has no layout yet.
        if name in self.__slots__ or name.startswith("_"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        if name in self.layout or hasattr(ComponentVector, name):
            raise NoViewError(f"a shard has no views: call `.gather()` for `.{name}`")
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __getitem__(self, key: object) -> NoReturn:
        raise NoViewError(f"a shard has no views: call `.gather()` for `[{key!r}]`")

    __array_ufunc__ = None  # so that an array on the left leaves it to the methods above
    __hash__: ClassVar[None] = None  # pyright: ignore[reportIncompatibleMethodOverride]

    # Copies and text

    def __copy__(self) -> "ShardedVector":
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "ShardedVector":
        return self.with_data(copy.deepcopy(self.data, memo))

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a shard cannot be pickled, since its devices are those of this process: `fl.save` writes it to "
            "a file, and `.gather()` can be pickled"
        )

    def __repr__(self) -> str:
        parts = f"{self.parts} part{'s' if self.parts > 1 else ''} along {self.axis!r}"
        # Transformations put others than arrays in the place of the data.
        is_array = getattr(self.data, "shape", None) is not None
        numbers = f"{self.dtype}[{','.join(map(str, self.shape))}]" if is_array else ""
        return f"ShardedVector({', '.join(filter(None, [numbers, names_in_a_line(self.layout), parts]))})"


def _refuse(*_: object, **__: object) -> NoReturn:
    raise TypeError(
        "a shard has no arithmetic: call `.gather()` for the vector; `jax.tree.map` goes over the parts"
    )


# Nor `==`: a vector compares number by number, and that a shard were not equal to itself would be no answer.
for _name in (
    *("add", "radd", "sub", "rsub", "mul", "rmul", "matmul", "rmatmul", "truediv", "rtruediv", "pow", "rpow"),
    *("and", "rand", "or", "ror", "xor", "rxor", "invert", "round", "divmod", "rdivmod"),
    *("float", "int", "complex"),
    *("floordiv", "rfloordiv", "mod", "rmod", "neg", "pos", "abs", "lt", "le", "gt", "ge", "eq", "ne"),
    *("bool", "len", "iter", "array"),
):
    setattr(ShardedVector, f"__{_name}__", _refuse)


def padded_length(length: int, parts: int) -> int:
    """Return the least multiple of the number of parts that is not below the length."""
    return -(-length // parts) * parts


def cut(numbers: np.ndarray, layout: Layout, mesh: DeviceMesh, axis: str) -> ShardedVector:
    """Return the vector of numbers that are on the host, each device with a copy of its own part.

    Of several processes each has all the numbers.
    """
    lead, length = numbers.shape[:-1], layout.length
    padded = padded_length(length, mesh.shape[axis])

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None  # it is so for uninitialised arrays alone
        start, stop, _ = index[-1].indices(padded)
        found = numbers[..., start : min(stop, length)]
        room = np.zeros((*lead, stop - start), numbers.dtype)
        room[..., : found.shape[-1]] = found
        return room

    sharding = NamedSharding(mesh, PartitionSpec(*[None] * len(lead), axis))
    data = jax.make_array_from_callback((*lead, padded), sharding, part)
    return ShardedVector(data, layout, mesh, axis)


def _same(x: Array) -> Array:
    return x


def _constrained(data: Array, mesh: DeviceMesh, along: str | None) -> Array:
    """Return the data with the last axis in parts along an axis of the mesh, or whole."""
    spec = PartitionSpec(*[PartitionSpec.UNCONSTRAINED] * (data.ndim - 1), along)
    return jax.lax.with_sharding_constraint(data, NamedSharding(mesh, spec))


def _unflatten(static: tuple[Layout, DeviceMesh, str], children: Iterable[Any]) -> ShardedVector:
    (data,), (layout, mesh, axis) = children, static
    return ShardedVector._new(data=data, layout=layout, mesh=mesh, axis=axis)


jax.tree_util.register_pytree_with_keys(
    ShardedVector,
    lambda v: (((jax.tree_util.GetAttrKey("data"), v.data),), (v.layout, v.mesh, v.axis)),
    _unflatten,
    lambda v: ((v.data,), (v.layout, v.mesh, v.axis)),
)
