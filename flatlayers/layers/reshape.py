"""Layers that change the shape and nothing else."""

import math
from typing import Annotated

import jax
import jax.numpy as jnp

from ..core.fields import Check, Count, Integer, checked, integer
from ..core.layer import Layer
from ..types import Input, Output, Params, State
from .shapes import as_dims


# -1 stands for what is left.
SampleSize = Annotated[int, Check("a size (or -1 once)", integer(-1).accept)]


class NoOpLayer(Layer):
    """The identity: `y = x`.

    **Inputs:** anything. **Returns:** `(x, st)`. **Parameters and states:** none.

    >>> import flatlayers as fl
    >>> fl.NoOpLayer()(3, {}, {})[0]
    3
    """

    def forward(self, x: Input, ps: Params, st: State) -> tuple[Output, State]:
        return x, st


class ReshapeLayer(Layer):
    """Reshape all axes but the leading batch axis.

    **Arguments:**

    - `shape`: the new shape of each sample; one size may be -1.

    **Inputs:** `x` of shape `(batch, ...)`. **Returns:** `(y, st)` with `y` of shape `(batch, *shape)`.
    **Parameters and states:** none.

    **Raises:** `ValueError` for two sizes of -1 and, in the call, if the numbers of a sample do not fit.

    >>> import jax.numpy as jnp
    >>> import flatlayers as fl
    >>> fl.ReshapeLayer((2, 3))(jnp.ones((5, 6)), {}, {})[0].shape
    (5, 2, 3)
    """

    shape: SampleSize | tuple[SampleSize, ...]

    def check_fields(self) -> None:
        sizes = as_dims(self.shape)
        if sizes.count(-1) > 1:
            raise ValueError(f"ReshapeLayer.shape: expected one size of -1 at most, found {sizes}")
        self.shape = sizes

    def forward(self, x: Input, ps: Params, st: State) -> tuple[Output, State]:
        x = jnp.asarray(x)
        sizes = as_dims(self.shape)
        size, known = math.prod(x.shape[1:]), math.prod(n for n in sizes if n != -1)
        fits = size == known if -1 not in sizes else known > 0 and size % known == 0
        if x.ndim == 0 or not fits:
            raise ValueError(
                f"expected x of shape (batch, ...) with samples that fit {self.shape}, found shape {x.shape}"
            )
        return x.reshape(x.shape[0], *sizes), st


class FlattenLayer(Layer):
    """Flatten all axes but the leading ones.

    **Arguments:**

    - `keep`: how many leading axes are kept: 1, the batch axis, unless given.

    **Inputs:** `x` with at least `keep` axes. **Returns:** `(y, st)` with `y` of `keep + 1` axes.
    **Parameters and states:** none.

    **Raises:** `ValueError` for fewer axes.

    >>> import jax.numpy as jnp
    >>> import flatlayers as fl
    >>> fl.FlattenLayer()(jnp.ones((5, 2, 3)), {}, {})[0].shape
    (5, 6)
    """

    keep: Count = 1

    def forward(self, x: Input, ps: Params, st: State) -> tuple[Output, State]:
        return flatten(x, keep=self.keep), st


def flatten(x: Input, *, keep: int = 1) -> jax.Array:
    """Flatten all axes but the leading ones.

    **Arguments:**

    - `x`: an array with at least `keep` axes.
    - `keep`: how many leading axes are kept: 1, the batch axis, unless given.

    **Returns:** an array of `keep + 1` axes.

    **Raises:** `ValueError` for fewer axes.

    >>> import jax.numpy as jnp
    >>> import flatlayers as fl
    >>> fl.flatten(jnp.ones((5, 2, 3))).shape
    (5, 6)
    """
    x, keep = jnp.asarray(x), checked(Count, "flatten: keep", keep)
    if x.ndim < keep:
        raise ValueError(f"expected x with at least {keep} axes, found shape {x.shape}")
    return x.reshape(*x.shape[:keep], math.prod(x.shape[keep:]))


class SelectDim(Layer):
    """One index along an axis: `y = x[..., index, ...]`.

    **Arguments:**

    - `axis`: the axis, which is removed.
    - `index`: the index along it. Both may be negative.

    **Inputs:** `x`, an array. **Returns:** `(y, st)`, `y` with one axis less.
    **Parameters and states:** none.

    **Raises:** `ValueError` if `x` has no such axis or index.

    >>> import jax.numpy as jnp
    >>> import flatlayers as fl
    >>> fl.SelectDim(-1, 0)(jnp.ones((5, 3)), {}, {})[0].shape
    (5,)
    """

    axis: Integer
    index: Integer

    def forward(self, x: Input, ps: Params, st: State) -> tuple[Output, State]:
        x = jnp.asarray(x)
        check_axis(x, self.axis)
        size = x.shape[self.axis]
        if not -size <= self.index < size:
            raise ValueError(
                f"expected x with an index {self.index} along axis {self.axis}, found shape {x.shape}"
            )
        return jax.lax.index_in_dim(x, self.index, self.axis, keepdims=False), st


class ReverseSequence(Layer):
    """The same array backwards along an axis: `y[i] = x[n - 1 - i]`.

    **Arguments:**

    - `axis`: the axis; -2, the time axis of `(..., time, features)`, unless given.

    **Inputs:** `x`, an array. **Returns:** `(y, st)` with `y` of the same shape.
    **Parameters and states:** none.

    **Raises:** `ValueError` if `x` has no such axis.

    >>> import jax.numpy as jnp
    >>> import flatlayers as fl
    >>> fl.ReverseSequence(0)(jnp.arange(3.0), {}, {})[0]
    Array([2., 1., 0.], dtype=float32)
    """

    axis: Integer = -2

    def forward(self, x: Input, ps: Params, st: State) -> tuple[Output, State]:
        x = jnp.asarray(x)
        check_axis(x, self.axis)
        return jnp.flip(x, self.axis), st


def check_axis(x: jax.Array, axis: int) -> None:
    if not -x.ndim <= axis < x.ndim:
        raise ValueError(f"expected x with an axis {axis}, found shape {x.shape}")
