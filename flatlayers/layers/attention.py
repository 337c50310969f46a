"""Attention: each token takes in a weighted mean of others."""

import functools
import math
from dataclasses import KW_ONLY
from typing import Any

import jax
import jax.numpy as jnp

from ..core.composite import Container
from ..core.fields import Flag, Size
from ..dtypes import as_floating, at_least_float32, in_common_dtype
from ..types import Array, ArrayLike, Input, Output, Params, Shape, State
from .dense import Dense
from .dropout import Dropout
from .fields import Probability
from .shapes import broadcasts_to


class MultiHeadAttention(Container):
    """Attention with several heads: `y = out_proj([head_1, head_2, ...])` (Vaswani et al., 2017).

    Each head is `softmax(q k' / sqrt(d)) v`, with its part of `d` features of the projected queries and keys.

    **Arguments:**

    - `dims`: the number of features of `q`, `k` and `v`, or a tuple of three numbers.
    - `heads`: the number of heads; it divides `qk_dims` and `v_dims`.
    - `dropout`: the probability of `Dropout` on the weights, after the softmax.
    - `causal`: whether token `i` of the queries sees the keys 0 to `i` only.
    - `qk_dims`, `v_dims`: the numbers of features, over all heads, of the projected queries and keys and of
        the projected values; those of `q` unless given.
    - `out_dims`: the number of output features; that of `q` unless given.
    - `use_bias`: whether the projections have biases.

    **Inputs:** `q`, for self-attention, or a tuple `(q, kv)`, `(q, k, v)` or `(q, k, v, mask)`: `q` of
    shape `(*batch, queries, features)`, `k` and `v` of shape `(*batch, keys, features)`, `mask` of bools,
    true where a key is seen, or `None`. A mask has all axes of `(*batch, heads, queries, keys)`, of size 1
    where it is the same: one for the keys alone is of shape `(*batch, 1, 1, keys)`. Without batch axes it may
    also be of shape `(queries, keys)`.
    **Returns:** `(y, st)` with `y` of shape `(*batch, queries, out_dims)`. A query that sees no key gets
    zeros.

    **Parameters:** those of `q_proj`, `k_proj`, `v_proj`, `out_proj`, each a `Dense`.
    **States:** those of `dropout`: `key` and `training`, if the probability is not 0.

    **Raises:** `ValueError` for numbers that do not divide, for shapes that do not fit and for a mask of
    fewer axes, which could be `(batch, keys)` as well as `(queries, keys)`; `TypeError` for a mask that is
    not of bools and for complex numbers.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import flatlayers as fl
    >>> layer = fl.MultiHeadAttention(8, heads=2, causal=True)
    >>> ps, st = fl.setup(jax.random.key(0), layer)
    >>> x = jnp.ones((5, 10, 8))
    >>> layer(x, ps, st)[0].shape
    (5, 10, 8)
    >>> lengths = jnp.array([10, 7, 3, 9, 1])
    >>> seen = jnp.arange(10) < lengths[:, None]  # (batch, keys)
    >>> layer((x, x, x, seen[:, None, None, :]), ps, st)[0].shape
    (5, 10, 8)
    """

    dims: Size | tuple[Size, Size, Size]
    _: KW_ONLY
    heads: Size
    dropout: Probability = 0.0
    causal: Flag = False
    qk_dims: Size | None = None
    v_dims: Size | None = None
    out_dims: Size | None = None
    use_bias: Flag = False

    def check_fields(self) -> None:
        for name in ("q_proj", "v_proj"):
            features = self._layers[name].out_dims
            if features % self.heads:
                raise ValueError(
                    f"MultiHeadAttention.heads: expected a number of heads that divides {features}, "
                    f"found {self.heads}"
                )

    def children(self) -> dict[str, Any]:
        return self._layers

    @functools.cached_property
    def _layers(self) -> dict[str, Any]:
        q, k, v = self.dims if isinstance(self.dims, tuple) else (self.dims,) * 3
        qk_dims, v_dims, out_dims = (
            q if size is None else size for size in (self.qk_dims, self.v_dims, self.out_dims)
        )
        return {
            "q_proj": Dense(q, qk_dims, use_bias=self.use_bias),
            "k_proj": Dense(k, qk_dims, use_bias=self.use_bias),
            "v_proj": Dense(v, v_dims, use_bias=self.use_bias),
            "out_proj": Dense(v_dims, out_dims, use_bias=self.use_bias),
            "dropout": Dropout(self.dropout),
        }

    def forward(self, x: Input, ps: Params, st: State) -> tuple[Output, State]:
        layers = self._layers

        def project(name: str, x: Input) -> jax.Array:
            return layers[name](x, getattr(ps, name), st[name])[0]

        q, k, v, mask = _inputs(x)
        q, k, v = (
            _split_heads(project(name, part), self.heads)
            for name, part in (("q_proj", q), ("k_proj", k), ("v_proj", v))
        )
        q, k, v = map(as_floating, in_common_dtype(q, k, v))
        keep = _kept(mask, self.causal, (*q.shape[:-3], self.heads, q.shape[-3], k.shape[-3]))
        if _is_written_out(q, v, self.dropout > 0 and st.dropout.training):
            weights = _weights(q, k, keep).astype(v.dtype)
            weights, dropout = layers["dropout"](weights, ps.dropout, st.dropout)
            y = _weighted(weights, v)
        else:
            y, dropout = _attend_without_dropout(q, k, v, keep, mask is not None), st.dropout
        y = project("out_proj", y.reshape(*y.shape[:-2], y.shape[-2] * y.shape[-1]))
        return y, st.replace(dropout=dropout)


def _inputs(x: Input) -> tuple[Any, Any, Any, Any]:
    """Queries, keys, values and mask, in shapes that fit each other."""
    parts = x if type(x) is tuple else (x, x)
    if len(parts) == 2:
        parts = (parts[0], parts[1], parts[1])
    if not 3 <= len(parts) <= 4:
        raise ValueError(f"expected q, (q, kv), (q, k, v) or (q, k, v, mask), found a tuple of {len(parts)}")
    q, k, v = parts[:3]
    shapes = [jnp.shape(part) for part in (q, k, v)]
    fits = min(map(len, shapes)) >= 2 and shapes[1][:-1] == shapes[2][:-1]
    if not fits or shapes[0][:-2] != shapes[1][:-2]:
        raise ValueError(
            "expected q of shape (*batch, queries, features), k and v of shape (*batch, keys, features), "
            f"found shapes {', '.join(map(str, shapes))}"
        )
    return q, k, v, parts[3] if len(parts) == 4 else None


def _split_heads(x: jax.Array, heads: int) -> jax.Array:
    """`(..., tokens, features)` as `(..., tokens, heads, features of a head)`."""
    return x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads)


def _kept(mask: ArrayLike | None, causal: bool, shape: Shape) -> jax.Array | None:
    """Tell which query sees which key, in the shape `(*batch, heads, queries, keys)`; `None` is all."""
    triangle = jnp.broadcast_to(jnp.tril(jnp.ones(shape[-2:], bool)), shape) if causal else None
    if mask is None:
        return triangle
    mask = jnp.asarray(mask)
    if mask.dtype != jnp.bool_:
        raise TypeError(f"expected a mask of bools, found {mask.dtype}")
    _check_axes(mask.shape, len(shape) - 3)
    if not broadcasts_to(mask.shape, shape):
        raise ValueError(
            f"expected a mask that broadcasts to (*batch, heads, queries, keys) = {shape}, "
            f"found shape {mask.shape}"
        )
    mask = jnp.broadcast_to(mask, shape)
    return mask if triangle is None else mask & triangle


def _check_axes(shape: Shape, batch: int) -> None:
    """Raise for a mask whose axes could be others than broadcasting takes them for."""
    full, fewer = batch + 3, not batch and len(shape) == 2
    if len(shape) < full and shape and not fewer:
        new = ", ".join(["None"] * (full - 2))
        raise ValueError(
            "expected a mask with all axes of (*batch, heads, queries, keys), of size 1 where it is the "
            f"same, found shape {shape} with {batch} batch {'axis' if batch == 1 else 'axes'}; a mask of "
            f"(queries, keys) for the whole batch is `mask[{new}, :, :]`, one of (*batch, keys) for all "
            "queries `mask[..., None, None, :]`"
        )


def _is_written_out(q: jax.Array, v: jax.Array, drops: bool) -> bool:
    # `jax.nn.dot_product_attention` takes its softmax in float32, drops no weights, and has one
    # number of features for keys and values.
    return drops or q.dtype == jnp.float64 or v.dtype == jnp.float64 or q.shape[-1] != v.shape[-1]


def _attend_without_dropout(
    q: Array, k: Array, v: Array, keep: Array | None, may_see_none: bool
) -> jax.Array:
    # On a CPU JAX's function takes 1.4 times as long as the formula; see benchmarks/README.md.
    return jax.lax.platform_dependent(
        *(q, k, v, keep),
        cpu=lambda q, k, v, keep: _weighted(_weights(q, k, keep).astype(v.dtype), v),
        default=lambda q, k, v, keep: _attend_in_jax(q, k, v, keep, may_see_none),
    )


def _weights(q: jax.Array, k: jax.Array, keep: jax.Array | None) -> jax.Array:
    """`softmax(q k' / sqrt(d))`, of shape `(..., heads, queries, keys)`."""
    q, k = (jnp.swapaxes(part, -3, -2) for part in (q / math.sqrt(q.shape[-1]), k))
    scores = q @ jnp.swapaxes(k, -1, -2)
    scores = scores.astype(at_least_float32(scores.dtype))
    if keep is None:
        return jax.nn.softmax(scores, axis=-1)
    weights = jax.nn.softmax(jnp.where(keep, scores, jnp.finfo(scores.dtype).min), axis=-1)
    return jnp.where(keep, weights, jnp.zeros_like(weights))


def _weighted(weights: jax.Array, v: jax.Array) -> jax.Array:
    """The sums of the values, of shape `(..., queries, heads, features)`."""
    return jnp.swapaxes(weights @ jnp.swapaxes(v, -3, -2), -3, -2)


def _attend_in_jax(q: Array, k: Array, v: Array, keep: Array | None, may_see_none: bool) -> jax.Array:
    """The same by JAX, which has one batch axis."""
    batch = q.shape[:-3]
    q, k, v = (part.reshape(math.prod(batch), *part.shape[-3:]) for part in (q, k, v))
    if keep is not None:
        keep = keep.reshape(math.prod(batch), *keep.shape[-3:])
    with jax.numpy_dtype_promotion("standard"):  # It mixes half precisions with float32.
        y = jax.nn.dot_product_attention(q, k, v, mask=keep)
    if keep is not None and may_see_none:
        sees = jnp.swapaxes(keep.any(axis=-1), -1, -2)[..., None]
        y = jnp.where(sees, y, jnp.zeros_like(y))
    return y.reshape(*batch, *y.shape[-3:])
