"""`SolveTimes`: the times of a solve as data, beside the state that a layer is called with."""

from collections.abc import Sequence
from types import ModuleType
from typing import TypeVar

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ..core.layer import Layer
from ..dtypes import at_least_float32, floating, is_floating, is_traced, promoted
from ..types import Array, ArrayLike, Input, Shape
from ..vectors.names import describe
from .failures import require
from .times import ULPS, Times


Numbers = Array | np.ndarray
L = TypeVar("L", bound=Layer)


class SolveTimes(eqx.Module):
    """The times of a solve as data: `layer((x, fl.SolveTimes(ts)), ps, st)` saves at `ts`.

    They are arrays that a compiled program takes: other times of the same number need no other program. Each
    sample has its own under `jax.vmap`, and with `batching="each"`.

    Gradients with respect to times are those of the solution, by any adjoint: `dy(t)/dt = f(t, y(t))`, and a
    start that is later by `d` is as a state `y0 - d f(t0, y0)`. So are second derivatives that begin with the
    time, or with all at once; others raise. With an event, and with a `SaveAt` that saves other things than
    states at times, only diffrax's own adjoints, such as `diffrax.RecursiveCheckpointAdjoint`, give a
    gradient by times; `fl.AdaptiveCheckpointAdjoint` and `fl.GaussAdjoint` raise. So does a `NeuralSDE` with
    any of them: its path has no derivative.

    **Arguments:** each an array, a number or `None`.

    - `ts`: the times to save at, in order from `t0` to `t1`, of shape `(times,)`, or `(*batch, times)` with
        `batching="each"`. `None` saves what the layer's `saveat` says.
    - `t0`: the time of the given state, of shape `()` or `(*batch)`; `None` is the layer's.
    - `t1`: the end, likewise; `None` is the last of `ts`, or without these the layer's.
    - `mask`: for series that are padded, where there is a time, of the shape of `ts`. It does not matter what
        is in `ts` elsewhere, NaN included: the time before is repeated (`t0` if there is none), so that the
        states there are finite.

    **Raises:** the layer raises `ValueError` for times that are not finite or not in order (under `jax.jit`
    an error at run time), for shapes that do not go with the state and for ends that do not go with the
    layer's `dt0` and `saveat`; `TypeError` for a solver layer without save times, as `FFJORD` is, for what
    are no real numbers, and where they are not the second of a pair. With an event `t1` may be infinite.
    A layer that solves no equation in time, such as `Dense` or `DeepEquilibriumNetwork`, takes the pair for
    an input as any other, and raises what it does for a wrong one.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import flatlayers as fl
    >>> decay = fl.NeuralODE(lambda y: -y, batching="each")
    >>> ps, st = fl.setup(jax.random.key(0), decay)
    >>> ts = jnp.array([[0.5, 1.0, 2.0], [0.1, 0.2, jnp.nan]])
    >>> times = fl.SolveTimes(ts, mask=jnp.isfinite(ts))
    >>> ys, st = decay((jnp.ones((2, 1)), times), ps, st)
    >>> print(ys.shape, ys[-1, :, 0].round(2))
    (3, 2, 1) [0.14 0.82]
    >>> def end(t1):
    ...     return decay((jnp.ones((1, 1)), fl.SolveTimes(t1=t1)), ps, st)[0].sum()
    >>> print(f"{jax.grad(end)(1.0):.2f}")  # -exp(-1)
    -0.37
    """

    ts: Numbers | None
    t0: Numbers | None
    t1: Numbers | None
    mask: Numbers | None

    def __init__(
        self,
        ts: ArrayLike | Sequence[float] | None = None,
        *,
        t0: ArrayLike | None = None,
        t1: ArrayLike | None = None,
        mask: ArrayLike | Sequence[bool] | None = None,
    ):
        self.ts, self.t0, self.t1, self.mask = map(_array, (ts, t0, t1, mask))


def _array(value: ArrayLike | Sequence[float] | None) -> Numbers | None:
    """Return an array; what is known stays one of NumPy, which no program depends on."""
    return value if value is None or isinstance(value, jax.Array) else np.asarray(value)


def split(x: Input) -> tuple[Input, SolveTimes | None]:
    """Return the input and the times that came with it. **Raises:** `TypeError` for times elsewhere."""
    x, given = x if isinstance(x, tuple) and len(x) == 2 and isinstance(x[1], SolveTimes) else (x, None)
    if any(isinstance(part, SolveTimes) for part in (x if isinstance(x, tuple | list) else [x])):
        found = describe(x if given is None else (x, given))
        raise TypeError(f"expected a pair (x, fl.SolveTimes(...)), with times once, found {found}")
    return x, given


def saving(layer: L, x: Input) -> L:
    """Return a layer with the `saveat` of a call: with times in its input it saves at these."""
    _, given = split(x)
    if given is None or given.ts is None:
        return layer
    copy = object.__new__(type(layer))
    vars(copy).update({**vars(layer), "saveat": (0.0,)})
    return copy


def resolved(
    given: SolveTimes, base: Times, batch: Shape, state: np.dtype, *, constant: bool, event: bool
) -> Times:
    """Return the times of a solve: those that are given, and for the rest those of `base`, all as arrays.

    **Arguments:**

    - `batch`: the leading axes that are solved sample by sample.
    - `state`: the real dtype of the state.
    - `constant`: whether all steps are `base.dt0`.
    - `event`: whether there is one, before which the end may be infinite.
    """
    _check_dtypes(given)
    _check_shapes(given, batch)
    t0, t1, ts = _in_one_dtype(given, base)
    xp = jnp if any(isinstance(x, jax.Array) for x in (t0, t1, ts, given.mask)) else np
    if ts is not None:
        ts = ts if given.mask is None else _filled(xp, ts, given.mask, t0)
        t1 = ts[..., -1] if given.t1 is None else t1
    if xp is np:
        dtype = _dtype(t0, t1, ts, base.dt0, state, constant)
        t0, t1, ts = (None if t is None else jnp.asarray(t, dtype) for t in (t0, t1, ts))
    t0, t1, ts = _checked(jnp.asarray(t0), jnp.asarray(t1), None if ts is None else jnp.asarray(ts), event)
    _check_fields_go_with(t0, t1, base, ts is None)
    each = any(t is not None and t.ndim > least for t, least in ((t0, 0), (t1, 0), (ts, 1)))
    if each:
        t0, t1 = (jnp.broadcast_to(t, batch) for t in (t0, t1))
        ts = None if ts is None else jnp.broadcast_to(ts, (*batch, ts.shape[-1]))
    return Times(t0, t1, base.dt0, base.saveat if ts is None else diffrax.SaveAt(ts=ts), each=each)


def _check_dtypes(given: SolveTimes) -> None:
    for t in (given.ts, given.t0, given.t1):
        if t is not None and not (is_floating(t) or jnp.issubdtype(t.dtype, jnp.integer)):
            raise TypeError(f"expected times that are real numbers, found {describe(given)}")


def _check_fields_go_with(t0: Array, t1: Array, base: Times, saved: bool) -> None:
    """Raise for a first step and, if `saved`, for save times of a layer that do not go with the ends.

    Of ends that are known only when it runs diffrax says so.
    """
    if is_traced(t0) or is_traced(t1):
        return
    if base.dt0 is not None and ((t1 - t0) * base.dt0 < 0).any():
        raise ValueError(f"expected times in the direction of dt0={base.dt0}, found t0={t0} and t1={t1}")
    known = base.saveat if saved and isinstance(base.saveat, tuple) else ()
    room = ULPS * float(jnp.finfo(t0.dtype).eps)
    low, high = jnp.minimum(t0, t1), jnp.maximum(t0, t1)
    low, high = (low - room * abs(low)).max(), (high + room * abs(high)).min()
    if outside := [t for t in known if not low <= t <= high]:
        raise ValueError(f"expected times that reach to saveat={outside[0]}, found t0={t0} and t1={t1}")


def _check_shapes(given: SolveTimes, batch: Shape) -> None:
    ends = [np.shape(t) for t in (given.t0, given.t1) if t is not None]
    ts = None if given.ts is None else np.shape(given.ts)
    fine = all(shape in ((), batch) for shape in ends)
    fine = fine and (ts is None or (len(ts) > 0 and ts[-1] > 0 and ts[:-1] in ((), batch)))
    if not fine:
        sizes = ", ".join(map(str, batch))
        own = f", or ({sizes}, times) and {batch} for each sample" if batch else ""
        raise ValueError(
            f"expected ts of shape (times,), not empty, and t0 and t1 of shape (){own}, found "
            + describe(given)
            + ("" if batch else '. Times of each sample need batching="each" or jax.vmap')
        )
    if given.mask is not None and np.shape(given.mask) != ts:
        raise ValueError(f"expected a mask of the shape of ts, found {describe(given)}")


def _in_one_dtype(given: SolveTimes, base: Times) -> tuple[Numbers, Numbers, Numbers | None]:
    """Return `(t0, t1, ts)` in the dtype of those that are given; numbers of a layer's fields follow it.

    So an end that is a rounded time in the data is the same time here.
    """
    t0, t1 = (
        of_layer if own is None else own for own, of_layer in ((given.t0, base.t0), (given.t1, base.t1))
    )
    arrays = [t for t in (t0, t1, given.ts) if isinstance(t, jax.Array | np.ndarray)]
    xp = jnp if any(isinstance(t, jax.Array) for t in arrays) else np
    # What is known keeps its dtype here, also one that JAX does not have without x64.
    dtypes = [floating(t).dtype if isinstance(t, jax.Array) else _known(t).dtype for t in arrays]
    dtype = (
        np.result_type(*dtypes or [float])
        if xp is np
        else promoted(*map(jax.dtypes.canonicalize_dtype, dtypes))
    )
    return (
        xp.asarray(t0, dtype),
        xp.asarray(t1, dtype),
        None if given.ts is None else xp.asarray(given.ts, dtype),
    )


def _known(times: np.ndarray) -> np.ndarray:
    return times if jnp.issubdtype(times.dtype, jnp.floating) else times.astype(float)


def _filled(xp: ModuleType, ts: Numbers, mask: Numbers, t0: Numbers) -> Numbers:
    """Return `ts` with the last time before each that is left out, or `t0` if there is none."""
    places = xp.where(mask, xp.arange(ts.shape[-1]), -1)
    last = xp.maximum.accumulate(places, axis=-1)
    repeated = xp.take_along_axis(ts, xp.maximum(last, 0), axis=-1)
    return xp.where(last < 0, xp.expand_dims(t0, -1), repeated)


def _dtype(
    t0: Numbers, t1: Numbers, ts: Numbers | None, dt0: float | None, state: np.dtype, constant: bool
) -> np.dtype:
    """Return the dtype in which the known times of each sample are told apart."""
    size = 0 if ts is None else ts.shape[-1]
    rows = [t0[..., None], t1[..., None], *([] if ts is None else [ts])]
    shape = np.broadcast_shapes(*(row.shape[:-1] for row in rows))
    rows = [np.broadcast_to(row, (*shape, row.shape[-1])).reshape(-1, row.shape[-1]) for row in rows]
    samples = np.unique(np.concatenate(rows, axis=-1).astype(float), axis=0)
    found = [
        Times(row[0], row[1], dt0, tuple(row[2 : 2 + size].tolist())).dtype(state, constant)
        for row in samples[np.isfinite(np.delete(samples, 1, axis=-1)).all(-1)]
    ]
    return promoted(at_least_float32(state), *found)


def _checked(t0: Array, t1: Array, ts: Array | None, event: bool) -> tuple[Array, Array, Array | None]:
    """Return the times. **Raises:** unless they are finite, and in order from `t0` to `t1`.

    `event`: whether there is one, before which the end may be infinite.
    """
    rows = [t0[..., None], *([] if ts is None else [ts]), t1[..., None]]
    shape = np.broadcast_shapes(*(row.shape[:-1] for row in rows))
    row = jnp.concatenate([jnp.broadcast_to(row, (*shape, row.shape[-1])) for row in rows], axis=-1)
    row = jax.lax.stop_gradient(row)
    forward = jnp.diff(row, axis=-1) * jnp.where(row[..., -1:] >= row[..., :1], 1, -1).astype(row.dtype)
    finite = jnp.isfinite(row[..., :-1] if event else row).all(-1)
    fine = finite & (forward >= 0).all(-1)
    message = "expected finite times in order: t0, then ts, each at or after the one before, then t1"
    if not is_traced(fine) and not fine.all():
        message += f", found {np.asarray(row)[~np.asarray(fine)][0]}"
    return require(fine.all(), message, (t0, t1, ts))
