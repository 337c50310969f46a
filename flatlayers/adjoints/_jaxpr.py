"""A vector field taken apart, so that the gradient of a weight is one matrix product for many calls."""

from collections.abc import Iterable, Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import ShapedArray
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var

from ..types import Array, PyTree


Values: TypeAlias = Sequence[Array]
# The values of variables, as far as they have been computed.
Environment: TypeAlias = dict[Var, Array]


class SplitField:
    """A traced function of constants and inputs, split into what is done once and what is done at each call.

    Once: all that depends on constants alone and does not grow, such as the views of a flat vector.

    The gradient of the weight `W` of a product `x W^T` is the sum of `delta^T x` over the calls. Added up
    call by call, arrays as large as `W` are written and read each time. Here a call gives out its `x`;
    `delta` is the cotangent of its `tap`, a zero added to the product; and one product of all `delta` with
    all `x` is the gradient. It is put off like this where `W` is at least as large as the product.
    """

    def __init__(self, jaxpr: Jaxpr, constants: Values, inputs: Values, perturbed: Sequence[bool]):
        closed = jax.make_jaxpr(lambda c, x: _inlined(jaxpr, c, x))(list(constants), list(inputs))
        self.jaxpr, count = closed.jaxpr, len(constants)
        self.is_complex = _has_complex(self.jaxpr)
        self.consts = dict(zip(self.jaxpr.constvars, closed.consts, strict=True))
        self.constants, self.inputs = self.jaxpr.invars[:count], self.jaxpr.invars[count:]
        # Invariants of the loop: what is `known` does not depend on the inputs; `moving` is what of that has
        # a gradient. An equation whose results are larger than what it takes, such as a broadcast, is done at
        # each call: to pass on its results would cost more than to compute them.
        known = {*self.constants, *self.consts}
        moving = {var for var, moves in zip(self.constants, perturbed, strict=True) if moves}
        self.once, self.each = [], []
        for eqn in self.jaxpr.eqns:
            used = _variables(eqn.invars)
            if known.issuperset(used) and not eqn.effects and _size(eqn.outvars) <= _size(used):
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
        self.products = {id(eqn): eqn for eqn in self.each if _puts_off(eqn, known, moving)}
        # All that `each` and the results read, but the weights of the products, which are passed on apart.
        used = _variables(var for eqn in self.each if id(eqn) not in self.products for var in eqn.invars)
        used = [*used, *_variables(self.jaxpr.outvars)]
        weights = [next(var for var in eqn.invars if var in moving) for eqn in self.products.values()]
        self.plain = _unique(var for var in used if var in moving)
        self.fixed = _unique(var for var in used if var in known and var not in moving)
        self.weights = _unique(weights)
        self.weight_of = [self.weights.index(var) for var in weights]
        avals = [eqn.outvars[0].aval for eqn in self.products.values()]
        self.taps = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in avals]

    def prepare(self, constants: Values) -> tuple[tuple[list[Array], list[Array]], list[Array]]:
        """Return the values `((plain, weights), fixed)`."""
        env = {**self.consts, **dict(zip(self.constants, constants, strict=True))}
        _evaluate(self.once, env)
        plain, weights, fixed = ([env[v] for v in part] for part in (self.plain, self.weights, self.fixed))
        return (plain, weights), fixed

    def __call__(
        self, prepared: tuple[tuple[Values, Values], Values], inputs: Values, taps: Values
    ) -> tuple[list[Array], list[Array]]:
        """Return the results, and the factors `x` of the products, whose weights have no gradient here."""
        (plain, weights), fixed = prepared
        env = dict(zip([*self.inputs, *self.plain, *self.fixed], [*inputs, *plain, *fixed], strict=True))
        factors = []
        for eqn in self.each:
            if id(eqn) in self.products:
                k = len(factors)
                side = self._side(eqn, k)
                x = env[eqn.invars[1 - side]]
                # Not from `env`: what else uses this weight has its gradient call by call.
                weight = weights[self.weight_of[k]]
                product = eqn.primitive.bind(*((x, weight) if side else (weight, x)), **eqn.params)
                env[eqn.outvars[0]] = _tapped(product, taps[k])
                factors.append(x)
            else:
                _evaluate([eqn], env)
        return [_read(env, var) for var in self.jaxpr.outvars], factors

    def gradients(self, weights: Values, factors: Values, deltas: Values) -> list[Array]:
        """Return the gradients of the weights from factors and cotangents of products, calls leading."""
        total = [jnp.zeros_like(weight) for weight in weights]
        for k, (eqn, x, delta) in enumerate(zip(self.products.values(), factors, deltas, strict=True)):
            # Batched over the calls, the transpose of the product is one product that sums over them.
            ends = (0, None) if self._side(eqn, k) else (None, 0)
            product = jax.vmap(lambda a, b, eqn=eqn: eqn.primitive.bind(a, b, **eqn.params), ends)
            order = (lambda w, x: (x, w)) if self._side(eqn, k) else (lambda w, x: (w, x))
            which = self.weight_of[k]
            _, pull = jax.vjp(lambda w, x=x, p=product, order=order: p(*order(w, x)), weights[which])
            total[which] = total[which] + pull(delta)[0]
        return total

    def _side(self, eqn: JaxprEqn, k: int) -> int:
        """Tell whether the weight of the `k`-th product is its left (0) or its right (1) factor."""
        return int(eqn.invars[1] is self.weights[self.weight_of[k]])


@jax.custom_jvp
def _tapped(product: Array, tap: Array) -> Array:
    """Return `product + tap` for a tap that is zero, which is not read."""
    del tap
    return product


@_tapped.defjvp
def _tapped_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    return _tapped(*primals), tangents[0] + tangents[1]


def _puts_off(eqn: JaxprEqn, known: set[Var], moving: set[Var]) -> bool:
    # Both factors may be one variable, or both may have gradients: then the product is as any other.
    if eqn.primitive is not lax.dot_general_p or len(_variables(eqn.invars)) < 2:
        return False
    weights = [var for var in eqn.invars if var in moving]
    # The other factor has to come from the call: of two constants the product is one as well.
    others = [var for var in eqn.invars if var not in known]
    return len(weights) == len(others) == 1 and _size(weights) >= _size(eqn.outvars)


def _evaluate(eqns: Iterable[JaxprEqn], env: Environment) -> None:
    for eqn in eqns:
        # As `jax.core.eval_jaxpr` does. Parameters that are jaxprs are bound as functions.
        bound = eqn.primitive.get_bind_params(eqn.params)
        functions, params = bound if isinstance(bound, tuple) else ((), bound)  # older and newer JAX
        out = eqn.primitive.bind(*functions, *(_read(env, var) for var in eqn.invars), **params)
        env.update(zip(eqn.outvars, out if eqn.primitive.multiple_results else [out], strict=True))


def _inlined(jaxpr: Jaxpr, constants: Values, inputs: Values) -> list[Array]:
    """Evaluate with what is under a `jit` inside written out."""
    env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*constants, *inputs], strict=True))
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("jit", "pjit"):
            inner = eqn.params["jaxpr"]
            out = _inlined(inner.jaxpr, inner.consts, [_read(env, var) for var in eqn.invars])
            env.update(zip(eqn.outvars, out, strict=True))
        else:
            _evaluate([eqn], env)
    return [_read(env, var) for var in jaxpr.outvars]


def _has_complex(jaxpr: Jaxpr) -> bool:
    """Tell whether there are complex numbers anywhere in it."""
    variables = [*jaxpr.constvars, *jaxpr.invars, *(var for eqn in jaxpr.eqns for var in eqn.outvars)]
    dtypes = [var.aval.dtype for var in variables if isinstance(var.aval, ShapedArray)]
    if any(jnp.issubdtype(dtype, jnp.complexfloating) for dtype in dtypes):
        return True
    return any(_has_complex(inner) for eqn in jaxpr.eqns for inner in _inner(eqn))


def _inner(eqn: JaxprEqn) -> Iterable[Jaxpr]:
    """Return what an equation holds to be evaluated: the body of a loop, the branches of a condition."""
    parts = [part for x in eqn.params.values() for part in (x if isinstance(x, tuple | list) else [x])]
    closed = [part.jaxpr for part in parts if isinstance(part, ClosedJaxpr)]
    return [*closed, *(part for part in parts if isinstance(part, Jaxpr))]


def _read(env: Environment, var: Var | Literal) -> Array:
    return var.val if isinstance(var, Literal) else env[var]


def _variables(variables: Iterable[Var | Literal]) -> list[Var]:
    return [var for var in variables if not isinstance(var, Literal)]


def _unique(variables: Iterable[Var]) -> list[Var]:
    return list(dict.fromkeys(variables))


def _size(variables: Iterable[Var]) -> int:
    avals: list[PyTree] = [var.aval for var in variables]
    return sum(aval.size for aval in avals)
