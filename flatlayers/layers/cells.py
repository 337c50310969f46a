"""Recurrent cells: layers with a memory that take one step in time."""

import math
import operator
from dataclasses import KW_ONLY
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from ..core.declaration import Param
from ..core.fields import Count, Flag, Size
from ..core.layer import Layer
from ..initializers import uniform, zeros
from ..types import Input, Output, Params, PyTree, Shape, State
from ..vectors.names import describe
from .ending import activated
from .fields import Activation, Initial
from .shapes import along_last, check_trailing


# Weight and bias of the product with the input, and of that with the carry.
Kernels = tuple[tuple[Any, Any], ...]


class RecurrentCell(Layer):
    """The base of the cells: their parameters, where a step starts, and its two products."""

    in_dims: Count
    hidden_dims: Size
    _: KW_ONLY
    use_bias: Flag = True
    learn_initial_state: Flag = False
    init_weight: Initial | None = None
    init_bias: Initial | None = None

    gates: ClassVar[int] = 1
    initial_names: ClassVar[tuple[str, ...]] = ("initial_hidden",)

    def parameters(self) -> dict[str, Param]:
        rows, spread = self.gates * self.hidden_dims, uniform(scale=1 / math.sqrt(self.hidden_dims))
        weight, bias = self.init_weight or spread, self.init_bias or spread
        declared = {
            "weight_ih": Param((rows, self.in_dims), weight),
            "weight_hh": Param((rows, self.hidden_dims), weight),
        }
        if self.use_bias:
            declared |= {"bias_ih": Param((rows,), bias), "bias_hh": Param((rows,), bias)}
        if self.learn_initial_state:
            declared |= {name: Param((self.hidden_dims,), zeros) for name in self.initial_names}
        return declared

    def start(self, x: jax.Array, given: tuple[Any, ...], ps: Params) -> tuple[jax.Array, ...]:
        """The carry that is given, or else the initial one."""
        check_trailing(x, (self.in_dims,))
        shape, count = (*x.shape[:-1], self.hidden_dims), len(self.initial_names)
        if given:
            return _checked_carry(given[0], shape, count)
        dtype = jnp.result_type(x, ps.weight_ih)
        if not self.learn_initial_state:
            return (jnp.zeros(shape, dtype),) * count
        initial = (getattr(ps, name).astype(dtype) for name in self.initial_names)
        return tuple(jnp.broadcast_to(h, shape) for h in initial)

    def kernels(self, x: jax.Array, ps: Params) -> Kernels:
        """The parameters as the products take them. For a batch they are transposed, once for all steps."""
        weights = (ps.weight_ih, ps.weight_hh) if x.ndim == 1 else (ps.weight_ih.T, ps.weight_hh.T)
        biases = (ps.bias_ih, ps.bias_hh) if self.use_bias else (None, None)
        return tuple(zip(weights, biases, strict=True))

    def advance(self, x: jax.Array, carry: tuple[jax.Array, ...], kernels: Kernels) -> tuple[jax.Array, ...]:
        """The next carry; its first part is the output."""
        raise NotImplementedError

    def forward(self, x: Input, ps: Params, st: State) -> tuple[Output, State]:
        x, given = input_and_carry(x)
        x = jnp.asarray(x)
        carry = self.advance(x, self.start(x, given, ps), self.kernels(x, ps))
        return (carry[0], carry), st


class RNNCell(RecurrentCell):
    """One step of a simple recurrent network (Elman, 1990).

    `h' = activation(weight_ih @ x + bias_ih + weight_hh @ h + bias_hh)`, and `y = h'`.

    **Arguments:**

    - `in_dims`, `hidden_dims`: the numbers of input and hidden features.
    - `use_bias`: whether there are biases.
    - `learn_initial_state`: whether the initial state is a parameter; else it is zero.
    - `init_weight`, `init_bias`: their initializers; `None` is uniform in `±1 / sqrt(hidden_dims)`.
    - `activation`: an elementwise function; `None` is the identity.

    **Inputs:** `x` of shape `(..., in_dims)`, to start from the initial state, or `(x, carry)`, to
    continue, with `carry = (h,)` of shape `(..., hidden_dims)`. **Returns:** `((y, carry), st)`
    with `y` of shape `(..., hidden_dims)`.

    **Parameters:** `weight_ih (hidden_dims, in_dims)`, `weight_hh (hidden_dims, hidden_dims)`,
    `bias_ih (hidden_dims,)`, `bias_hh (hidden_dims,)`; if it is learned,
    `initial_hidden (hidden_dims,)`, zero at first. **States:** none.

    **Raises:** `ValueError` for another number of features or a carry of other shapes, `TypeError`
    for a carry that is no tuple.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import flatlayers as fl
    >>> cell = fl.RNNCell(3, 2)
    >>> ps, st = fl.setup(jax.random.key(0), cell)
    >>> (y, carry), st = cell(jnp.ones((5, 3)), ps, st)
    >>> (y, carry), st = cell((jnp.ones((5, 3)), carry), ps, st)
    >>> y.shape
    (5, 2)
    """

    _: KW_ONLY
    activation: Activation | None = jnp.tanh

    def advance(self, x: jax.Array, carry: tuple[jax.Array, ...], kernels: Kernels) -> tuple[jax.Array, ...]:
        h = operator.add(*products(x, carry[0], kernels))
        return (activated(self.activation, h),)


class LSTMCell(RecurrentCell):
    """One step of a long short-term memory (Hochreiter and Schmidhuber, 1997).

    With `i, f, g, o` the four parts of `weight_ih @ x + bias_ih + weight_hh @ h + bias_hh`:
    `c' = sigmoid(f) * c + sigmoid(i) * tanh(g)`, `h' = sigmoid(o) * tanh(c')`, and `y = h'`.

    **Arguments:** those of `RNNCell`, without `activation`.

    **Inputs:** `x` of shape `(..., in_dims)`, to start from the initial state, or `(x, carry)`, to
    continue, with `carry = (h, c)`, each of shape `(..., hidden_dims)`. **Returns:**
    `((y, carry), st)` with `y` of shape `(..., hidden_dims)`.

    **Parameters:** `weight_ih (4 * hidden_dims, in_dims)`,
    `weight_hh (4 * hidden_dims, hidden_dims)`, `bias_ih (4 * hidden_dims,)`,
    `bias_hh (4 * hidden_dims,)`; if it is learned, `initial_hidden (hidden_dims,)` and
    `initial_cell (hidden_dims,)`, zero at first. **States:** none.

    **Raises:** as `RNNCell`.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import flatlayers as fl
    >>> cell = fl.LSTMCell(3, 2)
    >>> ps, st = fl.setup(jax.random.key(0), cell)
    >>> (y, (h, c)), st = cell(jnp.ones(3), ps, st)
    >>> y.shape, c.shape
    ((2,), (2,))
    """

    gates = 4
    initial_names = ("initial_hidden", "initial_cell")

    def advance(self, x: jax.Array, carry: tuple[jax.Array, ...], kernels: Kernels) -> tuple[jax.Array, ...]:
        h, c = carry
        i, f, g, o = jnp.split(operator.add(*products(x, h, kernels)), 4, axis=-1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        return jax.nn.sigmoid(o) * jnp.tanh(c), c


class GRUCell(RecurrentCell):
    """One step of a gated recurrent unit (Cho et al., 2014).

    With `r, z, n` in `weight_ih @ x + bias_ih` and `weight_hh @ h + bias_hh`, marked `x` and `h`:
    `r = sigmoid(r_x + r_h)`, `z = sigmoid(z_x + z_h)`, `n = tanh(n_x + r * n_h)`,
    `h' = (1 - z) * n + z * h`, and `y = h'`.

    **Arguments:** those of `RNNCell`, without `activation`.

    **Inputs:** `x` of shape `(..., in_dims)`, to start from the initial state, or `(x, carry)`, to
    continue, with `carry = (h,)` of shape `(..., hidden_dims)`. **Returns:** `((y, carry), st)`
    with `y` of shape `(..., hidden_dims)`.

    **Parameters:** `weight_ih (3 * hidden_dims, in_dims)`,
    `weight_hh (3 * hidden_dims, hidden_dims)`, `bias_ih (3 * hidden_dims,)`,
    `bias_hh (3 * hidden_dims,)`; if it is learned, `initial_hidden (hidden_dims,)`, zero at first.
    **States:** none.

    **Raises:** as `RNNCell`.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import flatlayers as fl
    >>> cell = fl.GRUCell(3, 2)
    >>> ps, st = fl.setup(jax.random.key(0), cell)
    >>> (y, (h,)), st = cell(jnp.ones(3), ps, st)
    >>> y.shape
    (2,)
    """

    gates = 3

    def advance(self, x: jax.Array, carry: tuple[jax.Array, ...], kernels: Kernels) -> tuple[jax.Array, ...]:
        (h,) = carry
        from_x, from_h = products(x, h, kernels)
        r_x, z_x, n_x = jnp.split(from_x, 3, axis=-1)
        r_h, z_h, n_h = jnp.split(from_h, 3, axis=-1)
        r, z = jax.nn.sigmoid(r_x + r_h), jax.nn.sigmoid(z_x + z_h)
        n = jnp.tanh(n_x + r * n_h)
        return ((1 - z) * n + z * h,)


def input_and_carry(x: Input) -> tuple[Any, tuple[Any, ...]]:
    """The input and the carry that came with it, in a tuple of one; an empty one if there is none."""
    if type(x) is not tuple:
        return x, ()
    if len(x) != 2:
        raise ValueError(f"expected x or a tuple (x, carry), found a tuple of {len(x)}")
    return x[0], x[1:]


def _checked_carry(carry: PyTree, shape: Shape, count: int) -> tuple[jax.Array, ...]:
    names = ("(h,)", "(h, c)")[count - 1]
    if not isinstance(carry, tuple):
        raise TypeError(f"expected a carry that is a tuple {names}, found {describe(carry)}")
    if len(carry) != count or any(jnp.shape(part) != shape for part in carry):
        raise ValueError(f"expected a carry {names} of arrays of shape {shape}, found {describe(carry)}")
    return tuple(map(jnp.asarray, carry))


def products(x: jax.Array, h: jax.Array, kernels: Kernels) -> tuple[jax.Array, jax.Array]:
    """`weight_ih @ x + bias_ih` and `weight_hh @ h + bias_hh`."""
    from_x, from_h = (
        _plus(kernel @ part if part.ndim == 1 else part @ kernel, bias)
        for part, (kernel, bias) in zip((x, h), kernels, strict=True)
    )
    return from_x, from_h


def _plus(y: jax.Array, bias: jax.Array | None) -> jax.Array:
    return y if bias is None else y + along_last(bias, y.ndim)
