"""Linear systems without a matrix, for implicit gradients: GMRES that knows whether it has succeeded."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import equinox.internal as eqxi
import jax
import jax.numpy as jnp
from jax import lax


Product = Callable[[jax.Array], jax.Array]


class Accuracy(NamedTuple):
    """The conditions for a solution to count, and its cost.

    - `aim`: the norm of the residual `b - A x`, relative to that of `b` or of `x`, whichever is larger.
    - `slack`: the error of `x`, relative to `x`. Rounding in `A` may keep the residual above the aim: then
        it is the change of `x` by another cycle. And an `x` so large that `aim |x| > slack |b|` is none:
        the inverse of `A` is larger still, and `A` perhaps singular.
    - `most`: the largest number of products with `A`.
    """

    aim: float
    slack: float
    most: int


class _State(NamedTuple):
    x: jax.Array
    residual: jax.Array  # its norm at the start of the last cycle
    reached: jax.Array  # whether the last cycle came to the aim, if products were exact
    accepted: jax.Array
    stalled: jax.Array
    products: jax.Array


class _Basis(NamedTuple):
    """The basis of a cycle after so many products."""

    products: jax.Array
    rows: jax.Array  # (restart + 1, n): orthonormal, zero where not used
    columns: jax.Array  # (restart + 1, restart + 1): of the residual, then of `A` times each row
    null: jax.Array  # (restart + 1,): 1 at first, with the product 0 with each column but the first
    going: jax.Array


def gmres(product: Product, b: jax.Array, accuracy: Accuracy) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Solve `A x = b` by restarted GMRES (Saad and Schultz, 1986), by short cycles or else by long ones.

    A cycle ends when it comes to the aim. One of as many steps as there are unknowns is a direct solver; a
    long one has as many as fit into a basis of 2^17 numbers, and at least those of a short one.

    **Arguments:**

    - `product`: `A v` of `v`, a linear function of vectors like `b`.
    - `b`: of shape `(n,)`, in float32 at least.
    - `accuracy`: when `x` is a solution.

    **Returns:** `(x, accepted, products)`: whether `x` is a solution, after so many products.
    """
    n, yes = b.size, jnp.array(True)
    if n == 0:
        return b, yes, jnp.array(0)
    scale = jnp.abs(b).max()
    scale = jnp.where(scale > 0, scale, 1)
    state = _State(jnp.zeros_like(b), jnp.full_like(scale, jnp.inf), ~yes, ~yes, ~yes, jnp.array(0))
    short, long = (min(n, steps) for steps in (_SHORT, max(_SHORT, _NUMBERS // n)))
    for restart, most in (*([(short, 4 * short)] if short < long else []), (long, accuracy.most)):
        state = state._replace(residual=jnp.full_like(scale, jnp.inf), stalled=~yes)
        cycle = functools.partial(_cycle, product, b / scale.astype(b.dtype), restart, accuracy)
        state = lax.while_loop(functools.partial(_unfinished, most), cycle, state)
    return state.x * scale.astype(b.dtype), state.accepted, state.products


_SHORT = 20  # steps
_NUMBERS = 2**17


def _unfinished(most: int, state: _State) -> jax.Array:
    return ~state.accepted & ~state.stalled & (state.products < most)


def _cycle(product: Product, b: jax.Array, restart: int, accuracy: Accuracy, state: _State) -> _State:
    """Run one cycle of at most `restart` steps, from the residual of `x`."""
    size = _norm(b)
    aim = accuracy.aim * jnp.maximum(size, _norm(state.x))
    basis = _basis(product, b, state.x, restart, aim)
    first, rest = basis.columns[:, 0], basis.columns[:, 1:]
    q, r = jnp.linalg.qr(rest)
    weights = jax.scipy.linalg.solve_triangular(r, _dot("ij,i->j", q, first))
    step = _dot("i,ij->j", weights, basis.rows[:-1])
    x = state.x + step
    residual = first[0]
    reached = residual <= aim * _norm(basis.null)
    regular = accuracy.aim * _norm(x) <= accuracy.slack * size
    # If the last cycle came to the aim by its own account, the residual is that of rounding.
    least = jnp.where(state.reached, _ROUNDING, _CRAWL)
    return _State(
        x,
        residual,
        reached,
        accepted=reached & (_norm(step) <= accuracy.slack * _norm(x)) & regular,
        stalled=~(residual <= least * state.residual),
        products=state.products + basis.products,
    )


_ROUNDING, _CRAWL = 0.5, 0.999


def _basis(product: Product, b: jax.Array, x: jax.Array, restart: int, aim: jax.Array) -> _Basis:
    """Return the residual and an orthonormal basis of its Krylov space, which has a solution that will do.

    The residual is the first product of the same loop: so the program has `A` once.
    """
    size = restart + 1

    def step(basis: _Basis) -> _Basis:
        i, first = basis.products, basis.products == 0
        new = product(jnp.where(first, x, basis.rows[i - 1]))
        new, column = _orthogonal(basis.rows, jnp.where(first, b - new, new))
        length = _norm(new)
        row = new / jnp.where(length > 0, length, 1).astype(new.dtype)
        null = -jnp.dot(basis.null, column, precision="highest") / length.astype(new.dtype)
        null = basis.null.at[i].set(jnp.where(first, 1, null))
        column = column.at[i].set(length.astype(new.dtype))
        # A system that has come to the aim stays as it is while others go on.
        columns = jnp.where(basis.going, column, basis.columns[:, i])
        null = jnp.where(basis.going, null, basis.null)
        residual = jnp.where(first, length, basis.columns[0, 0]) / _norm(null)
        return _Basis(
            i + 1,
            basis.rows.at[i].set(jnp.where(basis.going, row, 0)),
            basis.columns.at[:, i].set(columns),
            null,
            basis.going & (residual > aim),
        )

    def unfinished(basis: _Basis) -> jax.Array:
        # Under `jax.vmap` all go on until the last one has finished: no loop copies the basis to keep it.
        return eqxi.unvmap_any(basis.going) & (basis.products < size)

    zeros, identity = jnp.zeros((size, b.size), b.dtype), jnp.eye(size, dtype=b.dtype)
    start = _Basis(jnp.array(0), zeros, identity, zeros[:, 0], jnp.array(True))
    return lax.while_loop(unfinished, step, start)


def _orthogonal(rows: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return `v` without its parts along the rows, and these parts. Twice is enough (Kahan and Parlett)."""
    first = _dot("ij,j->i", rows, v)
    v = v - _dot("i,ij->j", first, rows)
    second = _dot("ij,j->i", rows, v)
    return v - _dot("i,ij->j", second, rows), first + second


_norm = jnp.linalg.norm
_dot = functools.partial(jnp.einsum, precision="highest")
