"""Operators between functions: networks whose input and output are functions, on a grid or at points."""

import functools
from collections.abc import Mapping
from dataclasses import KW_ONLY
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..core.composite import Container
from ..core.declaration import Param
from ..core.fields import Count, Flag, NonNegative, Size
from ..core.layer import Layer
from ..dtypes import as_floating, in_common_dtype
from ..initializers import zeros
from ..types import Input, Output, Params, Shape, State
from .containers import child_named
from .ending import plus_bias
from .fields import Activation, AnyLayer, Initial, Sizes
from .mlp import MLP
from .shapes import as_dims, check_count
from .spectral import FourierLayer, check_grid, check_modes


class FourierNeuralOperator(Container):
    """A Fourier neural operator: `y = projection(layer_n(... layer_0(lifting(x))))`.

    It maps functions on a periodic grid to functions on the same grid. `lifting` and `projection` are `MLP`s
    at each point with one hidden layer, the others are `FourierLayer`s, the last one without activation. All
    are independent of the size of the grid: trained on one, it is evaluated on another as it is.

    It is the `FNO` of PyTorch's neuraloperator with `use_channel_mlp=False`, from the same numbers of
    parameters, but for the activation of a Fourier layer: that one applies it twice (version 2.0).

    **Arguments:**

    - `modes`: how many frequencies are kept along each spatial axis, an integer or a tuple of 1 to 3, as in
        `SpectralConv`.
    - `in_channels`, `hidden_channels`, `out_channels`: the numbers of channels of `x`, between the Fourier
        layers and of `y`.
    - `layers`: the number of Fourier layers.
    - `activation`: an elementwise function; `None` is the identity.
    - `norm`: a layer or a function in each Fourier layer, before its activation.
    - `grid`: whether the coordinates of the points are appended to the channels of `x`, one for each axis:
        `i / n` for the point `i` of `n`, in `[0, 1)`. So a point has the same coordinates at every
        resolution, as in neuraloperator.
    - `lifting_channel_ratio`, `projection_channel_ratio`: the widths of the hidden layers of `lifting` and
        `projection` are so many times `hidden_channels`. With 0 they are a single `Dense` without activation.

    **Inputs:** `x` of shape `(..., *spatial, in_channels)`, floating, with any number of batch axes.
    **Returns:** `(y, st)` with `y` of shape `(..., *spatial, out_channels)`.

    **Parameters:** those of `lifting`, of `layer_0`, `layer_1`, ... and of `projection`. **States:** those of
    the norms.

    **Raises:** `ValueError` and `TypeError` as `SpectralConv` does.

    Li et al., Fourier Neural Operator for Parametric Partial Differential Equations, 2021.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import flatlayers as fl
    >>> model = fl.FourierNeuralOperator(16, 1, 24, 1)
    >>> ps, st = fl.setup(jax.random.key(0), model)
    >>> [model(jnp.ones((5, n, 1)), ps, st)[0].shape for n in (64, 128)]
    [(5, 64, 1), (5, 128, 1)]
    """

    modes: Sizes
    in_channels: Size
    hidden_channels: Size
    out_channels: Size
    layers: Count = 4
    _: KW_ONLY
    activation: Activation | None = jax.nn.gelu
    norm: AnyLayer | None = None
    grid: Flag = True
    lifting_channel_ratio: NonNegative = 2.0
    projection_channel_ratio: NonNegative = 2.0

    def check_fields(self) -> None:
        check_modes(self)

    @functools.cached_property
    def _layers(self) -> dict[str, Layer]:
        width = self.hidden_channels
        channels = self.in_channels + (len(as_dims(self.modes)) if self.grid else 0)
        fourier = [
            FourierLayer(self.modes, width, width, activation, norm=self.norm)
            for activation in [*[self.activation] * (self.layers - 1), None][: self.layers]
        ]
        return {
            "lifting": self._pointwise(channels, self.lifting_channel_ratio, width),
            **{f"layer_{i}": layer for i, layer in enumerate(fourier)},
            "projection": self._pointwise(width, self.projection_channel_ratio, self.out_channels),
        }

    def _pointwise(self, channels: int, ratio: float, out_channels: int) -> MLP:
        hidden = int(ratio * self.hidden_channels)
        return MLP(channels, (hidden,) if hidden else (), out_channels, self.activation)

    def __getattr__(self, name: str) -> Layer:
        return child_named(self, self._layers if "_ready" in self.__dict__ else {}, name)

    def children(self) -> Mapping[str, Any]:
        return self._layers

    def forward(self, x: Input, ps: Params, st: State) -> tuple[Output, State]:
        sizes = check_grid(x, len(as_dims(self.modes)), self.in_channels)
        x = as_floating(x)
        if self.grid:
            x = with_coordinates(x, sizes)
        for name, layer in self._layers.items():
            x, new = layer(x, getattr(ps, name), st[name])
            st = st.replace(**{name: new})
        return x, st


class DeepONet(Container):
    """A deep operator network: `y(p) = sum_j branch(u)_j trunk(p)_j + bias`.

    It maps a function `u`, known by its values at fixed sensors, to a function of points `p`, which may be
    any. With several outputs, each has its own group of neighbouring features: of `branch` and `trunk` both,
    if they have the same number; of the one that has `out_dims` times as many, if they have not, and the
    other is shared. In DeepXDE they are "split_both", "split_branch" and "split_trunk".

    **Arguments:**

    - `branch`: a layer of the function, `(..., sensors)` to `(..., features)`. It may have another input,
        such as `(..., n, channels)` for an `fl.Chain` of convolutions.
    - `trunk`: a layer of the points, `(..., d)` to `(..., features)`.
    - `out_dims`: the number of outputs at each point.
    - `use_bias`: whether there is a bias.
    - `init_bias`: its initializer.

    **Inputs:** a pair `(u, points)`: `u` of shape `(..., sensors)`, `points` of shape `(n, d)`, the same for
    all functions, or `(..., n, d)` with the batch axes of `u`. **Returns:** `(y, st)` with `y` of shape
    `(..., n, out_dims)`.

    **Parameters:** those of `branch` and `trunk`; `bias (out_dims,)`. **States:** those of both.

    **Raises:** `ValueError` for an input that is no pair, for points with other batch axes than `u`, and for
    features that do not fit each other or `out_dims`.

    Lu et al., Learning nonlinear operators via DeepONet based on the universal approximation theorem of
    operators, 2021.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import flatlayers as fl
    >>> model = fl.DeepONet(fl.MLP(50, (40,), 20), fl.MLP(2, (40,), 20))
    >>> ps, st = fl.setup(jax.random.key(0), model)
    >>> u, points = jnp.ones((5, 50)), jnp.ones((100, 2))
    >>> model((u, points), ps, st)[0].shape
    (5, 100, 1)
    """

    branch: AnyLayer
    trunk: AnyLayer
    _: KW_ONLY
    out_dims: Size = 1
    use_bias: Flag = True
    init_bias: Initial = zeros

    def parameters(self) -> Mapping[str, Any]:
        bias = {"bias": Param((self.out_dims,), self.init_bias)} if self.use_bias else {}
        return {**super().parameters(), **bias}

    def forward(self, x: Input, ps: Params, st: State) -> tuple[Output, State]:
        check_count(len(x) if isinstance(x, tuple | list) else 1, 2, "function and its points")
        u, points = x
        b, branch = self.branch(u, ps.branch, st.branch)
        t, trunk = self.trunk(points, ps.trunk, st.trunk)
        b, t = in_common_dtype(b, t)
        lead = shared_or_own(t.shape, b.shape, jnp.shape(points))
        b, t, groups = self._in_groups(b, t)
        y = jnp.einsum(f"...{groups[0]}j,{lead}n{groups[1]}j->...no", b, t)
        return plus_bias(self, y, ps), st.replace(branch=branch, trunk=trunk)

    def _in_groups(self, b: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array, tuple[str, str]]:
        """The features with an axis `o` of the outputs, and that axis' letter where they have one."""
        n, k, found = self.out_dims, b.shape[-1], t.shape[-1]
        same, more, fewer = k == found and k % n == 0, k == n * found, found == n * k
        if not (same or more or fewer):
            raise ValueError(
                f"expected branch and trunk with the same number of features, a multiple of {n}, or one with "
                f"{n} times as many as the other, found {k} and {found}"
            )
        has = (same or more, same or fewer)
        b, t = (
            x.reshape(*x.shape[:-1], n, x.shape[-1] // n) if split else x
            for x, split in zip((b, t), has, strict=True)
        )
        return b, t, ("o" if has[0] else "", "o" if has[1] else "")


def with_coordinates(x: jax.Array, sizes: tuple[int, ...]) -> jax.Array:
    """Append the coordinates `i / n` of each spatial axis to the channels."""
    axes = range(x.ndim - 1 - len(sizes), x.ndim - 1)
    shape = (*x.shape[:-1], 1)
    coordinates = [
        jax.lax.broadcast_in_dim(jnp.asarray(np.arange(n) / n, x.dtype), shape, (axis,))
        for axis, n in zip(axes, sizes, strict=True)
    ]
    return jnp.concatenate([x, *coordinates], axis=-1)


def shared_or_own(t: Shape, b: Shape, points: Shape) -> str:
    """Return the batch axes of the points for an `einsum`: none, or those of the functions."""
    batch = b[:-1]
    if len(t) == 2:
        return ""
    if len(t) < 2 or t[:-2] != batch:
        own = f" or ({', '.join(map(str, batch))}, n, d)" if batch else ""
        raise ValueError(f"expected points of shape (n, d){own}, found shape {points}")
    return "..."
