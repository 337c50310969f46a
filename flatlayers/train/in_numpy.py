"""A program of JAX that NumPy runs: for a few small arrays, compiling takes a thousand times as long."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np


class InNumpy:
    """A function of arrays, traced by JAX once and evaluated by NumPy, in double precision.

    **Arguments:**

    - `f`: a function of pytrees of arrays.
    - `examples`: what it is traced with: pytrees of arrays or of `jax.ShapeDtypeStruct`s.

    Operations that are not in the tables below, such as a decomposition, are done by JAX.
    """

    def __init__(self, f: Callable[..., Any], *examples: Any):
        self.program, self.output = jax.make_jaxpr(f, return_shape=True)(*examples)

    def __call__(self, *args: Any) -> Any:
        leaves = _evaluate(self.program.jaxpr, self.program.consts, jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(self.output), leaves)

    @property
    def is_a_function(self) -> bool:
        """Whether equal arguments give equal results and nothing else: no effects, no random numbers."""
        names = _names(self.program.jaxpr)
        return not self.program.effects and not any(name.startswith(("random_", "rng_")) for name in names)


def _names(jaxpr: jex.Jaxpr) -> Iterator[str]:
    """The names of all operations, those of inner functions included."""
    for eqn in jaxpr.eqns:
        yield eqn.primitive.name
        for value in eqn.params.values():
            for part in value if isinstance(value, tuple | list) else [value]:
                if isinstance(part, jex.ClosedJaxpr | jex.Jaxpr):
                    yield from _names(_open(part))


def _open(jaxpr: jex.ClosedJaxpr | jex.Jaxpr) -> jex.Jaxpr:
    return jaxpr.jaxpr if isinstance(jaxpr, jex.ClosedJaxpr) else jaxpr


def _evaluate(jaxpr: jex.Jaxpr, consts: Sequence[Any], args: Sequence[Any]) -> list[np.ndarray]:
    values: dict[Any, np.ndarray] = {}

    def read(x: Any) -> np.ndarray:
        return widened(x.val) if isinstance(x, jex.Literal) else values[x]

    values |= zip((*jaxpr.constvars, *jaxpr.invars), map(widened, (*consts, *args)), strict=True)
    for eqn in jaxpr.eqns:
        values |= zip(eqn.outvars, _apply(eqn, [read(x) for x in eqn.invars]), strict=True)
    return [read(x) for x in jaxpr.outvars]


_CALLS = ("jit", "pjit", "closed_call", "checkpoint", "custom_jvp_call", "custom_vjp_call")


def _apply(eqn: jex.JaxprEqn, given: list[np.ndarray]) -> Sequence[np.ndarray]:
    name, params = eqn.primitive.name, eqn.params
    if name in _CALLS:
        return _call(params["jaxpr" if "jaxpr" in params else "call_jaxpr"], given)
    if name == "cond":
        last = len(params["branches"]) - 1
        return _call(params["branches"][min(max(int(given[0]), 0), last)], given[1:])
    if name in _ON_NUMBERS:
        results = _ON_NUMBERS[name](*given)
    elif name in _ON_ARRAYS:
        results = _ON_ARRAYS[name](*given, **params)
    else:
        arrays = [jnp.asarray(x, _dtype(var)) for x, var in zip(given, eqn.invars, strict=True)]
        results = eqn.primitive.bind(*arrays, **params)
    results = results if eqn.primitive.multiple_results else [results]
    return [widened(x, _dtype(var)) for x, var in zip(results, eqn.outvars, strict=True)]


def _call(jaxpr: jex.ClosedJaxpr | jex.Jaxpr, given: list[np.ndarray]) -> list[np.ndarray]:
    consts = jaxpr.consts if isinstance(jaxpr, jex.ClosedJaxpr) else ()
    return _evaluate(_open(jaxpr), consts, given)


def _dtype(value: Any) -> Any:
    return value.aval.dtype


def widened(x: Any, dtype: Any = None) -> np.ndarray:
    """As an array of the dtype, with at least double precision where that is single."""
    x = np.asarray(x)
    dtype = np.dtype(dtype or x.dtype)
    return x.astype({"float32": np.float64, "complex64": np.complex128}.get(dtype.name, dtype), copy=False)


# The tables, by the names and with the parameters that the operations have in `jax.lax`


def _broadcast_in_dim(x: Any, *_: Any, shape: Any, broadcast_dimensions: Any, **__: Any) -> Any:
    axes = [1] * len(shape)
    for size, axis in zip(x.shape, broadcast_dimensions, strict=True):
        axes[axis] = size
    return np.broadcast_to(x.reshape(axes), shape)


def _dot_general(x: Any, y: Any, *, dimension_numbers: Any, **_: Any) -> Any:
    (x_sum, y_sum), (x_batch, y_batch) = dimension_numbers
    x_axes, y_axes = list(range(x.ndim)), list(range(x.ndim, x.ndim + y.ndim))
    for i, j in zip((*x_sum, *x_batch), (*y_sum, *y_batch), strict=True):
        y_axes[j] = x_axes[i]
    batch, summed = [x_axes[i] for i in x_batch], [x_axes[i] for i in x_sum]
    free = [axis for axis in (*x_axes, *y_axes) if axis not in (*batch, *summed)]
    return np.einsum(x, x_axes, y, y_axes, batch + free, optimize=True)


def _slice(x: Any, *, start_indices: Any, limit_indices: Any, strides: Any) -> Any:
    return x[tuple(map(slice, start_indices, limit_indices, strides or [1] * x.ndim))]


def _reduction(f: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x, *, axes, **_: f(x, axis=tuple(axes))


def _divide(x: Any, y: Any) -> Any:
    return x / y if np.issubdtype(x.dtype, np.inexact) else np.trunc(x / y)


_ON_NUMBERS: dict[str, Callable[..., Any]] = {
    "abs": np.abs,
    "add": np.add,
    "and": np.bitwise_and,
    "cbrt": np.cbrt,
    "clamp": lambda low, x, high: np.clip(x, low, high),
    "complex": lambda real, imag: real + 1j * imag,
    "conj": np.conj,
    "convert_element_type": np.asarray,
    "copy": np.asarray,
    "div": _divide,
    "eq": np.equal,
    "exp": np.exp,
    "ge": np.greater_equal,
    "gt": np.greater,
    "imag": np.imag,
    "is_finite": np.isfinite,
    "le": np.less_equal,
    "log": np.log,
    "log1p": np.log1p,
    "lt": np.less,
    "max": np.maximum,
    "min": np.minimum,
    "mul": np.multiply,
    "ne": np.not_equal,
    "neg": np.negative,
    "not": np.invert,
    "or": np.bitwise_or,
    "pow": np.power,
    "real": np.real,
    "rem": np.fmod,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "select_n": lambda which, *cases: np.choose(which.astype(int), cases),
    "sign": np.sign,
    "sqrt": np.sqrt,
    "square": np.square,
    "stop_gradient": np.asarray,
    "sub": np.subtract,
    "tanh": np.tanh,
}

_ON_ARRAYS: dict[str, Callable[..., Any]] = {
    "broadcast_in_dim": _broadcast_in_dim,
    "concatenate": lambda *parts, dimension: np.concatenate(parts, dimension),
    "dot_general": _dot_general,
    "integer_pow": lambda x, *, y: x**y,
    "reduce_and": _reduction(np.all),
    "reduce_max": _reduction(np.max),
    "reduce_min": _reduction(np.min),
    "reduce_or": _reduction(np.any),
    "reduce_sum": _reduction(np.sum),
    "reshape": lambda x, *, new_sizes, **_: x.reshape(new_sizes),
    "slice": _slice,
    "split": lambda x, *, sizes, axis: np.split(x, np.cumsum(sizes)[:-1], axis),
    "squeeze": lambda x, *, dimensions: np.squeeze(x, tuple(dimensions)),
    "transpose": lambda x, *, permutation: np.transpose(x, permutation),
}
