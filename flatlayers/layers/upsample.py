"""Layers that make the spatial axes longer."""

import math
from dataclasses import KW_ONLY
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from ..core.fields import Flag, Positive, Size
from ..core.layer import Layer
from ..dtypes import as_floating
from ..types import Input, Output, Params, Shape, State
from .fields import Sizes
from .shapes import per_axis


class PixelShuffle(Layer):
    """Channels into space: `y[i*r + a, j*r + b, c] = x[i, j, c*r^2 + a*r + b]` for two spatial axes.

    For `n` spatial axes the channels become `r^n` times fewer. On `(batch, channels, *spatial)` with
    the axes in that order this is PyTorch's `pixel_shuffle`.

    **Arguments:**

    - `factor`: by how much each spatial axis becomes longer, `r`.

    **Inputs:** `x` of shape `(batch, *spatial, channels)`. **Returns:** `(y, st)` with `y` of shape
    `(batch, *(r * spatial), channels / r^n)`.

    **Parameters and states:** none.

    **Raises:** `ValueError` for channels that `r^n` does not divide.

    Shi et al., Real-time single image and video super-resolution using an efficient sub-pixel
    convolutional neural network, 2016.

    >>> import jax.numpy as jnp
    >>> import flatlayers as fl
    >>> fl.PixelShuffle(2)(jnp.arange(4.0).reshape(1, 1, 1, 4), {}, {})[0][0, :, :, 0]
    Array([[0., 1.],
           [2., 3.]], dtype=float32)
    """

    factor: Size

    def forward(self, x: Input, ps: Params, st: State) -> tuple[Output, State]:
        x, r = jnp.asarray(x), self.factor
        rank = x.ndim - 2
        if rank < 1 or x.shape[-1] % r**rank:
            multiple = f"a multiple of {r**rank}" if rank > 0 else f"a multiple of {r} for each spatial axis"
            raise ValueError(
                f"expected x of shape (batch, *spatial, channels), with channels {multiple}, "
                f"found shape {x.shape}"
            )
        batch, *spatial, channels = x.shape
        parts = x.reshape(batch, *spatial, channels // r**rank, *(r,) * rank)
        pairs = [axis for i in range(rank) for axis in (1 + i, rank + 2 + i)]
        longer = parts.transpose(0, *pairs, rank + 1)
        return longer.reshape(batch, *(r * n for n in spatial), channels // r**rank), st


class Upsample(Layer):
    """Longer spatial axes by interpolation, each axis by itself.

    `"nearest"` is `y[i] = x[floor(i * in / out)]`. `"bilinear"` and `"trilinear"` are the linear
    interpolation of `x` at `(i + 1/2) * in / out - 1/2`, where the ends are continued as constants;
    with `align_corners` at `i * (in - 1) / (out - 1)`, so that the ends stay where they are.

    **Arguments:**

    - `mode`: `"nearest"`, `"bilinear"` or `"trilinear"`; the latter two are the same on any number of
        spatial axes.
    - `scale`: by how much an axis becomes longer, a number or one for each axis; the size is rounded
        down.
    - `size`: the new size instead, an integer or one for each axis.
    - `align_corners`: whether the first and last entries stay at the ends, in the linear modes.

    **Inputs:** `x` of shape `(batch, *spatial, channels)`. **Returns:** `(y, st)` with `y` of shape
    `(batch, *size, channels)`.

    **Parameters and states:** none.

    **Raises:** `ValueError` for both or neither of `scale` and `size`, another mode, `align_corners`
    with `"nearest"`, or an `x` with other spatial axes.

    >>> import jax.numpy as jnp
    >>> import flatlayers as fl
    >>> x = jnp.array([[[0.0], [4.0]]])
    >>> fl.Upsample(scale=2)(x, {}, {})[0][0, :, 0]
    Array([0., 0., 4., 4.], dtype=float32)
    >>> fl.Upsample("bilinear", scale=2)(x, {}, {})[0][0, :, 0]
    Array([0., 1., 3., 4.], dtype=float32)
    >>> fl.Upsample("bilinear", size=5, align_corners=True)(x, {}, {})[0][0, :, 0]
    Array([0., 1., 2., 3., 4.], dtype=float32)
    """

    mode: Literal["nearest", "bilinear", "trilinear"] = "nearest"
    _: KW_ONLY
    scale: Positive | tuple[Positive, ...] | None = None
    size: Sizes | None = None
    align_corners: Flag = False

    def check_fields(self) -> None:
        if (self.scale is None) == (self.size is None):
            found = "neither" if self.scale is None else f"scale={self.scale} and size={self.size}"
            raise ValueError(f"Upsample: expected one of scale and size, found {found}")
        if self.align_corners and self.mode == "nearest":
            raise ValueError(
                "Upsample: expected align_corners with the mode bilinear or trilinear, found nearest"
            )
        for name in ("scale", "size"):
            if getattr(self, name) == ():
                raise ValueError(f"Upsample.{name}: expected one number or more, found ()")

    def forward(self, x: Input, ps: Params, st: State) -> tuple[Output, State]:
        x = jnp.asarray(x) if self.mode == "nearest" else as_floating(x)
        for axis, size in enumerate(self.new_sizes(x.shape), 1):
            if self.mode == "nearest":
                places = np.arange(size) * x.shape[axis] // size
                x = jnp.take(x, places, axis=axis, mode="clip")
            else:
                x = interpolate(x, axis, size, self.align_corners)
        return x, st

    def new_sizes(self, shape: Shape) -> tuple[int, ...]:
        rank = len(shape) - 2
        given: Any = self.scale or self.size
        if rank < 1 or 0 in shape[1:-1] or (isinstance(given, tuple) and len(given) != rank):
            axes = f"{len(given)} spatial axes" if isinstance(given, tuple) else "spatial axes"
            raise ValueError(
                f"expected x of shape (batch, *spatial, channels) with {axes}, found shape {shape}"
            )
        numbers = per_axis(given, rank, "Upsample")
        if self.scale is None:
            return numbers
        # Rounded so that 10 times 2.3, which is 22.999999999999996, counts as 23.
        sizes = tuple(math.floor(round(scale * n, 9)) for scale, n in zip(numbers, shape[1:-1], strict=True))
        if min(sizes) < 1:
            raise ValueError(f"expected spatial sizes that scale={self.scale} leaves, found shape {shape}")
        return sizes


def interpolate(x: jax.Array, axis: int, size: int, align_corners: bool) -> jax.Array:
    """`x` interpolated linearly to a new size along one axis."""
    n = x.shape[axis]
    if align_corners:
        places = np.arange(size) * ((n - 1) / max(size - 1, 1))
    else:
        places = (np.arange(size) + 0.5) * (n / size) - 0.5
    places = np.clip(places, 0, n - 1)
    low = np.floor(places).astype(int)
    high = np.minimum(low + 1, n - 1)
    part = np.expand_dims(places - low, [i for i in range(x.ndim) if i != axis])
    share = jnp.asarray(part, x.dtype)
    below = jnp.take(x, low, axis=axis, mode="clip")
    above = jnp.take(x, high, axis=axis, mode="clip")
    return (1 - share) * below + share * above
