"""Layers that drop numbers at random."""

from collections.abc import Sequence
from dataclasses import KW_ONLY
from typing import Any

import jax
import jax.numpy as jnp

from ..core.layer import Layer


class Dropout(Layer):
    """Set numbers to zero with probability `p` in training, and scale the others by `1 / (1 - p)`.

    In test mode it is the identity (Srivastava et al., 2014).

    **Arguments:**

    - `p`: the probability; 0 is the identity, 1 gives zeros.
    - `axis`: the axis or axes along which the mask varies; along the others it is the same. `None`
        means all.

    **Inputs:** `x`, a floating array. **Returns:** `(y, st)` with `y` of the same shape.

    **Parameters:** none. **States:** `key`, split at each use in training, and the flag `training`;
    none if `p` is 0.

    **Raises:** `ValueError` for a `p` that is no probability or an axis that `x` does not have.

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

    p: float
    _: KW_ONLY
    axis: int | tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.p <= 1:
            raise ValueError(f"expected a probability p from 0 to 1, found {self.p}")

    def states(self, key: jax.Array) -> dict[str, Any]:
        return {"key": key, "training": True} if self.p else {}

    def forward(self, x: Any, ps: Any, st: Any) -> tuple[Any, Any]:
        if self.p == 0 or not st.training:
            return x, st
        key, mask_key = jax.random.split(st.key)
        return drop(mask_key, jnp.asarray(x), self.p, self.axis), st.replace(key=key)


def drop(key: jax.Array, x: jax.Array, p: float, axis: int | Sequence[int] | None) -> jax.Array:
    """`x` with numbers dropped. The mask is drawn in the dtype of `x`."""
    keep = jax.random.uniform(key, mask_shape(x.shape, axis), x.dtype) >= p
    scale = 1 / (1 - p) if p < 1 else 0.0
    return jnp.where(keep, scale * x, jnp.zeros_like(x))


def mask_shape(shape: tuple[int, ...], axis: int | Sequence[int] | None) -> tuple[int, ...]:
    if axis is None:
        return shape
    axes = (axis,) if isinstance(axis, int) else axis
    if any(not -len(shape) <= a < len(shape) for a in axes):
        raise ValueError(f"expected x with the axes {tuple(axes)}, found shape {shape}")
    varies = {a % len(shape) for a in axes}
    return tuple(size if i in varies else 1 for i, size in enumerate(shape))
