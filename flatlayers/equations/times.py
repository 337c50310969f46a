"""The times of a solve: as the fields of a layer have them, and as arrays for the solver."""

from collections.abc import Sequence
from dataclasses import dataclass

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ..adjoints._diffrax import sub_saveats
from ..core.values import Hashable, hashable, plain
from ..dtypes import at_least_float32, is_floating, promoted
from ..types import Array, Time
from .options import SaveAt


FINAL = diffrax.SaveAt(t1=True)

# How far outside of an end a time may lie, in units of that end's last place: room for its rounding.
ULPS = 4

# How far a dtype may move a time: at most this part of the gap to its neighbour, and of the whole solve.
NEIGHBOUR, WHOLE = 1 / 4, 1e-4


# Fields of a layer


def check_first_step(where: str, t0: float | None, t1: float | None, dt0: float | None) -> None:
    """Raise for a first step away from the end. An end that is `None` comes with the input."""
    if t0 is not None and t1 is not None and dt0 is not None and t0 != t1 and not dt0 * (t1 - t0) > 0:
        raise ValueError(f"{where}: expected a step from t0={t0} towards t1={t1}, found {dt0}")


def canonical(saveat: SaveAt, t0: float | None, t1: float | None) -> tuple[float, ...] | Hashable:
    """Return the field `saveat` in its final form, so that equal layers are equal.

    Times become a tuple of floats from `t0` to `t1`, as a `SaveAt` with times alone does; any other `SaveAt`
    becomes hashable. If an end is `None`, the solver checks the times.
    """
    given: diffrax.SaveAt | Sequence[float] | np.ndarray = plain(saveat)
    if not isinstance(given, diffrax.SaveAt):
        return tuple(_between(given, t0, t1).tolist())
    arrays = save_times(given)
    times = [_between(ts, t0, t1) for ts in arrays]
    if len(arrays) == 1 and bool(eqx.tree_equal(given, diffrax.SaveAt(ts=arrays[0]))):
        return tuple(times[0].tolist())
    return hashable(eqx.tree_at(save_times, given, times) if times else given)


def _between(times: Array | Sequence[float] | np.ndarray, t0: float | None, t1: float | None) -> np.ndarray:
    """Return the times as float64; one that is outside by no more than rounding becomes the end itself."""
    given = np.asarray(times).ravel()
    found = given.astype(float)
    inside, room = found, 0.0
    if t0 is not None and t1 is not None:
        eps = float(jnp.finfo(given.dtype).eps) if is_floating(given) else np.finfo(float).eps
        low, high = min(t0, t1), max(t0, t1)
        inside = np.clip(found, low, high)
        room = ULPS * eps * np.where(found < low, abs(low), abs(high))
    with np.errstate(invalid="ignore"):
        fine = np.isfinite(found) & (abs(found - inside) <= room)
    if not fine.all():
        first = found[~fine][0]
        way_out = _way_out(first, found, t0, t1)
        raise ValueError(f"expected times in `saveat` from t0={t0} to t1={t1}, found {first}{way_out}")
    return inside


def _way_out(outside: float, times: np.ndarray, t0: float | None, t1: float | None) -> str:
    """Return what to give for times one of which is outside of the ends; nothing if it is not finite."""
    if t0 is None or t1 is None or not np.isfinite(times).all():
        return ""
    forward = t1 >= t0
    if (outside > t1) == forward:
        return f"; the solve ends at t1: give `t1={times.max() if forward else times.min()}`"
    return f"; the solve starts at t0: give `t0={times.min() if forward else times.max()}`"


def save_times(saveat: diffrax.SaveAt) -> list[Array]:
    """Return the arrays of times in a `SaveAt`."""
    return [sub.ts for sub in sub_saveats(saveat) if sub.ts is not None]


def check_saves_values(saveat: SaveAt | None) -> None:
    """Raise for a `SaveAt` that gives no values for a call to return."""
    if isinstance(saveat, diffrax.SaveAt) and saveat.subs is None:
        raise ValueError(
            f"expected saveat to save values, which a call returns, found {saveat}; "
            "use `solution, st = layer.solve(x, ps, st)`, or add t1=True"
        )


def saves_final_only(saveat: SaveAt | None) -> bool:
    """Tell whether the field `saveat` asks for the final state alone, which then has no time axis."""
    if isinstance(saveat, diffrax.SaveAt):
        return bool(eqx.tree_equal(saveat.subs, FINAL.subs))
    return saveat is None


# A solve


@dataclass(frozen=True)
class Times:
    """The times of a solve as they are given: as numbers, which are known, or as arrays of JAX.

    **Arguments:**

    - `t0`, `t1`: the start and the end.
    - `dt0`: the first step, or `None`.
    - `saveat`: what to save, as the field of a layer or as a `diffrax.SaveAt`.
    - `each`: whether times that are arrays have the leading axes of a batch, a part for each sample.
    """

    t0: Time
    t1: Time
    dt0: float | None = None
    saveat: SaveAt | None = None
    each: bool = False

    def own(self) -> tuple[Array, ...]:
        """Return the arrays that have a part for each sample."""
        if not self.each:
            return ()
        saved = save_times(self.saveat) if isinstance(self.saveat, diffrax.SaveAt) else []
        return (jnp.asarray(self.t0), jnp.asarray(self.t1), *(ts for ts in saved if jnp.ndim(ts) > 1))

    def of_sample(self, own: tuple[Array, ...]) -> "Times":
        """Return the times of a sample, by its part of `own()`."""
        if not self.each:
            return self
        t0, t1, *saved = own
        saveat = diffrax.SaveAt(ts=saved[0]) if saved else self.saveat
        return Times(t0, t1, self.dt0, saveat)

    def dtype(self, state: np.dtype, constant: bool) -> np.dtype:
        """Return the dtype of these times in a solve whose state has the real dtype `state`.

        It is at least float32, and float64 if these times are given so as arrays, or if float32 does not tell
        them apart. With `constant`, all steps are `dt0`. **Raises:** `ValueError` if there is no such
        dtype.
        """
        arrays, known = self._given()
        least = promoted(at_least_float32(state), *dict.fromkeys(array.dtype for array in arrays))
        problem = None
        for dtype in (least, promoted(least, promoted())):
            problem = self._problem(known, constant, dtype)
            if problem is None:
                return dtype
        raise ValueError(
            f"{problem}. The state is of {state}, the solve of {dtype}: count the times from t0=0, "
            "or use float64 (jax_enable_x64)"
        )

    def arrays(self, dtype: np.dtype) -> tuple[Array, Array, Array | None, diffrax.SaveAt]:
        """Return `(t0, t1, dt0, saveat)` as arrays of a dtype, for the solver."""
        t0, t1, dt0 = (None if t is None else jnp.asarray(t, dtype) for t in (self.t0, self.t1, self.dt0))
        return t0, t1, dt0, self._saveat(dtype)  # pyright: ignore[reportReturnType]

    def _saveat(self, dtype: np.dtype) -> diffrax.SaveAt:
        saveat = plain(self.saveat)
        if saveat is None:
            return FINAL
        if isinstance(saveat, tuple):
            return diffrax.SaveAt(ts=self._as_array(np.asarray(saveat), dtype))
        saveat = eqx.tree_at(save_times, saveat, replace_fn=lambda ts: self._as_array(ts, dtype))
        return jax.tree.map(lambda x: jnp.asarray(x, dtype) if is_floating(x) else x, saveat)

    def _as_array(self, times: Array | np.ndarray, dtype: np.dtype) -> Array:
        """Return save times as an array.

        Ends that are arrays were not known before: only here can times be brought onto them.
        """
        ends = [t for t in (self.t0, self.t1) if isinstance(t, jax.Array)]
        array = jnp.asarray(times, dtype)
        if not ends or isinstance(times, jax.Array):
            return array
        exact = (times.astype(np.float32) == times).all()
        eps = max(float(jnp.finfo(kind).eps) for kind in (*(t.dtype for t in ends), "f4" if exact else "f8"))
        ends = [jnp.asarray(t, dtype) for t in (self.t0, self.t1)]
        low, high = jnp.minimum(*ends), jnp.maximum(*ends)
        inside = jnp.clip(array, low, high)
        room = ULPS * eps * jnp.where(array < low, abs(low), abs(high))
        return jnp.where(abs(array - inside) <= room, inside, array)

    def _given(self) -> tuple[list[Array], np.ndarray]:
        """Return the times that are arrays of JAX, and all others, which are known, sorted and distinct."""
        saveat = plain(self.saveat)
        saved = save_times(saveat) if isinstance(saveat, diffrax.SaveAt) else [saveat or ()]
        arrays = [t for t in (self.t0, self.t1, *saved) if isinstance(t, jax.Array)]
        known = [np.ravel(t) for t in (self.t0, self.t1, *saved, ()) if not isinstance(t, jax.Array)]
        times = np.unique(np.concatenate(known))
        return arrays, times[np.isfinite(times)]

    def _problem(self, times: np.ndarray, constant: bool, dtype: np.dtype) -> str | None:
        """Return a text that says what is wrong with the known times in a dtype; `None` if nothing is."""
        rounded = times.astype(dtype).astype(float)
        gaps = np.concatenate([[np.inf], np.diff(times), [np.inf]])
        room = np.minimum(NEIGHBOUR * np.minimum(gaps[:-1], gaps[1:]), WHOLE * gaps[1:-1].sum())
        moved = np.flatnonzero(abs(rounded - times) > room) if len(times) > 1 else []
        for i in moved[:1]:
            other = times[i - 1 if gaps[i] < gaps[i + 1] else i + 1]
            found = f"{times[i]!s}, which becomes {rounded[i]!s}, and {other!s}"
            return f"expected times that {dtype} tells apart, found {found}"
        ends = [t for t in (self.t0, self.t1 if constant else self.t0) if not isinstance(t, jax.Array)]
        longest = max([abs(t) for t in ends if np.isfinite(t)], default=0.0)
        if self.dt0 is None or abs(self.dt0) >= 2 * float(jnp.finfo(dtype).eps) * longest:
            return None
        return f"expected steps that {dtype} resolves at t={longest}, found dt0={self.dt0}"
