"""Convolutions: true ones, cross-correlations, depthwise and transposed ones."""

import math
from dataclasses import KW_ONLY
from typing import Any

import jax
import jax.numpy as jnp

from ..core.declaration import Param
from ..core.fields import Flag, Size
from ..core.layer import Layer
from ..dtypes import in_common_dtype
from ..initializers import glorot_uniform, zeros
from ..types import Input, Output, Params, Shape, State
from .ending import ended, weight_and_bias
from .fields import Activation, Initial, Sizes
from .shapes import per_axis
from .windows import Counts, Pad, Windows, paddings, windows_of


class AbstractConv(Layer):
    """The base of the convolutions: their fields, their parameters and their windows."""

    kernel: tuple[Size, ...]
    in_channels: Size
    out_channels: Size
    activation: Activation | None = None
    _: KW_ONLY
    stride: Sizes = 1
    pad: Pad = 0
    dilation: Sizes = 1
    use_bias: Flag = True
    init_weight: Initial = glorot_uniform
    init_bias: Initial = zeros

    def check_fields(self) -> None:
        if not 1 <= len(self.windows.size) <= 3:
            name = type(self).__name__
            raise ValueError(f"{name}.kernel: expected a kernel of 1, 2 or 3 sizes, found {self.kernel}")
        self.parameters()

    @property
    def windows(self) -> Windows:
        return windows_of(self, "kernel")

    def declare(self, weight_shape: Shape, groups: int, output_axis: int | None = None) -> dict[str, Param]:
        """Declare weight and bias. **Raises:** `ValueError` for groups that do not divide the channels."""
        if self.in_channels % groups or self.out_channels % groups:
            raise ValueError(
                f"{type(self).__name__}: expected groups that divide the {self.in_channels} input and "
                f"{self.out_channels} output channels, found {groups}"
            )
        size = math.prod(self.kernel)
        fan_in, fan_out = size * self.in_channels // groups, size * self.out_channels // groups
        weight = Param(weight_shape, self.init_weight, fan_in, fan_out, output_axis)
        return weight_and_bias(self, weight, (self.out_channels,))

    def conv_parameters(self, groups: int) -> dict[str, Param]:
        return self.declare((*self.kernel, self.in_channels // groups, self.out_channels), groups)

    def convolve(self, x: Input, ps: Params, groups: int, *, flip: bool) -> jax.Array:
        sizes = self.check_input(x)
        where = self.windows
        where.check(sizes, "kernel")
        x, weight = in_common_dtype(x, ps.weight)
        y = correlate(
            x,
            flipped(weight) if flip else weight,
            window_strides=where.stride,
            padding=where.pads,
            rhs_dilation=where.dilation,
            feature_group_count=groups,
        )
        return ended(self, y, ps)

    def check_input(self, x: Input) -> tuple[int, ...]:
        """The spatial sizes of `x`. **Raises:** `ValueError` for other channels or too few axes."""
        shape, rank = jnp.shape(x), len(self.kernel)
        if len(shape) <= rank or shape[-1] != self.in_channels:
            axes = ", ".join(("depth", "height", "width")[-rank:])
            raise ValueError(f"expected x of shape (..., {axes}, {self.in_channels}), found shape {shape}")
        return shape[-rank - 1 : -1]


class Conv(AbstractConv):
    """A convolution: `y[i] = activation(sum_k weight[K - 1 - k]^T @ x[i*stride + k*dilation] + bias)`.

    `K` is the size of the kernel and `x` is padded. This is the true convolution, with the kernel
    flipped, as in Flux and Lux; `CrossCor` is the cross-correlation that PyTorch and Flax call
    convolution.

    **Arguments:**

    - `kernel`: its sizes, a tuple of 1, 2 or 3.
    - `in_channels`, `out_channels`: the numbers of input and output channels.
    - `activation`: an elementwise function; `None` is the identity.
    - `stride`: the step between outputs, an integer or one for each spatial axis.
    - `pad`: how many zeros are put around `x`: an integer, one for each spatial axis, two for each
        (low and high of the first, low and high of the second, ...), or `SamePad()`.
    - `dilation`: the step between the entries of the kernel, an integer or one for each axis.
    - `groups`: into how many groups the channels are divided that do not see each other.
    - `use_bias`: whether there is a bias.
    - `init_weight`, `init_bias`: their initializers.
    - `cross_correlation`: whether the kernel is left as it is, not flipped.

    **Inputs:** `x` of shape `(..., *spatial, in_channels)`, with any number of batch axes.
    **Returns:** `(y, st)` with `y` of shape `(..., *spatial', out_channels)`, where
    `spatial' = (spatial + low + high - dilation * (kernel - 1) - 1) // stride + 1`.

    **Parameters:** `weight (*kernel, in_channels / groups, out_channels)`, `bias (out_channels,)`.
    **States:** none.

    **Raises:** `ValueError` for groups that do not divide the channels, another number of channels
    or a kernel longer than the padded input.

    Dumoulin and Visin, A guide to convolution arithmetic for deep learning, 2016.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import flatlayers as fl
    >>> layer = fl.Conv((5, 5), 3, 7, jnp.tanh, stride=2)
    >>> ps, st = fl.setup(jax.random.key(0), layer)
    >>> layer(jnp.ones((4, 28, 28, 3)), ps, st)[0].shape
    (4, 12, 12, 7)
    """

    _: KW_ONLY
    groups: Size = 1
    cross_correlation: Flag = False

    def parameters(self) -> dict[str, Param]:
        return self.conv_parameters(self.groups)

    def forward(self, x: Input, ps: Params, st: State) -> tuple[Output, State]:
        return self.convolve(x, ps, self.groups, flip=not self.cross_correlation), st


class CrossCor(AbstractConv):
    """A cross-correlation: `y[i] = activation(sum_k weight[k]^T @ x[i*stride + k*dilation] + bias)`.

    `x` is padded. This is what PyTorch and Flax call convolution: the kernel is not flipped, as it
    is in `Conv`.

    **Arguments:** those of `Conv`, without `cross_correlation`.

    **Inputs:** `x` of shape `(..., *spatial, in_channels)`, with any number of batch axes.
    **Returns:** `(y, st)` with `y` of shape `(..., *spatial', out_channels)`, sizes as for `Conv`.

    **Parameters:** `weight (*kernel, in_channels / groups, out_channels)`, `bias (out_channels,)`.
    **States:** none.

    **Raises:** `ValueError` as `Conv` does.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import flatlayers as fl
    >>> layer = fl.CrossCor((2,), 1, 1, init_weight=fl.initializers.from_array([[[0.0]], [[1.0]]]))
    >>> ps, st = fl.setup(jax.random.key(0), layer)
    >>> layer(jnp.arange(4.0)[:, None], ps, st)[0][:, 0]
    Array([1., 2., 3.], dtype=float32)
    """

    _: KW_ONLY
    groups: Size = 1

    def parameters(self) -> dict[str, Param]:
        return self.conv_parameters(self.groups)

    def forward(self, x: Input, ps: Params, st: State) -> tuple[Output, State]:
        return self.convolve(x, ps, self.groups, flip=False), st


class DepthwiseConv(AbstractConv):
    """A convolution of each input channel by itself: `Conv` with as many groups as input channels.

    **Arguments:** those of `Conv`, without `groups`; `out_channels` is a multiple of `in_channels`.

    **Inputs:** `x` of shape `(..., *spatial, in_channels)`, with any number of batch axes.
    **Returns:** `(y, st)` with `y` of shape `(..., *spatial', out_channels)`, sizes as for `Conv`;
    the first `out_channels / in_channels` channels are made of the first channel of `x`, and so on.

    **Parameters:** `weight (*kernel, 1, out_channels)`, `bias (out_channels,)`. **States:** none.

    **Raises:** `ValueError` as `Conv` does.

    Chollet, Xception: Deep learning with depthwise separable convolutions, 2017.

    >>> import flatlayers as fl
    >>> fl.parameter_length(fl.DepthwiseConv((5, 5), 3, 6, use_bias=False))
    150
    """

    _: KW_ONLY
    cross_correlation: Flag = False

    def parameters(self) -> dict[str, Param]:
        return self.conv_parameters(self.in_channels)

    def forward(self, x: Input, ps: Params, st: State) -> tuple[Output, State]:
        return self.convolve(x, ps, self.in_channels, flip=not self.cross_correlation), st


class ConvTranspose(AbstractConv):
    """The transpose of a convolution: `y = activation(C^T x + bias)`.

    `C` is the linear map of the `Conv` from `out_channels` to `in_channels` with the same weight and
    options; so a `ConvTranspose` gives the shape that this `Conv` takes.

    **Arguments:** those of `Conv`, where `pad` is cut off the result instead of put around `x`, and

    - `output_pad`: by how much the result is longer at the high end, an integer or one for each axis,
        under the stride. A `Conv` with a stride takes several sizes to one; this chooses among them.

    **Inputs:** `x` of shape `(..., *spatial, in_channels)`, with any number of batch axes.
    **Returns:** `(y, st)` with `y` of shape `(..., *spatial', out_channels)`, where `spatial' =
    (spatial - 1) * stride + dilation * (kernel - 1) + 1 - low - high + output_pad`.

    **Parameters:** `weight (*kernel, out_channels / groups, in_channels)`, `bias (out_channels,)`.
    **States:** none.

    **Raises:** `ValueError` for groups that do not divide the channels, another number of channels
    or a padding that leaves nothing.

    Dumoulin and Visin, A guide to convolution arithmetic for deep learning, 2016.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import flatlayers as fl
    >>> layer = fl.ConvTranspose((5, 5), 3, 7, stride=2)
    >>> ps, st = fl.setup(jax.random.key(0), layer)
    >>> layer(jnp.ones((4, 10, 10, 3)), ps, st)[0].shape
    (4, 23, 23, 7)
    """

    _: KW_ONLY
    groups: Size = 1
    cross_correlation: Flag = False
    output_pad: Counts = 0

    def check_fields(self) -> None:
        super().check_fields()
        stride = self.windows.stride
        extra = self.extra(len(stride))
        if any(n >= step for n, step in zip(extra, stride, strict=True)):
            raise ValueError(
                f"ConvTranspose: expected an output_pad under the stride {stride}, found {self.output_pad}"
            )

    @property
    def windows(self) -> Windows:
        found = super().windows
        same = [span - step for span, step in zip(found.span, found.stride, strict=True)]
        return found._replace(pads=paddings(self.pad, same, "ConvTranspose.pad"))

    def extra(self, rank: int) -> tuple[int, ...]:
        """By how much the result is longer, for each spatial axis."""
        return per_axis(self.output_pad, rank, "ConvTranspose.output_pad")

    def parameters(self) -> dict[str, Param]:
        shape = (*self.kernel, self.out_channels // self.groups, self.in_channels)
        return self.declare(shape, self.groups, output_axis=-2)

    def forward(self, x: Input, ps: Params, st: State) -> tuple[Output, State]:
        sizes = self.check_input(x)
        x, weight = in_common_dtype(x, ps.weight)
        weight = with_channels_swapped(weight, self.groups)
        y = correlate(
            x,
            flipped(weight) if self.cross_correlation else weight,
            window_strides=(1,) * len(sizes),
            padding=self.transposed_pads(sizes),
            lhs_dilation=self.windows.stride,
            rhs_dilation=self.windows.dilation,
            feature_group_count=self.groups,
        )
        return ended(self, y, ps), st

    def transposed_pads(self, sizes: tuple[int, ...]) -> list[tuple[int, int]]:
        """Return the padding of `x`, with zeros between its entries, that gives the result its sizes."""
        where = self.windows
        ends = zip(where.span, where.pads, self.extra(len(sizes)), strict=True)
        pads = [(span - 1 - low, span - 1 - high + more) for span, (low, high), more in ends]
        result = [
            (n - 1) * step + sum(ends) + 2 - span
            for n, step, ends, span in zip(sizes, where.stride, pads, where.span, strict=True)
        ]
        if min(*sizes, *result) < 1:
            raise ValueError(
                f"expected x of spatial sizes that leave something of the result, found {sizes}, which "
                f"gives {tuple(result)} with pad={self.pad}"
            )
        return pads


def correlate(x: jax.Array, weight: jax.Array, **options: Any) -> jax.Array:
    """The cross-correlation of `x (..., *spatial, in)` with `weight (*kernel, in, out)`."""
    rank = weight.ndim - 2
    batch = x.shape[: x.ndim - rank - 1]
    spatial = "DHW"[-rank:]
    y = jax.lax.conv_general_dilated(
        x.reshape(math.prod(batch), *x.shape[len(batch) :]),
        weight,
        dimension_numbers=(f"N{spatial}C", f"{spatial}IO", f"N{spatial}C"),
        **options,
    )
    return y.reshape(*batch, *y.shape[1:])


def flipped(weight: jax.Array) -> jax.Array:
    return jax.lax.rev(weight, range(weight.ndim - 2))


def with_channels_swapped(weight: jax.Array, groups: int) -> jax.Array:
    """`(*kernel, out / groups, in)` as `(*kernel, in / groups, out)`."""
    *kernel, outs, ins = weight.shape
    parts = weight.reshape(*kernel, outs, groups, ins // groups)
    return jnp.swapaxes(parts, -1, -3).reshape(*kernel, ins // groups, groups * outs)
