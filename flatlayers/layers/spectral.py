"""Layers that compute with the Fourier coefficients of functions on a periodic grid."""

import functools
import math
from collections.abc import Mapping
from dataclasses import KW_ONLY
from typing import Any, Protocol, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from ..core.composite import Container
from ..core.declaration import Param
from ..core.fields import Flag, Integer, Positive, Size
from ..core.layer import Layer
from ..dtypes import as_floating, at_least_float32, is_complex
from ..initializers import glorot_normal, zeros
from ..types import Input, Output, Params, State
from .dense import Dense
from .ending import activated, plus_bias, weight_and_bias
from .fields import Activation, AnyLayer, Initial, Sizes
from .shapes import along_last, as_dims


class SpectralConv(Layer):
    """A convolution on a periodic grid, by its Fourier coefficients: `y_k = weight_k^T x_k`, and a bias.

    Here `x_k` are the coefficients `sum_j x[j] exp(-2πi k·j/n) / n` of each input channel, and `weight_k` is
    a complex matrix for each frequency `k` that is kept; all other frequencies of `y` are zero. Neither
    depends on the size of the grid, so the same parameters serve every resolution: a function whose
    frequencies lie below half of the grid's size gives the same function on each of them.

    **Arguments:**

    - `modes`: how many frequencies are kept along each spatial axis, an integer or a tuple of 1 to 3, as
        `n_modes` in PyTorch's neuraloperator. Both signs are counted, `-(m // 2), ..., m - m // 2 - 1`. Of
        the last axis those that are not negative are kept, `0, ..., m // 2`, since `x` is real.
    - `in_channels`, `out_channels`: the numbers of input and output channels.
    - `use_bias`: whether there is a bias.
    - `init_weight`, `init_bias`: their initializers. The weights are drawn as in neuraloperator, with
        variance `2 / (in_channels + out_channels)` of a complex number; the bias is zero.

    **Inputs:** `x` of shape `(..., *spatial, in_channels)`, floating, with any number of batch axes and any
    sizes along the spatial axes, even or odd. **Returns:** `(y, st)` with `y` of shape
    `(..., *spatial, out_channels)`; half precisions compute in float32.

    **Parameters:** `weight (2, *kept, in_channels, out_channels)`, the real parts and then the imaginary
    parts, in the order of the frequencies above, with `kept = (*modes[:-1], modes[-1] // 2 + 1)`;
    `bias (out_channels,)`. **States:** none.

    The vector of all parameters has one real dtype, so a complex weight lies in it as two real parts. Each
    part is contiguous: it becomes complex, and a gradient real, without a copy with strides.

    **Raises:** `ValueError` for more modes than the grid has, `m // 2 > n // 2` along the last axis and `m >
    n` along the others, where neuraloperator leaves out weights without a word; for another number of
    channels or too few axes. `TypeError` for complex numbers and integers.

    Li et al., Fourier Neural Operator for Parametric Partial Differential Equations, 2021.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import flatlayers as fl
    >>> layer = fl.SpectralConv((12, 12), 3, 5)
    >>> ps, st = fl.setup(jax.random.key(0), layer)
    >>> ps.weight.shape
    (2, 12, 7, 3, 5)
    >>> [layer(jnp.ones((4, n, n, 3)), ps, st)[0].shape for n in (16, 33)]
    [(4, 16, 16, 5), (4, 33, 33, 5)]
    """

    modes: Sizes
    in_channels: Size
    out_channels: Size
    _: KW_ONLY
    use_bias: Flag = True
    init_weight: Initial = glorot_normal
    init_bias: Initial = zeros

    def check_fields(self) -> None:
        check_modes(self)

    @property
    def kept(self) -> tuple[int, ...]:
        """The numbers of frequencies that are kept along each spatial axis."""
        *others, last = as_dims(self.modes)
        return *others, last // 2 + 1

    def parameters(self) -> dict[str, Param]:
        shape = (2, *self.kept, self.in_channels, self.out_channels)
        # Twice the channels: the two parts of a complex number have half of its variance each.
        weight = Param(shape, self.init_weight, 2 * self.in_channels, 2 * self.out_channels)
        return weight_and_bias(self, weight, (self.out_channels,))

    def forward(self, x: Input, ps: Params, st: State) -> tuple[Output, State]:
        modes = as_dims(self.modes)
        sizes = check_grid(x, len(modes), self.in_channels)
        check_enough(sizes, modes)
        x = as_floating(x)
        if is_complex(ps.weight):
            raise TypeError(f"expected real parameters, found {ps.weight.dtype}")
        dtype = jnp.result_type(x, ps.weight)
        wide = at_least_float32(dtype)
        real, imaginary = ps.weight.astype(wide)
        coefficients = kept_coefficients(x.astype(wide), self.kept)
        # Three real products in the place of four, or four by themselves, take the same time on a CPU.
        k = "xyz"[: len(modes)]
        coefficients = jnp.einsum(f"{k}...i,{k}io->{k}...o", coefficients, jax.lax.complex(real, imaginary))
        y = from_kept(coefficients, sizes).astype(dtype)
        return plus_bias(self, y, ps), st


class FourierLayer(Container):
    """A layer of a Fourier neural operator: `y = activation(norm(spectral(x) + pointwise(x)))`.

    `spectral` is a `SpectralConv`, which mixes all points of the grid for the frequencies that it keeps;
    `pointwise` is a `Dense` without bias at each point, which passes the other frequencies on.

    **Arguments:**

    - `modes`, `in_channels`, `out_channels`: those of `SpectralConv`.
    - `activation`: an elementwise function; `None` is the identity.
    - `norm`: a layer or a function between the sum and the activation, such as
        `fl.GroupNorm(out_channels, 1)`; `None` leaves it out.

    **Inputs:** `x` of shape `(..., *spatial, in_channels)`, floating. **Returns:** `(y, st)` with `y` of
    shape `(..., *spatial, out_channels)`.

    **Parameters:** those of `spectral`, `pointwise` and, if there is one, `norm`. **States:** those of
    `norm`.

    **Raises:** `ValueError` and `TypeError` as `SpectralConv` does.

    Li et al., Fourier Neural Operator for Parametric Partial Differential Equations, 2021.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import flatlayers as fl
    >>> layer = fl.FourierLayer(8, 3, 3, jnp.tanh)
    >>> ps, st = fl.setup(jax.random.key(0), layer)
    >>> ps.pointwise.weight.shape, layer(jnp.ones((5, 32, 3)), ps, st)[0].shape
    ((3, 3), (5, 32, 3))
    """

    modes: Sizes
    in_channels: Size
    out_channels: Size
    activation: Activation | None = jax.nn.gelu
    _: KW_ONLY
    norm: AnyLayer | None = None

    def check_fields(self) -> None:
        check_modes(self)

    @functools.cached_property
    def spectral(self) -> SpectralConv:
        """The convolution."""
        return SpectralConv(self.modes, self.in_channels, self.out_channels)

    @functools.cached_property
    def pointwise(self) -> Dense:
        """The map at each point."""
        return Dense(self.in_channels, self.out_channels, use_bias=False)

    def children(self) -> Mapping[str, Any]:
        return {"spectral": self.spectral, "pointwise": self.pointwise, **super().children()}

    def forward(self, x: Input, ps: Params, st: State) -> tuple[Output, State]:
        z, _ = self.spectral(x, ps.spectral, st.spectral)
        y = z + self.pointwise(x, ps.pointwise, st.pointwise)[0]
        if isinstance(self.norm, Layer):
            y, norm = self.norm(y, ps.norm, st.norm)
            st = st.replace(norm=norm)
        return activated(self.activation, y), st


class SpectralDerivative(Layer):
    """A derivative along an axis of a periodic grid: `y_k = (2πik / length)^order x_k`.

    Here `x_k` are the coefficients of the discrete Fourier transform. The derivative of a function whose
    frequencies lie below half of the grid's size is exact; for others the error falls faster than any power
    of the grid's spacing, if they are smooth. Rounding grows with the order, by up to `(π n / length)^order`.

    A grid of even size has one coefficient for the frequencies `n / 2` and `-n / 2`. For odd orders it is 0,
    since the two cancel (Trefethen, Spectral Methods in MATLAB, 2000, chapter 3).

    **Arguments:**

    - `order`: which derivative, 1 or more.
    - `length`: the period: `n` times the distance between two points.
    - `axis`: the axis of the grid. By default it is the last but one, the last being channels.

    **Inputs:** `x` of shape `(..., n, ...)`, floating, at `n` points of equal distance of which the first is
    not repeated at the end. **Returns:** `(y, st)` with `y` of the same shape; half precisions compute in
    float32.

    **Parameters:** none. **States:** none.

    **Raises:** `ValueError` for an axis that `x` does not have, `TypeError` for complex numbers and integers.

    >>> import jax.numpy as jnp
    >>> import numpy as np
    >>> import flatlayers as fl
    >>> x = np.arange(8) / 8  # a period of length 1
    >>> second = fl.SpectralDerivative(2, 1.0)
    >>> y, _ = second(jnp.sin(2 * np.pi * x)[:, None], {}, {})
    >>> bool(jnp.allclose(y[:, 0], -4 * np.pi**2 * jnp.sin(2 * np.pi * x), atol=1e-4))
    True
    """

    order: Size
    length: Positive
    _: KW_ONLY
    axis: Integer = -2

    def forward(self, x: Input, ps: Params, st: State) -> tuple[Output, State]:
        x = as_floating(x)
        if not -x.ndim <= self.axis < x.ndim:
            raise ValueError(f"expected x with the axis {self.axis}, found shape {x.shape}")
        wide = x.astype(at_least_float32(x.dtype))
        n, axis = x.shape[self.axis], self.axis % x.ndim
        factors = (2j * math.pi / self.length * np.arange(n // 2 + 1)) ** self.order
        if self.order % 2 and n % 2 == 0:
            factors[-1] = 0.0
        coefficients = jnp.fft.rfft(wide, axis=axis)
        shape = (-1, *(1,) * (x.ndim - 1 - axis))
        factors = along_last(jnp.asarray(factors.reshape(shape), coefficients.dtype), x.ndim)
        return jnp.fft.irfft(factors * coefficients, n, axis=axis).astype(x.dtype), st


# Checks


class HasModes(Protocol):
    """A layer with a number of frequencies for each spatial axis."""

    modes: Sizes


def check_modes(layer: HasModes) -> None:
    """Raise `ValueError` unless there are modes for 1, 2 or 3 spatial axes."""
    if not 1 <= len(as_dims(layer.modes)) <= 3:
        name = type(layer).__name__
        raise ValueError(f"{name}.modes: expected modes for 1, 2 or 3 axes, found {layer.modes}")


def check_grid(x: Input, axes: int, channels: int) -> tuple[int, ...]:
    """Return the spatial sizes of `x`. **Raises:** `ValueError` for other channels or too few axes."""
    shape = jnp.shape(x)
    if len(shape) <= axes or shape[-1] != channels:
        names = ", ".join(("depth", "height", "width")[-axes:])
        raise ValueError(f"expected x of shape (..., {names}, {channels}), found shape {shape}")
    return shape[-axes - 1 : -1]


def check_enough(sizes: tuple[int, ...], modes: tuple[int, ...]) -> None:
    """Raise `ValueError` for a grid with fewer frequencies than there are modes."""
    *others, last = zip(sizes, modes, strict=True)
    if last[1] // 2 > last[0] // 2 or any(m > n for n, m in others):
        least = (*modes[:-1], max(modes[-1] // 2 * 2, 1))
        raise ValueError(
            f"expected x of spatial sizes of at least {least}, for the modes {modes}, found {sizes}"
        )


# The coefficients that are kept

# Up to so many frequencies of so many points, a product with their sines and cosines takes less time than a
# fast transform of all frequencies, which also has to bring its axis to the end: half to two thirds of it at
# 16 to 32 frequencies; the two meet at 64 (float32 and float64, value and gradient, on a CPU).
MOST_FREQUENCIES, MOST_POINTS = 64, 2048
Waves: TypeAlias = np.ndarray[Any, np.dtype[np.complex128]]
EXACT = jax.lax.Precision.HIGHEST


def kept_coefficients(x: jax.Array, kept: tuple[int, ...]) -> jax.Array:
    """The coefficients of the frequencies that are kept, of shape `(*kept, *batch, channels)`.

    They are `sum_j x[j] exp(-2πi k·j/n) / n`, in ascending order of the frequencies: both signs of all axes
    but the last. Axis by axis, each transform is of what the one before it has kept.
    """
    *others, last = kept
    z = _of_real(x, last)
    for m in reversed(others):
        z = _of_complex(z, m)
    return z


def from_kept(z: jax.Array, sizes: tuple[int, ...]) -> jax.Array:
    """The real function, of shape `(*batch, *sizes, channels)`, with these coefficients and no others."""
    *others, last = sizes
    for n in others:
        z = _to_complex(z, n)
    return _to_real(z, last)


# Each transforms one axis: the last but one becomes the first, and the first the last but one again.


def _of_real(x: jax.Array, kept: int) -> jax.Array:
    n = x.shape[-2]
    if not _by_product(n, 2 * kept - 2):
        z = jax.lax.slice_in_dim(jnp.fft.rfft(x, axis=-2, norm="forward"), 0, kept, axis=-2)
        return jnp.moveaxis(z, -2, 0)
    waves = _waves(n, 0, kept).conj() / n
    matrix = jnp.asarray(np.concatenate([waves.real, waves.imag]), x.dtype)
    z = jnp.tensordot(matrix, x, ((1,), (x.ndim - 2,)), precision=EXACT)
    return jax.lax.complex(*jnp.split(z, 2))


def _of_complex(z: jax.Array, m: int) -> jax.Array:
    n = z.shape[-2]
    if _by_product(n, m):
        matrix = jnp.asarray(_waves(n, -(m // 2), m).conj() / n, z.dtype)
        return jnp.tensordot(matrix, z, ((1,), (z.ndim - 2,)), precision=EXACT)
    z = jnp.fft.fft(z, axis=-2, norm="forward")
    parts = (n - m // 2, n), (0, m - m // 2)
    z = jnp.concatenate([jax.lax.slice_in_dim(z, *part, axis=-2) for part in parts], axis=-2)
    return jnp.moveaxis(z, -2, 0)


def _to_complex(z: jax.Array, n: int) -> jax.Array:
    m = z.shape[0]
    if _by_product(n, m):
        matrix = jnp.asarray(_waves(n, -(m // 2), m), z.dtype)
        return jnp.einsum("kn,k...c->...nc", matrix, z, precision=EXACT)
    z = jnp.moveaxis(z, 0, -2)
    negative, rest = jnp.split(z, [m // 2], axis=-2)
    none = jnp.zeros((*z.shape[:-2], n - m, z.shape[-1]), z.dtype)
    return jnp.fft.ifft(jnp.concatenate([rest, none, negative], axis=-2), axis=-2, norm="forward")


def _to_real(z: jax.Array, n: int) -> jax.Array:
    kept = z.shape[0]
    if not _by_product(n, 2 * kept - 2):
        return jnp.fft.irfft(jnp.moveaxis(z, 0, -2), n, axis=-2, norm="forward")
    # A frequency stands for its negative one, too, unless it is 0 or half of the points.
    alone = np.isin(np.arange(kept) * 2, (0, n))
    waves: Waves = np.where(alone, 1.0, 2.0)[:, None] * _waves(n, 0, kept)
    z = jnp.concatenate([z.real, z.imag])
    matrix = jnp.asarray(np.concatenate([waves.real, -waves.imag]), z.dtype)
    return jnp.einsum("kn,k...c->...nc", matrix, z, precision=EXACT)


def _by_product(n: int, frequencies: int) -> bool:
    return frequencies <= MOST_FREQUENCIES and n <= MOST_POINTS


@functools.lru_cache(maxsize=64)
def _waves(n: int, first: int, m: int) -> Waves:
    """`exp(2πi k j / n)` of shape `(m, n)`, for the frequencies `k` from `first` on and the points `j`."""
    # Of whole numbers the remainder is exact, so each number is.
    turns = np.outer(np.arange(first, first + m), np.arange(n)) % n
    return np.exp(2j * math.pi * turns / n)
