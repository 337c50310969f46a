"""Steps divided for the quadrature, where the integrand is piecewise in time."""

from collections.abc import Iterable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import ShapedArray
from jax.extend.core import Jaxpr, Literal

from ..types import Array, Cotangent, DType, Time, Y
from ._diffrax import DenseInfo
from ._quadrature import AdjointPath, Moving, Value
from ._sketch import Sketch
from ._trajectory import SegmentPath
from ._trees import cast_like


# What a smooth function of time is made of; of anything else it may be a piecewise one. An index or a
# condition that depends on time comes from something else.
SMOOTH = {
    *("add", "add_any", "broadcast_in_dim", "complex", "concatenate", "conv_general_dilated"),
    *("convert_element_type", "copy", "cos", "cosh", "cumsum", "custom_jvp_call"),
    *("custom_vjp_call", "div", "dot_general", "dynamic_slice", "dynamic_update_slice", "erf"),
    *("exp", "exp2", "expand_dims", "expm1", "gather", "imag", "integer_pow", "jit", "log"),
    *("log1p", "logistic", "mul", "neg", "pad", "pjit", "pow", "real", "reduce_sum", "reshape"),
    *("rev", "rsqrt", "scatter", "scatter-add", "select_n", "sin", "sinh", "slice", "split"),
    *("sqrt", "square", "squeeze", "stop_gradient", "sub", "tan", "tanh", "transpose"),
}


def is_piecewise(jaxpr: Jaxpr, times: Iterable[int] = (0,)) -> bool:
    """Tell whether a function may be piecewise in these of its arguments."""
    reached = {jaxpr.invars[i] for i in times}
    for eqn in jaxpr.eqns:
        used = [i for i, var in enumerate(eqn.invars) if not isinstance(var, Literal) and var in reached]
        if not used:
            continue
        arrays = [var.aval for var in eqn.outvars if isinstance(var.aval, ShapedArray)]
        discrete = any(not jnp.issubdtype(array.dtype, jnp.inexact) for array in arrays)
        inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
        if eqn.primitive.name not in SMOOTH or discrete:
            return True
        if inner is not None and is_piecewise(getattr(inner, "jaxpr", inner), used):
            return True
        reached.update(eqn.outvars)
    return False


class UndividedStep(eqx.Module):
    """The rest of a step that is being divided: from `s` on to `end`, the next part of it as far as `stop`.

    `dense` makes the adjoint state of the whole step, which began at `start`. Of all steps so far, `integral`
    is that of the sketch, `size` the largest number it had, `trials` how many parts were tried, and `missed`
    the largest error of a part that was too short to be divided.
    """

    s: Array
    stop: Array
    end: Array
    start: Array
    dense: DenseInfo
    integral: Array
    size: Array
    trials: Array
    missed: Array

    @property
    def is_left(self) -> Array:
        return self.s < self.end

    def of_step(self, accepted: Array, s0: Array, s1: Array, dense: DenseInfo) -> "UndividedStep":
        """Return a whole step, if it is accepted."""
        sums = (self.integral, self.size, self.trials, self.missed)
        new = UndividedStep(s0, s1, s1, s0, dense, *sums)
        return jax.tree.map(lambda new, old: jnp.where(accepted, new, old), new, self)


class Division:
    """Divides steps until the integrand is a polynomial of degree `number - 3` on each part.

    At the Gauss-Lobatto points, which include both ends, it is taken apart into orthogonal polynomials. The
    two of highest degree are taken for what the rule may have missed. There are two, since for some places
    of a corner one of them is zero.
    """

    def __init__(
        self, value: Value, moving: Moving, number: int, tolerance: Array, dtype: DType, y_dtype: DType
    ):
        self.value, self.moving, self.tolerance = value, moving, tolerance
        points, self.weights = _lobatto(number)
        self.points = jnp.asarray(points, dtype)
        root = np.sqrt(self.weights)
        self.highest = np.linalg.qr(root[:, None] * np.vander(points, increasing=True))[0][:, -2:].T * root
        self.sketch = Sketch.of(moving, jnp.finfo(y_dtype).dtype)

    def empty(self, s: Array, dense: DenseInfo) -> UndividedStep:
        """Return a step of which nothing is left."""
        integral = self.sketch.zeros()
        zero = jnp.zeros((), integral.dtype)
        return UndividedStep(s, s, s, s, dense, integral, zero, jnp.asarray(0), zero)

    def attempt(
        self, step: UndividedStep, solution: SegmentPath, adjoint: AdjointPath
    ) -> tuple[Array, UndividedStep]:
        """Try the next part: return whether it is short enough, and the step without it, or with half of it.

        A part of four units in the last place is not divided. Its error counts when the solve is over, since
        next to a jump it says nothing: only the whole integral shows whether it is small.
        """
        length = step.stop - step.s
        s = step.s + length * self.points
        found = jax.vmap(self._integrand)(-s, jax.vmap(solution.evaluate)(-s), jax.vmap(adjoint)(s))
        width = length.astype(found.dtype)
        integral = step.integral + width * (jnp.asarray(self.weights, found.dtype) @ found)
        size = jnp.maximum(step.size, jnp.max(jnp.abs(integral)))
        error = width * jnp.max(jnp.linalg.norm(jnp.asarray(self.highest, found.dtype) @ found, axis=0))
        agrees = error <= self._allowed(size)
        ulp = jnp.finfo(s.dtype).eps * jnp.maximum(jnp.abs(step.start), jnp.abs(step.end))
        accepted = agrees | (length <= 4 * ulp)
        after = UndividedStep(
            step.stop,
            jnp.minimum(step.stop + 2 * length, step.end),
            *(step.end, step.start, step.dense, integral, size, step.trials + 1),
            jnp.where(agrees, step.missed, jnp.maximum(step.missed, error)),
        )
        half = step.s + 0.5 * length
        before = eqx.tree_at(lambda step: (step.stop, step.trials), step, (half, step.trials + 1))
        return accepted, jax.tree.map(lambda a, b: jnp.where(accepted, a, b), after, before)

    def has_converged(self, last: UndividedStep) -> Array:
        """Tell whether the parts that were too short to be divided were right, at the end of the solve."""
        rounding = 8 * jnp.finfo(last.size.dtype).eps * last.size
        return last.missed <= jnp.maximum(self._allowed(last.size), rounding)

    def _allowed(self, size: Array) -> Array:
        return 0.25 * self.tolerance.astype(size.dtype) * size

    def _integrand(self, t: Time, y: Y, adjoint: Cotangent) -> Array:
        value, pull = jax.vjp(lambda moving: self.value(t, y, moving), self.moving)
        return self.sketch(pull(cast_like(adjoint, value))[0])


def _lobatto(number: int) -> tuple[np.ndarray, np.ndarray]:
    """Return points and weights of the rule of Gauss and Lobatto, on the interval from 0 to 1."""
    last = np.polynomial.legendre.Legendre.basis(number - 1)
    points = np.concatenate([[-1.0], np.sort(last.deriv().roots().real), [1.0]])
    return 0.5 + 0.5 * points, 1 / (number * (number - 1) * last(points) ** 2)
