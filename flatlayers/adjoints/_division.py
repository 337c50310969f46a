"""Steps divided for the quadrature, where the integrand is piecewise in time."""

from collections.abc import Iterable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import ShapedArray
from jax.extend.core import Jaxpr, Literal

from ._quadrature import Path, Value
from ._sketch import Sketch
from ._trajectory import Window


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
    """Whether a function may be piecewise in these of its arguments."""
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


class Rest(eqx.Module):
    """What is left of a step: from `s` on to `end`, next as far as `stop`. `dense`: its adjoint state.

    `integral` is that of the sketch so far, `size` the largest number it had, `trials` how many there were.
    """

    s: Any
    stop: Any
    end: Any
    start: Any
    dense: Any
    integral: Any
    size: Any
    trials: Any

    @property
    def is_left(self) -> Any:
        return self.s < self.end

    def of_step(self, kept: Any, s0: Any, s1: Any, dense: Any) -> "Rest":
        """A whole step, if it is kept."""
        new = Rest(s0, s1, s1, s0, dense, self.integral, self.size, self.trials)
        return jax.tree.map(lambda new, old: jnp.where(kept, new, old), new, self)


class Division:
    """Divides steps until the integrand is a polynomial of degree `number - 3` on each part.

    At the Gauss-Lobatto points, which include both ends, it is taken apart into orthogonal polynomials. The
    two of highest degree are taken for what the rule may have missed. There are two, since for some places
    of a corner one of them is zero.
    """

    def __init__(self, value: Value, moving: Any, number: int, tolerance: Any, dtype: Any, y_dtype: Any):
        self.value, self.moving, self.tolerance = value, moving, tolerance
        points, self.weights = _lobatto(number)
        self.points = jnp.asarray(points, dtype)
        root = np.sqrt(self.weights)
        self.highest = np.linalg.qr(root[:, None] * np.vander(points, increasing=True))[0][:, -2:].T * root
        self.sketch = Sketch.of(moving, jnp.finfo(y_dtype).dtype)

    def empty(self, s: Any, dense: Any) -> Rest:
        zero = self.sketch.zeros()
        return Rest(s, s, s, s, dense, zero, jnp.zeros((), zero.dtype), jnp.asarray(0))

    def attempt(self, rest: Rest, window: Window, path: Path) -> tuple[Any, Rest]:
        """Whether the next part is short enough; what is left after it, or if not then before half of it."""
        s = rest.s + (rest.stop - rest.s) * self.points
        found = jax.vmap(self._integrand)(-s, jax.vmap(window.evaluate)(-s), jax.vmap(path)(s))
        length = (rest.stop - rest.s).astype(found.dtype)
        integral = rest.integral + length * (jnp.asarray(self.weights, found.dtype) @ found)
        size = jnp.maximum(rest.size, jnp.max(jnp.abs(integral)))
        missed = length * jnp.max(jnp.linalg.norm(jnp.asarray(self.highest, found.dtype) @ found, axis=0))
        ulp = jnp.finfo(s.dtype).eps * jnp.maximum(jnp.abs(rest.start), jnp.abs(rest.end))
        kept = (missed <= 0.25 * self.tolerance.astype(size.dtype) * size) | (rest.stop - rest.s <= 4 * ulp)
        after = Rest(
            rest.stop,
            jnp.minimum(rest.stop + 2 * (rest.stop - rest.s), rest.end),
            *(rest.end, rest.start, rest.dense, integral, size, rest.trials + 1),
        )
        half = rest.s + 0.5 * (rest.stop - rest.s)
        before = eqx.tree_at(lambda rest: (rest.stop, rest.trials), rest, (half, rest.trials + 1))
        return kept, jax.tree.map(lambda a, b: jnp.where(kept, a, b), after, before)

    def _integrand(self, t: Any, y: Any, adjoint: Any) -> Any:
        value, pull = jax.vjp(lambda moving: self.value(t, y, moving), self.moving)
        adjoint = jax.tree.map(lambda x, y: x.astype(y.dtype), adjoint, value)
        return self.sketch(pull(adjoint)[0])


def _lobatto(number: int) -> tuple[np.ndarray, np.ndarray]:
    """Points and weights of the rule of Gauss and Lobatto, on the interval from 0 to 1."""
    last = np.polynomial.legendre.Legendre.basis(number - 1)
    points = np.concatenate([[-1.0], np.sort(last.deriv().roots().real), [1.0]])
    return 0.5 + 0.5 * points, 1 / (number * (number - 1) * last(points) ** 2)
