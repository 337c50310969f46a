"""Collocation: smooth a time series and its derivative, to fit a vector field without solving."""

import functools
import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from ..core.fields import Positive, checked
from ..dtypes import at_least_float32, floating, is_traced
from ..equations.failures import require
from ..types import Array, ArrayLike, DType
from ..vectors.names import describe


Function = Callable[[Array], Array]
# The kernels that are zero beyond the bandwidth, and all.
Bounded = Literal["epanechnikov", "uniform", "triangular", "quartic", "triweight", "tricube", "cosine"]
Kernel = Literal[Bounded, "gaussian", "logistic", "sigmoid", "silverman"]


def collocate(
    ts: ArrayLike, ys: ArrayLike, *, kernel: Kernel = "epanechnikov", bandwidth: ArrayLike | None = None
) -> tuple[Array, Array]:
    """Smooth data and estimate its derivative, by local polynomials under a kernel (Liang and Wu, 2008).

    At each time `t`, `value` and `derivative` are the `a_0` and `b_1` of the polynomials that minimise

        sum_j K((t_j - t) / bandwidth) |y_j - a_0 - a_1 (t_j - t)|^2,
        sum_j K((t_j - t) / bandwidth) |y_j - b_0 - b_1 (t_j - t) - b_2 (t_j - t)^2|^2.

    A field that is fitted to them by least squares is a start for training through a solver. Exact for
    values of a straight line and derivatives of a parabola. The cost grows as the square of the number of
    times.

    **Arguments:**

    - `ts`: the times, of shape `(times,)`. Only their differences matter, which are taken first: a large
        offset costs no precision, unless the dtype of `ts` has lost it.
    - `ys`: the data, real, of shape `(times, ...)`. A half precision is computed in float32.
    - `kernel`: `"epanechnikov"`, `"uniform"`, `"triangular"`, `"quartic"`, `"triweight"`, `"tricube"` or
        `"cosine"`, which are zero beyond the bandwidth; `"gaussian"`, `"logistic"`, `"sigmoid"` or
        `"silverman"`, which are not.
    - `bandwidth`: the width of the kernel, in the unit of `ts`. `None` is `n^(-2/7) log(n)^(-1/16)` for `n`
        times, which suits times of order one, and at least two and a half of the largest gaps between them.

    **Returns:** `(values, derivatives)`, of the shape of `ys`.

    **Raises:** `ValueError` for an unknown kernel, for shapes that do not go together, for fewer than three
    times, for a bandwidth or times that are not finite and for a bandwidth with fewer than three distinct
    times under the kernel somewhere (Equinox's error under `jax.jit`); `TypeError` for complex data.

    >>> import jax.numpy as jnp
    >>> import flatlayers as fl
    >>> ts = jnp.linspace(0.0, 1.0, 21)
    >>> values, derivatives = fl.collocate(ts, ts**2)
    >>> print(f"{derivatives[10]:.3f}")
    1.000
    """
    kernel = checked(Kernel, "kernel", kernel)
    ys = floating(ys)
    if jnp.iscomplexobj(ys):
        raise TypeError(f"expected real ys, found {describe(ys)}; collocate real and imaginary parts")
    ts = ts if isinstance(ts, jax.Array) else np.asarray(ts)
    if ts.ndim != 1 or ys.shape[:1] != ts.shape or len(ts) < 3:
        raise ValueError(
            "expected ts of shape (times,) and ys of shape (times, ...) with at least three times, found "
            f"{describe(ts)} and {describe(ys)}"
        )
    dtype = at_least_float32(ys.dtype)
    ts = jnp.asarray(ts - ts[:1], dtype)
    ts = require(jnp.isfinite(ts).all(), "expected finite times, found NaN or infinity", ts)
    h = default_bandwidth(ts) if bandwidth is None else _as_bandwidth(bandwidth, dtype)
    away = ts[None, :] - ts[:, None]
    weights = require(*_enough_times(ts, _KERNELS[kernel](away / h)))
    # In a unit in which they are of order one, however wide the kernel.
    unit = jnp.minimum(h, ts.max() - ts.min())
    steps = away / unit
    powers = jnp.stack([jnp.ones_like(steps), steps, steps * steps], axis=-1)
    gram = _sum("ij,ijk,ijl->ikl", weights, powers, powers)
    moments = _sum("ij,ijk,jn->ikn", weights, powers, ys.reshape(len(ts), -1).astype(dtype))
    values = jnp.linalg.solve(gram[:, :2, :2], moments[:, :2])[:, 0]
    derivatives = jnp.linalg.solve(gram, moments)[:, 1] / unit
    return tuple(out.reshape(ys.shape).astype(ys.dtype) for out in (values, derivatives))


def default_bandwidth(ts: Array) -> Array:
    """Return the bandwidth that `None` stands for."""
    n = len(ts)
    return jnp.maximum(n ** (-2 / 7) * math.log(n) ** (-1 / 16), 2.5 * jnp.diff(jnp.sort(ts)).max())


def _as_bandwidth(bandwidth: ArrayLike, dtype: DType) -> Array:
    """Return the bandwidth as an array. **Raises:** unless it is finite and above 0."""
    if not is_traced(bandwidth):
        return jnp.asarray(checked(Positive, "bandwidth", bandwidth), dtype)
    width = jnp.asarray(bandwidth)
    fine = jnp.isfinite(width) & (width > 0)
    return require(fine, "expected bandwidth: a finite number above 0", width.astype(dtype))


def _enough_times(ts: Array, weights: Array) -> tuple[Array, str, Array]:
    """Return the arguments of `require`: three distinct times need a weight that is not negligible."""
    size = jnp.abs(weights)
    counts = size > jnp.finfo(size.dtype).eps * size.max(axis=1, keepdims=True)
    # Of equal times, the first in order counts if any of them does: they have the same weight.
    order = jnp.argsort(ts)
    distinct = jnp.concatenate([jnp.array([True]), jnp.diff(ts[order]) > 0])
    message = "expected at least three distinct times under the kernel at each time; use a larger bandwidth"
    return ((counts[:, order] & distinct[None]).sum(axis=1) >= 3).all(), message, weights


def _inside(kernel: Function) -> Function:
    """Return a kernel that is zero beyond 1."""
    return lambda u: jnp.where(jnp.abs(u) <= 1, kernel(jnp.clip(u, -1, 1)), jnp.zeros_like(u))


def _silverman(u: Array) -> Array:
    size = jnp.abs(u) / math.sqrt(2)
    return jnp.exp(-size) * jnp.sin(size + math.pi / 4) / 2


_sum = functools.partial(jnp.einsum, precision="highest")

_KERNELS: dict[str, Function] = {
    "epanechnikov": _inside(lambda u: 3 / 4 * (1 - u**2)),
    "uniform": _inside(lambda u: jnp.full_like(u, 1 / 2)),
    "triangular": _inside(lambda u: 1 - jnp.abs(u)),
    "quartic": _inside(lambda u: 15 / 16 * (1 - u**2) ** 2),
    "triweight": _inside(lambda u: 35 / 32 * (1 - u**2) ** 3),
    "tricube": _inside(lambda u: 70 / 81 * (1 - jnp.abs(u) ** 3) ** 3),
    "gaussian": lambda u: jnp.exp(-(u**2) / 2) / math.sqrt(2 * math.pi),
    "cosine": _inside(lambda u: math.pi / 4 * jnp.cos(math.pi / 2 * u)),
    "logistic": lambda u: 1 / (jnp.exp(u) + 2 + jnp.exp(-u)),
    "sigmoid": lambda u: 2 / math.pi / (jnp.exp(u) + jnp.exp(-u)),
    "silverman": _silverman,
}
