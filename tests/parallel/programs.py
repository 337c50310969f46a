"""Compiled programs as text: what each device computes, and what is sent from one to another."""

import re

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

from tests.helpers import compiled_by_default


COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")


def mesh_of(count, kind=AxisType.Auto):
    return Mesh(np.array(jax.devices()[:count]), ("data",), axis_types=(kind,))


def placed(tree, mesh, *spec):
    return jax.device_put(tree, NamedSharding(mesh, P(*spec)))


def compiled(function, *args):
    return compiled_by_default(jax.jit(function).lower(*args)).as_text()


def arrays_of_shape(text, *shape):
    """The number of times that a program names an array of this shape."""
    return text.count("[" + ",".join(map(str, shape)) + "]")


def collectives(text):
    """The collectives of a program, by their kind."""
    found = {kind: len(re.findall(rf" {kind}(?:-start)?\(", text)) for kind in COLLECTIVES}
    return {kind: number for kind, number in found.items() if number}
