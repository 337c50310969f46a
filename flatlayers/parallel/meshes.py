"""Meshes of devices: their axes, and how arrays lie on them."""

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def auto_mesh(mesh: Mesh, axis: str, name: str) -> Mesh:
    """Return a mesh of the same devices whose axes have the type `Auto`, as arrays are placed here.

    **Raises:** `TypeError` for what is no mesh, `ValueError` for an axis that it has not, and inside of
    `jax.set_mesh` with other types of axes, where JAX takes no such arrays. `name` is the function called.
    """
    if not isinstance(mesh, Mesh):
        raise TypeError(f"{name}: expected a mesh, such as jax.make_mesh((8,), ('data',)), found {mesh!r}")
    if axis not in mesh.axis_names:
        raise ValueError(
            f"{name}: expected an axis of the mesh, {', '.join(mesh.axis_names)}, found {axis!r}"
        )
    around = jax.sharding.get_abstract_mesh()
    if AxisType.Explicit in getattr(around, "axis_types", ()):
        raise ValueError(
            f"{name}: expected axes of type Auto in the mesh of `jax.set_mesh`, found Explicit ones, with "
            "which JAX takes no other arrays; `jax.make_mesh(..., axis_types=(AxisType.Auto,))` makes such"
        )
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def replicated(mesh: Mesh) -> NamedSharding:
    """Return how an array lies that each device has."""
    return NamedSharding(mesh, PartitionSpec())


def spec_along(axis: str, lead: int) -> PartitionSpec:
    """Return the spec of an array that is cut along the axis behind so many leading ones."""
    return PartitionSpec(*[None] * lead, axis)
