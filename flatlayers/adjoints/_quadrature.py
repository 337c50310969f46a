"""The parameter integral of `GaussAdjoint`: Gauss-Legendre nodes on the steps of the backward solve.

On a step the integrand is as smooth as the solution and the adjoint state, and one rule is right, unless the
field is piecewise in time, as by an interpolant of data. Then the solvers may not see where its pieces meet,
and a step is divided until the integrand is a polynomial on each part, to the tolerance.
"""

import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ._trajectory import Window, set_at


# How many rows of states go through one vjp: enough for fast matrix products, more only takes memory.
ROWS = 320

Value = Callable[[Any, Any, Any], Any]  # of the field, at time, state and parameters
Path = Callable[[Any], Any]  # the adjoint state at a time


class Nodes(eqx.Module):
    """The nodes of a block of intervals: times, weights, states and adjoint states, both axes leading."""

    count: Any
    t: Any
    weight: Any
    y: Any
    adjoint: Any

    @classmethod
    def empty(cls, t: Any, y: Any, number: int) -> "Nodes":
        rows = max((math.prod(y.shape[:-1]) for y in jax.tree.leaves(y)), default=1)
        shape = (min(max(ROWS // max(rows * number, 1), 2), 16), number)
        ys = jax.tree.map(lambda y: jnp.broadcast_to(y, (*shape, *y.shape)), y)
        return cls(0, jnp.full(shape, t), jnp.zeros(shape, t.dtype), ys, jax.tree.map(jnp.zeros_like, ys))

    @property
    def is_full(self) -> Any:
        return self.count == len(self.weight[...])

    def buffers(self) -> list[Any]:
        return [self.t, self.weight, self.y, self.adjoint]

    def put(self, kept: Any, *values: Any) -> "Nodes":
        """With the values for an interval, which the next one writes over unless it is kept."""
        buffers = [set_at(b, self.count, x) for b, x in zip(self.buffers(), values, strict=True)]
        return Nodes(self.count + jnp.where(kept, 1, 0), *buffers)


class Quadrature:
    """The rule with so many nodes on an interval from `s0` to `s1` of the time `s = -t`."""

    def __init__(self, value: Value, moving: Any, number: int, dtype: Any):
        self.value, self.moving = value, moving
        points, weights = np.polynomial.legendre.leggauss(number)
        self.points, self.weights = jnp.asarray(0.5 + 0.5 * points, dtype), jnp.asarray(0.5 * weights, dtype)

    def put(self, nodes: Nodes, kept: Any, window: Window, path: Path, s0: Any, s1: Any) -> Nodes:
        """Evaluate the forward and the adjoint solution at the nodes of an interval."""
        s = s0 + (s1 - s0) * self.points
        adjoint = _cast(jax.vmap(path)(s), nodes.adjoint)
        return nodes.put(kept, -s, (s1 - s0) * self.weights, jax.vmap(window.evaluate)(-s), adjoint)

    def gradient(self, nodes: Nodes) -> Any:
        """The parameter integral over a block of intervals."""
        used = jnp.arange(len(nodes.weight))[:, None] < nodes.count
        weight = jnp.where(used, nodes.weight, jnp.zeros_like(nodes.weight)).ravel()
        times = jax.vmap(lambda w, y: jax.tree.map(lambda x: w.astype(x.dtype) * x, y))

        def values(moving: Any) -> Any:
            return jax.vmap(lambda t, y: self.value(t, y, moving))(*_flat((nodes.t, nodes.y)))

        _, pull = jax.vjp(values, self.moving)
        return pull(times(weight, _flat(nodes.adjoint)))[0]


def _cast(tree: Any, like: Any) -> Any:
    return jax.tree.map(lambda x, y: x.astype(y.dtype), tree, like)


def _flat(tree: Any) -> Any:
    """Intervals and nodes on one axis."""
    return jax.tree.map(lambda x: x.reshape(x.shape[0] * x.shape[1], *x.shape[2:]), tree)
