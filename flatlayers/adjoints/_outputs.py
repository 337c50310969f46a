"""What a solve saved, seen from the way back: which cotangents belong to which step."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from . import _diffrax


class Cotangents(eqx.Module):
    """Cotangents of the place that the way back has come to, and of what steps and saved values depend on."""

    y: Any
    solver_state: Any
    params: Any
    saveat: Any


class Output:
    """What one `SubSaveAt` saved, read from the last to the first.

    A `place` is how much is left to be read: of all that was saved, and of `ts`.
    """

    def __init__(self, walk: Any, index: int, times: Any, ts_saved: Any, ys: Any, cotangents: Any):
        self.walk, self.index, self.times, self.ts_saved = walk, index, times, ts_saved
        self.sub = _diffrax.sub_saveats(walk.problem.saveat)[index]
        self.cotangents = cotangents
        if jax.tree.leaves(cotangents):
            self.cotangents = jax.tree.map(zero_if_none, eqx.filter(ys, eqx.is_inexact_array), cotangents)

    def save(self, saveat: Any, t: Any, y: Any) -> Any:
        saveat = eqx.combine(saveat, self.walk.rest_of_saveat)
        saved = _diffrax.sub_saveats(saveat)[self.index].fn(t, y, None)
        return eqx.filter(saved, eqx.is_inexact_array)

    def add(self, ct: Cotangents, k: Any, t: Any, y: Any, due: Any = True) -> Cotangents:
        """Add to the cotangent of `y`, of time `t`, that of place `k`, which was saved of it if `due`."""
        t = jnp.where(due, self.times[k], t)  # the very time, or where nothing was saved a finite one
        _, pull = jax.vjp(lambda saveat, y: self.save(saveat, t, y), self.walk.saveat, y)
        ct_saved = jax.tree.map(lambda ct: jnp.where(due, ct[k], jnp.zeros_like(ct[k])), self.cotangents)
        ct_saveat, ct_y = pull(ct_saved)
        return Cotangents(add(ct.y, ct_y), ct.solver_state, ct.params, add(ct.saveat, ct_saveat))

    def at_end(self, ct: Cotangents, y1: Any) -> tuple[Cotangents, Any]:
        sub, steps, options = self.sub, self.walk.steps, self.walk.setting.options
        left = self.ts_saved + int(sub.t0)
        if sub.ts is not None:  # with t0 == t1 diffrax makes no step, and saves y0 for all times
            left = left + jnp.where(options["t0"] == options["t1"], len(sub.ts), 0)
        if sub.steps:
            left = left + steps // sub.steps
        if sub.t1 and sub.steps != 1:
            due = steps % sub.steps != 0 if sub.steps else True
            ct = self.add(ct, left, options["t1"], y1, due)
        return ct, (left, self.ts_saved)

    def at_step(self, i: Any, ct: Cotangents, place: Any, y1: Any) -> tuple[Cotangents, Any]:
        """Add what was saved at the end of step `i`."""
        if not self.sub.steps:
            return ct, place
        left, ts_left = place
        due = (i + 1) % self.sub.steps == 0
        left = left - jnp.where(due, 1, 0)
        return self.add(ct, left, self.walk.record.t1[i], y1, due), (left, ts_left)

    def inside(self, i: Any, ct: Cotangents, ct_dense: Any, place: Any, dense: Any) -> Any:
        """Collect on `dense` the cotangents of all that was interpolated in step `i`."""
        ts = self.sub.ts
        if ts is None:
            return ct, ct_dense, place
        record, interpolation = self.walk.record, self.walk.problem.solver.interpolation_cls

        def cond(carry: Any) -> Any:
            ts_left = carry[1]
            return (ts_left > 0) & ((i == 0) | (ts[ts_left - 1] > record.t1[i - 1]))

        def body(carry: Any) -> Any:
            left, ts_left, ct_saveat, ct_dense = carry
            left, ts_left = left - 1, ts_left - 1

            def save(saveat: Any, dense: Any) -> Any:
                path = interpolation(t0=record.t0[i], t1=record.t1[i], **dense)
                return self.save(saveat, self.times[left], path.evaluate(self.times[left]))

            _, pull = jax.vjp(save, self.walk.saveat, dense)
            more = pull(jax.tree.map(lambda ct: ct[left], self.cotangents))
            return left, ts_left, *add((ct_saveat, ct_dense), more)

        carry = (*place, ct.saveat, ct_dense)
        *place, ct_saveat, ct_dense = _diffrax.while_loop(cond, body, carry)
        return Cotangents(ct.y, ct.solver_state, ct.params, ct_saveat), ct_dense, tuple(place)

    def at_start(self, ct: Cotangents, place: Any) -> Cotangents:
        first, t0, y0 = int(self.sub.t0), self.walk.setting.options["t0"], self.walk.problem.y0
        if self.sub.ts is not None:  # of which none is left, unless there was no step

            def body(carry: Any) -> Any:
                left, ct = carry
                return left - 1, self.add(ct, left - 1, t0, y0)

            _, ct = _diffrax.while_loop(lambda carry: carry[0] > first, body, (place[0], ct))
        return self.add(ct, 0, t0, y0) if self.sub.t0 else ct


def add(a: Any, b: Any) -> Any:
    return jax.tree.map(jnp.add, a, b)


def zeros(tree: Any) -> Any:
    return jax.tree.map(jnp.zeros_like, tree)


def zero_if_none(like: Any, x: Any) -> Any:
    return jnp.zeros_like(like) if x is None else x
