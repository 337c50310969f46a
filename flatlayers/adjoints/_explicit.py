"""Explicit Runge-Kutta methods: a step from the tableau, and its vjp from what its stages leave."""

from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple, TypeAlias, cast

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ..types import Args, Array, ArrayLike, Cotangent, PyTree, Y
from ._diffrax import DenseInfo, get_at
from ._jaxpr import Prepared, SplitField, Values
from ._stage import StageVjp
from ._traced import TracedFunction
from ._trees import add, cast_like, rows_of, set_row, wide_zeros, zeros


# Buffers in a loop, and what puts the arrays of stage `i` into them.
Kept: TypeAlias = list[Array]
Keep: TypeAlias = Callable[[Kept, Array, list[Array]], Kept]


class TracedStages(eqx.Module):
    """An explicit Runge-Kutta solver, whose steps are functions of their start alone, with its terms traced.

    `field(t, y)` and `product(field, control)` of a method whose last stage can be the next step's first one,
    `field(t, y, control)` of others, which is that product. Of both `control(t0, t1)`.
    """

    field: PyTree
    product: PyTree
    control: PyTree
    order: PyTree
    solver: diffrax.AbstractERK

    @classmethod
    def of(
        cls, solver: diffrax.AbstractERK, terms: diffrax.AbstractTerm, args: Args, t0: Array, y0: Y
    ) -> "TracedStages":
        control: PyTree = TracedFunction.of(terms.contr, t0, t0)
        order, tableau = solver.error_order(terms), cast(diffrax.ButcherTableau, solver.tableau)
        if tableau.fsal and not terms.is_vf_expensive(t0, t0, y0, args):
            field: PyTree = TracedFunction.of(lambda t, y: terms.vf(t, y, args), t0, y0)
            product = TracedFunction.of(terms.prod, field.out_struct, control.out_struct)
            return cls(field, product, control, order, solver)

        def vf_prod(t: Array, y: Y, control: PyTree) -> Y:
            return terms.vf_prod(t, y, args, control)

        field = TracedFunction.of(vf_prod, t0, y0, control.out_struct)
        return cls(field, None, control, order, solver)

    @property
    def tableau(self) -> diffrax.ButcherTableau:
        return cast(diffrax.ButcherTableau, self.solver.tableau)

    @property
    def interpolation_cls(self) -> Callable[..., diffrax.AbstractPath]:
        return self.solver.interpolation_cls


class Step(NamedTuple):
    """The outcome of a step: its end, the field at its last stage, and its stages `k`."""

    y1: Y
    f1: PyTree
    ks: PyTree

    def dense(self, y0: Y) -> DenseInfo:
        return {"y0": y0, "y1": self.y1, "k": self.ks}


class ExplicitMethod:
    """Steps `k_i = f(t + c_i h, y + sum_j a_ij k_j) h`, `y1 = y + sum_i b_i k_i`, and their vjps.

    Diffrax's own step can stop its loop over the stages anywhere, and so keeps no more than the stages for
    the way back: a vjp evaluates the field a second time. Here the number of stages is known. The vjp is
    that of the field, stage by stage from the last, and of the sums, which are linear.

    **Arguments:**

    - `stages`, `perturbed`: the traced functions, and which of their leaves have a gradient.
    - `t0`, `y0`: an example of a time and a state.
    """

    def __init__(self, stages: TracedStages, perturbed: PyTree, t0: Array, y0: Y):
        self.stages, self.tableau, self.y0 = stages, stages.tableau, zeros(y0)
        controls = (stages.control, stages.product)
        self.control, self.rest = eqx.partition(controls, (perturbed.control, perturbed.product))
        self.control_moves = jax.tree.leaves(self.control) != []
        inputs = _arrays(t0, y0, () if self.last_is_first else stages.control(t0, t0))
        self.field = SplitField(stages.field.jaxpr, stages.field.consts, inputs, perturbed.field.consts)
        moving, fixed = eqx.partition(stages.field.consts, perturbed.field.consts)

        def prepare(moving: list[Array]) -> tuple[tuple[Values, Values], Values]:
            return self.field.prepare(eqx.combine(moving, fixed))

        # The views of a flat vector are taken here, once, and their transpose once at the end.
        (self.plain, self.weights), self.pull_prepared, constants = jax.vjp(prepare, moving, has_aux=True)
        self.prepared: Prepared = ((self.plain, self.weights), constants)
        self.inputs, self.size = inputs, len(jax.tree.leaves(y0))

    @cached_property
    def stage(self) -> StageVjp:
        """The field at one stage and its vjp."""
        numbers = range(len(self.inputs))
        moves = [0 < i <= self.size or (i > self.size and self.control_moves) for i in numbers]
        return StageVjp(self.field, self.prepared, self.inputs, moves)

    @property
    def last_is_first(self) -> bool:
        """Tell whether the last stage of a step can be the first one of the next."""
        return self.stages.product is not None

    @property
    def keeps_field(self) -> bool:
        """Tell whether the product's vjp needs the field, as it does where the control has a gradient."""
        return self.last_is_first and self.control_moves

    @property
    def residuals(self) -> list[jax.ShapeDtypeStruct]:
        """The arrays that a stage leaves for its vjp."""
        return [*self.stage.residuals, *(self._field_leaves if self.keeps_field else [])]

    def count(self, is_dense: bool) -> int:
        """Return how many stages a step needs: a last one that `y1` is made without only for dense output."""
        return self.tableau.num_stages - (self.tableau.fsal and not is_dense)

    # Steps

    def step(
        self,
        t0: Array,
        t1: Array,
        y0: Y,
        count: int,
        keep: Keep | None = None,
        kept: Kept | None = None,
        f0: PyTree = None,
        first: ArrayLike = 0,
    ) -> tuple[Step, PyTree]:
        """Make a step of `count` stages, from stage `first` on; if that is 1, `f0` is the field at its start.

        `keep(kept, i, residuals)` puts what stage `i` leaves for its vjp to `kept`.
        """
        a, b, c = _square(self.tableau, count)
        a, c = self._weights(a), jnp.asarray(c, t0.dtype)
        control, ks = self._control(self.control, t0, t1), rows_of(count, y0)
        f: PyTree = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), self.stages.field.out_struct)
        if f0 is not None:
            ks = set_row(ks, 0, self._product(f0, control))

        # `ks` has a row for each stage, zero where there is none yet, as `a` has a zero for it.
        def stage(carry: PyTree) -> PyTree:
            i, _, _, ks, kept = carry
            t, y = _time(get_at(c, i), t0, t1), _plus(y0, get_at(a, i), ks)
            f, residuals = self._evaluate(t, y, control, keeps=keep is not None)
            kept = keep(kept, i, residuals) if keep else kept
            return i + 1, y, f, set_row(ks, i, self._product(f, control)), kept

        # The number of stages is the same for all samples, so this is right under `vmap` as well.
        init = (jnp.asarray(first), y0, f, ks, kept)
        _, y, f1, ks, kept = jax.lax.while_loop(lambda carry: carry[0] < count, stage, init)
        # The last stage is often evaluated at the very end: taken from there it is diffrax's to the last bit.
        ends_there = self.tableau.ssal and count == self.tableau.num_stages
        return Step(y if ends_there else _plus(y0, self._weights(b), ks), f1, ks), kept

    def error(self, ks: PyTree) -> Y:
        """Return the estimate of a step's error."""
        weights = self._weights(self.tableau.b_error)
        return jax.tree.map(lambda k: jnp.tensordot(weights.astype(k.dtype), k, axes=1), ks)

    def _evaluate(self, t: Array, y: Y, control: PyTree, *, keeps: bool) -> tuple[PyTree, list[Array]]:
        inputs, structure = self._inputs(t, y, control), jax.tree.structure(self.stages.field.out_struct)
        if not keeps:
            return structure.unflatten(self.field(self.prepared, inputs, self.field.no_taps())[0]), []
        out, kept = self.stage.forward(self.prepared, inputs)
        return structure.unflatten(out), [*kept, *out] if self.keeps_field else kept

    @property
    def _field_leaves(self) -> list[jax.ShapeDtypeStruct]:
        return jax.tree.leaves(self.stages.field.out_struct)

    def _inputs(self, t: Array, y: Y, control: PyTree) -> list[Array]:
        return _arrays(t, y, () if self.last_is_first else control)

    def _control(self, control: PyTree, t0: Array, t1: Array) -> PyTree:
        return eqx.combine(control, self.rest)[0](t0, t1)

    def _product(self, f: PyTree, control: PyTree) -> Y:
        return eqx.combine(self.control, self.rest)[1](f, control) if self.last_is_first else f

    def _weights(self, a: np.ndarray) -> Array:
        dtypes = [jnp.finfo(y.dtype).dtype for y in jax.tree.leaves(self.y0)]
        return jnp.asarray(a, jnp.result_type(*dtypes) if dtypes else None)

    # Their vjps

    def pull(
        self,
        t0: Array,
        t1: Array,
        read: Callable[[Array], list[Array]],
        cotangents: tuple[Cotangent, Cotangent],
        deltas: Kept,
        keep: Keep,
    ) -> tuple[Cotangent, tuple[list[Array], Cotangent], Kept]:
        """Pull the cotangents of a step's end and of its dense output, or `None`, back to its start.

        `read` gives what a stage has left. Return the cotangents of `y0`, those of plain constants and of the
        control, and `deltas`, to which `keep` has put the cotangents of each stage's products.
        """
        control, pull_control = jax.vjp(lambda control: self._control(control, t0, t1), self.control)
        ct_y1, ct_dense = cotangents
        count = self.count(ct_dense is not None)
        a, b, _ = _square(self.tableau, count)
        a, ct_ks = self._weights(a.T), rows_of(count, ct_y1)
        if ct_dense is not None:
            ct_y1, ct_ks = add(ct_y1, ct_dense["y1"]), ct_dense["k"]
        # A stage is part of `y1` and of the stages after it, whose cotangents are in the rows of `ct_ys`.
        ct_ks = jax.tree.map(
            lambda ks, y1: ks + jnp.multiply.outer(self._weights(b).astype(y1.dtype), y1), ct_ks, ct_y1
        )

        def stage(carry: PyTree) -> PyTree:
            i, ct_ys, total, deltas = carry
            i = i - 1
            ct_k = _plus(jax.tree.map(lambda ct: get_at(ct, i), ct_ks), get_at(a, i), ct_ys)
            ct_y, params, delta = self._pull_stage(read(i), control, ct_k)
            return i, set_row(ct_ys, i, ct_y), add(total, params), keep(deltas, i, delta)

        init = jnp.asarray(count), rows_of(count, ct_y1), self._no_params(control), deltas
        _, ct_ys, (plain, *moved), deltas = jax.lax.while_loop(lambda carry: carry[0] > 0, stage, init)
        ct_y0 = jax.tree.map(lambda y, ys: y + ys.sum(0), ct_y1, ct_ys)
        ct_y0 = ct_y0 if ct_dense is None else add(ct_y0, ct_dense["y0"])
        params = self.control
        if self.control_moves:
            of_control, of_product = pull_control(moved[0])[0]
            params = of_control, add(of_product, moved[1])
        return ct_y0, (plain, params), deltas

    def _pull_stage(
        self, residuals: Values, control: PyTree, ct_k: Cotangent
    ) -> tuple[Cotangent, PyTree, list[Array]]:
        """Return the cotangents of a stage's `y`; of constants, control and product; and of its products."""
        residuals, field = residuals[: len(self.stage.residuals)], residuals[len(self.stage.residuals) :]
        ct_f, ct_control, ct_product = self._pull_product(field, control, ct_k)
        inputs, plain, deltas = self.stage.pull(self.prepared, residuals, jax.tree.leaves(ct_f))
        if self.control_moves and not self.last_is_first:
            ct_control = jax.tree.structure(control).unflatten(inputs[self.size :])
        ct_y = jax.tree.structure(self.y0).unflatten(inputs[: self.size])
        return ct_y, (plain, ct_control, ct_product), deltas

    def _pull_product(
        self, field: Values, control: PyTree, ct_k: Cotangent
    ) -> tuple[Cotangent, Cotangent, Cotangent]:
        """Return the cotangents of the field, and of the control and the product where these have some."""
        if not self.last_is_first:
            return ct_k, None, None

        def product(f: PyTree, control: PyTree, params: PyTree) -> Y:
            return eqx.combine(params, self.rest[1])(f, control)

        # It is linear in the field, which may be any where the control has no gradient.
        field = field or [jnp.zeros(x.shape, x.dtype) for x in self._field_leaves]
        f = jax.tree.structure(self.stages.field.out_struct).unflatten(field)
        if self.control_moves:
            return jax.vjp(product, f, control, self.control[1])[1](ct_k)
        return (*jax.vjp(lambda f: product(f, control, self.control[1]), f)[1](ct_k), None, None)

    def _no_params(self, control: PyTree) -> PyTree:
        nothing = (zeros(control), zeros(self.control[1]) if self.last_is_first else None)
        return (zeros(list(self.plain)), *(nothing if self.control_moves else (None, None)))

    def empty_deltas(self, size: int, count: int) -> Kept:
        """Return buffers for the cotangents of the products of so many steps and stages."""
        return [jnp.zeros((size, count, *tap.shape), tap.dtype) for tap in self.field.taps]

    def weight_gradients(self, residuals: Values, deltas: Values) -> list[Array]:
        """Return the gradients of the weights from residuals and cotangents of products, calls leading."""
        if not self.weights:
            return []
        residuals = list(residuals[: len(self.stage.residuals)])  # the field, if it is kept, is behind them
        factors = jax.vmap(lambda kept: self.stage.factors(self.prepared, kept))(residuals)
        return self.field.gradients(self.weights, factors, deltas)

    # Sums over steps

    def zero_cotangents(self) -> Cotangent:
        """Return zeros for the sums of `(plain, weights, control)`."""
        return wide_zeros((list(self.plain), list(self.weights), self.control))

    def cotangents(self, total: Cotangent) -> TracedStages:
        """Return the cotangents of the traced functions for such sums."""
        plain, weights, (control, product) = cast_like(
            total, (list(self.plain), list(self.weights), self.control)
        )
        (constants,) = self.pull_prepared((plain, weights))
        nothing = jax.tree.map(lambda _: None, self.stages)
        field = eqx.tree_at(lambda field: field.consts, nothing.field, constants)
        return TracedStages(field, product, control, nothing.order, nothing.solver)


def _square(tableau: diffrax.ButcherTableau, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return `(a, b, c)` of the first `count` stages, `a` as a square matrix."""
    a = np.zeros((count, count))
    for i, row in enumerate(tableau.a_lower[: count - 1]):
        a[i + 1, : i + 1] = row
    return a, tableau.b_sol[:count], np.concatenate([[tableau.c1], tableau.c])[:count]


def _time(c: Array, t0: Array, t1: Array) -> Array:
    return jnp.where(c == 1, t1, t0 + c * (t1 - t0))  # the very end, as diffrax has it


def _plus(y: Y, weights: Array, rows: PyTree) -> Y:
    """Return `y` and the weighted sum of rows."""
    return jax.tree.map(lambda y, x: y + jnp.tensordot(weights.astype(y.dtype), x, axes=1), y, rows)


def _arrays(*tree: PyTree) -> list[Array]:
    return jax.tree.leaves(eqx.filter(tree, eqx.is_array))
