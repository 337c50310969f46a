"""Derivatives of a model with respect to its input, and Hessian-vector products over its parameters."""

import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from .vectors.layout import check_same_layout
from .vectors.names import describe
from .vectors.packing import is_number
from .vectors.vector import ComponentVector


Model = Callable[[Any, Any, Any], tuple[Any, Any]]


def jacobian_vector_product(model: Model, x: Any, ps: Any, st: Any, v: Any) -> Any:
    """The derivative of a model along a direction of its input: `J v`, where `J = dy/dx`.

    It costs about one call more of the model, whatever the sizes, and is differentiable itself: the
    derivatives in a loss, such as the residual of a differential equation, are products nested in products.
    This is forward mode. A `NeuralODE` has it with the adjoint `diffrax.ForwardMode()`, or with
    `diffrax.DirectAdjoint()` and a small `max_steps` inside of a gradient, and not with the default one.

    **Arguments:**

    - `model`: a layer, or a function `(x, ps, st) -> (y, st)`.
    - `x`: its input: floating arrays, one or a pytree of them.
    - `ps`, `st`: its parameters and its state, which is used and not returned.
    - `v`: the direction, with the structure, shapes and dtypes of `x`. In a batch of which each sample has
        an output of its own, each has a direction of its own.

    **Returns:** the product, with the structure and shapes of `y`.

    **Raises:** `ValueError` for a `v` of another structure or shape, `TypeError` for another dtype or layout
    and for an `x` that is not floating.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import flatlayers as fl
    >>> model = fl.Chain(jnp.sin)
    >>> ps, st = fl.setup(jax.random.key(0), model)
    >>> x, one = jnp.array([0.0, 1.0]), jnp.ones(2)
    >>> first = lambda x: fl.jacobian_vector_product(model, x, ps, st, one)
    >>> bool(jnp.allclose(first(x), jnp.cos(x)))
    True
    >>> bool(jnp.allclose(jax.jvp(first, (x,), (one,))[1], -jnp.sin(x)))
    True
    """
    x = _differentiable(x)
    return _jvp(_output(model, ps, st), x, _like(v, x, "x"))


def vector_jacobian_product(model: Model, x: Any, ps: Any, st: Any, v: Any) -> Any:
    """The derivative of a combination of the outputs of a model with respect to its input: `v' J`.

    It costs about two calls more of the model, whatever the sizes. This is reverse mode, which everything
    supports, the default adjoint of `NeuralODE` included.

    **Arguments:**

    - `model`: a layer, or a function `(x, ps, st) -> (y, st)`.
    - `x`: its input: floating arrays, one or a pytree of them.
    - `ps`, `st`: its parameters and its state, which is used and not returned.
    - `v`: the weights of the outputs, with the structure, shapes and dtypes of `y`.

    **Returns:** the product, with the structure and shapes of `x`.

    **Raises:** `ValueError` for a `v` of another structure or shape, `TypeError` for another dtype or layout
    and for an `x` that is not floating.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import flatlayers as fl
    >>> model = fl.Dense(3, 2)
    >>> ps, st = fl.setup(jax.random.key(0), model)
    >>> v = jnp.array([0.0, 1.0])
    >>> product = fl.vector_jacobian_product(model, jnp.ones(3), ps, st, v)
    >>> bool((product == ps.weight[1]).all())
    True
    """
    y, pull = jax.vjp(_output(model, ps, st), _differentiable(x))
    return pull(_like(v, y, "y"))[0]


def batched_jacobian(
    model: Model, x: Any, ps: Any, st: Any, *, mode: Literal["rev", "fwd"] = "rev"
) -> jax.Array:
    """The Jacobian of each sample of a batch: `J[i] = dy[i]/dx[i]`.

    The model is called once, on the whole batch, and derived once an output (or once an input, forward), in
    one vectorised pass. So each output has to depend on its own sample alone: a model that couples the
    samples of a batch, as `BatchNorm` does in training, is a model to put into test mode first
    (`fl.testmode(st)`); otherwise the derivatives by the other samples are added in.

    **Arguments:**

    - `model`: a layer, or a function `(x, ps, st) -> (y, st)`, that takes a batch.
    - `x`: its input, an array of shape `(batch, *features)` or a vector with a leading axis, which counts as
        its array.
    - `ps`, `st`: its parameters and its state, which is used and not returned.
    - `mode`: `"rev"` is reverse mode, which everything supports, the default adjoint of `NeuralODE` included;
        `"fwd"` is forward mode, faster where there are more outputs than inputs.

    **Returns:** an array of shape `(batch, out, in)`; in general `(batch, *outputs, *features)` for `y` of
    shape `(batch, *outputs)`.

    **Raises:** `ValueError` for an `x` without a batch axis, and for a `y` without that of `x`; `TypeError`
    for an `x` or a `y` that is no floating array.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import flatlayers as fl
    >>> model = fl.Dense(3, 2)
    >>> ps, st = fl.setup(jax.random.key(0), model)
    >>> J = fl.batched_jacobian(model, jnp.ones((5, 3)), ps, st)
    >>> J.shape, bool((J == ps.weight).all())
    ((5, 2, 3), True)
    """
    if mode not in ("rev", "fwd"):
        raise ValueError(f"expected the mode 'rev' or 'fwd', found {mode!r}")
    x = _differentiable(x)
    if not hasattr(x, "shape"):
        raise TypeError(f"expected x to be one array, found {describe(x)}")
    if x.ndim < 2:
        raise ValueError(
            f"expected x of shape (batch, *features), found shape {x.shape}; jax.jacobian takes one sample"
        )
    output = _output(model, ps, st)

    def f(data: jax.Array) -> jax.Array:
        y = output(x.layout.vector(data) if isinstance(x, ComponentVector) else data)
        return _checked_batch(y.data if isinstance(y, ComponentVector) else y, len(data))

    data = x.data if isinstance(x, ComponentVector) else x
    if mode == "rev":
        y, pull = jax.vjp(f, data)
        J = jax.vmap(lambda unit: pull(unit)[0], out_axes=1)(_units(y))
        return J.reshape(*y.shape, *data.shape[1:])
    J = jax.vmap(lambda unit: _jvp(f, data, unit), out_axes=-1)(_units(data))
    return J.reshape(*J.shape[:-1], *data.shape[1:])


def hessian_vector_product(f: Callable[[Any], Any], ps: Any, v: Any) -> Any:
    """The Hessian of a scalar function times a vector, by forward over reverse: `H v`, without `H`.

    It costs about two gradients, whatever the length of the vector. What `f` calls has to support forward
    over reverse mode: a `NeuralODE` does with the adjoint `diffrax.DirectAdjoint()` and a small `max_steps`.

    **Arguments:**

    - `f`: a function `f(ps)` that returns a scalar.
    - `ps`: where: a `ComponentVector`, or any pytree of floating arrays.
    - `v`: the direction, like `ps`; an array of the same shape does for a `ComponentVector`.

    **Returns:** the product, with the structure of `v`.

    **Raises:** `ValueError` if `f` returns no scalar and for a `v` of another structure or shape, `TypeError`
    for another dtype or layout.

    >>> import flatlayers as fl
    >>> ps = fl.ComponentVector.of({"a": 2.0, "b": 3.0})
    >>> v = fl.ComponentVector.of({"a": 1.0, "b": 0.0})
    >>> fl.hessian_vector_product(lambda ps: ps.a * ps.b**2, ps, v).b
    Array(6., dtype=float32)
    """
    if isinstance(ps, ComponentVector) and hasattr(v, "shape") and not isinstance(v, ComponentVector):
        return hessian_vector_product(f, ps, ps.layout.vector(v)).data

    def scalar(ps: Any) -> Any:
        value = f(ps)
        if getattr(value, "shape", None) != ():
            raise ValueError(f"expected a function that returns a scalar, found {describe(value)}")
        return value

    ps = _differentiable(ps)
    return _jvp(jax.grad(scalar), ps, _like(v, ps, "ps"))


def _output(model: Model, ps: Any, st: Any) -> Callable[[Any], Any]:
    return lambda x: model(x, ps, st)[0]


def _jvp(f: Callable[[Any], Any], x: Any, v: Any) -> Any:
    try:
        return jax.jvp(f, (x,), (v,))[1]
    except TypeError as error:
        if "custom_vjp" in str(error):
            error.add_note(
                "A NeuralODE has forward mode with adjoint=diffrax.ForwardMode(), and forward over reverse "
                "mode with diffrax.DirectAdjoint(); fl.vector_jacobian_product and mode='rev' do without it."
            )
        raise


def _differentiable(x: Any) -> Any:
    x = jax.tree.map(jnp.asarray, x)
    if not all(jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in jax.tree.leaves(x)):
        raise TypeError(f"expected floating numbers to differentiate by, found {describe(x)}")
    return x


def _like(v: Any, other: Any, name: str) -> Any:
    """`v` as arrays, if it has the structure, shapes and dtypes of `other`. A number takes the dtype."""
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


def _checked_batch(y: Any, batch: int) -> jax.Array:
    if not hasattr(y, "dtype") or not jnp.issubdtype(y.dtype, jnp.inexact):
        raise TypeError(f"expected a model that returns one floating array, found {describe(y)}")
    if y.shape[:1] != (batch,):
        raise ValueError(f"expected y with the batch axis of x, of size {batch}, found shape {y.shape}")
    return y


def _units(like: jax.Array) -> jax.Array:
    """The unit vectors of a sample, each for the whole batch: of shape `(size, *like.shape)`."""
    size = math.prod(like.shape[1:])
    units = jnp.eye(size, dtype=like.dtype).reshape(size, 1, *like.shape[1:])
    return jnp.broadcast_to(units, (size, *like.shape))
