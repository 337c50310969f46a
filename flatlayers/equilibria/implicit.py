"""Adjoints for fixed points: implicit ones, phantom gradients, and those that go through the solver.

The arguments of `apply`, which optimistix calls, are not public: its loop is the last input of `primal_fn`,
and `rewrite_fn` is the residual `fn(y) - y`. Tested with optimistix 0.1; `check_version` says so with another
version.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Annotated, Any, TypeVar

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
import optimistix as optx

from ..adjoints._guards import stop_gradient
from ..adjoints._traced import TracedFunction
from ..checks import error_if
from ..core.data_axis import current_data_axis
from ..core.fields import Size, check_module_fields, number
from ..dtypes import at_least_float32, common_real_dtype
from ..types import Args, Array, PyTree, Y
from ._krylov import Accuracy, gmres
from .accelerated import Fn, Options, Tags, as_python


# `primal_fn(inputs)` gives the root and the rest; `rewrite_fn(root, rest, inputs)` is zero there.
Primal = Callable[[PyTree], tuple[Y, PyTree]]
Rewrite = Callable[[Y, PyTree, PyTree], Y]
Solver = optx.AbstractFixedPointSolver | optx.AbstractRootFinder | optx.AbstractLeastSquaresSolver
T = TypeVar("T")


def is_tested(version: str = optx.__version__) -> bool:
    """Tell whether this is a version of optimistix that the adjoints are tested with."""
    return version.split(".")[:2] == ["0", "1"]


def check_version(version: str = optx.__version__) -> None:
    """Raise `ImportError` unless the adjoints are tested with this version of optimistix."""
    if not is_tested(version):
        raise ImportError(
            "expected optimistix >= 0.1 and < 0.2, which flatlayers' adjoints are tested with, found "
            f"{version}; install one of these, or use optimistix's own optimistix.ImplicitAdjoint()"
        )


class PhantomAdjoint(optx.AbstractAdjoint):
    """The gradient of `k` damped steps from the solution: `y <- tau fn(y) + (1 - tau) y`.

    It takes the place of the implicit function theorem: no linear system is solved, and a step costs as much
    as one of plain iteration. The gradient is not exact: it is that of the Neumann series of the damped
    iteration, cut off after `k` terms, and tends to the exact one with `k` if the iteration converges. The
    value stays that of the solver. For `optimistix.fixed_point` and root finding, with any solver.

    **Arguments:**

    - `k`: the number of steps.
    - `tau`: the damping, above 0 and at most 1.

    **Raises:** `ValueError` for a `k` below 1, or another `tau`; `TypeError` for what is no number;
    `ImportError` for a version of optimistix that this is not tested with.

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

    k: Size = eqx.field(default=5, converter=as_python)
    tau: Annotated[float, number(above=0, high=1)] = eqx.field(default=0.8, converter=as_python)

    def __check_init__(self) -> None:
        check_version()
        check_module_fields(self)

    def apply(self, primal_fn: Primal, rewrite_fn: Rewrite, inputs: PyTree, tags: Tags) -> tuple[Y, PyTree]:
        """Return the root and the rest; called by optimistix."""
        inputs = _on_any_device(inputs)
        root, rest = stop_gradient(primal_fn((*stop_gradient(inputs), _while_loop)))

        def step(y: Y, _: None) -> tuple[Y, None]:
            residual = rewrite_fn(y, rest, inputs)
            return jax.tree.map(lambda y, r: y + self.tau * r, y, residual), None

        last, _ = jax.lax.scan(step, root, length=self.k)
        # The derivative of the last step at the value of the solver.
        return jax.tree.map(lambda y, z: y + (z - stop_gradient(z)), root, last), rest


class ImplicitAdjoint(optx.AbstractAdjoint):
    """The implicit function theorem, with a linear system that is solved as well as the arithmetic allows.

    Without `throw` an unsolved system makes the whole gradient NaN, where `optimistix.ImplicitAdjoint` always
    raises. Derivatives of any order, forward and reverse.

    **Arguments:**

    - `tolerance`: that of the forward solve. For a contraction of rate `r`, the error of a solution is up to
        `1 / (1 - r)` times its residual; so the residual is brought to a thousandth of the tolerance.
    - `most`: the largest number of products with the Jacobian.
    - `throw`: whether a system that is not solved raises.
    """

    tolerance: float
    most: int
    throw: bool

    def __check_init__(self) -> None:
        check_version()

    def apply(self, primal_fn: Primal, rewrite_fn: Rewrite, inputs: PyTree, tags: Tags) -> tuple[Y, PyTree]:
        """Return the root and the rest; called by optimistix."""
        inputs = (*_on_any_device(inputs), _while_loop)
        root, rest = _solved(primal_fn, rewrite_fn, inputs, self.linear_solve)
        return root, jax.tree.map(eqxi.nondifferentiable_backward, rest)

    def linear_solve(self, product: Callable[[Y], Y], b: Y) -> Y:
        """Solve `product(x) = b`, for any pytree, in float32 at least and by real numbers."""
        vector, restore = _as_vector(b)
        finest = jnp.finfo(vector.dtype).eps
        coarsest = max((float(jnp.finfo(x.dtype).eps) for x in jax.tree.leaves(b)), default=0.0)
        tolerance = max(self.tolerance, 100 * coarsest)
        accuracy = Accuracy(max(2 * float(finest), 1e-3 * tolerance), min(100 * tolerance, 0.1), self.most)
        x, solved, _ = gmres(lambda v: _as_vector(product(restore(v)))[0], vector, accuracy)
        if self.throw:
            x = error_if(x, ~solved & jnp.isfinite(vector).all(), _UNSOLVED)
        return restore(jnp.where(solved, x, jnp.nan))


_UNSOLVED = (
    "the linear system of the implicit gradient was not solved: an eigenvalue of the model's Jacobian is too "
    "close to 1, or too many are too far from 0. Allow more steps with `max_steps`; or take "
    "adjoint='unroll' or 'phantom'; or, for a small state, adjoint=optimistix.ImplicitAdjoint(), which "
    "builds the matrix"
)


@eqx.filter_custom_jvp
def _solved(
    primal_fn: Primal, rewrite_fn: Rewrite, inputs: PyTree, linear_solve: Callable[..., Y]
) -> tuple[Y, PyTree]:
    """Return the root of `rewrite_fn(root, rest, inputs)`, and the rest, which is constant."""
    return jax.tree.map(jnp.asarray, primal_fn(inputs))


@_solved.def_jvp
def _solved_jvp(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[PyTree, PyTree]:
    _, rewrite_fn, inputs, linear_solve = primals
    fixed, moving = eqx.partition(
        inputs, jax.tree.map(lambda t: t is None, tangents[2], is_leaf=lambda t: t is None)
    )
    root, rest = _solved(*primals)
    # With the residual f(root, inputs) = 0: (df/droot) droot = -(df/dinputs) dinputs. Its transpose is
    # the reverse mode; `custom_linear_solve` is told that both systems are solved in the same way.

    def at_root(moving: PyTree) -> Y:
        return rewrite_fn(root, rest, eqx.combine(moving, fixed))

    _, change = jax.jvp(at_root, (moving,), (tangents[2],))
    _, product = jax.linearize(lambda root: rewrite_fn(root, rest, inputs), root)
    step = jax.lax.custom_linear_solve(product, change, linear_solve, linear_solve)
    constant = jax.custom_derivatives.zero_from_primal(rest, symbolic_zeros=True)
    return (root, rest), (jax.tree.map(jnp.negative, step), constant)


def _as_vector(tree: PyTree) -> tuple[Array, Callable[[Array], PyTree]]:
    """Return all numbers as one real vector, in float32 at least, and the way back to the tree."""
    leaves, structure = jax.tree.flatten(tree)
    parts = [part for x in leaves for part in ((x.real, x.imag) if jnp.iscomplexobj(x) else (x,))]
    with jax.numpy_dtype_promotion("standard"):
        dtype = at_least_float32(jnp.result_type(*parts) if parts else jnp.float32)
    ends = list(itertools.accumulate(part.size for part in parts))

    def restore(vector: Array) -> PyTree:
        split = iter(jnp.split(vector, ends[:-1]) if parts else ())
        return structure.unflatten([_like(x, split) for x in leaves])

    return jnp.concatenate([jnp.zeros(0, dtype), *(p.ravel().astype(dtype) for p in parts)]), restore


def _like(x: Array, parts: Iterator[Array]) -> Array:
    if jnp.iscomplexobj(x):
        real, imaginary = (next(parts).reshape(x.shape) for _ in range(2))
        return jax.lax.complex(real, imaginary).astype(x.dtype)
    return next(parts).reshape(x.shape).astype(x.dtype)


# Such as cannot be differentiated in `jax.shard_map`.
UNDIVIDED = (optx.RecursiveCheckpointAdjoint, optx.ImplicitAdjoint)
NAMED = {"phantom": PhantomAdjoint, "unroll": optx.RecursiveCheckpointAdjoint}


def check_solver(solver: object, adjoint: object) -> None:
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
    if not fits and (adjoint == "phantom" or isinstance(adjoint, PhantomAdjoint)):
        raise ValueError(f"expected a solver of the equation itself for phantom gradients, found {solver!r}")


def as_solver(solver: Solver) -> Solver:
    """Return the solver, to run in the dtype of the state."""
    if type(solver) is optx.FixedPointIteration:
        return _FixedPointIteration(solver.rtol, solver.atol, solver.norm, solver.damp)
    return solver


class _FixedPointIteration(optx.FixedPointIteration):
    """The solver of optimistix, with a first error of the dtype of the state, as all later ones have it."""

    def init(
        self, fn: Fn, y: Y, args: Args, options: Options, f_struct: PyTree, aux_struct: PyTree, tags: Tags
    ) -> PyTree:
        error = super().init(fn, y, args, options, f_struct, aux_struct, tags)
        return jax.tree.map(lambda x: x.astype(common_real_dtype(y)), error)


def as_adjoint(
    adjoint: optx.AbstractAdjoint | str | None, solver: Solver, max_steps: int, throw: bool
) -> optx.AbstractAdjoint:
    """Return the adjoint that the option means, for a solve with these options."""
    if adjoint is None and is_tested():
        return ImplicitAdjoint(max(solver.rtol, solver.atol), max(1000, 4 * max_steps), throw)
    found = optx.ImplicitAdjoint() if adjoint is None else adjoint
    found = NAMED[found]() if isinstance(found, str) else found
    axis = current_data_axis()
    if axis is not None and isinstance(found, UNDIVIDED):
        raise ValueError(
            "expected an adjoint with a gradient in jax.shard_map, None or 'phantom', or a fixed_depth, for "
            f"a loss whose batch is divided over {axis!r}, found optimistix.{type(found).__name__}()"
        )
    return found


def _on_any_device(inputs: PyTree) -> PyTree:
    """Return what optimistix calls `apply` with, its traced function as one that `jax.shard_map` can call."""
    fn, *rest = inputs
    return (TracedFunction(fn) if hasattr(fn, "jaxpr") else fn, *rest)


def _while_loop(*args: Any, **kwargs: Any) -> Any:
    return eqxi.while_loop(*args, kind="lax", **kwargs)
