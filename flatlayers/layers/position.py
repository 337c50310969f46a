"""Layers that tell where in a sequence something stands."""

import math
from dataclasses import KW_ONLY
from typing import Annotated, Any

import jax.numpy as jnp
import numpy as np

from ..core.fields import Check, Finite, Positive, integer
from ..core.layer import Layer
from ..dtypes import at_least_float32, floating
from ..types import Input, Output, Params, State
from .shapes import along_last, broadcasts_to, check_trailing


def _even(value: Any) -> int:
    number = integer(2).accept(value)
    if number % 2:
        raise ValueError
    return number


Even = Annotated[int, Check("an even number of features", _even)]


class SinusoidalPositionalEmbedding(Layer):
    """Positions as sines and cosines: `y = scale * [sin(f_1 x), sin(f_2 x), ..., cos(f_1 x), ...]`.

    The frequencies `f_1, f_2, ...` are a geometric sequence from `max_freq` to `min_freq` (Vaswani et al.,
    2017).

    **Arguments:**

    - `dims`: the number of features, an even one.
    - `min_freq`, `max_freq`: the lowest and the highest frequency.
    - `scale`: what the features are multiplied by; `None` is `sqrt(2 / dims)`, with which they have norm 1.

    **Inputs:** `x` of shape `(...)`, positions; integers count as JAX's default floats. **Returns:**
    `(y, st)` with `y` of shape `(..., dims)`.

    **Parameters and states:** none.

    **Raises:** `ValueError` for an odd number of features or frequencies that are not positive.

    >>> import jax.numpy as jnp
    >>> import flatlayers as fl
    >>> layer = fl.SinusoidalPositionalEmbedding(8)
    >>> layer(jnp.arange(10), {}, {})[0].shape
    (10, 8)
    """

    dims: Even
    _: KW_ONLY
    min_freq: Positive = 1e-4
    max_freq: Positive = 1.0
    scale: Finite | None = None

    def forward(self, x: Input, ps: Params, st: State) -> tuple[Output, State]:
        x = floating(x)
        dtype = at_least_float32(x.dtype)
        frequencies = jnp.asarray(np.geomspace(self.max_freq, self.min_freq, self.dims // 2), dtype)
        angles = x.astype(dtype)[..., None] * along_last(frequencies, x.ndim + 1)
        scale = math.sqrt(2 / self.dims) if self.scale is None else self.scale
        y = scale * jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
        return y.astype(x.dtype), st


class RotaryPositionalEmbedding(Layer):
    """Queries or keys turned by an angle that grows with the position (Su et al., 2021).

    With `a, b` the two halves of the features and `t_i = position * base ** (-2 i / dims)`:
    `y = [a_i cos(t_i) - b_i sin(t_i), ..., b_i cos(t_i) + a_i sin(t_i), ...]`. Norms are kept, and the
    inner product of two rotated vectors depends on the difference of their positions alone.

    **Arguments:**

    - `dims`: the number of features of a head, an even one.
    - `base`: the ratio of the highest to the lowest frequency, nearly.

    **Inputs:** `x` of shape `(..., tokens, heads, dims)`, with positions from 0, or `(x, positions)` with
    positions that broadcast to `(..., tokens)`. **Returns:** `(y, st)` with `y` of the shape of `x`.

    **Parameters and states:** none.

    **Raises:** `ValueError` for an odd number of features, a base that is not positive, or an `x` or
    positions of another shape.

    >>> import jax.numpy as jnp
    >>> import flatlayers as fl
    >>> layer = fl.RotaryPositionalEmbedding(2)
    >>> layer((jnp.array([[[1.0, 0.0]]]), jnp.array([jnp.pi / 2])), {}, {})[0].round(3)
    Array([[[-0.,  1.]]], dtype=float32)
    """

    dims: Even
    _: KW_ONLY
    base: Positive = 10_000

    def forward(self, x: Input, ps: Params, st: State) -> tuple[Output, State]:
        x, positions = _input_and_positions(x, self.dims)
        dtype = at_least_float32(x.dtype)
        frequencies = jnp.asarray(self.base ** -(np.arange(0, self.dims, 2) / self.dims), dtype)
        positions = along_last(positions.astype(dtype), x.ndim - 2)
        angles = positions[..., None, None] * along_last(frequencies, x.ndim)
        cos, sin = jnp.cos(angles), jnp.sin(angles)
        a, b = jnp.split(x.astype(dtype), 2, axis=-1)
        y = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
        return y.astype(x.dtype), st


def _input_and_positions(x: Input, dims: int) -> tuple[Any, Any]:
    """The input, and the positions that came with it or those from 0."""
    if type(x) is tuple and len(x) != 2:
        raise ValueError(f"expected x or a tuple (x, positions), found a tuple of {len(x)}")
    x, positions = x if type(x) is tuple else (x, None)
    check_trailing(x, (dims,))
    x = floating(x)
    if x.ndim < 3:
        raise ValueError(f"expected x of shape (..., tokens, heads, {dims}), found shape {x.shape}")
    positions = jnp.arange(x.shape[-3]) if positions is None else jnp.asarray(positions)
    if not broadcasts_to(positions.shape, x.shape[:-2]):
        raise ValueError(
            f"expected positions that broadcast to shape {x.shape[:-2]}, found shape {positions.shape}"
        )
    return x, positions
