"""Derivatives that an adjoint does not have, refused with a sentence that names the way out.

JAX's own errors come from deep inside a solve, and name neither the adjoint nor what to do. Each function
here is the identity, and leaves nothing in a compiled program.
"""

from collections.abc import Callable
from functools import partial
from typing import NoReturn

import equinox as eqx
import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from ..types import Array, Cotangent, PyTree


_DIRECT = "adjoint=diffrax.DirectAdjoint() with a small max_steps"


def reverse_only(tree: PyTree, name: str, instead: str = "", *, once: bool = False) -> PyTree:
    """Return `tree`, with an error where a tangent of it is evaluated, not transposed as by reverse mode.

    `instead`: a way out that comes before the others. `once`: whether there is no second derivative either.
    """
    ways = f"{instead}adjoint=diffrax.ForwardMode(), or {_DIRECT}"
    message = (
        f"{name} has reverse mode, such as jax.grad and jax.jacrev, found forward-mode differentiation, such "
        f"as jax.jvp, jax.jacfwd or a least squares solver. Use {ways} for both modes. "
        "A solver of optimistix goes by reverse mode with options={'jac': 'bwd'}."
    )
    again = f"{name} has no second derivative. Use {_DIRECT}." if once else None
    return _each(_reverse_only_p, tree, message=message, again=again)


def reversed_once(tree: PyTree, name: str) -> PyTree:
    """Return `tree`, the outcome of a pass of reverse mode, with an error where a second one comes to it."""
    message = (
        f"{name} has no reverse mode over reverse mode, such as jax.grad of jax.grad. Use forward mode over "
        f"reverse mode, such as jax.jvp or jax.jacfwd of jax.grad and fl.hessian, or {_DIRECT}."
    )
    return _each(_forward_only_p, tree, message=message)


def reversed_never(tree: PyTree, name: str) -> PyTree:
    """Return `tree`, tangents by forward mode, with an error where reverse mode comes to them."""
    message = (
        f"{name} has no reverse mode over forward mode, such as jax.grad of jax.jvp. Use forward mode over "
        f"reverse mode, such as jax.jvp of jax.grad and fl.hessian, or {_DIRECT}."
    )
    return _each(_forward_only_p, tree, message=message)


def differentiated_once(x: Array, problem: PyTree, name: str, cause: str, instead: str) -> Array:
    """Return `x`, which a pass of reverse mode starts with; an error where its `problem` has a tangent."""
    message = f"{name} has no second derivative{cause}. Use {instead} or {_DIRECT}."
    return _constant_p.bind(x, *jax.tree.leaves(eqx.filter(problem, eqx.is_inexact_array)), message=message)


def _each(primitive: Primitive, tree: PyTree, **messages: str | None) -> PyTree:
    bind = partial(primitive.bind, **messages)
    return jax.tree.map(lambda x: bind(x) if eqx.is_inexact_array(x) else x, tree)


def _identity(x: Array, *_: object, **__: object) -> Array:
    return x


def _raise(*_: object, message: str, **__: object) -> NoReturn:
    raise TypeError(message)


def _linear(
    name: str, evaluate: Callable[..., Array], transpose: Callable[..., list[Cotangent]]
) -> Primitive:
    """Return a linear primitive that gives an array like the first of what it takes."""
    primitive = Primitive(name)
    primitive.def_impl(evaluate)
    primitive.def_abstract_eval(_identity)

    def lower(_: PyTree, x: PyTree, *__: PyTree, **params: PyTree) -> PyTree:
        return [evaluate(x, **params)]

    mlir.register_lowering(primitive, lower)
    batching.defvectorized(primitive)
    ad.deflinear(primitive, transpose)
    return primitive


def _reverse_only_jvp(
    primals: tuple[Array], tangents: tuple[Array], message: str, again: str | None
) -> tuple[Array, Array]:
    tangent = _transposed_only_p.bind(*tangents, *primals, message=message)
    return primals[0] if again is None else _once_p.bind(*primals, message=again), tangent


_constant_p = _linear("constant", _identity, _raise)
batching.primitive_batchers[_constant_p] = lambda xs, axes, **params: (
    _constant_p.bind(*xs, **params),
    axes[0],
)
ad.primitive_jvps[_constant_p] = _raise

# An error where a tangent is evaluated or transposed: one that nothing comes to does no harm.
_never_p = _linear("never", _raise, _raise)
_once_p = _linear("once", _identity, _raise)
ad.primitive_jvps[_once_p] = lambda primals, tangents, message: (
    primals[0],
    _never_p.bind(*tangents, message=message),
)

_forward_only_p = _linear("forward_only", _identity, _raise)

# Reverse mode neither evaluates a tangent nor batches or differentiates it: by then it is transposed. The
# second operand is the primal value, which may be batched or differentiated where the tangent is not.
_transposed_only_p = _linear("transposed_only", _raise, lambda ct, **_: [ct, None])
batching.primitive_batchers[_transposed_only_p] = _raise
ad.primitive_jvps[_transposed_only_p] = _raise

_reverse_only_p = _linear("reverse_only", _identity, lambda ct, **_: [ct])
ad.primitive_jvps[_reverse_only_p] = _reverse_only_jvp
