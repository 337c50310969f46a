"""`minimize`: the optimisers of SciPy on a vector with names."""

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from ..transforms import inward
from ..types import Array, PyTree
from ..vectors.layout import check_same_layout
from ..vectors.names import describe
from ..vectors.vector import ComponentVector
from .bounds import Box, box


if TYPE_CHECKING:
    from scipy.optimize import Bounds, OptimizeResult


# `loss(ps, *args)` gives a number.
Loss: TypeAlias = Callable[..., Array]

_WITHOUT_GRADIENT = {"nelder-mead", "powell", "cobyla", "cobyqa"}
_BY_HESSIAN_PRODUCT = {"newton-cg", "trust-ncg", "trust-krylov", "trust-constr"}
_BY_HESSIAN = {"dogleg", "trust-exact"}
_WITH_BOUNDS = {"l-bfgs-b", "tnc", "slsqp", "trust-constr", "nelder-mead", "powell", "cobyla", "cobyqa"}


class NonFiniteError(RuntimeError):
    """A loss, a gradient or a product with the Hessian that is not finite, found by `fl.minimize`.

    `x` is the vector that it was found for.

    >>> import jax.numpy as jnp
    >>> import flatlayers as fl
    >>> try:
    ...     fl.minimize(lambda ps: jnp.log(ps.a), fl.ComponentVector.of({"a": -1.0}))
    ... except fl.NonFiniteError as error:
    ...     print(error.x.a)
    -1.0
    """

    def __init__(self, what: str, x: ComponentVector):
        super().__init__(f"minimize: expected {what} to be finite; the exception has the parameters as `x`")
        self.x = x


def minimize(
    loss: Loss,
    ps: ComponentVector,
    *args: PyTree,
    method: str = "L-BFGS-B",
    bounds: "Box | tuple[ComponentVector, ComponentVector] | None" = None,
    callback: Callable[[ComponentVector], object] | None = None,
    **options: Any,
) -> "OptimizeResult":
    """Minimise a loss by `scipy.optimize.minimize`, from a vector to a vector.

    For few parameters and a loss without noise: a mechanism, a network of some thousand numbers on all data.
    The value and the gradient are one call, compiled once for a loss and the shapes of its arguments. SciPy
    works in float64, the loss in the dtype of the vector. In float32 its last digits are noise, at which a
    line search may end with a warning: for them, enable x64 in JAX and set up in float64.

    **Arguments:**

    - `loss`: a function `loss(ps, *args)` that returns a real number and can be compiled.
    - `ps`: where to start, a `ComponentVector` without leading axes.
    - `*args`: what else the loss takes: arrays, pytrees of them and layers.
    - `method`: a method of SciPy by its name. One that needs the Hessian or products with it gets these too.
    - `bounds`: pattern → `(low, high)` as for `fl.bounds`, or the two vectors that it returns; for
        `L-BFGS-B`, `TNC`, `SLSQP`, `trust-constr`, `Nelder-Mead`, `Powell`, `COBYLA` and `COBYQA`. They bound
        the numbers of the vector: those of a parameter that is declared with bounds are free, and need none.
    - `callback`: called as `callback(ps)` after each iteration; `StopIteration` ends the search, but it comes
        out of `TNC`.
    - `**options`: further keywords of `scipy.optimize.minimize`: `tol`, `options`, `constraints`.

    **Returns:** SciPy's `OptimizeResult`. `x` is a `ComponentVector` in the dtype of `ps`, inside of the
    bounds; `fun` is the loss of that `x`, and `jac` its gradient, a `ComponentVector` too.

    **Raises:** `NonFiniteError` if the loss or its gradient at the start or the end is not finite, and for a
    product with the Hessian that is not. In between a trial may be: SciPy gets the largest finite loss so far
    in its place, and a gradient of zero, so that no search ends there and none makes NaN of it.
    `ValueError` for a start outside of the bounds, a method that has no bounds, numbers that equal bounds fix
    and constraints or a callback with `COBYLA`, and as `fl.bounds`; `TypeError` for what is no vector, and
    for a loss that is no real number.

    **Warns:** if SciPy does not succeed, with its message: `maxiter` was reached, or precision was lost.

    >>> import flatlayers as fl
    >>> ps = fl.ComponentVector.of({"a": 1.0, "b": [2.0, 3.0]})
    >>> loss = lambda ps, y: (ps.a - y) ** 2 + (ps.b**2).sum()
    >>> result = fl.minimize(loss, ps, 4.0, bounds={"b": (1, None)})
    >>> result.x.a.round(4), result.x.b
    (Array(4., dtype=float32), Array([1., 1.], dtype=float32))
    """
    from scipy.optimize import (
        minimize as scipy_minimize,  # here, so that importing the library does not cost it
    )

    start = _checked(ps)
    if not isinstance(method, str):
        raise TypeError(f"minimize: expected the name of a method of SciPy, found {method!r}")
    kind = method.lower()
    problem = _Problem(loss, ps, args, kind not in _WITHOUT_GRADIENT)
    limits = None if bounds is None else _limits(bounds, ps, method)
    if limits is not None:
        start = _inside(start, ps, limits)
    if kind == "cobyla" and limits is not None:
        _check_fixed(limits, "constraints" in options or callback is not None)
    problem.check(start, "the loss and its gradient at the start")
    if kind in _BY_HESSIAN_PRODUCT:
        options.setdefault("hessp", problem.hessian_product)
    if kind in _BY_HESSIAN:
        options.setdefault("hess", problem.hessian)
    if callback is not None:
        options["callback"] = lambda x, *_: callback(problem.vector(x))
    result = scipy_minimize(
        problem, start, method=method, jac=problem.by_gradient or None, bounds=limits, **options
    )
    end = result.x if limits is None else np.clip(result.x, limits.lb, limits.ub)
    value, gradient = problem.check(end, "the loss and its gradient at the end")
    result.x, result.fun = problem.vector(end), value
    if gradient is not None:
        result.jac = ComponentVector(jnp.asarray(gradient, ps.dtype), ps.layout)
    if not result.success:
        warnings.warn(f"minimize: {method} did not succeed: {result.message}", RuntimeWarning, stacklevel=2)
    return result


class _Problem:
    """A loss as SciPy calls it: float64 in and out, and no value that is not finite."""

    def __init__(self, loss: Loss, ps: ComponentVector, args: tuple[PyTree, ...], by_gradient: bool):
        self.loss, self.like, self.args, self.by_gradient = loss, ps, args, by_gradient
        self.largest = -np.inf

    def vector(self, x: np.ndarray) -> ComponentVector:
        return ComponentVector(jnp.asarray(np.asarray(x, self.like.dtype)), self.like.layout)

    def __call__(self, x: np.ndarray) -> "float | tuple[float, np.ndarray]":
        value, gradient = self.evaluate(x)
        if self.is_finite(value, gradient):
            self.largest = max(self.largest, value)
        else:
            # A plain infinity would become NaN in the interpolation of a line search.
            value = self.largest + abs(self.largest) + 1.0
            gradient = None if gradient is None else np.zeros_like(gradient)
        return value if gradient is None else (value, gradient)

    def evaluate(self, x: np.ndarray) -> tuple[float, np.ndarray | None]:
        if not self.by_gradient:
            return float(_value(self.loss, self.vector(x), self.args)), None
        value, gradient = _value_and_gradient(self.loss, self.vector(x), self.args)
        return float(value), np.asarray(gradient, float)

    def check(self, x: np.ndarray, what: str) -> tuple[float, np.ndarray | None]:
        """Return the value and the gradient. **Raises:** `NonFiniteError` if they are not finite."""
        value, gradient = self.evaluate(x)
        if not self.is_finite(value, gradient):
            raise NonFiniteError(what, self.vector(x))
        self.largest = max(self.largest, value)
        return value, gradient

    @staticmethod
    def is_finite(value: float, gradient: np.ndarray | None) -> bool:
        return bool(np.isfinite(value) and (gradient is None or np.isfinite(gradient).all()))

    def hessian_product(self, x: np.ndarray, p: np.ndarray) -> np.ndarray:
        found = np.asarray(_hessian_product(self.loss, self.vector(x), self.vector(p), self.args), float)
        # The inner solvers of SciPy never end on NaN.
        if not np.isfinite(found).all():
            raise NonFiniteError("a product with the Hessian", self.vector(x))
        return found

    def hessian(self, x: np.ndarray) -> np.ndarray:
        found = np.asarray(_hessian(self.loss, self.vector(x), self.args), float)
        if not np.isfinite(found).all():
            raise NonFiniteError("the Hessian", self.vector(x))
        return found


def _scalar(loss: Loss, ps: ComponentVector, args: tuple[PyTree, ...]) -> Array:
    value = jnp.asarray(loss(ps, *args))
    if value.shape or not jnp.issubdtype(value.dtype, jnp.floating):
        raise TypeError(f"minimize: expected a loss that returns a real number, found {describe(value)}")
    return value


_value = jax.jit(_scalar, static_argnums=0)


@functools.partial(jax.jit, static_argnums=0)
def _value_and_gradient(loss: Loss, ps: ComponentVector, args: tuple[PyTree, ...]) -> tuple[Array, Array]:
    value, gradient = jax.value_and_grad(lambda ps: _scalar(loss, ps, args))(ps)
    return value, gradient.data


@functools.partial(jax.jit, static_argnums=0)
def _hessian_product(loss: Loss, ps: ComponentVector, p: ComponentVector, args: tuple[PyTree, ...]) -> Array:
    return jax.jvp(jax.grad(lambda ps: _scalar(loss, ps, args)), (ps,), (p,))[1].data


@functools.partial(jax.jit, static_argnums=0)
def _hessian(loss: Loss, ps: ComponentVector, args: tuple[PyTree, ...]) -> Array:
    return jax.hessian(lambda data: _scalar(loss, ComponentVector(data, ps.layout), args))(ps.data)


# The start and its bounds


def _checked(ps: object) -> np.ndarray:
    """Return the numbers of the vector to start from."""
    if not isinstance(ps, ComponentVector):
        raise TypeError(f"minimize: expected a ComponentVector, found {describe(ps)}")
    if ps.ndim != 1 or not jnp.issubdtype(ps.dtype, jnp.floating):
        raise TypeError(f"minimize: expected real numbers without leading axes, found {describe(ps)}")
    return np.asarray(ps.data, float)


def _limits(
    bounds: "Box | tuple[ComponentVector, ComponentVector]", ps: ComponentVector, method: str
) -> "Bounds":
    """Return the bounds as SciPy takes them, as numbers that the dtype of the vector has."""
    from scipy.optimize import Bounds

    if method.lower() not in _WITH_BOUNDS:
        raise ValueError(f"minimize: {method} has no bounds; L-BFGS-B, TNC and trust-constr do, among others")
    if isinstance(bounds, Mapping):
        low, high = box(ps.layout, bounds, ps.dtype)
        return Bounds(low, high, keep_feasible=True)  # pyright: ignore[reportArgumentType]
    if not isinstance(bounds, tuple | list) or len(bounds) != 2:
        raise TypeError(f"minimize: expected bounds as a mapping or two vectors, found {describe(bounds)}")
    for end in bounds:
        if not isinstance(end, ComponentVector):
            raise TypeError(f"minimize: expected bounds as a mapping or two vectors, found {describe(end)}")
        check_same_layout(ps.layout, end.layout)
    low, high = (np.asarray(end.data, float) for end in bounds)
    low, high = (end.astype(float) for end in inward(low, high, ps.dtype))
    if not (low <= high).all():
        i = int(np.argmin(low <= high))
        raise ValueError(
            f"minimize: expected low <= high for {ps.layout.label(i)!r}, found {low[i]}, {high[i]}"
        )
    return Bounds(low, high, keep_feasible=True)  # pyright: ignore[reportArgumentType]


def _check_fixed(limits: "Bounds", shows_numbers: bool) -> None:
    """Refuse what COBYLA does wrong: constraints and callbacks get a vector without what is fixed."""
    fixed = limits.lb == limits.ub
    if fixed.all() or (fixed.any() and shows_numbers):
        raise ValueError(
            "minimize: expected no numbers that equal bounds fix, found "
            f"{fixed.sum()} of {fixed.size}: COBYLA leaves them out of what it gives to constraints and to a "
            "callback, and needs one that is free; COBYQA takes them"
        )


def _inside(start: np.ndarray, ps: ComponentVector, limits: "Bounds") -> np.ndarray:
    """Return the start, in the bounds. One that is given on a bound may be outside by its rounding."""
    low, high = limits.lb, limits.ub
    inside = np.clip(start, low, high)
    wrong = np.abs(inside - start) > 2 * float(jnp.finfo(ps.dtype).eps) * np.abs(start)
    if wrong.any():
        i = int(np.argmax(wrong))
        raise ValueError(
            f"minimize: expected {ps.layout.label(i)!r} to start in ({low[i]:g}, {high[i]:g}), "
            f"found {start[i]:g}"
        )
    return inside
