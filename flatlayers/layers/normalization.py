"""Layers that bring numbers to mean 0 and variance 1."""

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ..core.data_axis import check_sees_batch, parts_of
from ..core.declaration import Param
from ..core.fields import Flag, NonNegative, Size
from ..core.layer import Layer
from ..dtypes import as_floating, at_least_float32
from ..initializers import ones, zeros
from ..types import Input, Key, Output, Params, Shape, State
from ..vectors.record import Record
from .ending import activated
from .fields import Activation, Probability, Sizes, Text
from .shapes import along_last, as_dims, check_trailing


class AbstractTrackedNorm(Layer):
    """The base of the layers that may follow the statistics of their input by running values."""

    channels: Size
    activation: Activation | None = None
    _: KW_ONLY
    affine: Flag = True
    track_stats: Flag = True
    epsilon: NonNegative = 1e-5
    momentum: Probability = 0.1

    def parameters(self) -> dict[str, Param]:
        return scale_and_bias((self.channels,), self.affine)

    def states(self, key: Key) -> dict[str, Any]:
        if not self.track_stats:
            return {}
        n = self.channels
        return {"running_mean": jnp.zeros(n), "running_var": jnp.ones(n), "training": True}


class BatchNorm(AbstractTrackedNorm):
    """Normalise each channel over the batch: `y = activation(scale * z + bias)`.

    Here `z = (x - mean) / sqrt(var + epsilon)`. In training, `mean` and `var` are those of all numbers of
    the channel in `x`, with the biased variance. The running values follow them, `new = (1 - momentum) * old
    + momentum * batch`, with the unbiased variance. In test mode they take their place, and the layer is
    an affine map (Ioffe and Szegedy, 2015).

    **Arguments:**

    - `channels`: the number of channels.
    - `activation`: an elementwise function; `None` is the identity.
    - `affine`: whether there are `scale` and `bias`.
    - `track_stats`: whether there are running values; without them both modes use those of `x`.
    - `epsilon`: added to the variance.
    - `momentum`: the weight of the newest batch in the running values.
    - `axis_name`: the name, or names, of mapped axes (`jax.vmap`, `jax.shard_map`) over which the
        statistics are taken too: those of the whole batch, where each device has a part of it. In
        training the layer then runs inside such a map only.

    **Inputs:** `x` of shape `(..., channels)`, floating. **Returns:** `(y, st)` with `y` of the same shape.

    **Parameters:** `scale (channels,)`, `bias (channels,)`, if `affine`. **States:** `running_mean
    (channels,)`, `running_var (channels,)` and the flag `training`, if `track_stats`.

    **Raises:** `ValueError` for another number of channels, for a single number per channel where the
    statistics of `x` are used, and for an `axis_name` without the axis over which a loss has its batch
    divided.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import flatlayers as fl
    >>> layer = fl.BatchNorm(2)
    >>> ps, st = fl.setup(jax.random.key(0), layer)
    >>> y, st = layer(jnp.array([[1.0, 10.0], [3.0, 30.0]]), ps, st)
    >>> y.round(3)
    Array([[-1., -1.],
           [ 1.,  1.]], dtype=float32)
    >>> st.running_mean
    Array([0.2, 2. ], dtype=float32)
    >>> y, st = layer(jnp.ones(2), ps, fl.testmode(st))
    >>> y.shape
    (2,)
    """

    _: KW_ONLY
    axis_name: Text | tuple[Text, ...] | None = None

    def forward(self, x: Input, ps: Params, st: State) -> tuple[Output, State]:
        check_trailing(x, (self.channels,))
        x = as_floating(x)
        if not self.track_stats or st.training:
            check_sees_batch(self.axis_name)
        found, st = tracked(self, x, tuple(range(x.ndim - 1)), st, self.axis_name)
        return affine_map(self, x, found, ps), st


class GroupNorm(Layer):
    """Normalise groups of channels in each sample: `y = activation(scale * z + bias)`.

    Here `z = (x - mean) / sqrt(var + epsilon)`, where `mean` and `var` are those of the channels of one group
    over the spatial axes (Wu and He, 2018). One group normalises over all but the batch; as many groups as
    channels are an `InstanceNorm`.

    **Arguments:**

    - `channels`: the number of channels.
    - `groups`: the number of groups of neighbouring channels; it divides `channels`.
    - `activation`: an elementwise function; `None` is the identity.
    - `affine`: whether there are `scale` and `bias`.
    - `epsilon`: added to the variance.

    **Inputs:** `x` of shape `(batch, *spatial, channels)`, floating. **Returns:** `(y, st)` with `y` of
    the same shape.

    **Parameters:** `scale (channels,)`, `bias (channels,)`, if `affine`. **States:** none.

    **Raises:** `ValueError` for groups that do not divide the channels, another number of channels, no
    batch axis, or a single number a group.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import flatlayers as fl
    >>> layer = fl.GroupNorm(4, 2)
    >>> ps, st = fl.setup(jax.random.key(0), layer)
    >>> layer(jnp.array([[1.0, 3.0, 10.0, 30.0]]), ps, st)[0].round(3)
    Array([[-1.,  1., -1.,  1.]], dtype=float32)
    """

    channels: Size
    groups: Size
    activation: Activation | None = None
    _: KW_ONLY
    affine: Flag = True
    epsilon: NonNegative = 1e-5

    def check_fields(self) -> None:
        if self.channels % self.groups:
            raise ValueError(
                f"GroupNorm.groups: expected groups that divide {self.channels} channels, found {self.groups}"
            )

    def parameters(self) -> dict[str, Param]:
        return scale_and_bias((self.channels,), self.affine)

    def forward(self, x: Input, ps: Params, st: State) -> tuple[Output, State]:
        check_samples(x, self.channels)
        x = as_floating(x)
        grouped = x.reshape(*x.shape[:-1], self.groups, self.channels // self.groups)
        axes = (*range(1, x.ndim - 1), x.ndim)
        check_several(math.prod(grouped.shape[a] for a in axes), x)
        y = normalize(grouped, axis=axes, epsilon=self.epsilon).reshape(x.shape)
        return finish(y, ps, self.affine, self.activation), st


class InstanceNorm(AbstractTrackedNorm):
    """Normalise each channel of each sample: `y = activation(scale * z + bias)`.

    Here `z = (x - mean) / sqrt(var + epsilon)`, where `mean` and `var` are those of one channel of one sample
    over the spatial axes (Ulyanov et al., 2016). With `track_stats` the running values follow their
    averages over the batch, as in `BatchNorm`, and take their place in test mode.

    **Arguments:**

    - `channels`: the number of channels.
    - `activation`: an elementwise function; `None` is the identity.
    - `affine`: whether there are `scale` and `bias`.
    - `track_stats`: whether there are running values; without them both modes are the same.
    - `epsilon`: added to the variance.
    - `momentum`: the weight of the newest batch in the running values.

    **Inputs:** `x` of shape `(batch, *spatial, channels)`, floating. **Returns:** `(y, st)` with `y` of
    the same shape.

    **Parameters:** `scale (channels,)`, `bias (channels,)`, if `affine`. **States:** `running_mean
    (channels,)`, `running_var (channels,)` and the flag `training`, if `track_stats`.

    **Raises:** `ValueError` for another number of channels, no batch axis, and a single number per channel
    and sample where the statistics of `x` are used.

    >>> import jax.numpy as jnp
    >>> import flatlayers as fl
    >>> fl.InstanceNorm(1)(jnp.array([[[1.0], [3.0]], [[10.0], [30.0]]]), {}, {})[0][..., 0].round(3)
    Array([[-1.,  1.],
           [-1.,  1.]], dtype=float32)
    """

    _: KW_ONLY
    affine: Flag = False
    track_stats: Flag = False

    def forward(self, x: Input, ps: Params, st: State) -> tuple[Output, State]:
        check_samples(x, self.channels)
        x = as_floating(x)
        found, st = tracked(self, x, tuple(range(1, x.ndim - 1)), st)
        return affine_map(self, x, found, ps), st


class LayerNorm(Layer):
    """Normalise the features of each sample: `y = activation(scale * z + bias)`.

    Here `z = (x - mean) / sqrt(var + epsilon)`, where `mean` and `var` are those of the last axes, those of
    `shape`, and never of the batch (Ba et al., 2016).

    **Arguments:**

    - `shape`: the shape of the features, an integer or a tuple.
    - `activation`: an elementwise function; `None` is the identity.
    - `affine`: whether there are `scale` and `bias`.
    - `epsilon`: added to the variance.

    **Inputs:** `x` of shape `(..., *shape)`, floating. **Returns:** `(y, st)` with `y` of the same shape.

    **Parameters:** `scale shape`, `bias shape`, if `affine`. **States:** none.

    **Raises:** `ValueError` for features of another shape, or a `shape` without an axis.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import flatlayers as fl
    >>> layer = fl.LayerNorm(2)
    >>> ps, st = fl.setup(jax.random.key(0), layer)
    >>> layer(jnp.array([[1.0, 3.0], [10.0, 30.0]]), ps, st)[0].round(3)
    Array([[-1.,  1.],
           [-1.,  1.]], dtype=float32)
    """

    shape: Sizes
    activation: Activation | None = None
    _: KW_ONLY
    affine: Flag = True
    epsilon: NonNegative = 1e-5

    def check_fields(self) -> None:
        check_has_axes(self)

    def parameters(self) -> dict[str, Param]:
        return scale_and_bias(as_dims(self.shape), self.affine)

    def forward(self, x: Input, ps: Params, st: State) -> tuple[Output, State]:
        check_trailing(x, as_dims(self.shape))
        y = normalize(x, axis=last_axes(self.shape), epsilon=self.epsilon)
        return finish(y, ps, self.affine, self.activation), st


class RMSNorm(Layer):
    """Divide features by their root mean square: `y = scale * x / sqrt(mean(x²) + epsilon)`.

    The mean is over the last axes, those of `shape`, and never over the batch (Zhang and Sennrich, 2019).

    **Arguments:**

    - `shape`: the shape of the features, an integer or a tuple.
    - `affine`: whether there is a `scale`.
    - `epsilon`: added to the mean square.

    **Inputs:** `x` of shape `(..., *shape)`, floating. **Returns:** `(y, st)` with `y` of the same shape.

    **Parameters:** `scale shape`, if `affine`. **States:** none.

    **Raises:** `ValueError` for features of another shape, or a `shape` without an axis.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import flatlayers as fl
    >>> layer = fl.RMSNorm(2)
    >>> ps, st = fl.setup(jax.random.key(0), layer)
    >>> layer(jnp.array([[1.0, 1.0], [-3.0, 3.0]]), ps, st)[0].round(3)
    Array([[ 1.,  1.],
           [-1.,  1.]], dtype=float32)
    """

    shape: Sizes
    _: KW_ONLY
    affine: Flag = True
    epsilon: NonNegative = 1e-5

    def check_fields(self) -> None:
        check_has_axes(self)

    def parameters(self) -> dict[str, Param]:
        return {"scale": Param(as_dims(self.shape), ones)} if self.affine else {}

    def forward(self, x: Input, ps: Params, st: State) -> tuple[Output, State]:
        check_trailing(x, as_dims(self.shape))
        x = as_floating(x)
        wide = x.astype(at_least_float32(x.dtype))
        square = jnp.mean(wide * wide, last_axes(self.shape), keepdims=True)
        y = (wide * jax.lax.rsqrt(square + self.epsilon)).astype(x.dtype)
        return along_last(ps.scale, y.ndim) * y if self.affine else y, st


def normalize(x: Input, *, axis: int | Sequence[int] = -1, epsilon: float = 1e-5) -> jax.Array:
    """Bring `x` to mean 0 and variance 1 along axes: `(x - mean) / sqrt(var + epsilon)`.

    **Arguments:**

    - `x`: a floating array.
    - `axis`: the axis or axes of which the mean and the biased variance are taken.
    - `epsilon`: added to the variance.

    **Returns:** an array of the same shape and dtype; half precisions compute in float32.

    **Raises:** `ValueError` for an axis that `x` does not have, `TypeError` if `x` is not floating.

    >>> import jax.numpy as jnp
    >>> import flatlayers as fl
    >>> fl.normalize(jnp.array([1.0, 3.0]), axis=0).round(3)
    Array([-1.,  1.], dtype=float32)
    """
    x = as_floating(x)
    axes = as_dims(axis)
    if any(not -x.ndim <= a < x.ndim for a in axes):
        raise ValueError(f"expected x with the axes {axes}, found shape {x.shape}")
    shift, rest, var = moments(x, axes)
    return ((x.astype(shift.dtype) - shift - rest) * jax.lax.rsqrt(var + epsilon)).astype(x.dtype)


# The name, or names, of mapped axes that the devices lie along.
Axis = str | tuple[str, ...] | None

# Moments


class Moments(NamedTuple):
    """A number near the mean of `x`, `shift`; the mean of what is left, `rest`; the biased variance.

    The mean is `shift + rest`, which a sum of large numbers does not give exactly: where it is large against
    the spread, neither `x - mean` nor `mean(x²) - mean²` has a digit left. Of `x - shift` both have them all.
    """

    shift: jax.Array
    rest: jax.Array
    var: jax.Array


def moments(x: jax.Array, axes: tuple[int, ...], axis_name: Axis = None) -> Moments:
    """The moments with axes of size 1 left in place, in float32 at least."""
    x = x.astype(at_least_float32(x.dtype))

    def average(x: jax.Array) -> jax.Array:
        mean = jnp.mean(x, axes, keepdims=True)
        return mean if axis_name is None else jax.lax.pmean(mean, axis_name)

    # Which number is subtracted makes no difference, and none to the derivatives.
    shift = jax.lax.stop_gradient(average(x))
    x = x - shift
    rest = average(x)
    return Moments(shift, rest, jnp.maximum(average(jnp.square(x)) - jnp.square(rest), 0.0))


def finish(y: jax.Array, ps: Params, affine: bool, activation: Activation | None) -> jax.Array:
    """Apply the scale, the bias and the activation."""
    if affine:
        y = along_last(ps.scale, y.ndim) * y + along_last(ps.bias, y.ndim)
    return activated(activation, y)


def scale_and_bias(shape: Shape, affine: bool) -> dict[str, Param]:
    return {"scale": Param(shape, ones), "bias": Param(shape, zeros)} if affine else {}


# Running values


def tracked(
    layer: AbstractTrackedNorm, x: jax.Array, axes: tuple[int, ...], st: State, axis_name: Axis = None
) -> tuple[Moments, Any]:
    """The moments of `x` and the state, whose running values follow them; in test mode these values."""
    if layer.track_stats and not st.training:
        dtype = at_least_float32(x.dtype)
        mean, var = (along_last(value.astype(dtype), x.ndim) for value in (st.running_mean, st.running_var))
        return Moments(mean, jnp.zeros_like(mean), var), st
    devices = 1 if axis_name is None else parts_of(axis_name)
    count = check_several(devices * math.prod(x.shape[a] for a in axes), x)
    found = moments(x, axes, axis_name)
    return found, follow(st, found, count, layer.momentum) if layer.track_stats else st


def affine_map(layer: AbstractTrackedNorm, x: jax.Array, found: Moments, ps: Params) -> jax.Array:
    """`activation(scale * (x - mean) / sqrt(var + epsilon) + bias)`, a line for each channel."""
    shift, rest, var = found
    slope, bias, dtype = jax.lax.rsqrt(var + layer.epsilon), jnp.zeros_like(rest), x.dtype
    if layer.affine:
        dtype = jnp.result_type(x, ps.scale)
        wide = jnp.result_type(shift, at_least_float32(ps.scale.dtype))
        shift, rest, slope, scale, bias = (
            along_last(part.astype(wide), x.ndim) for part in (shift, rest, slope, ps.scale, ps.bias)
        )
        slope = scale * slope
    # One pass over `x`, and one back, which subtracts again: what is left would be as much memory as `x`.
    y = jax.checkpoint(_line)(x, shift, slope, bias - rest * slope).astype(dtype)
    return activated(layer.activation, y)


def _line(x: jax.Array, shift: jax.Array, slope: jax.Array, offset: jax.Array) -> jax.Array:
    return (x.astype(shift.dtype) - shift) * slope + offset


def follow(st: Record, found: Moments, count: int, momentum: float) -> Record:
    """The state with the running values moved towards the moments of `count` numbers per channel."""

    def moved(old: jax.Array, new: jax.Array) -> jax.Array:
        # No gradient passes from call to call: the running values are not differentiated.
        batch = jax.lax.stop_gradient(jnp.mean(new, tuple(range(new.ndim - 1)))).astype(old.dtype)
        return (1 - momentum) * old + momentum * batch

    unbiased = count / (count - 1) * found.var
    return st.replace(
        running_mean=moved(st.running_mean, found.shift + found.rest),
        running_var=moved(st.running_var, unbiased),
    )


# Checks


def check_several(count: int, x: jax.Array) -> int:
    """The number of values that each statistic is of. **Raises:** `ValueError` unless there are several."""
    if count < 2:
        raise ValueError(
            f"expected more than one value for each mean and variance, found {count} in x of shape {x.shape}"
        )
    return count


def check_samples(x: Input, channels: int) -> None:
    shape = jnp.shape(x)
    if len(shape) < 2 or shape[-1] != channels:
        raise ValueError(f"expected x of shape (batch, ..., {channels}), found shape {shape}")


def check_has_axes(layer: LayerNorm | RMSNorm) -> None:
    if not as_dims(layer.shape):
        where = f"{type(layer).__name__}.shape"
        raise ValueError(f"{where}: expected a shape with at least one axis, found {layer.shape}")


def last_axes(shape: int | tuple[int, ...]) -> tuple[int, ...]:
    return tuple(range(-len(as_dims(shape)), 0))
