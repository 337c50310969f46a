"""`ShardedVector`: a vector cut evenly over the devices of a mesh."""

from collections.abc import Iterable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ..types import Array, Shape
from .immutable import Immutable
from .layout import Layout
from .vector import ComponentVector


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

    **Raises:** `TypeError` for a name, an index or arithmetic; `ValueError` for data of another length.

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
    mesh: Mesh
    axis: str

    def __init__(self, data: Array, layout: Layout, mesh: Mesh, axis: str):
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

    def sharding(self, lead: int = 0) -> NamedSharding:
        """Return how such a vector lies, with so many leading axes."""
        return NamedSharding(self.mesh, PartitionSpec(*[None] * lead, self.axis))

    def gather(self) -> ComponentVector:
        """Return the whole vector, without the zeros, on each device.

        It works outside of `jax.jit`, inside of it, and inside of a `jax.shard_map` over the axis. Of several
        processes all have to call it.
        """
        lead = self.data.ndim - 1
        if self.axis in jax.sharding.get_abstract_mesh().manual_axes:
            data = jax.lax.all_gather(self.data, self.axis, axis=lead, tiled=True)
        else:
            whole = NamedSharding(self.mesh, PartitionSpec(*[PartitionSpec.UNCONSTRAINED] * lead, None))
            data = _constrained(self.data, whole)
        return ComponentVector._new(data=data[..., : self.layout.length], layout=self.layout)

    def __getattr__(self, name: str) -> Any:
        if name in self.layout or name in ("at", "unpack", "to_dict", "pick", "lead", "map"):
            raise TypeError(f"a shard has no views: call `.gather()` for `.{name}`")
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __getitem__(self, key: object) -> Any:
        raise TypeError(f"a shard has no views: call `.gather()` for `[{key!r}]`")

    def __repr__(self) -> str:
        parts = f"{self.parts} part{'s' if self.parts > 1 else ''} along {self.axis!r}"
        names = "".join(f", {name}={shape}" for name, shape in self.layout.shapes.items())
        shape = getattr(self.data, "shape", None)
        numbers = "" if shape is None else f"{self.dtype}[{','.join(map(str, self.shape))}]"
        return f"ShardedVector({numbers}{names}, {parts})"


def padded_length(length: int, parts: int) -> int:
    """Return the least multiple of the number of parts that is not below the length."""
    return -(-length // parts) * parts


def _same(x: Array) -> Array:
    return x


def _constrained(data: Array, sharding: NamedSharding) -> Array:
    if isinstance(data, jax.core.Tracer):
        return jax.lax.with_sharding_constraint(data, sharding)
    # Compiled, since of several processes each has only its own parts.
    return jax.jit(_same, out_shardings=NamedSharding(sharding.mesh, PartitionSpec()))(data)


def _unflatten(static: tuple[Layout, Mesh, str], children: Iterable[Any]) -> ShardedVector:
    (data,), (layout, mesh, axis) = children, static
    return ShardedVector._new(data=data, layout=layout, mesh=mesh, axis=axis)


jax.tree_util.register_pytree_with_keys(
    ShardedVector,
    lambda v: (((jax.tree_util.GetAttrKey("data"), v.data),), (v.layout, v.mesh, v.axis)),
    _unflatten,
    lambda v: ((v.data,), (v.layout, v.mesh, v.axis)),
)
