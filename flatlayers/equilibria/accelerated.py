"""`Anderson` and `Broyden`: fixed-point solvers for optimistix, of single vectors and of batches."""

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import KW_ONLY
from typing import Annotated, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx

from ..core.fields import Count, Function, NonNegative, Size, check_module_fields, number
from ..dtypes import at_least_float32, is_traced
from ..types import Args, Array, PyTree, Y
from ..vectors.names import describe


# What optimistix calls a solver with.
Fn = Callable[[Y, Args], tuple[Y, PyTree]]
Options = dict[str, object]
Tags = frozenset[object]

T = TypeVar("T")


def as_python(value: T) -> T:
    """Return a number of NumPy or JAX as one of Python, which promotes nothing; anything else as it is."""
    scalar = isinstance(value, np.generic | np.ndarray | jax.Array) and np.ndim(value) == 0
    return value.item() if scalar and not is_traced(value) else value  # pyright: ignore


class _Memory(eqx.Module):
    """The last steps and the best point, one row per sample. Steps are the oldest first, zero for none."""

    y: Array  # (rows, n)
    residual: Array  # (rows, n)
    y_steps: Array  # (rows, history, n)
    residual_steps: Array  # (rows, history, n)
    sizes: Array  # (rows, history): the norms of the last residuals, infinite for none
    best: Array  # (rows, n)
    best_size: Array  # (rows,): the norm of its residual
    moving: Array  # (rows,)
    failed: Array  # (rows,)


class _Accelerated(optx.AbstractFixedPointSolver):
    """The base: `y + damping r - (S + damping R) c`, where a subclass has the linear system for `c`.

    `r = fn(y) - y` is the residual, `S` and `R` are the last differences of iterates and residuals.
    """

    history: eqx.AbstractVar[int]
    batch_axes: eqx.AbstractVar[int]

    def __check_init__(self) -> None:
        check_module_fields(self)

    @property
    def _damping(self) -> float:
        return 1.0

    @abstractmethod
    def system(self, y_steps: Array, residual_steps: Array) -> tuple[Array, Array]:
        """Return `(K, P)` of the system `K c = P r`, for each row: (history, history) and (history, n)."""

    def init(
        self, fn: Fn, y: Y, args: Args, options: Options, f_struct: PyTree, aux_struct: PyTree, tags: Tags
    ) -> _Memory:
        y = self._as_rows(y)
        zeros, moving = jnp.zeros_like(y), jnp.ones(len(y), bool)
        steps = jnp.zeros((len(y), self.history, y.shape[1]), y.dtype)
        sizes = jnp.full((len(y), self.history), jnp.inf, y.dtype)
        return _Memory(zeros, zeros, steps, steps, sizes, y, sizes[:, 0], moving, ~moving)

    def step(
        self, fn: Fn, y: Y, args: Args, options: Options, state: _Memory, tags: Tags
    ) -> tuple[Y, _Memory, PyTree]:
        value, aux = fn(y, args)
        rows = self._as_rows(y)
        state = self._remember(state, rows, self._as_rows(value) - rows)
        # A row that has stopped stays where it was best.
        new = jnp.where(state.moving[:, None], rows + self._step(state), state.best)
        return self._like(new, y), state, aux

    def terminate(
        self, fn: Fn, y: Y, args: Args, options: Options, state: _Memory, tags: Tags
    ) -> tuple[Array, optx.RESULTS]:
        # Any other result than success ends the solve, so a failure waits for the last row.
        stopped = ~state.moving.any()
        failed = stopped & state.failed.any()
        return stopped, optx.RESULTS.where(failed, optx.RESULTS.nonfinite, optx.RESULTS.successful)

    def postprocess(
        self,
        fn: Fn,
        y: Y,
        aux: PyTree,
        args: Args,
        options: Options,
        state: _Memory,
        tags: Tags,
        result: optx.RESULTS,
    ) -> tuple[Y, PyTree, Options]:
        best = self._like(state.best, y)
        if jax.tree.leaves(aux):
            _, aux = fn(best, args)
        return best, aux, {}

    def _remember(self, state: _Memory, y: Array, residual: Array) -> _Memory:
        finite = jnp.isfinite(residual).all(1)
        # Zero where it is not finite: such a row stops, and its numbers must not reach the sums of others.
        residual = jnp.where(finite[:, None], residual, 0)
        bound = jnp.maximum(self.atol, self.rtol * jnp.abs(y + residual))
        error = jax.vmap(self.norm)(residual / jnp.maximum(bound, jnp.finfo(bound.dtype).tiny))
        converged = finite & (error <= 1)
        size = jnp.linalg.norm(residual, axis=1)
        better = state.moving & finite & (converged | (size < state.best_size))
        first = jnp.isinf(state.sizes[:, -1:])  # no step has led to the first point
        y_step = jnp.where(first, 0, y - state.y)
        residual_step = jnp.where(first, 0, residual - state.residual)
        # Forgotten steps are zero, which `_step` takes for no steps yet.
        full = (state.residual_steps[:, 0] != 0).any(1)
        stalled = (full & (size > _STALLED * state.sizes[:, 0]))[:, None, None]
        return _Memory(
            y,
            residual,
            _pushed(jnp.where(stalled, 0, state.y_steps), y_step),
            _pushed(jnp.where(stalled, 0, state.residual_steps), residual_step),
            _pushed(state.sizes, size),
            jnp.where(better[:, None], y, state.best),
            jnp.where(better, size, state.best_size),
            state.moving & finite & ~converged,
            state.failed | (state.moving & ~finite),
        )

    def _step(self, state: _Memory) -> Array:
        # Any scale of a pair of steps gives the same step; in this one the system is well scaled.
        scale = _inverse_norm(state.residual_steps)
        y_steps, residual_steps = scale * state.y_steps, scale * state.residual_steps
        matrix, projection = self.system(y_steps, residual_steps)
        # A step of zero has a row and a column of zeros: a one on the diagonal gives it the weight zero.
        none_yet = (scale == 0).astype(matrix.dtype) * jnp.eye(self.history, dtype=matrix.dtype)[None]
        right = _product("rhn,rn->rh", projection, state.residual)
        weights = jnp.linalg.solve(matrix + none_yet, right[..., None])[..., 0]
        plain = self._damping * state.residual
        step = plain - _product("rh,rhn->rn", weights, y_steps + self._damping * residual_steps)
        return jnp.where(jnp.isfinite(step).all(1, keepdims=True), step, plain)

    def _as_rows(self, y: Y) -> Array:
        """Return `y` as a matrix with one row per sample, in float32 at least."""
        leaves = list(map(jnp.asarray, jax.tree.leaves(y)))
        lead = leaves[0].shape[: self.batch_axes] if leaves else ()
        fits = all(x.ndim >= self.batch_axes and x.shape[: self.batch_axes] == lead for x in leaves)
        if not leaves or not fits or any(jnp.iscomplexobj(x) for x in leaves):
            axes = f"{self.batch_axes} leading axes in common" if self.batch_axes else "numbers"
            raise ValueError(f"expected y of real arrays with {axes}, found {describe(y)}")
        with jax.numpy_dtype_promotion("standard"):
            dtype = at_least_float32(jnp.result_type(*leaves))
        rows = math.prod(lead)
        return jnp.concatenate(
            [x.reshape(rows, math.prod(x.shape[self.batch_axes :])).astype(dtype) for x in leaves], axis=1
        )

    def _like(self, rows: Array, y: Y) -> Y:
        """Return rows in the shapes and dtypes of `y`: the inverse of `_as_rows`."""
        leaves, structure = jax.tree.flatten(y)
        sizes = [math.prod(x.shape[self.batch_axes :]) for x in leaves]
        ends = [sum(sizes[: i + 1]) for i in range(len(sizes) - 1)]
        parts = jnp.split(rows, ends, axis=1)
        return structure.unflatten(
            [part.reshape(x.shape).astype(x.dtype) for part, x in zip(parts, leaves, strict=True)]
        )


_STALLED = 0.3  # of the residual a full history ago


class Anderson(_Accelerated):
    """Anderson acceleration of `y = fn(y)`: the mixture of the last iterates with the least residual.

    With the residual `r = fn(y) - y` and the last differences of iterates `S` and of residuals `R`, the next
    iterate is `y + damping r - (S + damping R) c`, where `c` minimises `|r - R c|^2 + regularization |c|^2`
    for `R` scaled to unit columns. It is a solver of `optimistix.fixed_point`, for any pytree `y`. One
    evaluation per step; the memory is that of `2 history` copies of `y`.

    The solve ends where `|fn(y) - y| <= max(atol, rtol |fn(y)|)`, in `norm`; this is the `y` that is
    returned, and if it is never found, the one that came closest. The result is `nonfinite` if `fn` gives
    such numbers. Everything is computed in float32 at least.

    **Arguments:**

    - `rtol`, `atol`: the relative and the absolute tolerance. A half precision cannot tell small ones: there
        the solve ends at the maximum of steps.
    - `history`: the number of differences that are used. If the residual has not fallen to 0.3 within a
        full history, all but the last are forgotten: old differences would hold it where it is.
    - `damping`: how much of the residual is taken, from 0 to 1; less is slower and more stable.
    - `regularization`: what keeps `c` small where differences are nearly dependent; at least the rounding
        error of the dtype.
    - `batch_axes`: the number of leading axes of `y` that count samples. With 0, `y` is one vector. Otherwise
        each sample has its own mixture, and stays as it is once it has converged, while the others go on.
    - `norm`: of the residual of one sample over its tolerance.

    **Raises:** `ValueError` for an option out of range or not finite, `TypeError` for one that is no number;
    `ValueError` for complex `y`, and for leaves of `y` with other leading axes.

    Reference: Walker and Ni, "Anderson Acceleration for Fixed-Point Iterations", SIAM J. Numer. Anal., 2011.

    >>> import jax.numpy as jnp
    >>> import optimistix as optx
    >>> import flatlayers as fl
    >>> solver = fl.Anderson(rtol=1e-5, atol=1e-5)
    >>> solution = optx.fixed_point(lambda y, _: jnp.cos(y), solver, jnp.ones(3))
    >>> print(f"{solution.value[0]:.4f} after {solution.stats['num_steps']} steps")
    0.7391 after 6 steps
    """

    rtol: NonNegative = eqx.field(converter=as_python)
    atol: NonNegative = eqx.field(converter=as_python)
    _: KW_ONLY
    history: Size = eqx.field(default=5, converter=as_python)
    damping: Annotated[float, number(above=0, high=1)] = eqx.field(default=1.0, converter=as_python)
    regularization: NonNegative = eqx.field(default=1e-10, converter=as_python)
    batch_axes: Count = eqx.field(default=0, converter=as_python)
    norm: Function = optx.max_norm

    @property
    def _damping(self) -> float:
        return self.damping

    def system(self, y_steps: Array, residual_steps: Array) -> tuple[Array, Array]:
        gram = _product("rin,rjn->rij", residual_steps, residual_steps)
        least = max(self.regularization, float(jnp.finfo(gram.dtype).eps))
        return gram + least * jnp.eye(self.history, dtype=gram.dtype)[None], residual_steps


class Broyden(_Accelerated):
    """Broyden's good method for `y = fn(y)`, of limited memory: a Jacobian learned from the last steps.

    With the residual `r = fn(y) - y` and the last differences of iterates `S` and of residuals `R`, the next
    iterate is `y + r - (S + R) (S' R + L)^-1 S' r`, where `L` is `S' S` below its diagonal. That is the step
    of Newton's method with the Jacobian that Broyden's updates make of `-1`, in the order of the steps. It
    is a solver of `optimistix.fixed_point`, for any pytree `y`. One evaluation per step; the memory is that
    of `2 history` copies of `y`.

    It ends, and returns the best iterate, as `Anderson` does. Next to that it needs a longer history, and
    can be the faster one where the residual is far from linear.

    **Arguments:**

    - `rtol`, `atol`: the relative and the absolute tolerance.
    - `history`: the number of steps that are used; they are forgotten as with `Anderson`.
    - `batch_axes`: the number of leading axes of `y` that count samples, each with a Jacobian of its own; 0
        treats `y` as one vector.
    - `norm`: of the residual of one sample over its tolerance.

    **Raises:** as `Anderson`.

    References: Byrd, Nocedal and Schnabel, "Representations of Quasi-Newton Matrices and their Use in Limited
    Memory Methods", Math. Programming, 1994; Bai, Kolter and Koltun, "Deep Equilibrium Models", NeurIPS 2019.

    >>> import jax.numpy as jnp
    >>> import optimistix as optx
    >>> import flatlayers as fl
    >>> solver = fl.Broyden(rtol=1e-5, atol=1e-5)
    >>> solution = optx.fixed_point(lambda y, _: jnp.cos(y), solver, jnp.ones(3))
    >>> print(f"{solution.value[0]:.4f} after {solution.stats['num_steps']} steps")
    0.7391 after 5 steps
    """

    rtol: NonNegative = eqx.field(converter=as_python)
    atol: NonNegative = eqx.field(converter=as_python)
    _: KW_ONLY
    history: Size = eqx.field(default=20, converter=as_python)
    batch_axes: Count = eqx.field(default=0, converter=as_python)
    norm: Function = optx.max_norm

    def system(self, y_steps: Array, residual_steps: Array) -> tuple[Array, Array]:
        lower = jnp.tril(_product("rin,rjn->rij", y_steps, y_steps), -1)
        return _product("rin,rjn->rij", y_steps, residual_steps) + lower, y_steps


def _product(subscripts: str, a: Array, b: Array) -> Array:
    return jnp.einsum(subscripts, a, b, precision=jax.lax.Precision.HIGHEST)


def _pushed(steps: Array, step: Array) -> Array:
    """Return the steps with a new one at the end, and without the oldest."""
    return jnp.concatenate([steps[:, 1:], step[:, None]], axis=1)


def _inverse_norm(steps: Array) -> Array:
    """Return one over the norm along the last axis, and zero for zero; a constant to `jax.grad`."""
    norm = jnp.linalg.norm(jax.lax.stop_gradient(steps), axis=-1, keepdims=True)
    return jnp.where(norm > 0, 1 / jnp.where(norm > 0, norm, 1), 0)
