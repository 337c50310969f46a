import jax
import pytest
from jax.sharding import AxisType, PartitionSpec

from flatlayers.dtypes import is_key
from flatlayers.parallel.meshes import auto_mesh, replicated, spec_along

from .meshes import mesh_of, mesh_of_two_axes


@pytest.mark.parametrize("kind", list(AxisType))
def test_axes_become_auto(kind):
    mesh = auto_mesh(mesh_of_two_axes(kind), "model", "f")
    assert mesh.axis_names == ("data", "model")
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert (mesh.devices == mesh_of_two_axes(kind).devices).all()
    assert mesh == auto_mesh(mesh, "data", "f")


def test_what_is_no_mesh_and_no_axis():
    with pytest.raises(TypeError, match=r"f: expected a mesh, such as jax.make_mesh\(\(8,\), \('data',\)\)"):
        auto_mesh(8, "data", "f")
    with pytest.raises(ValueError, match="f: expected an axis of the mesh, data, model, found 'batch'"):
        auto_mesh(mesh_of_two_axes(), "batch", "f")


def test_specs():
    assert replicated(mesh_of(2)).is_fully_replicated
    assert spec_along("data", 2) == PartitionSpec(None, None, "data")


def test_keys_are_told():
    assert is_key(jax.random.key(0))
    assert is_key(jax.random.split(jax.random.key(0), 3))
    assert not is_key(jax.random.key_data(jax.random.key(0)))
    assert not is_key(1.0)
