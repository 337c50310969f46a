"""Layers that drop numbers at random."""

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from ..core.fields import checked
from ..core.layer import Layer
from ..dtypes import as_floating, as_inexact, at_least_float32, real_dtype
from ..types import Input, Key, Output, Params, Shape, State
from .fields import Axes, Probability
from .shapes import as_dims


# The limit of SELU for large negative numbers: -lambda * alpha.
SELU_LIMIT = -1.0507009873554805 * 1.6732632423543772


class AbstractDropout(Layer):
    """The base of dropouts: the identity in test mode and for the probability 0."""

    p: Probability

    def states(self, key: Key) -> dict[str, Any]:
        return {"key": key, "training": True} if self.p else {}

    def forward(self, x: Input, ps: Params, st: State) -> tuple[Output, State]:
        return (x, st) if self.p == 0 or not st.training else self.drop(x, st)

    def drop(self, x: Input, st: State) -> tuple[jax.Array, State]:
        """Drop numbers of `x` at random; called in training alone."""
        raise TypeError(f"{type(self).__name__} does not define `drop(self, x, st)`")


class Dropout(AbstractDropout):
    """Set numbers to zero with probability `p` in training, and scale the others by `1 / (1 - p)`.

    In test mode it is the identity (Srivastava et al., 2014).

    **Arguments:**

    - `p`: the probability; 0 is the identity, 1 gives zeros.
    - `axis`: the axis or axes along which the mask varies; along the others it is the same. `None`
        means all.

    **Inputs:** `x`, a floating array. **Returns:** `(y, st)` with `y` of the same shape; a NaN stays one.

    **Parameters:** none. **States:** `key`, split at each use in training, and the flag `training`;
    none if `p` is 0.

    **Raises:** `ValueError` for a `p` that is no probability or an axis that `x` does not have;
    `TypeError` for an `x` of integers, in training.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import flatlayers as fl
    >>> layer = fl.Dropout(0.5)
    >>> ps, st = fl.setup(jax.random.key(0), layer)
    >>> sorted(set(layer(jnp.ones(100), ps, st)[0].tolist()))
    [0.0, 2.0]
    >>> float(layer(jnp.ones(100), ps, fl.testmode(st))[0].sum())
    100.0
    """

    _: KW_ONLY
    axis: Axes | None = None

    def drop(self, x: Input, st: State) -> tuple[jax.Array, State]:
        key, mask_key = jax.random.split(st.key)
        return dropout(mask_key, x, self.p, axis=self.axis), st.replace(key=key)


class AlphaDropout(AbstractDropout):
    """Dropout that keeps mean 0 and variance 1: `y = a * x + b` or, with probability `p`, `a * limit + b`.

    `limit = -1.7581` is what SELU has for large negative numbers; `a` and `b` follow from `p`. It goes with
    SELU networks, whose activations have mean 0 and variance 1. In test mode it is the identity
    (Klambauer et al., 2017).

    **Arguments:**

    - `p`: the probability; 0 is the identity, 1 gives zeros.

    **Inputs:** `x`, a floating array. **Returns:** `(y, st)` with `y` of the same shape; a NaN stays one.

    **Parameters:** none. **States:** `key`, split at each use in training, and the flag `training`;
    none if `p` is 0.

    **Raises:** `ValueError` for a `p` that is no probability.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import flatlayers as fl
    >>> layer = fl.AlphaDropout(0.5)
    >>> ps, st = fl.setup(jax.random.key(0), layer)
    >>> x = jax.random.normal(jax.random.key(1), (100_000,))
    >>> y, st = layer(x, ps, st)
    >>> abs(float(y.mean())) < 0.02, abs(float(y.var()) - 1) < 0.02
    (True, True)
    """

    def drop(self, x: Input, st: State) -> tuple[jax.Array, State]:
        key, mask_key = jax.random.split(st.key)
        x, keep = as_floating(x), 1 - self.p
        a = 1 / math.sqrt(keep * (1 + self.p * SELU_LIMIT**2)) if keep else 0.0
        kept = draw_mask(mask_key, x, self.p).astype(x.dtype)
        # As a product: a NaN stays one.
        y = a * (kept * x + (1 - kept) * SELU_LIMIT) - a * self.p * SELU_LIMIT
        return y, st.replace(key=key)


class VariationalHiddenDropout(AbstractDropout):
    """Dropout with one mask for many calls, such as the steps of a recurrent network.

    The first call in training draws the mask, and each later one uses it again, until
    `fl.update_state(st, "update_mask", True)` asks for a new one. In test mode it is the identity
    (Gal and Ghahramani, 2016).

    **Arguments:**

    - `p`: the probability; 0 is the identity, 1 gives zeros.
    - `axis`: the axis or axes along which the mask varies; along the others it is the same. `None`
        means all.

    **Inputs:** `x`, a floating array. **Returns:** `(y, st)` with `y` of the same shape; a NaN stays one.

    **Parameters:** none. **States:** `key`, split when a mask is drawn; the flags `training` and
    `update_mask`; and `mask`, which is `None` until the first call in training and then a boolean array: the
    state changes its type. None if `p` is 0.

    **Raises:** `ValueError` for a `p` that is no probability, an axis that `x` does not have, or an `x` that
    the mask does not fit.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import flatlayers as fl
    >>> layer = fl.VariationalHiddenDropout(0.5)
    >>> ps, st = fl.setup(jax.random.key(0), layer)
    >>> one, st = layer(jnp.ones(100), ps, st)
    >>> two, st = layer(jnp.ones(100), ps, st)
    >>> new, st = layer(jnp.ones(100), ps, fl.update_state(st, "update_mask", True))
    >>> bool((one == two).all()), bool((one == new).all())
    (True, False)
    """

    keeps_state_type: ClassVar[bool] = False

    _: KW_ONLY
    axis: Axes | None = None

    def states(self, key: Key) -> dict[str, Any]:
        return {**super().states(key), "update_mask": True, "mask": None} if self.p else {}

    def drop(self, x: Input, st: State) -> tuple[jax.Array, State]:
        x = as_inexact(x)
        if st.update_mask or st.mask is None:
            key, mask_key = jax.random.split(st.key)
            st = st.replace(key=key, mask=draw_mask(mask_key, x, self.p, self.axis), update_mask=False)
        elif st.mask.shape != (expected := mask_shape(x.shape, self.axis)):
            raise ValueError(
                f"expected a mask of shape {expected} for x of shape {x.shape}, found {st.mask.shape}; "
                '`fl.update_state(st, "update_mask", True)` has a new one drawn'
            )
        return scale_kept(x, st.mask, self.p), st


def dropout(
    key: Key, x: Input, p: float, *, axis: int | Sequence[int] | None = None, training: bool = True
) -> jax.Array:
    """Set numbers to zero with probability `p`, and scale the others by `1 / (1 - p)`.

    **Arguments:**

    - `key`: a PRNG key. The same key drops the same numbers.
    - `x`: a floating array.
    - `p`: the probability, a number; 0 is the identity, 1 gives zeros.
    - `axis`: the axis or axes along which the mask varies; along the others it is the same. `None`
        means all.
    - `training`: the identity if it is false.

    **Returns:** an array of the same shape and dtype.

    **Raises:** `ValueError` for a `p` that is no probability or an axis that `x` does not have;
    `TypeError` for an `x` of integers, in training.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import flatlayers as fl
    >>> sorted(set(fl.dropout(jax.random.key(0), jnp.ones(100), 0.5).tolist()))
    [0.0, 2.0]
    """
    p = checked(Probability, "dropout: p", p)
    if not (training and p):
        return jnp.asarray(x)
    x = as_inexact(x)
    return scale_kept(x, draw_mask(key, x, p, axis), p)


def draw_mask(key: Key, x: jax.Array, p: float, axis: int | Sequence[int] | None = None) -> jax.Array:
    """Draw which numbers are kept, in float32 at least: a half precision cannot tell small probabilities."""
    return jax.random.uniform(key, mask_shape(x.shape, axis), at_least_float32(real_dtype(x.dtype))) >= p


def scale_kept(x: jax.Array, keep: jax.Array, p: float) -> jax.Array:
    # As a product: a NaN stays one where it is dropped, too.
    return x * (keep.astype(x.dtype) * (1 / (1 - p) if p < 1 else 0.0))


def mask_shape(shape: Shape, axis: int | Sequence[int] | None) -> tuple[int, ...]:
    if axis is None:
        return shape
    axes = as_dims(axis)
    if any(not -len(shape) <= a < len(shape) for a in axes):
        raise ValueError(f"expected x with the axes {axes}, found shape {shape}")
    varies = {a % len(shape) for a in axes}
    return tuple(size if i in varies else 1 for i, size in enumerate(shape))
