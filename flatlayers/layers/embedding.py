"""Layers that turn indices, angles and images into features."""

import math
from dataclasses import KW_ONLY
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np

from ..core.declaration import Param
from ..core.fields import Flag, Integer, Positive, Size
from ..core.layer import Layer
from ..dtypes import floating, is_traced
from ..initializers import glorot_uniform, normal, zeros
from ..types import Input, Output, Params, State
from ..vectors.names import describe
from .ending import plus_bias, weight_and_bias
from .fields import Initial, Sizes, sequence_of
from .shapes import along_last, as_dims, check_count, check_trailing


class Embedding(Layer):
    """A row of a table for each index: `y = weight[x]`.

    **Arguments:**

    - `vocab`: the number of indices; a tuple for a table with several index axes.
    - `dims`: the number of output features.
    - `init_weight`: the initializer.

    **Inputs:** `x`, integers of any shape `(...)`; or one-hot rows of shape `(..., vocab)`, floating or
    bool, with the same result. With a tuple `vocab`, a tuple of integer arrays of one shape, an array for
    each of its sizes. **Returns:** `(y, st)` with `y` of shape `(..., dims)`.

    **Parameters:** `weight (vocab, dims)`, or `(*vocab, dims)`. **States:** none.

    **Raises:** `ValueError` for indices outside of 0 to `vocab - 1` where the values are known; under
    `jax.jit` they are not, and the row is of NaN. `ValueError` too for one-hot rows of another
    length and for a tuple of another length or of arrays with different shapes; `TypeError` for an input
    of another kind.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import flatlayers as fl
    >>> layer = fl.Embedding(10, 4)
    >>> ps, st = fl.setup(jax.random.key(0), layer)
    >>> layer(jnp.array([[1, 2, 3]]), ps, st)[0].shape
    (1, 3, 4)
    """

    vocab: Sizes
    dims: Size
    _: KW_ONLY
    init_weight: Initial = normal

    def parameters(self) -> dict[str, Param]:
        return {"weight": Param((*as_dims(self.vocab), self.dims), self.init_weight)}

    def forward(self, x: Input, ps: Params, st: State) -> tuple[Output, State]:
        if not isinstance(self.vocab, tuple):
            x = jnp.asarray(x)
            if jnp.issubdtype(x.dtype, jnp.floating) or x.dtype == bool:
                check_trailing(x, (self.vocab,))
                return (x.astype(ps.weight.dtype) if x.dtype == bool else x) @ ps.weight, st
        indices = self._indices(x)
        # NaN for an index outside: no row is right there.
        return ps.weight.at[indices].get(mode="fill", wrap_negative_indices=False), st

    def _indices(self, x: Input) -> tuple[jax.Array, ...]:
        sizes = as_dims(self.vocab)
        if isinstance(self.vocab, tuple):
            if not isinstance(x, tuple):
                raise TypeError(f"expected a tuple of {len(sizes)} index arrays, found {describe(x)}")
            check_count(len(x), len(sizes), "size of the vocabulary")
        parts = tuple(map(jnp.asarray, x if isinstance(x, tuple) else (x,)))
        if len({part.shape for part in parts}) > 1:
            raise ValueError(f"expected index arrays of one shape, found {describe(parts)}")
        for part, size in zip(parts, sizes, strict=True):
            _check_indices(part, size)
        return parts


def _check_indices(x: jax.Array, size: int) -> None:
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise TypeError(f"expected integer indices, found {describe(x)}")
    if is_traced(x) or x.size == 0:
        return
    values = np.asarray(x)
    outside = values[(values < 0) | (values >= size)]
    if outside.size:
        raise ValueError(f"expected indices from 0 to {size - 1}, found {outside[0]}")


class PeriodicEmbedding(Layer):
    """Some features as points on a circle: `x_i` becomes `sin(2 pi x_i / p_i)` and `cos(2 pi x_i / p_i)`.

    The layers that follow are then periodic and smooth in them. The other features come first, as they are;
    then all sines, then all cosines.

    **Arguments:**

    - `indices`: which features are periodic, a tuple of integers.
    - `periods`: their periods, as many.

    **Inputs:** `x` of shape `(..., features)`. **Returns:** `(y, st)` with `y` of shape
    `(..., features + len(indices))`.

    **Parameters and states:** none.

    **Raises:** `ValueError` for another number of periods, a period that is not positive, and a feature
    that `x` does not have or that is named twice.

    >>> import jax.numpy as jnp
    >>> import flatlayers as fl
    >>> layer = fl.PeriodicEmbedding((1,), (4.0,))
    >>> print(layer(jnp.array([7.0, 0.0]), {}, {})[0])
    [7. 0. 1.]
    """

    indices: Annotated[tuple[int, ...], sequence_of(Integer)]
    periods: Annotated[tuple[float, ...], sequence_of(Positive)]

    def check_fields(self) -> None:
        if len(self.periods) != len(self.indices):
            raise ValueError(
                f"PeriodicEmbedding.periods: expected {len(self.indices)} periods, one an index, "
                f"found {len(self.periods)}"
            )

    def forward(self, x: Input, ps: Params, st: State) -> tuple[Output, State]:
        x = floating(x)
        size = x.shape[-1] if x.ndim else 0
        chosen = [i % size for i in self.indices if -size <= i < size]
        if len(set(chosen)) < len(self.indices):
            raise ValueError(f"expected x with different features {self.indices}, found shape {x.shape}")
        others = [i for i in range(size) if i not in chosen]
        rates = jnp.asarray([2 * math.pi / period for period in self.periods], x.dtype)
        angles = along_last(rates, x.ndim) * x[..., np.array(chosen, int)]
        parts = [x[..., np.array(others, int)], jnp.sin(angles), jnp.cos(angles)]
        return jnp.concatenate(parts, axis=-1), st


class PatchEmbedding(Layer):
    """Cut an image into patches and map each to a vector: `y_p = weight . patch_p + bias`.

    It equals `CrossCor(patch, in_channels, dims, stride=patch)` with the places in one row, row-major
    (Dosovitskiy et al., 2021).

    **Arguments:**

    - `patch`: the height and width of a patch, a pair or one number for both.
    - `in_channels`: the number of channels of the image.
    - `dims`: the number of output features.
    - `use_bias`: whether there is a bias.
    - `init_weight`, `init_bias`: their initializers.

    **Inputs:** `x` of shape `(..., height, width, in_channels)`. **Returns:** `(y, st)` with `y` of shape
    `(..., patches, dims)`.

    **Parameters:** `weight (*patch, in_channels, dims)`, `bias (dims,)`. **States:** none.

    **Raises:** `ValueError` for another number of channels or a size that the patch does not divide.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import flatlayers as fl
    >>> layer = fl.PatchEmbedding(4, 3, 16)
    >>> ps, st = fl.setup(jax.random.key(0), layer)
    >>> layer(jnp.ones((5, 8, 12, 3)), ps, st)[0].shape
    (5, 6, 16)
    """

    patch: Size | tuple[Size, Size]
    in_channels: Size
    dims: Size
    _: KW_ONLY
    use_bias: Flag = True
    init_weight: Initial = glorot_uniform
    init_bias: Initial = zeros

    def check_fields(self) -> None:
        if not isinstance(self.patch, tuple):
            self.patch = (self.patch, self.patch)

    def parameters(self) -> dict[str, Param]:
        shape = (*as_dims(self.patch), self.in_channels, self.dims)
        fan_in = math.prod(shape[:-1])
        weight = Param(shape, self.init_weight, fan_in=fan_in, fan_out=self.dims)
        return weight_and_bias(self, weight, (self.dims,))

    def forward(self, x: Input, ps: Params, st: State) -> tuple[Output, State]:
        x = jnp.asarray(x)
        rows, columns = as_dims(self.patch)
        if x.ndim < 3 or x.shape[-1] != self.in_channels or x.shape[-3] % rows or x.shape[-2] % columns:
            raise ValueError(
                f"expected x of shape (..., height, width, {self.in_channels}) that patches of "
                f"{rows} x {columns} divide, found shape {x.shape}"
            )
        *lead, height, width, channels = x.shape
        down, across = height // rows, width // columns
        x = x.reshape(*lead, down, rows, across, columns, channels).swapaxes(-4, -3)
        y = x.reshape(*lead, down * across, rows * columns * channels) @ ps.weight.reshape(-1, self.dims)
        return plus_bias(self, y, ps), st
