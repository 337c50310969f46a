"""Layers and state."""

import jax
import jax.numpy as jnp
import numpy as np

import flatlayers as fl
from tests.parallel.meshes import mesh_of

from .values import DENSE, KEY, ONES, ST, called, ones


def array_in_a_field():
    class Scaled(fl.Layer):
        scale: object

    return Scaled(ONES)


def array_in_compact():
    return fl.compact(scale=ONES)(lambda m, x: m.scale * x)


def attribute_that_is_no_field():
    class Scaled(fl.Layer):
        def __init__(self, factor):
            self.factor = factor

    return Scaled(2.0)


def layer_in_a_plain_layer():
    class Twice(fl.Layer):
        layer: fl.Layer

    return Twice(DENSE)


def layer_without_forward():
    class Scaled(fl.Layer):
        scale: float

        def call(self, x, ps, st):
            return self.scale * x, st

    return called(Scaled(2.0), ONES)


def layer_that_is_not_declared():
    class Shifted(fl.Layer):
        layer: fl.Layer

        def parameters(self):
            return {"shift": fl.Param((2,), fl.initializers.zeros)}

        def forward(self, x, ps, st):
            y, _ = self.layer(x, ps.layer, st)
            return y + ps.shift, st

    return called(Shifted(DENSE), ONES)


def class_for_a_layer():
    return fl.Chain(DENSE, fl.NoOpLayer)


def option_of_another_library():
    return fl.Dense(2, 2, bias=False)


def parameter_without_a_name():
    return fl.setup(KEY, fl.Param((2,), fl.initializers.ones))


def seed_for_a_key():
    return fl.setup(0, DENSE)


def old_keys():
    return fl.setup(jnp.zeros((3, 2), jnp.uint32), DENSE)


def another_models_vector():
    other = fl.setup(KEY, fl.Dense(3, 2), jnp.float64)[0]
    return DENSE(ONES, other, ST)


def state_where_none_is():
    layer = fl.BatchNorm(2)
    ps, _ = fl.setup(KEY, layer, jnp.float64)
    return fl.stateless_apply(layer, ONES, ps)


def positional_compact():
    return fl.compact(DENSE)


def key_for_a_state():
    return fl.State(KEY)


def assigned_in_compact():
    @fl.compact(net=DENSE)
    def model(m, x):
        m.count = 1
        return m.net(x)

    return called(model, ONES)


def changed_state():
    class Counter(fl.Layer):
        def states(self, key):
            return {"count": 0.0}

        def forward(self, x, ps, st):
            return x, st.replace(count="many")

    layer = Counter()
    return fl.StatefulLayer(layer, *fl.setup(KEY, layer))(ONES)


def state_that_leaves_a_transformation():
    class Sum(fl.Layer):
        def states(self, key):
            return {"sum": 0.0}

        def forward(self, x, ps, st):
            return x, st.replace(sum=st.sum + x)

    layer = fl.StatefulLayer(Sum(), *fl.setup(KEY, Sum(), jnp.float64))
    jax.eval_shape(layer, 1.0)
    return layer(1.0)


def state_of_a_wrapper():
    class Counted(fl.Wrapper):
        layer: fl.Layer

        def states(self, key):
            return {**super().states(key), "counts": np.zeros(self.layer.out_dims)}

    def wider(layer, ps, st, path):
        new = fl.Dense(2, 3)
        return new, *ones(new)

    model = Counted(DENSE)
    return fl.layer_map(wider, model, *ones(model))


def mask_of_another_shape():
    layer = fl.VariationalHiddenDropout(0.5)
    _, st = fl.setup(KEY, layer)
    _, st = layer(jnp.ones((2, 3)), {}, st)
    return layer(jnp.ones((4, 3)), {}, st)


def axis_that_is_not_mapped():
    return called(fl.BatchNorm(2, axis_name="data"), jnp.ones((3, 2)))


def not_frozen():
    return fl.unfreeze(DENSE)


def attention_mask():
    x = jnp.ones((3, 5, 4))
    return called(fl.MultiHeadAttention(4, heads=2), (x, x, x, jnp.ones((5, 5), bool)))


def initializer_that_is_called():
    return fl.initializers.normal((2, 2))


def unknown_option():
    return fl.initializers.normal(std=0.1)


def basis_without_a_tuple():
    return fl.TensorProductLayer(fl.Chebyshev(4), 2)


def two_declarations_in_one_keyword():
    pair = (fl.Param((2,), fl.initializers.ones), fl.Param((2,), fl.initializers.ones))
    return fl.compact(pair=pair)(lambda m, x: x)


def axis_that_is_not_named():
    layer, mesh = fl.BatchNorm(2), mesh_of(2)
    ps, st = fl.setup(KEY, layer, jnp.float64)

    def loss(ps, st, batch):
        y, st = layer(batch, ps, st)
        return (y**2).sum(), st

    return fl.sharded_value_and_grad(loss, mesh)(fl.shard(ps, mesh), st, jnp.ones((4, 2)))
