"""Files and other libraries."""

import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flatlayers as fl
from flatlayers.adjoints import _diffrax as diffrax_names
from flatlayers.equilibria import implicit

from .values import DENSE, KEY, PS, ST, VECTOR


TWO = fl.Chain(DENSE, DENSE)


def _from_torch(layer, *modules):
    """Take over arrays of modules with two inputs and outputs."""
    shapes = {f"{name}.{kind}": shape for name in modules for kind, shape in PS.layout.view_shapes.items()}
    arrays = {name: np.ones(shape) for name, shape in shapes.items()}
    return fl.from_torch(arrays, layer, *fl.setup(KEY, layer, jnp.float64))


def not_of_this_library():
    numpy = pytest.importorskip("safetensors.numpy")
    numpy.save_file({"w": np.ones(2)}, "other.safetensors")
    return fl.load("other.safetensors")


def part_that_is_not_there():
    fl.save("run.safetensors", ps=VECTOR)
    return fl.load("run.safetensors", st=ST)


def another_layout():
    return fl.transfer(VECTOR, fl.ComponentVector.of({"a": jnp.ones(2), "b": jnp.ones(3)}))


def transfer_between_dtypes():
    return fl.transfer(VECTOR, fl.ComponentVector.of({"a": jnp.ones(2, jnp.float32)}))


def transfer_to_float64_without_x64():
    with jax.enable_x64(False):
        return fl.transfer(VECTOR, VECTOR, dtype=jnp.float64)


def file_of_float64_without_x64():
    fl.save("run.safetensors", ps=VECTOR)
    with jax.enable_x64(False):
        return fl.load("run.safetensors")


def layer_without_names_there():
    return _from_torch(fl.Diagonal(2))


def arrays_that_are_left_over():
    return _from_torch(TWO, "fc.0", "fc.1", "fc.2")


def layers_in_any_order():
    return _from_torch(TWO, "decoder", "encoder")


def module_for_its_arrays():
    class Module:
        def state_dict(self):
            return {}

    return fl.from_torch(Module(), DENSE, PS, ST)


def module_with_keys():
    class Noisy(eqx.Module):
        key: jax.Array

        def __call__(self, x):
            return x + jax.random.normal(self.key, x.shape)

    return fl.FromEquinox(Noisy(KEY))


def module_with_state():
    return fl.FromEquinox(eqx.nn.BatchNorm(2, "batch", mode="batch"))


def package_that_is_missing():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "pandas", None)
        return VECTOR.to_series()


def flax_that_is_missing():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "flax", None)
        return fl.from_nnx(object(), DENSE)


def torch_that_is_missing():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torch", None)
        return fl.to_torch(DENSE, PS, ST)


def untested_diffrax():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diffrax_names.check_version, "__defaults__", ("0.9.0",))
        return fl.AdaptiveCheckpointAdjoint()


def untested_optimistix():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(implicit.check_version, "__defaults__", ("0.2.0",))
        return fl.PhantomAdjoint()
