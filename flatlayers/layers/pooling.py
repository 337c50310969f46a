"""Layers that reduce windows to one number: the largest, the mean, a norm."""

import math
from collections.abc import Callable
from dataclasses import KW_ONLY
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..core.fields import Size
from ..core.layer import Layer
from ..dtypes import as_floating, as_real, at_least_float32
from ..types import Input, Output, Params, State
from .fields import Exponent, Sizes
from .windows import Pad, Windows, windows_of


class AbstractPool(Layer):
    """The base of the pools over windows of a given size."""

    window: tuple[Size, ...]
    _: KW_ONLY
    stride: Sizes | None = None
    pad: Pad = 0
    dilation: Sizes = 1

    def check_fields(self) -> None:
        _ = self.windows

    @property
    def windows(self) -> Windows:
        return windows_of(self, "window")


class MaxPool(AbstractPool):
    """The largest of each window, channel by channel: `y[i] = max_k x[i*stride + k*dilation]`.

    **Arguments:**

    - `window`: its sizes, a tuple with one for each spatial axis.
    - `stride`: the step between windows, an integer or one for each axis; `None` is the window.
    - `pad`: how much is put around `x`, here -inf: an integer, one for each axis, two for each (low
        and high of the first, low and high of the second, ...), or `SamePad()`.
    - `dilation`: the step between the entries of a window, an integer or one for each axis.

    **Inputs:** `x` of shape `(..., *spatial, channels)`, with any number of batch axes.
    **Returns:** `(y, st)` with `y` of shape `(..., *spatial', channels)`, where
    `spatial' = (spatial + low + high - dilation * (window - 1) - 1) // stride + 1`.

    **Parameters and states:** none.

    **Raises:** `ValueError` for a window longer than the padded input, `TypeError` for bools and complex
    numbers.

    >>> import jax.numpy as jnp
    >>> import flatlayers as fl
    >>> fl.MaxPool((2,))(jnp.array([[1.0], [3.0], [2.0], [0.0]]), {}, {})[0][:, 0]
    Array([3., 2.], dtype=float32)
    """

    def forward(self, x: Input, ps: Params, st: State) -> tuple[Output, State]:
        return max_over(x, self.windows), st


class MeanPool(AbstractPool):
    """The mean of each window, channel by channel: `y[i] = mean_k x[i*stride + k*dilation]`.

    The padding is zeros, and they count.

    **Arguments:** those of `MaxPool`.

    **Inputs:** `x` of shape `(..., *spatial, channels)`, with any number of batch axes.
    **Returns:** `(y, st)` with `y` of shape `(..., *spatial', channels)`, sizes as for `MaxPool`.

    **Parameters and states:** none.

    **Raises:** `ValueError` as `MaxPool` does, `TypeError` for numbers that are not floating.

    >>> import jax.numpy as jnp
    >>> import flatlayers as fl
    >>> fl.MeanPool((2,))(jnp.array([[1.0], [3.0], [2.0], [0.0]]), {}, {})[0][:, 0]
    Array([2., 1.], dtype=float32)
    """

    def forward(self, x: Input, ps: Params, st: State) -> tuple[Output, State]:
        return mean_over(x, self.windows), st


class LPPool(AbstractPool):
    """The p-norm of each window, channel by channel: `y[i] = (sum_k |x[i*stride + k*dilation]|^p)^(1/p)`.

    The padding is zeros. At a window of zeros alone, where the norm has no derivative, it is zero.

    **Arguments:** those of `MaxPool`, and

    - `p`: the exponent, at least 1.

    **Inputs:** `x` of shape `(..., *spatial, channels)`, with any number of batch axes.
    **Returns:** `(y, st)` with `y` of shape `(..., *spatial', channels)`, sizes as for `MaxPool`.

    **Parameters and states:** none.

    **Raises:** `ValueError` as `MaxPool` does, `TypeError` for numbers that are not floating.

    >>> import jax.numpy as jnp
    >>> import flatlayers as fl
    >>> fl.LPPool((2,))(jnp.array([[3.0], [4.0], [0.0], [0.0]]), {}, {})[0][:, 0]
    Array([5., 0.], dtype=float32)
    """

    _: KW_ONLY
    p: Exponent = 2

    def forward(self, x: Input, ps: Params, st: State) -> tuple[Output, State]:
        return norm_over(x, self.windows, self.p), st


class GlobalMaxPool(Layer):
    """The largest over all spatial axes, channel by channel: `y = max_i x[i]`.

    **Inputs:** `x` of shape `(batch, *spatial, channels)`. **Returns:** `(y, st)` with `y` of shape
    `(batch, 1, ..., 1, channels)`.

    **Parameters and states:** none.

    **Raises:** `ValueError` if there are no spatial axes, or nothing on them; `TypeError` for bools and
    complex numbers.

    >>> import jax.numpy as jnp
    >>> import flatlayers as fl
    >>> fl.GlobalMaxPool()(jnp.ones((5, 8, 8, 3)), {}, {})[0].shape
    (5, 1, 1, 3)
    """

    def forward(self, x: Input, ps: Params, st: State) -> tuple[Output, State]:
        return over_spatial(jnp.max, as_real(x)), st


class GlobalMeanPool(Layer):
    """The mean over all spatial axes, channel by channel: `y = mean_i x[i]`.

    **Inputs:** `x` of shape `(batch, *spatial, channels)`. **Returns:** `(y, st)` with `y` of shape
    `(batch, 1, ..., 1, channels)`.

    **Parameters and states:** none.

    **Raises:** `ValueError` if there are no spatial axes, or nothing on them; `TypeError` for numbers
    that are not floating.

    >>> import jax.numpy as jnp
    >>> import flatlayers as fl
    >>> fl.GlobalMeanPool()(jnp.ones((5, 8, 8, 3)), {}, {})[0].shape
    (5, 1, 1, 3)
    """

    def forward(self, x: Input, ps: Params, st: State) -> tuple[Output, State]:
        return over_spatial(jnp.mean, as_floating(x)), st


class GlobalLPPool(Layer):
    """The p-norm over all spatial axes, channel by channel: `y = (sum_i |x[i]|^p)^(1/p)`.

    **Arguments:**

    - `p`: the exponent, at least 1.

    **Inputs:** `x` of shape `(batch, *spatial, channels)`. **Returns:** `(y, st)` with `y` of shape
    `(batch, 1, ..., 1, channels)`.

    **Parameters and states:** none.

    **Raises:** `ValueError` if there are no spatial axes, or nothing on them; `TypeError` for numbers
    that are not floating.

    >>> import jax.numpy as jnp
    >>> import flatlayers as fl
    >>> fl.GlobalLPPool()(jnp.array([[[3.0], [4.0]]]), {}, {})[0]
    Array([[[5.]]], dtype=float32)
    """

    _: KW_ONLY
    p: Exponent = 2

    def forward(self, x: Input, ps: Params, st: State) -> tuple[Output, State]:
        total = over_spatial(jnp.sum, to_the_power(x, self.p))
        return root(total, self.p).astype(jnp.result_type(x)), st


class AbstractAdaptivePool(Layer):
    """The base of the pools to a given size."""

    out: tuple[Size, ...]

    def check_fields(self) -> None:
        if not self.out:
            raise ValueError(f"{type(self).__name__}.out: expected one size or more, found {self.out}")

    def windows(self, x: Input) -> Windows:
        """Stride `in // out` and window `in - (out - 1) * stride`, for each spatial axis."""
        shape, rank = jnp.shape(x), len(self.out)
        sizes = shape[-rank - 1 : -1]
        if len(shape) <= rank or any(n < out for n, out in zip(sizes, self.out, strict=True)):
            raise ValueError(
                f"expected x of shape (..., *spatial, channels) with spatial sizes of at least {self.out}, "
                f"found shape {shape}"
            )
        stride = tuple(n // out for n, out in zip(sizes, self.out, strict=True))
        size = tuple(n - (out - 1) * s for n, out, s in zip(sizes, self.out, stride, strict=True))
        return Windows(size, stride, (1,) * rank, ((0, 0),) * rank)


class AdaptiveMaxPool(AbstractAdaptivePool):
    """`MaxPool` to a given size: the stride is `in // out`, the window `in - (out - 1) * stride`.

    **Arguments:**

    - `out`: the sizes of the result, a tuple with one for each spatial axis.

    **Inputs:** `x` of shape `(..., *spatial, channels)`, with any number of batch axes.
    **Returns:** `(y, st)` with `y` of shape `(..., *out, channels)`.

    **Parameters and states:** none.

    **Raises:** `ValueError` for spatial sizes under `out`.

    >>> import jax.numpy as jnp
    >>> import flatlayers as fl
    >>> fl.AdaptiveMaxPool((2,))(jnp.arange(5.0)[:, None], {}, {})[0][:, 0]
    Array([2., 4.], dtype=float32)
    """

    def forward(self, x: Input, ps: Params, st: State) -> tuple[Output, State]:
        return max_over(x, self.windows(x)), st


class AdaptiveMeanPool(AbstractAdaptivePool):
    """`MeanPool` to a given size: the stride is `in // out`, the window `in - (out - 1) * stride`.

    **Arguments:**

    - `out`: the sizes of the result, a tuple with one for each spatial axis.

    **Inputs:** `x` of shape `(..., *spatial, channels)`, with any number of batch axes.
    **Returns:** `(y, st)` with `y` of shape `(..., *out, channels)`.

    **Parameters and states:** none.

    **Raises:** `ValueError` for spatial sizes under `out`, `TypeError` for numbers that are not floating.

    >>> import jax.numpy as jnp
    >>> import flatlayers as fl
    >>> fl.AdaptiveMeanPool((2,))(jnp.arange(5.0)[:, None], {}, {})[0][:, 0]
    Array([1., 3.], dtype=float32)
    """

    def forward(self, x: Input, ps: Params, st: State) -> tuple[Output, State]:
        return mean_over(x, self.windows(x)), st


class AdaptiveLPPool(AbstractAdaptivePool):
    """`LPPool` to a given size: the stride is `in // out`, the window `in - (out - 1) * stride`.

    **Arguments:**

    - `out`: the sizes of the result, a tuple with one for each spatial axis.
    - `p`: the exponent, at least 1.

    **Inputs:** `x` of shape `(..., *spatial, channels)`, with any number of batch axes.
    **Returns:** `(y, st)` with `y` of shape `(..., *out, channels)`.

    **Parameters and states:** none.

    **Raises:** `ValueError` for spatial sizes under `out`, `TypeError` for numbers that are not floating.

    >>> import jax.numpy as jnp
    >>> import flatlayers as fl
    >>> fl.AdaptiveLPPool((1,))(jnp.array([[3.0], [4.0]]), {}, {})[0]
    Array([[5.]], dtype=float32)
    """

    _: KW_ONLY
    p: Exponent = 2

    def forward(self, x: Input, ps: Params, st: State) -> tuple[Output, State]:
        return norm_over(x, self.windows(x), self.p), st


# Reductions over windows


def max_over(x: Input, where: Windows) -> jax.Array:
    x = as_real(x)
    check_spatial(x, where)
    lowest = -np.inf if jnp.issubdtype(x.dtype, jnp.floating) else jnp.iinfo(x.dtype).min
    if any(d > 1 for d in where.dilation):
        # The gradient of a maximum over dilated windows is not implemented in JAX.
        x, where = side_by_side(x, where, lowest)
    return reduce_windows(x, lowest, jax.lax.max, where)


def mean_over(x: Input, where: Windows) -> jax.Array:
    x = as_floating(x)
    return (sum_over(x.astype(at_least_float32(x.dtype)), where) / math.prod(where.size)).astype(x.dtype)


def norm_over(x: Input, where: Windows, p: float) -> jax.Array:
    return root(sum_over(to_the_power(x, p), where), p).astype(jnp.result_type(x))


def sum_over(x: jax.Array, where: Windows) -> jax.Array:
    check_spatial(x, where)
    return reduce_windows(x, 0.0, jax.lax.add, where)


def reduce_windows(x: jax.Array, initial: float, operation: Callable[..., Any], where: Windows) -> jax.Array:
    batch = (1,) * (x.ndim - len(where.size) - 1)
    return jax.lax.reduce_window(
        x,
        np.array(initial, x.dtype),
        operation,
        window_dimensions=(*batch, *where.size, 1),
        window_strides=(*batch, *where.stride, 1),
        padding=(*((0, 0) for _ in batch), *where.pads, (0, 0)),
        window_dilation=(*batch, *where.dilation, 1),
    )


def side_by_side(x: jax.Array, where: Windows, fill: float) -> tuple[jax.Array, Windows]:
    """The entries of all windows one after another along each axis, and the windows they then are."""
    rank = len(where.size)
    first = x.ndim - rank - 1
    x = jnp.pad(x, [(0, 0)] * first + [*where.pads, (0, 0)], constant_values=fill)
    axes = zip(where.size, where.stride, where.dilation, where.span, strict=True)
    for axis, (size, stride, dilation, span) in enumerate(axes, first):
        starts = np.arange(0, x.shape[axis] - span + 1, stride)
        places = np.add.outer(starts, dilation * np.arange(size)).ravel()
        x = jnp.take(x, places, axis=axis, mode="clip")
    return x, Windows(where.size, where.size, (1,) * rank, ((0, 0),) * rank)


def check_spatial(x: jax.Array, where: Windows) -> None:
    rank = len(where.size)
    if x.ndim <= rank:
        raise ValueError(
            f"expected x of shape (..., *spatial, channels) with {rank} spatial axes, found shape {x.shape}"
        )
    where.check(x.shape[-rank - 1 : -1], "window")


# Reductions over everything


def over_spatial(reduce: Callable[..., jax.Array], x: jax.Array) -> jax.Array:
    if x.ndim < 3 or 0 in x.shape[1:-1]:
        raise ValueError(f"expected x of shape (batch, *spatial, channels), found shape {x.shape}")
    return reduce(x, axis=tuple(range(1, x.ndim - 1)), keepdims=True)


# Norms


def to_the_power(x: Input, p: float) -> jax.Array:
    x = as_floating(x)
    # An integer power is products.
    return jnp.abs(x.astype(at_least_float32(x.dtype))) ** (int(p) if p == int(p) else p)


def root(total: jax.Array, p: float) -> jax.Array:
    """`total^(1/p)`, with the derivative 0 at 0, where it has none."""
    # Asked so that a NaN stays one.
    zero = total == 0
    return jnp.where(zero, 0.0, jnp.where(zero, 1.0, total) ** (1 / p))
