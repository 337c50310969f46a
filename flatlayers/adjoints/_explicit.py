"""Steps of an explicit Runge-Kutta method, made again so that their vjps are cheap."""

from collections.abc import Callable
from typing import TypeAlias

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Primitive

from ..types import Args, Array, Cotangent, PyTree, Y
from ._diffrax import DenseInfo
from ._jaxpr import SplitField
from ._steps import Pull, Start, StepRecord
from ._trees import cast_like, wide_zeros


# Computed again rather than kept: no more work than to read it.
CHEAP = {
    *("abs", "add", "add_any", "and", "broadcast_in_dim", "convert_element_type", "copy", "div", "eq", "ge"),
    *("gt", "le", "lt", "max", "min", "mul", "ne", "neg", "not", "or", "reduce_sum", "reshape", "select_n"),
    *("sign", "squeeze", "sub", "transpose"),
}


# One zero for each product whose gradient is put off, as `SplitField` explains.
Taps: TypeAlias = list[Array]


class StageFunctions(eqx.Module):
    """The functions of a step of an explicit method: `field(t, y, control)` and `control(t0, t1)`, traced."""

    field: PyTree
    control: PyTree
    method: type = eqx.field(static=True)

    @classmethod
    def of(cls, method: type, terms: diffrax.AbstractTerm, args: Args, t0: Array, y0: Y) -> "StageFunctions":
        def product(t: Array, y: Y, control: PyTree) -> Y:
            return terms.vf_prod(t, y, args, control)

        control: PyTree = eqx.filter_closure_convert(terms.contr, t0, t0)
        field = eqx.filter_closure_convert(product, t0, y0, control.out_struct)
        return cls(field, control, method)


class ExplicitSteps:
    """Steps `k_i = f(t + c_i h, y + sum_j a_ij k_j) h`, `y1 = y + sum_i b_i k_i`, from the method's tableau.

    Diffrax's own step can stop its loop over the stages anywhere, and so keeps no more than the stages for
    the way back: a vjp evaluates the field a second time. Here the number of stages is known, and the loop
    is a `lax.scan`. A last stage that only error estimate and interpolation use is left out if it can be.
    """

    def __init__(self, stages: StageFunctions, perturbed: StageFunctions, record: StepRecord, y0: Y):
        self.stages, self.record, self.tableau = stages, record, stages.method.tableau
        t0 = record.t0[0]
        self.control, self.rest = eqx.partition(stages.control, perturbed.control)
        inputs = _arrays(t0, y0, stages.control(t0, t0))
        self.field = SplitField(stages.field.jaxpr, stages.field.consts, inputs, perturbed.field.consts)
        moving, fixed = eqx.partition(stages.field.consts, perturbed.field.consts)

        def prepare(moving: list[Array]) -> tuple[tuple[list[Array], list[Array]], list[Array]]:
            return self.field.prepare(eqx.combine(moving, fixed))

        # The views of a flat vector are taken here, once, and their transpose once at the end.
        (self.plain, self.weights), self.pull, self.fixed = jax.vjp(prepare, moving, has_aux=True)

    def zero_cotangents(self) -> Cotangent:
        return wide_zeros((self.plain, self.weights, self.control))

    def cotangents(self, total: Cotangent) -> tuple[Cotangent, Cotangent]:
        plain, weights, control = cast_like(total, (self.plain, self.weights, self.control))
        (constants,) = self.pull((plain, weights))
        nothing = jax.tree.map(lambda _: None, self.stages.field)
        field = eqx.tree_at(lambda field: field.consts, nothing, constants)
        return None, StageFunctions(field, control, self.stages.method)

    def advance(self, i: Array, start: Start) -> Start:
        count = self._count(last=False)
        y1, *_ = self._step(i, start[0], self.plain, self.control, self._taps(count), count)
        return y1, None

    def step_with_vjp(self, i: Array, start: Start, needs_dense: bool) -> tuple[Y, DenseInfo, Pull]:
        count = self._count(needs_dense)

        def step(y0: Y, plain: list[Array], control: PyTree, taps: Taps) -> tuple[PyTree, list[Array]]:
            y1, dense, factors = self._step(i, y0, plain, control, taps, count)
            return (y1, dense if needs_dense else None), factors

        inputs = (start[0], self.plain, self.control, self._taps(count))
        (y1, dense), pull, factors = jax.vjp(step, *inputs, has_aux=True)

        def pull_all(
            ct_y1: Cotangent, ct_dense: Cotangent, _: None
        ) -> tuple[tuple[Cotangent, Cotangent], Cotangent]:
            ct_y0, plain, control, deltas = pull((ct_y1, ct_dense))
            weights = self.field.gradients(self.weights, factors, deltas)
            return (ct_y0, None), (plain, weights, control)

        return y1, dense, pull_all

    def _count(self, last: bool) -> int:
        return self.tableau.num_stages - (self.tableau.fsal and not last)

    def _taps(self, count: int) -> Taps:
        return [jnp.zeros((count, *tap.shape), tap.dtype) for tap in self.field.taps]

    def _field(self) -> Callable[..., PyTree]:
        """Return the field, with what is `CHEAP` computed again for its vjp.

        With complex numbers all is kept: JAX rounds what a policy keeps by `reduce_precision`, which takes
        none.
        """
        if self.field.is_complex:
            return self.field
        return jax.checkpoint(self.field.__call__, policy=_is_dear, prevent_cse=False)

    def _step(
        self, i: Array, y0: Y, plain: list[Array], control: PyTree, taps: Taps, count: int
    ) -> tuple[Y, DenseInfo, list[Array]]:
        t0, t1 = self.record.t0[i], self.record.t1[i]
        control = eqx.combine(control, self.rest)(t0, t1)
        prepared = ((plain, self.weights), self.fixed)
        field = self._field()

        # `ks` has a row for each stage, zero where there is none yet, as `a` has a zero for it.
        def stage(ks: Y, row: tuple[Array, Array, Array, Taps]) -> tuple[Y, list[Array]]:
            k, a, c, taps = row
            y = jax.tree.map(lambda y, ks: y + _combine(a, ks), y0, ks)
            t = jnp.where(c == 1, t1, t0 + c * (t1 - t0))  # the very end, as diffrax has it
            out, factors = field(prepared, _arrays(t, y, control), taps)
            out = jax.tree.unflatten(jax.tree.structure(y0), out)
            return jax.tree.map(lambda ks, out: ks.at[k].set(out), ks, out), factors

        a, b, c = _square(self.tableau, count)
        dtype = jnp.result_type(*(jax.tree.leaves(y0) or [t0]))
        rows: PyTree = (np.arange(count), jnp.asarray(a, dtype), jnp.asarray(c, t0.dtype), taps)
        ks = jax.tree.map(lambda y: jnp.zeros((count, *y.shape), y.dtype), y0)
        ks, factors = lax.scan(stage, ks, rows)
        y1 = jax.tree.map(lambda y, ks: y + _combine(jnp.asarray(b, dtype), ks), y0, ks)
        return y1, {"y0": y0, "y1": y1, "k": ks}, factors


def _is_dear(primitive: Primitive, *_: object, **__: object) -> bool:
    return primitive.name not in CHEAP


def _square(tableau: diffrax.ButcherTableau, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return `(a, b, c)` of the first `count` stages, `a` as a square matrix."""
    a = np.zeros((count, count))
    for i, row in enumerate(tableau.a_lower[: count - 1]):
        a[i + 1, : i + 1] = row
    return a, tableau.b_sol[:count], np.concatenate([[tableau.c1], tableau.c])[:count]


def _combine(weights: Array, ks: Array) -> Array:
    return jnp.tensordot(weights, ks, axes=1)


def _arrays(*tree: PyTree) -> list[Array]:
    return jax.tree.leaves(eqx.filter(tree, eqx.is_array))
