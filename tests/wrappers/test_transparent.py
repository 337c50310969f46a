import copy
import pickle

import jax
import jax.numpy as jnp
import pytest

import flatlayers as fl
from flatlayers.wrappers.transparent import Transparent
from tests.helpers import assert_same


def test_it_computes_as_its_layer(key):
    layer = fl.Dense(3, 2)
    wrapper, x = Transparent(layer), jnp.ones((5, 3))
    assert_same(fl.setup(key, wrapper), fl.setup(key, layer))
    ps, st = fl.setup(key, layer)
    assert_same(jax.jit(wrapper)(x, ps, st)[0], jax.jit(layer)(x, ps, st)[0])


def test_it_has_the_attributes_of_its_layer():
    wrapper = Transparent(Transparent(fl.Dense(3, 2)))
    assert (wrapper.in_dims, wrapper.out_dims) == (3, 2)
    with pytest.raises(AttributeError, match="'Dense' object has no attribute 'width'"):
        _ = wrapper.width
    with pytest.raises(AttributeError, match="'Transparent' object has no attribute '_width'"):
        _ = wrapper._width


def test_it_is_copied_and_pickled():
    wrapper = Transparent(fl.Dense(3, 2))
    assert copy.copy(wrapper) == copy.deepcopy(wrapper) == wrapper
    assert pickle.loads(pickle.dumps(wrapper)) == wrapper
