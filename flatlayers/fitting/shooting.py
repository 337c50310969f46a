"""Multiple shooting: fit a neural differential equation on pieces of its time series."""

import functools

import diffrax
import jax
import jax.numpy as jnp
import numpy as np

from ..core.layer import call
from ..dtypes import common_real_dtype, is_traced
from ..equations.failures import check_start
from ..equations.ode import NeuralODE, SecondOrderNeuralODE
from ..equations.solving import time_leading
from ..equations.times import Times
from ..types import Array, ArrayLike, Params, PyTree, State
from ..vectors.names import describe


def multiple_shooting(
    model: NeuralODE,
    ts: ArrayLike,
    ys: ArrayLike,
    starts: ArrayLike,
    ps: Params,
    st: State,
    *,
    continuity: float = 100.0,
) -> tuple[Array, Array]:
    """Return the loss of a neural ODE that is solved on segments of the data, each from a start of its own.

        loss = mean (prediction - data)^2 + continuity * mean (end of a segment - start of the next)^2

    A long solve that goes wrong early has a gradient that says little; short ones do not go far. The starts
    are optimised together with the parameters, and the second term closes the gaps (Bock and Plitt, 1984).
    The segments have equal numbers of times and share their end points. They are solved in parallel, by
    `jax.vmap`.

    **Arguments:**

    - `model`: a `NeuralODE`. Its times and `saveat` are not used, the other options are.
    - `ts`: the times of the data, increasing or decreasing, of shape `(times,)`.
    - `ys`: the data, of shape `(times, n)`, or `(times, *batch, n)` for a model that takes batches.
    - `starts`: the state at the start of each segment, of shape `(segments, n)` or
        `(segments, *batch, n)`: a part of the vector that is optimised.
    - `ps`, `st`: the model's parameters and its state, which is the same in all segments and does not change.
    - `continuity`: the weight of the gaps.

    **Returns:** `(loss, predictions)`: a number, and the states at the times of each segment, of shape
    `(segments, 1 + (times - 1) / segments, n)`, where the last of a segment is at the time of the first of
    the next.

    **Raises:** `TypeError` for another layer; `ValueError` for shapes that do not go together, for a number
    of times that the segments cannot share, and for times that are known and not monotonic; what the
    model raises for a solve that fails.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import flatlayers as fl
    >>> model, ts = fl.NeuralODE(fl.Dense(2, 2)), jnp.linspace(0.0, 3.0, 13)
    >>> ys = jnp.stack([jnp.cos(ts), jnp.sin(ts)], axis=1)
    >>> layout = fl.Layout({"net": model.layout, "starts": (4, 2)})
    >>> ps, st = fl.setup(jax.random.key(0), model)
    >>> v = fl.ComponentVector.of({"net": ps, "starts": ys[:-1:3]}, layout)
    >>> loss, predictions = fl.multiple_shooting(model, ts, ys, v.starts, v.net, st)
    >>> predictions.shape
    (4, 4, 2)
    """
    if not isinstance(model, NeuralODE) or isinstance(model, SecondOrderNeuralODE):
        raise TypeError(f"expected model to be a NeuralODE, found {model!r}")
    ys, starts = jnp.asarray(ys), jnp.asarray(check_start(starts, model.throw))
    ts = _as_array(ts, starts)
    _check(ts, ys, starts)
    segments = len(starts)
    steps = (len(ts) - 1) // segments
    index = jnp.arange(segments)[:, None] * steps + jnp.arange(steps + 1)[None, :]
    predictions, _ = call(model, functools.partial(_solve_segments, model), (starts, ts[index]), ps, st)
    gaps = predictions[:-1, -1] - starts[1:]
    loss = jnp.mean((predictions - ys[index]) ** 2)
    return loss + continuity * jnp.sum(gaps**2) / max(gaps.size, 1), predictions


def _solve_segments(model: NeuralODE, x: tuple[Array, Array], ps: Params, st: State) -> tuple[PyTree, State]:
    """Return the solutions from all starts, each at its own times."""

    def solve(y0: Array, ts: Array) -> PyTree:
        return time_leading(model.integrate(y0, ts[0], ts[-1], diffrax.SaveAt(ts=ts), ps, st))

    return jax.vmap(solve)(*x), st


def _as_array(ts: ArrayLike, starts: Array) -> Array:
    """Return the times as an array; known ones decide themselves which dtype they need."""
    if isinstance(ts, jax.Array):
        return ts
    known_ts = np.asarray(ts, float)
    known = Times(known_ts.min(initial=0.0), known_ts.max(initial=0.0), saveat=tuple(known_ts.ravel()))
    return jnp.asarray(known_ts, known.dtype(common_real_dtype(starts), constant=False))


def _check(ts: Array, ys: Array, starts: Array) -> None:
    """Raise unless the shapes go together and the times are monotonic."""
    if ts.ndim != 1 or not starts.shape or ys.shape != (*ts.shape, *starts.shape[1:]) or not len(starts):
        raise ValueError(
            "expected ts of shape (times,), ys of shape (times, n) and starts of shape (segments, n), found "
            f"{describe(ts)}, {describe(ys)} and {describe(starts)}"
        )
    steps, rest = divmod(len(ts) - 1, len(starts))
    if rest or not steps:
        raise ValueError(
            f"expected times that {len(starts)} segments of equal length share, a multiple of it plus 1, "
            f"found {len(ts)}"
        )
    gaps = jnp.diff(ts)
    if not is_traced(gaps) and not ((gaps > 0).all() or (gaps < 0).all()):
        raise ValueError("expected times that increase or decrease, found some that do not")
