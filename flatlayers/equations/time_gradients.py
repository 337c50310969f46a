"""Gradients of a solve with respect to its times: they are the vector field there, whatever the adjoint.

After `dy/dt = f(t, y)` the state `y(t)` has the slope `f(t, y(t))`, and a start that is later by `d` is as a
state `y0 - d f(t0, y0)` at the old one. So the solve itself may take all times for constants.
"""

from collections.abc import Callable
from dataclasses import dataclass

import diffrax
import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp

from ..adjoints._diffrax import saves_y
from ..dtypes import is_traced
from ..types import Args, Array, PyTree, Y
from .times import save_times


Field = Callable[..., Y]  # of `(t, y, args)`

_ORDER = (
    "expected a second derivative by a time and by something else to begin with the time or with both, as "
    "jax.jacfwd(jax.grad(loss, by_time), by_other) or jax.hessian(loss, (by_time, by_other)) do, found the "
    "other first"
)


@dataclass(frozen=True)
class MovingTimes:
    """The times of a solve, with derivatives.

    **Arguments:**

    - `t0`, `t1`, `saveat`: as `diffrax.diffeqsolve` takes them.
    - `field`, `args`: the vector field of the whole equation, and what it is called with.
    """

    t0: Array
    t1: Array
    saveat: diffrax.SaveAt
    field: Field
    args: Args

    @staticmethod
    def of(
        t0: Array,
        t1: Array,
        saveat: diffrax.SaveAt,
        terms: diffrax.AbstractTerm,
        args: Args,
        event: diffrax.Event | None,
    ) -> "MovingTimes | None":
        """Return the times if a derivative is possible here, else `None`: then they are the adjoint's matter.

        That is so for an equation of several terms, an event, which makes an end of its own, and all that is
        not saved as states at times.
        """
        sub = saveat.subs
        at_times = isinstance(sub, diffrax.SubSaveAt) and saves_y(sub) and not sub.steps and not saveat.dense
        traced = any(map(is_traced, (t0, t1, *save_times(saveat))))
        if type(terms) is not diffrax.ODETerm or event is not None or not (at_times and traced):
            return None
        return MovingTimes(t0, t1, saveat, terms.vector_field, args)

    def constant(self, y0: Y) -> tuple[Y, Array, Array, diffrax.SaveAt]:
        """Return `(y0, t0, t1, saveat)` for a solve at constant times."""
        t0, t1 = jax.lax.stop_gradient((self.t0, self.t1))
        saveat = eqx.tree_at(save_times, self.saveat, replace_fn=jax.lax.stop_gradient)
        return carried(y0, self.t0, t0, self.args, field=self.field), t0, t1, saveat

    def of_solution(self, solution: diffrax.Solution) -> diffrax.Solution:
        """Return the solution as a function of the times that are given."""
        sub = self.saveat.subs
        moments = [self.t0[None]] * sub.t0 + save_times(self.saveat) + [self.t1[None]] * sub.t1
        ts = jnp.concatenate(moments)
        ys = jax.vmap(lambda y, a, b: carried(y, a, b, self.args, field=self.field))(
            solution.ys, jax.lax.stop_gradient(ts), ts
        )
        found: PyTree = solution.ts
        ts = jnp.where(jnp.isfinite(found), ts, found)
        return eqx.tree_at(lambda s: (s.t0, s.t1, s.ts, s.ys), solution, (self.t0, self.t1, ts, ys))


@eqx.filter_custom_jvp
def carried(y: Y, start: Array, end: Array, args: Args, *, field: Field) -> Y:
    """Return `y`, a state at `start`, carried on to `end`, which has to be the same time.

    It is `y` itself; its first and second derivatives are those of the solution at `end`.
    """
    del start, end, args, field
    return y


@carried.def_jvp
def _carried_jvp(primals: PyTree, tangents: PyTree, *, field: Field) -> tuple[Y, Y]:
    y, start, end, _ = primals
    dy, d_start, d_end, _ = tangents
    if d_start is None and d_end is None:
        same = jnp.equal(*eqxi.nondifferentiable((start, end), msg=_ORDER))
        return y, jax.tree.map(lambda x: jnp.where(same, x, jnp.zeros_like(x)), dy)
    dynamic, static = eqx.partition(primals, eqx.is_inexact_array)
    tangents = jax.tree.map(
        lambda x, dx: jnp.zeros_like(x) if dx is None else dx, dynamic, tangents, is_leaf=lambda x: x is None
    )
    return jax.jvp(lambda dynamic: _step(field, *eqx.combine(dynamic, static)), (dynamic,), (tangents,))


def _step(field: Field, y: Y, start: Array, end: Array, args: Args) -> Y:
    """Take one step of the midpoint rule, which has the solution's derivatives up to the second."""

    def moved(step: Array, slope: Y) -> Y:
        return jax.tree.map(lambda x, dx: x + step.astype(x.real.dtype) * dx, y, slope)

    half = (end - start) / 2
    return moved(end - start, field(start + half, moved(half, field(start, y, args)), args))
