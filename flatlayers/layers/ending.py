"""The end that many layers share: a weight has a bias, which is added, and an activation follows."""

from typing import Protocol

import jax

from ..core.declaration import Param
from ..types import Params, Shape
from .fields import Activation, Initial
from .shapes import along_last


class HasBias(Protocol):
    """A layer that may have a bias."""

    use_bias: bool
    init_bias: Initial


class Ends(HasBias, Protocol):
    """A layer that may have a bias, and an activation."""

    activation: Activation | None


def weight_and_bias(layer: HasBias, weight: Param, shape: Shape) -> dict[str, Param]:
    """Declare a weight and, if the layer has one, a bias of the given shape."""
    bias = {"bias": Param(shape, layer.init_bias)} if layer.use_bias else {}
    return {"weight": weight, **bias}


def plus_bias(layer: HasBias, y: jax.Array, ps: Params) -> jax.Array:
    """Add the bias, if there is one, over all leading axes."""
    return y + along_last(ps.bias, y.ndim) if layer.use_bias else y


def activated(activation: Activation | None, y: jax.Array) -> jax.Array:
    """Apply an activation; `None` is the identity."""
    return y if activation is None else activation(y)


def ended(layer: Ends, y: jax.Array, ps: Params) -> jax.Array:
    """Add the bias and apply the activation."""
    return activated(layer.activation, plus_bias(layer, y, ps))
