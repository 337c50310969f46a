"""The vector field at one stage, split into its value with all that its vjp needs, and the vjp."""

from collections.abc import Iterable, Sequence
from typing import TypeAlias

import jax
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var

from ..types import Array, PyTree
from ._jaxpr import (
    Environment,
    Prepared,
    SplitField,
    Values,
    evaluate,
    inlined,
    inner_jaxprs,
    read,
    size_of,
    struct_of,
    unique,
    variables,
)


# Computed again rather than kept: no more work than to read it.
CHEAP = {
    *("abs", "add", "add_any", "and", "broadcast_in_dim", "convert_element_type", "copy", "div", "eq", "ge"),
    *("gt", "integer_pow", "le", "lt", "max", "min", "mul", "ne", "neg", "not", "one_minus_square", "or"),
    *("reduce_sum", "reshape", "select_n", "sign", "square", "squeeze", "sub", "transpose"),
}

_CALLS = {"custom_jvp_call", "jit", "pjit"}

# Cotangents of the inputs, of the plain constants, and of the products.
StageCotangents: TypeAlias = tuple[list[Array], list[Array], list[Array]]


class StageVjp:
    """Two programs for a split field: `forward` gives values and residuals, and `pull` their vjp.

    Nothing is kept for `pull` that is a constant, that is there already, or that is cheap to compute from the
    rest: the output of an activation is the factor of the next product, and its derivative a function of it.

    **Arguments:**

    - `field`: with the constants that it was prepared with.
    - `inputs`: arrays like those that it will be called with.
    - `moving`: whether each of them has a gradient.
    """

    def __init__(self, field: SplitField, prepared: Prepared, inputs: Values, moving: Sequence[bool]):
        self.moving = list(moving)

        def forward(prepared: Prepared, inputs: Values) -> PyTree:
            (plain, weights), fixed = prepared

            def call(moving: Values, plain: Values, taps: Values) -> tuple[list[Array], list[Array]]:
                return field(((plain, weights), fixed), self._merge(moving, inputs), taps)

            return jax.vjp(call, self._moving(inputs), plain, field.no_taps(), has_aux=True)

        whole, (out, *rest) = jax.make_jaxpr(forward, return_shape=True)(prepared, list(inputs))
        closed = jax.make_jaxpr(lambda *x: inlined(whole.jaxpr, whole.consts, x))(
            *jax.tree.leaves((prepared, list(inputs)))
        )
        leaves, structure = jax.tree.flatten(rest)
        self.jaxpr: Jaxpr = closed.jaxpr
        self.consts = dict(zip(self.jaxpr.constvars, closed.consts, strict=True))
        number = len(out)
        self.out, self.needed = self.jaxpr.outvars[:number], self.jaxpr.outvars[number:]
        count = len(jax.tree.leaves(prepared))
        self.constants, self.inputs = self.jaxpr.invars[:count], self.jaxpr.invars[count:]
        self.kept, self.again = _kept(self.jaxpr, {*self.constants, *self.consts}, self.needed)
        self.residuals = [struct_of(var) for var in self.kept]

        def pull(leaves: Values, cotangents: Values) -> StageCotangents:
            pull, _ = jax.tree.unflatten(structure, leaves)
            return pull(list(cotangents))

        self.pullback, self.pulled = jax.make_jaxpr(pull, return_shape=True)(leaves, list(out))
        self.factor_count = len(rest[1])

    def forward(self, prepared: Prepared, inputs: Values) -> tuple[list[Array], list[Array]]:
        """Return the values of the field, and the residuals."""
        env = self._environment(prepared)
        env.update(zip(self.inputs, inputs, strict=True))
        evaluate(self.jaxpr.eqns, env)
        return [read(env, var) for var in self.out], [read(env, var) for var in self.kept]

    def pull(self, prepared: Prepared, residuals: Values, cotangents: Values) -> StageCotangents:
        """Return the cotangents of the moving inputs, of `plain` and of the products."""
        env = self._computed_again(prepared, residuals)
        leaves = [read(env, var) for var in self.needed]
        out = inlined(self.pullback.jaxpr, self.pullback.consts, [*leaves, *cotangents])
        return jax.tree.unflatten(jax.tree.structure(self.pulled), out)

    def factors(self, prepared: Prepared, residuals: Values) -> list[Array]:
        """Return what the weights were multiplied by."""
        env = self._computed_again(prepared, residuals)
        return [read(env, var) for var in self.needed[len(self.needed) - self.factor_count :]]

    def _computed_again(self, prepared: Prepared, residuals: Values) -> Environment:
        env = self._environment(prepared)
        env.update(zip(self.kept, residuals, strict=True))
        evaluate(self.again, env)
        return env

    def _environment(self, prepared: Prepared) -> Environment:
        return {**self.consts, **dict(zip(self.constants, jax.tree.leaves(prepared), strict=True))}

    def _moving(self, inputs: Values) -> list[Array]:
        return [x for x, moves in zip(inputs, self.moving, strict=True) if moves]

    def _merge(self, moving: Values, inputs: Values) -> list[Array]:
        values = iter(moving)
        return [next(values) if moves else x for x, moves in zip(inputs, self.moving, strict=True)]


def _kept(
    jaxpr: Jaxpr, constants: set[Var], needed: Iterable[Var | Literal]
) -> tuple[list[Var], list[JaxprEqn]]:
    """Return the variables to keep so that `needed` can be had from them and constants, and how.

    A cheap one is computed from its *roots*, the nearest variables before it that are not, unless these
    take more memory than it does.
    """
    roots: dict[Var, list[Var]] = {var: [] for var in constants}
    for eqn in jaxpr.eqns:
        above = unique(root for var in variables(eqn.invars) for root in roots.get(var, [var]))
        # What depends on constants alone is never kept.
        if _is_cheap(eqn) or not above:
            roots.update(dict.fromkeys(eqn.outvars, above))
    wanted = unique(variables(needed))
    # First those that have to be kept: they may be the roots of others.
    kept = dict.fromkeys(var for var in wanted if roots.get(var, [var]) == [var])
    for var in wanted:
        more = [root for root in roots.get(var, [var]) if root not in kept]
        kept.update(dict.fromkeys([var] if size_of(more) > size_of([var]) else more))
    return list(kept), _equations_between({*kept, *constants}, jaxpr, wanted)


def _is_cheap(eqn: JaxprEqn) -> bool:
    inner = [eqn for jaxpr in inner_jaxprs(eqn) for eqn in jaxpr.eqns]
    return eqn.primitive.name in CHEAP or (eqn.primitive.name in _CALLS and all(map(_is_cheap, inner)))


def _equations_between(known: set[Var], jaxpr: Jaxpr, wanted: Iterable[Var]) -> list[JaxprEqn]:
    """Return the equations that compute what is wanted from what is known."""
    missing, equations = set(wanted) - known, []
    for eqn in reversed(jaxpr.eqns):
        if missing.intersection(eqn.outvars):
            equations.append(eqn)
            missing.update(set(variables(eqn.invars)) - known)
    return equations[::-1]
