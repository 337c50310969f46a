"""The parameter integral of `GaussAdjoint`: Gauss-Legendre nodes on the steps of the backward solve.

On a step the integrand is as smooth as the solution and the adjoint state, and one rule is right, unless the
field is piecewise in time, as by an interpolant of data. Then the solvers may not see where its pieces meet,
and a step is divided until the integrand is a polynomial on each part, to the tolerance.
"""

import math
from collections.abc import Callable
from typing import TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ..types import Array, Cotangent, DType, PyTree, Time, Y
from ._trajectory import SegmentPath
from ._trees import cast_like, set_row


# How many rows of states go through one vjp: enough for fast matrix products, more only takes memory.
ROWS = 320

# The parameters with a gradient, in their places in a list that has `None` for the others.
Moving: TypeAlias = list[Array | None]
# Of the field, at time, state and parameters.
Value: TypeAlias = Callable[[Time, Y, Moving], Y]
# The adjoint state at a time.
AdjointPath: TypeAlias = Callable[[Array], Cotangent]


class Nodes(eqx.Module):
    """The nodes of a block of intervals: times, weights, states and adjoint states.

    The leading axes are the interval and its node; `count` intervals are used.
    """

    count: Array | int
    t: Array
    weight: Array
    y: Y
    adjoint: Cotangent

    @classmethod
    def empty(cls, t: Array, y: Y, number: int) -> "Nodes":
        rows = max((math.prod(y.shape[:-1]) for y in jax.tree.leaves(y)), default=1)
        shape = (min(max(ROWS // max(rows * number, 1), 2), 16), number)
        ys = jax.tree.map(lambda y: jnp.broadcast_to(y, (*shape, *y.shape)), y)
        return cls(0, jnp.full(shape, t), jnp.zeros(shape, t.dtype), ys, jax.tree.map(jnp.zeros_like, ys))

    @property
    def is_full(self) -> Array:
        return jnp.asarray(self.count) == len(self.weight[...])

    def buffers(self) -> list[PyTree]:
        return [self.t, self.weight, self.y, self.adjoint]

    def put(self, accepted: Array, *values: PyTree) -> "Nodes":
        """Return the nodes with those of an interval, which the next one replaces unless it is accepted."""
        buffers = [set_row(b, self.count, x) for b, x in zip(self.buffers(), values, strict=True)]
        return Nodes(self.count + jnp.where(accepted, 1, 0), *buffers)


class Quadrature:
    """The rule with so many nodes on an interval from `s0` to `s1` of the time `s = -t`."""

    def __init__(self, value: Value, moving: Moving, number: int, dtype: DType):
        self.value, self.moving = value, moving
        points, weights = np.polynomial.legendre.leggauss(number)
        self.points, self.weights = jnp.asarray(0.5 + 0.5 * points, dtype), jnp.asarray(0.5 * weights, dtype)

    def put(
        self, nodes: Nodes, accepted: Array, solution: SegmentPath, adjoint: AdjointPath, s0: Array, s1: Array
    ) -> Nodes:
        """Evaluate the forward and the adjoint solution at the nodes of an interval."""
        s = s0 + (s1 - s0) * self.points
        adjoints = cast_like(jax.vmap(adjoint)(s), nodes.adjoint)
        states = jax.vmap(solution.evaluate)(-s)
        return nodes.put(accepted, -s, (s1 - s0) * self.weights, states, adjoints)

    def gradient(self, nodes: Nodes) -> Cotangent:
        """Return the parameter integral over a block of intervals."""
        used = jnp.arange(len(nodes.weight))[:, None] < nodes.count
        weight = jnp.where(used, nodes.weight, jnp.zeros_like(nodes.weight)).ravel()
        times = jax.vmap(lambda w, y: jax.tree.map(lambda x: w.astype(x.dtype) * x, y))

        def values(moving: Moving) -> Y:
            return jax.vmap(lambda t, y: self.value(t, y, moving))(*_flat((nodes.t, nodes.y)))

        _, pull = jax.vjp(values, self.moving)
        return pull(times(weight, _flat(nodes.adjoint)))[0]


def _flat(tree: PyTree) -> PyTree:
    """Put intervals and nodes on one axis."""
    return jax.tree.map(lambda x: x.reshape(x.shape[0] * x.shape[1], *x.shape[2:]), tree)
