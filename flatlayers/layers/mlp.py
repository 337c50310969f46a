"""`MLP`: the small network of scientific models."""

import functools
from collections.abc import Mapping
from dataclasses import KW_ONLY
from typing import Any

import jax.numpy as jnp

from ..core.composite import Container
from ..core.fields import Count
from ..core.layer import Layer
from ..types import Input, Output, Params, State
from .containers import child_named
from .dense import Dense
from .fields import Activation, Sizes
from .shapes import as_dims


class MLP(Container):
    """A multilayer perceptron: `Dense` layers with an activation between them.

    `y = final_activation(W_n h_n + b_n)` with `h_1 = activation(W_0 x + b_0)` and so on. It computes what
    the `Chain` of the same `Dense` layers does, from the same parameters.

    **Arguments:**

    - `in_dims`: the number of input features.
    - `hidden`: the widths of the hidden layers, a tuple; an empty one leaves a single `Dense`.
    - `out_dims`: the number of output features.
    - `activation`: an elementwise function, after every layer but the last.
    - `final_activation`: the same after the last; `None` is the identity.

    **Inputs:** `x` of shape `(..., in_dims)`. **Returns:** `(y, st)` with `y` of shape
    `(..., out_dims)`.

    **Parameters:** `weight` and `bias` of each `Dense` under `layer_0`, `layer_1`, ... **States:** none.

    **Raises:** `ValueError` for another number of features.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import flatlayers as fl
    >>> layer = fl.MLP(2, (16, 16), 1)
    >>> ps, st = fl.setup(jax.random.key(0), layer)
    >>> ps.layer_1.weight.shape, layer(jnp.ones((5, 2)), ps, st)[0].shape
    ((16, 16), (5, 1))
    """

    in_dims: Count
    hidden: Sizes
    out_dims: Count
    activation: Activation | None = jnp.tanh
    _: KW_ONLY
    final_activation: Activation | None = None

    @functools.cached_property
    def layers(self) -> dict[str, Layer]:
        """The `Dense` layers by name."""
        sizes = (self.in_dims, *as_dims(self.hidden), self.out_dims)
        activations = [self.activation] * (len(sizes) - 2) + [self.final_activation]
        dense = map(Dense, sizes[:-1], sizes[1:], activations)
        return {f"layer_{i}": layer for i, layer in enumerate(dense)}

    def __getattr__(self, name: str) -> Layer:
        return child_named(self, self.layers if "_ready" in self.__dict__ else {}, name)

    def children(self) -> Mapping[str, Any]:
        return self.layers

    def forward(self, x: Input, ps: Params, st: State) -> tuple[Output, State]:
        for name, layer in self.layers.items():
            x, _ = layer(x, getattr(ps, name), st[name])
        return x, st
