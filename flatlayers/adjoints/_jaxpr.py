"""A vector field taken apart, so that the gradient of a weight is one matrix product for many calls."""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var

from ..types import Array, PyTree


Values: TypeAlias = Sequence[Array]
# The values of variables, as far as they have been computed.
Environment: TypeAlias = dict[Var, Array]
# Of a split field: `((plain, weights), fixed)`.
Prepared: TypeAlias = tuple[tuple[Values, Values], Values]


class SplitField:
    """A traced function of constants and inputs, split into what is done once and what is done at each call.

    Once: all that depends on constants alone and does not grow, such as the views of a flat vector.

    The gradient of the weight `W` of a product `x W^T` is the sum of `delta^T x` over the calls. Added up
    call by call, arrays as large as `W` are written and read each time. Here a call gives out its `x`;
    `delta` is the cotangent of its `tap`, a zero added to the product; and one product of all `delta` with
    all `x` is the gradient. It is put off like this where `W` is at least as large as the product. The
    gradient of a bias `b` in `x W^T + b` is then put off too: it is the sum of the same `delta`.
    """

    def __init__(self, jaxpr: Jaxpr, constants: Values, inputs: Values, perturbed: Sequence[bool]):
        closed = jax.make_jaxpr(lambda c, x: inlined(jaxpr, c, x))(list(constants), list(inputs))
        self.jaxpr, count = closed.jaxpr, len(constants)
        self.consts = dict(zip(self.jaxpr.constvars, closed.consts, strict=True))
        self.constants, self.inputs = self.jaxpr.invars[:count], self.jaxpr.invars[count:]
        # Invariants of the loop: what is `known` does not depend on the inputs; `moving` is what of that has
        # a gradient. An equation whose results are larger than what it takes, such as a broadcast, is done at
        # each call: to pass on its results would cost more than to compute them.
        known = {*self.constants, *self.consts}
        moving = {var for var, moves in zip(self.constants, perturbed, strict=True) if moves}
        self.once, self.each = [], []
        for eqn in self.jaxpr.eqns:
            used = variables(eqn.invars)
            if known.issuperset(used) and not eqn.effects and size_of(eqn.outvars) <= size_of(used):
                self.once.append(eqn)
                known.update(eqn.outvars)
                if moving.intersection(used):
                    moving.update(var for var in eqn.outvars if jnp.issubdtype(var.aval.dtype, jnp.inexact))
            else:
                self.each.append(eqn)
        self._split(known, moving)

    def _split(self, known: set[Var], moving: set[Var]) -> None:
        """Find what is passed on: `plain` has a gradient call by call, that of `weights` is put off.

        A weight that something else uses as well is in both, and its gradient is the sum of both parts.
        """
        self.products = [eqn for eqn in self.each if _is_put_off(eqn, known, moving)]
        # A product that goes into nothing but the addition of a bias has its tap behind that.
        biases = [_bias_of(eqn, self.each, self.jaxpr.outvars, moving) for eqn in self.products]
        self.tapped = [bias or eqn for bias, eqn in zip(biases, self.products, strict=True)]
        self.number = {id(eqn): k for eqns in (self.products, self.tapped) for k, eqn in enumerate(eqns)}
        self.put_off = [eqn for eqn in self.each if id(eqn) in self.number]
        weights = [var for eqn in self.put_off for var in variables(eqn.invars) if var in moving]
        # All that `each` and the results read, but the weights of these, which are passed on apart.
        used = variables(var for eqn in self.each if id(eqn) not in self.number for var in eqn.invars)
        used = [*used, *variables(self.jaxpr.outvars)]
        self.plain = unique(var for var in used if var in moving)
        self.fixed = unique(var for var in used if var in known and var not in moving)
        self.weights = unique(weights)
        self.weight_of = {id(eqn): var for eqn, var in zip(self.put_off, weights, strict=True)}
        self.taps = [struct_of(eqn.outvars[0]) for eqn in self.tapped]

    def prepare(self, constants: Values) -> tuple[tuple[list[Array], list[Array]], list[Array]]:
        """Return the values `((plain, weights), fixed)`."""
        env = {**self.consts, **dict(zip(self.constants, constants, strict=True))}
        evaluate(self.once, env)
        plain, weights, fixed = ([env[v] for v in part] for part in (self.plain, self.weights, self.fixed))
        return (plain, weights), fixed

    def no_taps(self) -> list[Array]:
        """Return the taps of a call."""
        return [jnp.zeros(tap.shape, tap.dtype) for tap in self.taps]

    def __call__(self, prepared: Prepared, inputs: Values, taps: Values) -> tuple[list[Array], list[Array]]:
        """Return the results, and the factors `x` of the products, whose weights have no gradient here."""
        (plain, weights), fixed = prepared
        env = dict(zip([*self.inputs, *self.plain, *self.fixed], [*inputs, *plain, *fixed], strict=True))
        factors = []
        for eqn in self.each:
            k = self.number.get(id(eqn))
            if k is None:
                evaluate([eqn], env)
                continue
            x = env[self._other(eqn)]
            # Not from `env`: what else uses this weight has its gradient call by call.
            out = self._bind(eqn, weights[self._which(eqn)], x)
            env[eqn.outvars[0]] = _tapped(out, taps[k]) if eqn is self.tapped[k] else out
            if eqn is self.products[k]:
                factors.append(x)
        return [read(env, var) for var in self.jaxpr.outvars], factors

    def gradients(self, weights: Values, factors: Values, deltas: Values) -> list[Array]:
        """Return the gradients of the weights from factors and cotangents of products, calls leading."""
        total = [jnp.zeros_like(weight) for weight in weights]
        for eqn in self.put_off:
            k, which, x = self.number[id(eqn)], self._which(eqn), struct_of(self._other(eqn))
            # A sum does not need what it is added to.
            xs = factors[k] if eqn is self.products[k] else jnp.zeros((len(deltas[k]), *x.shape), x.dtype)

            _, pull = jax.vjp(partial(self._calls, eqn, xs), weights[which])
            total[which] = total[which] + pull(deltas[k])[0]
        return total

    def _calls(self, eqn: JaxprEqn, xs: Array, weight: Array) -> Array:
        """Evaluate an equation for all calls: the transpose of a product is one that sums over them."""
        return jax.vmap(lambda x: self._bind(eqn, weight, x))(xs)

    def _bind(self, eqn: JaxprEqn, weight: Array, x: Array) -> Array:
        values = [weight if var is self.weight_of[id(eqn)] else x for var in eqn.invars]
        return eqn.primitive.bind(*values, **eqn.params)

    def _which(self, eqn: JaxprEqn) -> int:
        return self.weights.index(self.weight_of[id(eqn)])

    def _other(self, eqn: JaxprEqn) -> Var:
        return next(var for var in variables(eqn.invars) if var is not self.weight_of[id(eqn)])


@jax.custom_jvp
def _tapped(product: Array, tap: Array) -> Array:
    """Return `product + tap` for a tap that is zero, which is not read."""
    del tap
    return product


@_tapped.defjvp
def _tapped_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    return _tapped(*primals), tangents[0] + tangents[1]


def _is_put_off(eqn: JaxprEqn, known: set[Var], moving: set[Var]) -> bool:
    # Both factors may be one variable, or both may have gradients: then the product is as any other.
    if eqn.primitive is not lax.dot_general_p or len(variables(eqn.invars)) < 2:
        return False
    weights = [var for var in eqn.invars if var in moving]
    # The other factor has to come from the call: of two constants the product is one as well.
    others = [var for var in eqn.invars if var not in known]
    return len(weights) == len(others) == 1 and size_of(weights) >= size_of(eqn.outvars)


def _bias_of(
    product: JaxprEqn, eqns: Iterable[JaxprEqn], results: Iterable[Var | Literal], moving: set[Var]
) -> JaxprEqn | None:
    """Return the addition of something with a gradient that is all that a product goes into."""
    out = product.outvars[0]
    used = [eqn for eqn in eqns for var in variables(eqn.invars) if var is out]
    if len(used) != 1 or out in variables(results) or used[0].primitive is not lax.add_p:
        return None
    (eqn,) = used
    is_alike = eqn.outvars[0].aval == out.aval
    return eqn if is_alike and moving.intersection(variables(eqn.invars)) else None


def evaluate(eqns: Iterable[JaxprEqn], env: Environment) -> None:
    for eqn in eqns:
        # As `jax.core.eval_jaxpr` does. Parameters that are jaxprs are bound as functions.
        bound = eqn.primitive.get_bind_params(eqn.params)
        functions, params = bound if isinstance(bound, tuple) else ((), bound)  # older and newer JAX
        out = eqn.primitive.bind(*functions, *(read(env, var) for var in eqn.invars), **params)
        env.update(zip(eqn.outvars, out if eqn.primitive.multiple_results else [out], strict=True))


def inlined(jaxpr: Jaxpr, constants: Values, inputs: Values) -> list[Array]:
    """Evaluate with what is under a `jit` inside written out."""
    env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*constants, *inputs], strict=True))
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("jit", "pjit"):
            inner = eqn.params["jaxpr"]
            out = inlined(inner.jaxpr, inner.consts, [read(env, var) for var in eqn.invars])
            env.update(zip(eqn.outvars, out, strict=True))
        else:
            evaluate([eqn], env)
    return [read(env, var) for var in jaxpr.outvars]


def inner_jaxprs(eqn: JaxprEqn) -> Iterable[Jaxpr]:
    """Return what an equation holds to be evaluated: the body of a loop, the branches of a condition."""
    parts = [part for x in eqn.params.values() for part in (x if isinstance(x, tuple | list) else [x])]
    closed = [part.jaxpr for part in parts if isinstance(part, ClosedJaxpr)]
    return [*closed, *(part for part in parts if isinstance(part, Jaxpr))]


def read(env: Environment, var: Var | Literal) -> Array:
    return var.val if isinstance(var, Literal) else env[var]


def struct_of(var: Var) -> jax.ShapeDtypeStruct:
    """Return the shape and the dtype of a variable."""
    aval: PyTree = var.aval
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype)


def variables(variables: Iterable[Var | Literal]) -> list[Var]:
    return [var for var in variables if not isinstance(var, Literal)]


def unique(variables: Iterable[Var]) -> list[Var]:
    return list(dict.fromkeys(variables))


def size_of(variables: Iterable[Var]) -> int:
    avals: list[PyTree] = [var.aval for var in variables]
    return sum(aval.size for aval in avals)
