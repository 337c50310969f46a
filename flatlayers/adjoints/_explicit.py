"""Steps of an explicit Runge-Kutta method, made again so that their vjps are cheap."""

from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ._jaxpr import Field
from ._outputs import zeros


# What is computed again rather than kept: no more work than to read it.
CHEAP = {
    *("abs", "add", "add_any", "and", "broadcast_in_dim", "convert_element_type", "copy", "div", "eq", "ge"),
    *("gt", "le", "lt", "max", "min", "mul", "ne", "neg", "not", "or", "reduce_sum", "reshape", "select_n"),
    *("sign", "squeeze", "sub", "transpose"),
}


class Stages(eqx.Module):
    """What a step of an explicit method calls: `field(t, y, control)` and `control(t0, t1)`, traced."""

    field: Any
    control: Any
    method: type = eqx.field(static=True)

    @classmethod
    def of(cls, solver: diffrax.AbstractERK, terms: Any, args: Any, t0: Any, y0: Any) -> "Stages":
        def product(t: Any, y: Any, control: Any) -> Any:
            return terms.vf_prod(t, y, args, control)

        control: Any = eqx.filter_closure_convert(terms.contr, t0, t0)
        field = eqx.filter_closure_convert(product, t0, y0, control.out_struct)
        return cls(field, control, type(solver))


class ExplicitSteps:
    """Steps `k_i = f(t + c_i h, y + sum_j a_ij k_j) h`, `y1 = y + sum_i b_i k_i`, from the method's tableau.

    Diffrax's own step can stop its loop over the stages anywhere, and so keeps no more than the stages for
    the way back: a vjp evaluates the field a second time. Here the number of stages is known, and the loop
    is a `lax.scan`. A last stage that only error estimate and interpolation use is left out if it can be.
    """

    def __init__(self, stages: Stages, perturbed: Stages, record: Any, y0: Any):
        self.stages, self.record, self.tableau = stages, record, stages.method.tableau
        t0 = record.t0[0]
        self.control, self.rest = eqx.partition(stages.control, perturbed.control)
        inputs = _arrays(t0, y0, stages.control(t0, t0))
        self.field = Field(stages.field.jaxpr, stages.field.consts, inputs, perturbed.field.consts)
        moving, fixed = eqx.partition(stages.field.consts, perturbed.field.consts)

        def prepare(moving: Any) -> Any:
            return self.field.prepare(eqx.combine(moving, fixed))

        (self.plain, self.weights), self.pull, self.fixed = jax.vjp(prepare, moving, has_aux=True)

    def zeros(self) -> Any:
        return zeros((self.plain, self.weights, self.control))

    def finish(self, total: Any) -> tuple[None, Stages]:
        plain, weights, control = total
        (constants,) = self.pull((plain, weights))
        nothing = jax.tree.map(lambda _: None, self.stages.field)
        field = eqx.tree_at(lambda field: field.consts, nothing, constants)
        return None, Stages(field, control, self.stages.method)

    def advance(self, i: Any, start: Any) -> Any:
        count = self._count(last=False)
        y1, *_ = self._step(i, start[0], self.plain, self.control, self._taps(count), count)
        return y1, None

    def redo(self, i: Any, start: Any, needs_dense: bool) -> tuple[Any, Any, Callable[..., Any]]:
        count = self._count(needs_dense)

        def step(y0: Any, plain: Any, control: Any, taps: Any) -> Any:
            y1, dense, factors = self._step(i, y0, plain, control, taps, count)
            return (y1, dense if needs_dense else None), factors

        inputs = (start[0], self.plain, self.control, self._taps(count))
        (y1, dense), pull, factors = jax.vjp(step, *inputs, has_aux=True)

        def pull_all(ct_y1: Any, ct_dense: Any, _: None) -> Any:
            ct_y0, plain, control, deltas = pull((ct_y1, ct_dense))
            weights = self.field.gradients(self.weights, factors, deltas)
            return (ct_y0, None), (plain, weights, control)

        return y1, dense, pull_all

    def _count(self, last: bool) -> int:
        return self.tableau.num_stages - (self.tableau.fsal and not last)

    def _taps(self, count: int) -> list[Any]:
        return [jnp.zeros((count, *tap.shape), tap.dtype) for tap in self.field.taps]

    def _field(self) -> Callable[..., Any]:
        """The field, what is `CHEAP` computed again. With complex numbers all is kept: JAX rounds what
        a policy keeps by `reduce_precision`, which takes none."""
        if self.field.is_complex:
            return self.field
        return jax.checkpoint(self.field.__call__, policy=_is_dear, prevent_cse=False)

    def _step(self, i: Any, y0: Any, plain: Any, control: Any, taps: Any, count: int) -> Any:
        t0, t1 = self.record.t0[i], self.record.t1[i]
        control = eqx.combine(control, self.rest)(t0, t1)
        prepared = ((plain, self.weights), self.fixed)
        field = self._field()

        def stage(ks: Any, row: Any) -> tuple[Any, Any]:
            k, a, c, taps = row
            y = jax.tree.map(lambda y, ks: y + _combine(a, ks), y0, ks)
            t = jnp.where(c == 1, t1, t0 + c * (t1 - t0))
            out, factors = field(prepared, _arrays(t, y, control), taps)
            out = jax.tree.unflatten(jax.tree.structure(y0), out)
            return jax.tree.map(lambda ks, out: ks.at[k].set(out), ks, out), factors

        a, b, c = _square(self.tableau, count)
        dtype = jnp.result_type(*(jax.tree.leaves(y0) or [t0]))
        rows = (np.arange(count), jnp.asarray(a, dtype), jnp.asarray(c, t0.dtype), taps)
        ks = jax.tree.map(lambda y: jnp.zeros((count, *y.shape), y.dtype), y0)
        ks, factors = lax.scan(stage, ks, rows)
        y1 = jax.tree.map(lambda y, ks: y + _combine(jnp.asarray(b, dtype), ks), y0, ks)
        return y1, {"y0": y0, "y1": y1, "k": ks}, factors


def _is_dear(primitive: Any, *_: Any, **__: Any) -> bool:
    return primitive.name not in CHEAP


def _square(tableau: diffrax.ButcherTableau, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`(a, b, c)` of the first `count` stages, `a` as a square matrix."""
    a = np.zeros((count, count))
    for i, row in enumerate(tableau.a_lower[: count - 1]):
        a[i + 1, : i + 1] = row
    return a, tableau.b_sol[:count], np.concatenate([[tableau.c1], tableau.c])[:count]


def _combine(weights: Any, ks: Any) -> Any:
    return jnp.tensordot(weights, ks, axes=1)


def _arrays(*tree: Any) -> list[Any]:
    return jax.tree.leaves(eqx.filter(tree, eqx.is_array))
