"""How a fixed point is differentiated: implicitly, by phantom gradients, or through the solver."""

from typing import Any

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
import lineax as lx
import optimistix as optx

from ..layers.shapes import at_least_float32
from .shared import time_dtype


class PhantomAdjoint(optx.AbstractAdjoint):
    """The gradient of `k` damped steps from the solution: `y <- tau fn(y) + (1 - tau) y`.

    It takes the place of the implicit function theorem: no linear system is solved, and a step costs as much
    as one of plain iteration. The gradient is not exact: it is that of the Neumann series of the damped
    iteration, cut off after `k` terms, and tends to the exact one with `k` if the iteration converges. The
    value stays that of the solver. For `optimistix.fixed_point` and root finding, with any solver.

    **Arguments:**

    - `k`: the number of steps.
    - `tau`: the damping, above 0 and at most 1.

    **Raises:** `ValueError` for a `k` below 1, or another `tau`.

    Reference: Geng et al., "On Training Implicit Models", NeurIPS 2021.

    >>> import jax
    >>> import optimistix as optx
    >>> import flatlayers as fl
    >>> def root(a, k):  # of y = 0.5 y + a: 2 a
    ...     solver, adjoint = fl.Anderson(1e-6, 1e-6), fl.PhantomAdjoint(k, tau=1.0)
    ...     return optx.fixed_point(lambda y, a: 0.5 * y + a, solver, 0.0, a, adjoint=adjoint).value
    >>> float(jax.grad(root)(1.0, 1)), float(jax.grad(root)(1.0, 4))
    (1.0, 1.875)
    """

    k: int = 5
    tau: float = 0.8

    def __check_init__(self) -> None:
        if not isinstance(self.k, int) or self.k < 1:
            raise ValueError(f"expected `k` to be an integer of at least 1, found {self.k!r}")
        if not 0 < self.tau <= 1:
            raise ValueError(f"expected `tau` above 0 and at most 1, found {self.tau!r}")

    def apply(self, primal_fn: Any, rewrite_fn: Any, inputs: Any, tags: Any) -> Any:
        """Called by optimistix: `rewrite_fn` is the residual `fn(y) - y`."""
        root, rest = jax.tree.map(_constant, primal_fn((*_constants(inputs), _while_loop)))

        def step(y: Any, _: Any) -> Any:
            residual = rewrite_fn(y, rest, inputs)
            return jax.tree.map(lambda y, r: y + self.tau * r, y, residual), None

        last, _ = jax.lax.scan(step, root, length=self.k)
        # The derivative of the last step at the value of the solver.
        return jax.tree.map(lambda y, z: y + (z - _constant(z)), root, last), rest


class RelativeGMRES(lx.AbstractLinearSolver):
    """GMRES, matrix-free, with a tolerance relative to the largest number on the right-hand side.

    Gradients have any size; lineax's own tolerances are for numbers of order one. A half precision is raised
    to float32. A system that is not solved to half of its right-hand side is a failure; between that and the
    tolerance the approximation counts.
    """

    restart: int = 20
    max_steps: int = 12  # restarts

    def init(self, operator: Any, options: Any) -> Any:
        return lx.linearise(operator)

    def compute(self, state: Any, vector: Any, options: Any) -> Any:
        raised = jax.tree.map(lambda x: x.astype(at_least_float32(x.dtype)), vector)
        scale = optx.max_norm(raised)
        scale = jnp.where(scale > 0, scale, 1)
        raised = jax.tree.map(lambda x: x / scale.astype(x.dtype), raised)
        operator = lx.FunctionLinearOperator(
            lambda x: _as_dtype_of(state.mv(_as_dtype_of(x, vector)), raised), jax.eval_shape(lambda: raised)
        )
        least = min(jnp.finfo(x.dtype).bits for x in jax.tree.leaves(vector))
        tolerance = {16: 1e-2, 32: 1e-5}.get(least, 1e-9)
        solver = lx.GMRES(tolerance, tolerance, restart=self.restart, max_steps=self.max_steps)
        solution, result, stats = solver.compute(operator, raised, options)
        residual = jax.tree.map(jnp.subtract, raised, operator.mv(solution))
        near = optx.two_norm(residual) <= 0.5 * optx.two_norm(raised)
        result = lx.RESULTS.where(near, lx.RESULTS.successful, result)
        solution = jax.tree.map(lambda x: x * scale.astype(x.dtype), solution)
        return _as_dtype_of(solution, vector), result, stats

    def transpose(self, state: Any, options: Any) -> Any:
        return state.transpose(), options

    def conj(self, state: Any, options: Any) -> Any:
        return lx.conj(state), options

    def assume_full_rank(self) -> bool:
        return True


IMPLICIT = optx.ImplicitAdjoint(linear_solver=RelativeGMRES())
NAMED = {"phantom": PhantomAdjoint(), "unroll": optx.RecursiveCheckpointAdjoint()}


def check_solver(solver: Any, adjoint: Any) -> None:
    """Raise unless both options are of the kinds that there are, and go together."""
    fits = isinstance(solver, optx.AbstractFixedPointSolver | optx.AbstractRootFinder)
    if not fits and not isinstance(solver, optx.AbstractLeastSquaresSolver):
        raise TypeError(
            "expected solver to be a fixed-point solver or a root finder of optimistix, such as "
            f"Anderson(1e-4, 1e-4), found {solver!r}; SteadyState(solver=...) takes one of diffrax"
        )
    if isinstance(adjoint, str) and adjoint not in NAMED:
        raise ValueError(f"expected adjoint to be one of {sorted(NAMED)}, found {adjoint!r}")
    if not (adjoint is None or isinstance(adjoint, str | optx.AbstractAdjoint)):
        raise TypeError(f"expected adjoint to be None, a name or an adjoint of optimistix, found {adjoint!r}")
    if not fits and isinstance(as_adjoint(adjoint), PhantomAdjoint):
        raise ValueError(f"expected a solver of the equation itself for phantom gradients, found {solver!r}")


def as_solver(solver: Any) -> Any:
    """The solver, to run in the dtype of the state."""
    if type(solver) is optx.FixedPointIteration:
        return _FixedPointIteration(solver.rtol, solver.atol, solver.norm, solver.damp)
    return solver


class _FixedPointIteration(optx.FixedPointIteration):
    """Optimistix's own begins with an error of JAX's default dtype, and no other state has that later on."""

    def init(
        self, fn: Any, y: Any, args: Any, options: Any, f_struct: Any, aux_struct: Any, tags: Any
    ) -> Any:
        error = super().init(fn, y, args, options, f_struct, aux_struct, tags)
        return jax.tree.map(lambda x: x.astype(time_dtype(y)), error)


def as_adjoint(adjoint: Any) -> optx.AbstractAdjoint:
    """The adjoint that the option means."""
    if adjoint is None:
        return IMPLICIT
    return NAMED[adjoint] if isinstance(adjoint, str) else adjoint


def _as_dtype_of(tree: Any, other: Any) -> Any:
    return jax.tree.map(lambda x, y: x.astype(y.dtype), tree, other)


def _while_loop(*args: Any, **kwargs: Any) -> Any:
    return eqxi.while_loop(*args, kind="lax", **kwargs)


def _constant(x: Any) -> Any:
    return jax.lax.stop_gradient(x) if eqx.is_inexact_array(x) else x


def _constants(tree: Any) -> Any:
    return jax.tree.map(_constant, tree)
