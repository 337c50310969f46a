"""Floating-point operations of a program, as XLA counts them before it is compiled."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.extend.core as jex


def flops(f: Callable[..., Any], *types: Any) -> float | None:
    """Count the floating-point operations of a call of `f`; `None` where XLA does not tell.

    `types` are its arguments, or `jax.ShapeDtypeStruct`s in the place of arrays.
    """
    # A function: of anything else, as of a layer, JAX asks for its text, and displays take long.
    traced = jax.jit(lambda *args: f(*args)).trace(*types)
    once, rest = _counted(traced.lower()), _of_later_passes(traced.jaxpr.jaxpr)
    return None if once is None or rest is None else once + rest


def as_struct(aval: Any) -> jax.ShapeDtypeStruct:
    """Return the shape and the dtype of an abstract value, weak or not, as an argument for a trace."""
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=getattr(aval, "weak_type", False))


def _counted(lowered: jax.stages.Lowered) -> float | None:
    cost = lowered.cost_analysis()
    # A program without operations has no such entry.
    number = cost.get("flops", 0.0) if isinstance(cost, dict) else -1.0
    return float(number) if number >= 0 else None


def _of_later_passes(jaxpr: jex.Jaxpr) -> float | None:
    """Count what XLA leaves out of scans: all passes but the first, since it counts each body once."""
    total = 0.0
    for eqn in jaxpr.eqns:
        passes = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        for body in _bodies(eqn.params.values()):
            once = _counted(_lowered(body)) if passes > 1 else 0.0
            rest = _of_later_passes(body.jaxpr)
            if once is None or rest is None:
                return None
            total += (passes - 1) * once + passes * rest
    return total


def _bodies(parameters: Iterable[object]) -> Iterator[jex.ClosedJaxpr]:
    """Find the programs among the parameters of an operation. They stand there with and without constants."""
    for value in parameters:
        if isinstance(value, jex.ClosedJaxpr):
            yield value
        elif isinstance(value, jex.Jaxpr):
            yield jex.ClosedJaxpr(value, ())
        elif isinstance(value, tuple | list):
            yield from _bodies(value)


def _lowered(body: jex.ClosedJaxpr) -> jax.stages.Lowered:
    return jax.jit(jex.jaxpr_as_fun(body)).lower(*map(as_struct, body.in_avals))
