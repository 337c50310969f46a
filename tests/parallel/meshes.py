"""Meshes of the host's eight devices."""

import jax
from jax.sharding import AxisType, Mesh


def mesh_of(number, kind=AxisType.Auto):
    """The first devices along `data`."""
    return jax.make_mesh((number,), ("data",), (kind,), devices=jax.devices()[:number])


def mesh_of_two_axes(kind=AxisType.Auto):
    """Four along `data`, two along `model`."""
    return jax.make_mesh((4, 2), ("data", "model"), (kind, kind))


def on_one_device(x):
    """Whether each of its numbers is there once, whatever the shapes."""
    return len(x.sharding.device_set) == 1


__all__ = ["AxisType", "Mesh", "mesh_of", "mesh_of_two_axes", "on_one_device"]
