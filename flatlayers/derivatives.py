"""Derivatives: Jacobians and Hessians with names, of a function of a vector, and Jacobians of a model.

Each takes a function and gives the function that computes the derivative, as those of JAX do.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp

from .dtypes import is_inexact, is_number
from .types import Array, Input, Output, Params, PyTree, State
from .vectors.layout import check_same_layout
from .vectors.matrix import ComponentMatrix
from .vectors.names import describe
from .vectors.vector import ComponentVector


Model: TypeAlias = Callable[[Input, Params, State], tuple[Output, State]]
Mode: TypeAlias = Literal["rev", "fwd"]


# By a vector


def jacobian(f: Callable[..., Any], *, mode: Mode = "rev") -> Callable[..., Any]:
    """Make the Jacobian of a function of a `ComponentVector`, with names.

    **Arguments:**

    - `f`: a function `f(v, *args)` of a `ComponentVector` without leading axes. Its result is a
        `ComponentVector` or an array.
    - `mode`: `"rev"` is reverse mode, which everything supports, the default adjoints of diffrax
        included; `"fwd"` is forward mode, faster where the result is longer than the vector.

    **Returns:** a function `(v, *args)`. If `f` returns a vector it gives a `ComponentMatrix` with
    `J["y.a", "x.b"]`; if `f` returns an array of shape `s`, a `ComponentVector` with data of shape
    `(*s, n)`, whose views have shape `(*s, *shape)`.

    **Raises:** `TypeError` if `v` is no `ComponentVector`, `ValueError` if it has leading axes.

    >>> import flatlayers as fl
    >>> v = fl.ComponentVector.of({"a": 2.0, "b": [1.0, 3.0]})
    >>> fl.jacobian(lambda v: v.a * v.b)(v).a
    Array([1., 3.], dtype=float32)
    >>> fl.jacobian(lambda v: 2 * v)(v)["b", "b"]
    Array([[2., 0.],
           [0., 2.]], dtype=float32)
    """
    _check_mode(mode)
    transform = jax.jacrev if mode == "rev" else jax.jacfwd

    def jacobian_of_f(v: ComponentVector, *args: object) -> ComponentMatrix | ComponentVector:
        flat = _function_of_data(f, v, args)
        out = jax.eval_shape(flat, v.data)
        if not hasattr(_data(out), "shape"):
            raise TypeError(
                f"expected a function that returns a ComponentVector or an array, found {describe(out)}"
            )
        if isinstance(out, ComponentVector) and out.ndim != 1:
            raise ValueError(f"expected a result without leading axes, found shape {out.shape}; use jax.vmap")
        data = transform(lambda data: _data(flat(data)))(v.data)
        if isinstance(out, ComponentVector):
            return ComponentMatrix(data, out.layout, v.layout)
        return ComponentVector(data, v.layout)

    return jacobian_of_f


def hessian(f: Callable[..., Any]) -> Callable[..., ComponentMatrix]:
    """Make the Hessian of a scalar function of a `ComponentVector`, with names, by forward over reverse.

    Without reverse mode in `f`, as of a `NeuralODE` with the adjoint `diffrax.ForwardMode()`, it is made by
    forward over forward mode, whose cost grows with the square of the number of parameters.

    **Arguments:**

    - `f`: a function `f(v, *args)` of a `ComponentVector` without leading axes that returns a scalar.

    **Returns:** a function `(v, *args)` that gives a `ComponentMatrix` with `H["a.b", "c"]` of shape
    `(*shape_ab, *shape_c)`.

    **Raises:** `TypeError` if `v` is no `ComponentVector`, `ValueError` if it has leading axes or `f`
    returns no scalar; the error of forward over reverse mode for an `f` that has neither of the two.

    >>> import flatlayers as fl
    >>> v = fl.ComponentVector.of({"a": 2.0, "b": 3.0})
    >>> fl.hessian(lambda v: v.a * v.b**2)(v)["a", "b"]
    Array(6., dtype=float32)
    """

    def hessian_of_f(v: ComponentVector, *args: object) -> ComponentMatrix:
        flat = _function_of_data(f, v, args)
        _check_scalar(jax.eval_shape(flat, v.data))
        return ComponentMatrix(_second_derivative(flat, v.data), v.layout, v.layout)

    return hessian_of_f


def hessian_vector_product(f: Callable[..., Any]) -> Callable[..., Any]:
    """Make the product of the Hessian of a scalar function and a vector, `H v`, by forward over reverse.

    It costs about two gradients, whatever the length of the vector. All that `f` calls has to support forward
    over reverse mode. A `NeuralODE` does with its default adjoint and an explicit Runge-Kutta method, and
    with `diffrax.DirectAdjoint()` and a small `max_steps`.

    **Arguments:**

    - `f`: a function `f(ps, *args)` of a `ComponentVector`, or of any pytree of floating arrays, that returns
        a scalar.

    **Returns:** a function `(ps, v, *args)` that gives `H v` at `ps`, with the structure of `v`, and without
    `H`. The direction `v` is like `ps`; an array of the same shape does for a `ComponentVector`.

    **Raises:** `ValueError` if `f` returns no scalar and for a `v` of another structure or shape, `TypeError`
    for another dtype or layout.

    >>> import flatlayers as fl
    >>> ps = fl.ComponentVector.of({"a": 2.0, "b": 3.0})
    >>> v = fl.ComponentVector.of({"a": 1.0, "b": 0.0})
    >>> fl.hessian_vector_product(lambda ps: ps.a * ps.b**2)(ps, v).b
    Array(6., dtype=float32)
    """

    def product(ps: Params, v: Params, *args: object) -> Any:
        if isinstance(ps, ComponentVector) and hasattr(v, "shape") and not isinstance(v, ComponentVector):
            return product(ps, ComponentVector(v, ps.layout), *args).data
        ps = _differentiable(ps)
        gradient = jax.grad(lambda ps: _check_scalar(f(ps, *args)))
        return _jvp(gradient, ps, _like(v, ps, "ps"))

    return product


# By the input of a model


def jacobian_vector_product(model: Model) -> Callable[[Input, Input, Params, State], Output]:
    """Make the derivative of a model along a direction of its input: `J v`, where `J = dy/dx`.

    It costs about one call more of the model, whatever the sizes, and is differentiable itself: the
    derivatives in a loss, such as the residual of a differential equation, are products nested in products.
    This is forward mode. A `NeuralODE` has it with its default adjoint and an explicit Runge-Kutta method;
    inside of a gradient it takes `diffrax.DirectAdjoint()` and a small `max_steps`.

    **Arguments:**

    - `model`: a layer, or a function `(x, ps, st) -> (y, st)`.

    **Returns:** a function `(x, v, ps, st)` that gives the product, with the structure and shapes of `y`:

    - `x`: the input of the model: floating arrays, one or a pytree of them.
    - `v`: the direction, with the structure, shapes and dtypes of `x`. In a batch of which each sample has
        an output of its own, each has a direction of its own.
    - `ps`, `st`: the parameters and the state, which is used and not returned.

    **Raises:** `ValueError` for a `v` of another structure or shape, `TypeError` for another dtype or layout
    and for an `x` that is not floating.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import flatlayers as fl
    >>> model = fl.Chain(jnp.sin)
    >>> ps, st = fl.setup(jax.random.key(0), model)
    >>> x, one = jnp.array([0.0, 1.0]), jnp.ones(2)
    >>> first = lambda x: fl.jacobian_vector_product(model)(x, one, ps, st)
    >>> bool(jnp.allclose(first(x), jnp.cos(x)))
    True
    >>> bool(jnp.allclose(jax.jvp(first, (x,), (one,))[1], -jnp.sin(x)))
    True
    """

    def product(x: Input, v: Input, ps: Params, st: State) -> Output:
        x = _differentiable(x)
        return _jvp(_output(model, ps, st), x, _like(v, x, "x"))

    return product


def vector_jacobian_product(model: Model) -> Callable[[Input, Output, Params, State], Input]:
    """Make the derivative of a combination of the outputs of a model with respect to its input: `v' J`.

    It costs about two calls more of the model, whatever the sizes. This is reverse mode, which everything
    supports, the default adjoint of `NeuralODE` included.

    **Arguments:**

    - `model`: a layer, or a function `(x, ps, st) -> (y, st)`.

    **Returns:** a function `(x, v, ps, st)` that gives the product, with the structure and shapes of `x`:

    - `x`: the input of the model: floating arrays, one or a pytree of them.
    - `v`: the weights of the outputs, with the structure, shapes and dtypes of `y`.
    - `ps`, `st`: the parameters and the state, which is used and not returned.

    **Raises:** `ValueError` for a `v` of another structure or shape, `TypeError` for another dtype or layout
    and for an `x` that is not floating.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import flatlayers as fl
    >>> model = fl.Dense(3, 2)
    >>> ps, st = fl.setup(jax.random.key(0), model)
    >>> v = jnp.array([0.0, 1.0])
    >>> product = fl.vector_jacobian_product(model)(jnp.ones(3), v, ps, st)
    >>> bool((product == ps.weight[1]).all())
    True
    """

    def product(x: Input, v: Output, ps: Params, st: State) -> Input:
        y, pull = jax.vjp(_output(model, ps, st), _differentiable(x))
        return pull(_like(v, y, "y"))[0]

    return product


def batched_jacobian(model: Model, *, mode: Mode = "rev") -> Callable[[Input, Params, State], Array]:
    """Make the Jacobian of each sample of a batch: `J[i] = dy[i]/dx[i]`.

    The model is called once, on the whole batch, and derived once per output (or once per input, forward), in
    one vectorised pass. So each output has to depend on its own sample alone: a model that couples the
    samples of a batch, as `BatchNorm` does in training, is a model to put into test mode first
    (`fl.testmode(st)`); otherwise the derivatives by the other samples are added in.

    **Arguments:**

    - `model`: a layer, or a function `(x, ps, st) -> (y, st)`, that takes a batch.
    - `mode`: `"rev"` is reverse mode, which everything supports, the default adjoint of `NeuralODE` included;
        `"fwd"` is forward mode, faster where there are more outputs than inputs.

    **Returns:** a function `(x, ps, st)` that gives an array of shape `(batch, out, in)`; in general
    `(batch, *outputs, *features)` for `y` of shape `(batch, *outputs)`:

    - `x`: the input of the model, an array of shape `(batch, *features)` or a vector with a leading axis,
        which counts as its array.
    - `ps`, `st`: the parameters and the state, which is used and not returned.

    **Raises:** `ValueError` for another mode, for an `x` without a batch axis, and for a `y` without that of
    `x`; `TypeError` for an `x` or a `y` that is no floating array.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import flatlayers as fl
    >>> model = fl.Dense(3, 2)
    >>> ps, st = fl.setup(jax.random.key(0), model)
    >>> J = fl.batched_jacobian(model)(jnp.ones((5, 3)), ps, st)
    >>> J.shape, bool((J == ps.weight).all())
    ((5, 2, 3), True)
    """
    _check_mode(mode)

    def jacobian_of_batch(x: Input, ps: Params, st: State) -> Array:
        x = _differentiable(x)
        _check_samples(x)
        output = _output(model, ps, st)

        def f(data: Array) -> Array:
            y = output(ComponentVector(data, x.layout) if isinstance(x, ComponentVector) else data)
            return _checked_batch(_data(y), len(data))

        data = _data(x)
        if mode == "rev":
            y, pull = jax.vjp(f, data)
            J = jax.vmap(lambda unit: pull(unit)[0], out_axes=1)(_units(y))
            return J.reshape(*y.shape, *data.shape[1:])
        J = jax.vmap(lambda unit: _jvp(f, data, unit), out_axes=-1)(_units(data))
        return J.reshape(*J.shape[:-1], *data.shape[1:])

    return jacobian_of_batch


# Checks and helpers


def _second_derivative(f: Callable[[Array], Array], x: Array) -> Array:
    """Return the Hessian in the first pair of modes that `f` has, of which tracing it tells."""
    try:
        return jax.hessian(f)(x)
    except (TypeError, ValueError) as error:  # `f` itself is known to work
        try:
            return jax.jacfwd(jax.jacfwd(f))(x)
        except (TypeError, ValueError):
            raise error from None


def _check_mode(mode: str) -> None:
    if mode not in ("rev", "fwd"):
        raise ValueError(f"expected the mode 'rev' or 'fwd', found {mode!r}")


def _check_scalar(value: object) -> Any:
    if getattr(value, "shape", None) != ():
        raise ValueError(f"expected a function that returns a scalar, found {describe(value)}")
    return value


def _check_samples(x: object) -> None:
    shape = getattr(x, "shape", None)
    if shape is None:
        raise TypeError(f"expected x to be one array, found {describe(x)}")
    if len(shape) < 2:
        raise ValueError(
            f"expected x of shape (batch, *features), found shape {shape}; jax.jacobian takes one sample"
        )


def _checked_batch(y: Any, batch: int) -> Array:
    if not hasattr(y, "dtype") or not is_inexact(y):
        raise TypeError(f"expected a model that returns one floating array, found {describe(y)}")
    if y.shape[:1] != (batch,):
        raise ValueError(f"expected y with the batch axis of x, of size {batch}, found shape {y.shape}")
    return y


def _function_of_data(
    f: Callable[..., Any], v: ComponentVector, args: tuple[object, ...]
) -> Callable[[Array], Any]:
    if not isinstance(v, ComponentVector):
        raise TypeError(
            f"expected a ComponentVector, found {type(v).__name__}; use jax.jacobian and jax.hessian"
        )
    if v.ndim != 1:
        raise ValueError(f"expected a vector without leading axes, found shape {v.shape}; use jax.vmap")
    return lambda data: f(ComponentVector(data, v.layout), *args)


def _data(value: object) -> Any:
    return value.data if isinstance(value, ComponentVector) else value


def _output(model: Model, ps: Params, st: State) -> Callable[[Input], Output]:
    return lambda x: model(x, ps, st)[0]


def _jvp(f: Callable[[Any], Any], x: PyTree, v: PyTree) -> Any:
    try:
        return jax.jvp(f, (x,), (v,))[1]
    except TypeError as error:
        if "custom_vjp" in str(error):
            error.add_note(
                "A part of the function has a gradient of its own, by jax.custom_vjp, which is reverse mode "
                "only: fl.vector_jacobian_product and mode='rev' need no other. A solve by diffrax has "
                "forward mode with adjoint=diffrax.ForwardMode(), and both with diffrax.DirectAdjoint()."
            )
        raise


def _differentiable(x: PyTree) -> Any:
    x = jax.tree.map(jnp.asarray, x)
    if not all(map(is_inexact, jax.tree.leaves(x))):
        raise TypeError(f"expected floating numbers to differentiate by, found {describe(x)}")
    return x


def _like(v: PyTree, other: PyTree, name: str) -> PyTree:
    """Return `v` as arrays, if it has the structure, shapes and dtypes of `other`. Numbers take the dtype."""
    if isinstance(v, ComponentVector) and isinstance(other, ComponentVector):
        check_same_layout(other.layout, v.layout)
    expected, found = jax.tree.leaves(other), jax.tree.leaves(v)
    same = jax.tree.structure(v) == jax.tree.structure(other)
    if not same or any(jnp.shape(a) != b.shape for a, b in zip(found, expected, strict=True)):
        raise ValueError(f"expected v like {name}, {describe(other)}, found {describe(v)}")
    v = jax.tree.map(lambda a, b: jnp.asarray(a, b.dtype if is_number(a) else None), v, other)
    if any(a.dtype != b.dtype for a, b in zip(jax.tree.leaves(v), expected, strict=True)):
        raise TypeError(f"expected v in the dtype of {name}, {describe(other)}, found {describe(v)}")
    return v


def _units(like: Array) -> Array:
    """Return the unit vectors of a sample, each for the whole batch: of shape `(size, *like.shape)`."""
    size = math.prod(like.shape[1:])
    units = jnp.eye(size, dtype=like.dtype).reshape(size, 1, *like.shape[1:])
    return jnp.broadcast_to(units, (size, *like.shape))
