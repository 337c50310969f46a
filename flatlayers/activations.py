"""Activation functions: those of `jax.nn`, and `identity`. Any elementwise function will do as well."""

from jax.nn import (
    celu as celu,
    elu as elu,
    gelu as gelu,
    glu as glu,
    hard_sigmoid as hard_sigmoid,
    hard_silu as hard_silu,
    hard_swish as hard_swish,
    hard_tanh as hard_tanh,
    leaky_relu as leaky_relu,
    log_sigmoid as log_sigmoid,
    log_softmax as log_softmax,
    mish as mish,
    relu as relu,
    relu6 as relu6,
    selu as selu,
    sigmoid as sigmoid,
    silu as silu,
    soft_sign as soft_sign,
    softmax as softmax,
    softplus as softplus,
    squareplus as squareplus,
    swish as swish,
    tanh as tanh,
)
from jax.numpy import cos as cos, sin as sin

from .types import PyTree as _PyTree


def identity(x: _PyTree) -> _PyTree:
    """Return `x` itself."""
    return x
