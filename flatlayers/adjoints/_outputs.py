"""The saved values of a solve, seen from the way back: which cotangents belong to which step."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp

from ..types import Array, ArrayLike, Cotangent, PyTree, Time, Y
from . import _diffrax
from ._diffrax import DenseInfo, SavedValues
from ._steps import StepRecord
from ._trees import add, add_to, zero_if_none


class BackwardCotangents(eqx.Module):
    """Cotangents of the start of the step that the walk back has come to, and of what all steps depend on."""

    y: Cotangent
    solver_state: Cotangent
    params: Cotangent
    saveat: Cotangent

    def replace(self, **parts: Cotangent) -> "BackwardCotangents":
        return dataclasses.replace(self, **parts)


class Unread(NamedTuple):
    """The numbers of values that the walk back has yet to come to: of all, and of those at `ts`."""

    values: Array
    ts: Array


# How many steps are yet to be walked over, the cotangents so far, and how much of each output is unread.
Position: TypeAlias = tuple[Array, BackwardCotangents, list[Unread]]


@dataclass(frozen=True)
class FinishedSolve:
    """A solve that is over: all that tells which step a value was saved in, and from what."""

    t0: Array
    t1: Array
    y0: Y
    steps: Array
    record: StepRecord
    interpolation_cls: Callable[..., diffrax.AbstractPath]


class SavedOutput:
    """The values that one `SubSaveAt` saved, read from the last value to the first.

    Diffrax writes the values of all options of a `SubSaveAt` into one buffer, in this order: `t0`; in each
    step those of `ts`, and then its end if `steps` says so; `t1`. They are taken from the buffer's end.

    **Arguments:**

    - `saveat`: its differentiated part and the rest, as `eqx.partition` gives them.
    - `index`: which of its `SubSaveAt`.
    - `saved`: with `values` that are like the saved ones.
    - `cotangents`: of these values.
    """

    def __init__(
        self,
        solve: FinishedSolve,
        saveat: tuple[diffrax.SaveAt, diffrax.SaveAt],
        index: int,
        saved: SavedValues,
        cotangents: Cotangent,
    ):
        self.solve, self.index, self.times, self.ts_count = solve, index, saved.times, saved.ts_count
        self.saveat, self.rest_of_saveat = saveat
        self.sub = _diffrax.sub_saveats(eqx.combine(*saveat))[index]
        self.cotangents = cotangents
        if self.has_cotangents:
            values = eqx.filter(saved.values, eqx.is_inexact_array)
            self.cotangents = jax.tree.map(zero_if_none, values, cotangents)

    @property
    def has_cotangents(self) -> bool:
        return jax.tree.leaves(self.cotangents) != []

    @property
    def interpolates(self) -> bool:
        return self.sub.ts is not None

    def at_end(self, ct: BackwardCotangents, y1: Y) -> tuple[BackwardCotangents, Unread]:
        """Add what was saved at `t1`, and count all that comes before it."""
        sub, solve = self.sub, self.solve
        unread = self.ts_count + int(sub.t0)
        if sub.ts is not None:  # with t0 == t1 diffrax makes no step, and saves y0 for all times
            unread = unread + jnp.where(solve.t0 == solve.t1, len(sub.ts), 0)
        if sub.steps:
            unread = unread + solve.steps // sub.steps
        # `t1` is not saved a second time where the last step was.
        if sub.t1 and sub.steps != 1:
            is_saved = solve.steps % sub.steps != 0 if sub.steps else True
            ct = self._add(ct, unread, solve.t1, y1, is_saved)
        return ct, Unread(unread, self.ts_count)

    def at_step(
        self, i: Array, ct: BackwardCotangents, unread: Unread, y1: Y
    ) -> tuple[BackwardCotangents, Unread]:
        """Add what was saved at the end of step `i`."""
        if not self.sub.steps:
            return ct, unread
        is_saved = (i + 1) % self.sub.steps == 0
        # Where nothing was saved, place `values` is of a later value, and `_add` adds zeros of it.
        values = unread.values - jnp.where(is_saved, 1, 0)
        return self._add(ct, values, self.solve.record.t1[i], y1, is_saved), Unread(values, unread.ts)

    def inside(
        self, i: Array, ct: BackwardCotangents, ct_dense: Cotangent, unread: Unread, dense: DenseInfo
    ) -> tuple[BackwardCotangents, Cotangent, Unread]:
        """Collect in `ct_dense` the cotangents of all that was interpolated in step `i`."""
        ts, record = self.sub.ts, self.solve.record
        if ts is None:
            return ct, ct_dense, unread

        # Diffrax saves at a time in the first step whose end is not before it.
        def cond(carry: tuple[Unread, Cotangent, Cotangent]) -> Array:
            left = carry[0].ts
            return (left > 0) & ((i == 0) | (ts[left - 1] > record.t1[i - 1]))

        def body(carry: tuple[Unread, Cotangent, Cotangent]) -> tuple[Unread, Cotangent, Cotangent]:
            unread, ct_saveat, ct_dense = carry
            k = unread.values - 1

            def save(saveat: diffrax.SaveAt, dense: DenseInfo) -> PyTree:
                path = self.solve.interpolation_cls(t0=record.t0[i], t1=record.t1[i], **dense)
                return self._save(saveat, self.times[k], path.evaluate(self.times[k]))

            # A vjp of the interpolation alone; that of the step waits for the sum of all `ct_dense`.
            _, pull = jax.vjp(save, self.saveat, dense)
            more_saveat, more_dense = pull(jax.tree.map(lambda ct: ct[k], self.cotangents))
            return Unread(k, unread.ts - 1), add_to(ct_saveat, more_saveat), add(ct_dense, more_dense)

        unread, ct_saveat, ct_dense = _diffrax.while_loop(cond, body, (unread, ct.saveat, ct_dense))
        return BackwardCotangents(ct.y, ct.solver_state, ct.params, ct_saveat), ct_dense, unread

    def at_start(self, ct: BackwardCotangents, unread: Unread) -> BackwardCotangents:
        """Add what was saved of `y0`."""
        solve, first = self.solve, int(self.sub.t0)
        if self.sub.ts is not None:  # of which none is unread, unless there was no step

            def body(carry: tuple[Array, BackwardCotangents]) -> tuple[Array, BackwardCotangents]:
                left, ct = carry
                return left - 1, self._add(ct, left - 1, solve.t0, solve.y0)

            _, ct = _diffrax.while_loop(lambda carry: carry[0] > first, body, (unread.values, ct))
        return self._add(ct, 0, solve.t0, solve.y0) if self.sub.t0 else ct

    def _save(self, saveat: diffrax.SaveAt, t: Time, y: Y) -> PyTree:
        saved = _diffrax.sub_saveats(eqx.combine(saveat, self.rest_of_saveat))[self.index].fn(t, y, None)
        return eqx.filter(saved, eqx.is_inexact_array)

    def _add(
        self, ct: BackwardCotangents, k: ArrayLike, t: Time, y: Y, is_saved: ArrayLike = True
    ) -> BackwardCotangents:
        """Add the cotangent of value `k`, which was saved from `y` at the time `t`, if it was."""
        # No condition, for the sake of `vmap`: where nothing was saved, zeros go through the vjp, which has
        # to be finite for that. Place `k` may be of no value then, and its time infinite.
        t = jnp.where(is_saved, self.times[k], t)
        _, pull = jax.vjp(lambda saveat, y: self._save(saveat, t, y), self.saveat, y)
        saved = jax.tree.map(lambda ct: jnp.where(is_saved, ct[k], jnp.zeros_like(ct[k])), self.cotangents)
        ct_saveat, ct_y = pull(saved)
        return BackwardCotangents(add(ct.y, ct_y), ct.solver_state, ct.params, add_to(ct.saveat, ct_saveat))
