"""Layers with a memory: cells, which take one step in time, and what runs a cell over a sequence."""

import math
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from ..core.layer import Container, Layer, Param, Wrapper
from ..core.names import describe
from ..core.record import Record
from ..initializers import uniform, zeros
from .shapes import along_last, check_trailing


class RecurrentCell(Layer):
    """The base of the cells: their parameters, where a step starts, and its two products."""

    in_dims: int
    hidden_dims: int
    _: KW_ONLY
    use_bias: bool = True
    learn_initial_state: bool = False
    init_weight: Callable[..., Any] | None = None
    init_bias: Callable[..., Any] | None = None

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

    def start(self, x: Any, ps: Any) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """The input and the carry: the one that came with it, or the initial one."""
        x, carry = _input_and_carry(x)
        check_trailing(x, (self.in_dims,))
        x = jnp.asarray(x)
        shape, count = (*x.shape[:-1], self.hidden_dims), len(self.initial_names)
        if carry:
            return x, _checked_carry(carry[0], shape, count)
        dtype = jnp.result_type(x, ps.weight_ih)
        if not self.learn_initial_state:
            return x, (jnp.zeros(shape, dtype),) * count
        initial = (getattr(ps, name).astype(dtype) for name in self.initial_names)
        return x, tuple(jnp.broadcast_to(h, shape) for h in initial)

    def products(self, x: jax.Array, h: jax.Array, ps: Any) -> tuple[jax.Array, jax.Array]:
        """`weight_ih @ x + bias_ih` and `weight_hh @ h + bias_hh`."""
        bias_ih, bias_hh = (ps.bias_ih, ps.bias_hh) if self.use_bias else (None, None)
        return _affine(ps.weight_ih, x, bias_ih), _affine(ps.weight_hh, h, bias_hh)


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
    activation: Callable[[Any], Any] | None = jnp.tanh

    def forward(self, x: Any, ps: Any, st: Any) -> tuple[Any, Any]:
        x, (h,) = self.start(x, ps)
        from_x, from_h = self.products(x, h, ps)
        h = from_x + from_h
        h = h if self.activation is None else self.activation(h)
        return (h, (h,)), st


class LSTMCell(RecurrentCell):
    """One step of a long short-term memory (Hochreiter and Schmidhuber, 1997).

    With `i, f, g, o` the four parts of `weight_ih @ x + bias_ih + weight_hh @ h + bias_hh`:
    `c' = sigmoid(f) * c + sigmoid(i) * tanh(g)`, `h' = sigmoid(o) * tanh(c')`, and `y = h'`.

    **Arguments:**

    - `in_dims`, `hidden_dims`: the numbers of input and hidden features.
    - `use_bias`: whether there are biases.
    - `learn_initial_state`: whether the initial state is a parameter; else it is zero.
    - `init_weight`, `init_bias`: their initializers; `None` is uniform in `±1 / sqrt(hidden_dims)`.

    **Inputs:** `x` of shape `(..., in_dims)`, to start from the initial state, or `(x, carry)`, to
    continue, with `carry = (h, c)`, each of shape `(..., hidden_dims)`. **Returns:**
    `((y, carry), st)` with `y` of shape `(..., hidden_dims)`.

    **Parameters:** `weight_ih (4 * hidden_dims, in_dims)`,
    `weight_hh (4 * hidden_dims, hidden_dims)`, `bias_ih (4 * hidden_dims,)`,
    `bias_hh (4 * hidden_dims,)`; if it is learned, `initial_hidden (hidden_dims,)` and
    `initial_cell (hidden_dims,)`, zero at first. **States:** none.

    **Raises:** `ValueError` for another number of features or a carry of other shapes, `TypeError`
    for a carry that is no tuple.

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

    def forward(self, x: Any, ps: Any, st: Any) -> tuple[Any, Any]:
        x, (h, c) = self.start(x, ps)
        from_x, from_h = self.products(x, h, ps)
        i, f, g, o = jnp.split(from_x + from_h, 4, axis=-1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, (h, c)), st


class GRUCell(RecurrentCell):
    """One step of a gated recurrent unit (Cho et al., 2014).

    With `r, z, n` in `weight_ih @ x + bias_ih` and `weight_hh @ h + bias_hh`, marked `x` and `h`:
    `r = sigmoid(r_x + r_h)`, `z = sigmoid(z_x + z_h)`, `n = tanh(n_x + r * n_h)`,
    `h' = (1 - z) * n + z * h`, and `y = h'`.

    **Arguments:**

    - `in_dims`, `hidden_dims`: the numbers of input and hidden features.
    - `use_bias`: whether there are biases.
    - `learn_initial_state`: whether the initial state is a parameter; else it is zero.
    - `init_weight`, `init_bias`: their initializers; `None` is uniform in `±1 / sqrt(hidden_dims)`.

    **Inputs:** `x` of shape `(..., in_dims)`, to start from the initial state, or `(x, carry)`, to
    continue, with `carry = (h,)` of shape `(..., hidden_dims)`. **Returns:** `((y, carry), st)`
    with `y` of shape `(..., hidden_dims)`.

    **Parameters:** `weight_ih (3 * hidden_dims, in_dims)`,
    `weight_hh (3 * hidden_dims, hidden_dims)`, `bias_ih (3 * hidden_dims,)`,
    `bias_hh (3 * hidden_dims,)`; if it is learned, `initial_hidden (hidden_dims,)`, zero at first.
    **States:** none.

    **Raises:** `ValueError` for another number of features or a carry of other shapes, `TypeError`
    for a carry that is no tuple.

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

    def forward(self, x: Any, ps: Any, st: Any) -> tuple[Any, Any]:
        x, (h,) = self.start(x, ps)
        from_x, from_h = self.products(x, h, ps)
        r_x, z_x, n_x = jnp.split(from_x, 3, axis=-1)
        r_h, z_h, n_h = jnp.split(from_h, 3, axis=-1)
        r, z = jax.nn.sigmoid(r_x + r_h), jax.nn.sigmoid(z_x + z_h)
        n = jnp.tanh(n_x + r * n_h)
        h = (1 - z) * n + z * h
        return (h, (h,)), st


class Recurrence(Wrapper):
    """A cell run over time: `(y_t, carry) = cell(x_t, carry)` for each `t`, in one `jax.lax.scan`.

    The state of the cell goes from step to step too: a dropout in the cell draws anew each time.

    **Arguments:**

    - `cell`: a cell, a layer that takes `x` or `(x, carry)` and returns `((y, carry), st)`.
    - `return_sequence`: whether `y` has all steps, or the last one alone.
    - `time_axis`: the axis of the input that is time; of the sequence that is returned, too.
    - `reverse`: whether to run from the last step to the first. The sequence comes back in the
        order of the input; the last step is then that of the first input.

    **Inputs:** `x` of shape `(..., time, in_dims)`, or `(x, carry)`, to start from a carry.
    **Returns:** `(y, st)` with `y` of shape `(..., time, hidden_dims)` or `(..., hidden_dims)`.

    **Parameters and states:** those of the cell.

    **Raises:** `ValueError` if `x` has no such axis, or no step along it.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import flatlayers as fl
    >>> layer = fl.Recurrence(fl.GRUCell(3, 2), return_sequence=True)
    >>> ps, st = fl.setup(jax.random.key(0), layer)
    >>> layer(jnp.ones((5, 10, 3)), ps, st)[0].shape
    (5, 10, 2)
    """

    cell: Layer
    _: KW_ONLY
    return_sequence: bool = False
    time_axis: int = -2
    reverse: bool = False

    def forward(self, x: Any, ps: Any, st: Any) -> tuple[Any, Any]:
        x, carry = _input_and_carry(x)
        xs = _steps(jnp.asarray(x), self.time_axis)
        first, rest = (xs[-1], xs[:-1]) if self.reverse else (xs[0], xs[1:])
        # The first step gives the carry, and a state of the first call, the type of all others.
        y_first, carry, st = _step(self.cell, first, carry, ps, st)

        def step(loop: Any, x: Any) -> tuple[Any, Any]:
            _, carry, st = loop
            y, carry, st = _step(self.cell, x, (carry,), ps, st)
            return (y, carry, st), y if self.return_sequence else None

        (y, _, st), ys = jax.lax.scan(step, (y_first, carry, st), rest, reverse=self.reverse)
        if not self.return_sequence:
            return y, st
        parts = [ys, y_first[None]] if self.reverse else [y_first[None], ys]
        return jnp.moveaxis(jnp.concatenate(parts), 0, self.time_axis), st


class StatefulRecurrentCell(Wrapper):
    """A cell that remembers: each call continues from the carry of the one before.

    `fl.update_state(st, "carry", None)` makes it forget: the next call starts from the initial
    state. Do so, too, before a batch of another size.

    **Arguments:**

    - `cell`: a cell, a layer that takes `x` or `(x, carry)` and returns `((y, carry), st)`.

    **Inputs:** `x` of shape `(..., in_dims)`. **Returns:** `(y, st)` with `y` of shape
    `(..., hidden_dims)`.

    **Parameters:** those of the cell. **States:** those of the cell, and `carry`: `None` at first,
    then the cell's. So the first call changes the type of the state.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import flatlayers as fl
    >>> layer = fl.StatefulRecurrentCell(fl.LSTMCell(3, 2))
    >>> ps, st = fl.setup(jax.random.key(0), layer)
    >>> y, st = layer(jnp.ones(3), ps, st)
    >>> bool((y == st.carry[0]).all())
    True
    """

    cell: Layer

    keeps_state_type: ClassVar[bool] = False

    def states(self, key: jax.Array) -> Mapping[str, Any]:
        return {**self.cell.states(key), "carry": None}

    def forward(self, x: Any, ps: Any, st: Any) -> tuple[Any, Any]:
        inner = {name: part for name, part in st.items() if name != "carry"}
        carry = () if st.carry is None else (st.carry,)
        y, carry, inner = _step(self.cell, x, carry, ps, inner)
        return y, Record({**inner, "carry": carry})


def concatenate(forward: jax.Array, backward: jax.Array) -> jax.Array:
    """Two sequences side by side, along the features."""
    return jnp.concatenate([forward, backward], axis=-1)


class BidirectionalRNN(Container):
    """Two cells over one sequence, forward and backward in time: `y = merge(forward, backward)`.

    See Schuster and Paliwal, 1997.

    **Arguments:**

    - `cell`: the cell that runs forward.
    - `backward_cell`: the cell that runs backward; `None` is one like `cell`, with its own parameters.
    - `merge`: a function of the two sequences, both in the order of the input; along the features
        they are concatenated unless given. `None` returns them as a tuple.

    **Inputs:** `x` of shape `(..., time, in_dims)`. **Returns:** `(y, st)` with `y` of shape
    `(..., time, 2 * hidden_dims)`.

    **Parameters and states:** those of the cells, under `forward` and `backward`.

    **Raises:** `TypeError` for a `merge` that is no function.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import flatlayers as fl
    >>> layer = fl.BidirectionalRNN(fl.LSTMCell(3, 2))
    >>> ps, st = fl.setup(jax.random.key(0), layer)
    >>> layer(jnp.ones((5, 10, 3)), ps, st)[0].shape
    (5, 10, 4)
    """

    cell: Layer
    backward_cell: Layer | None = None
    _: KW_ONLY
    merge: Callable[[Any, Any], Any] | None = concatenate

    def __post_init__(self) -> None:
        if self.merge is not None and (isinstance(self.merge, Layer) or not callable(self.merge)):
            raise TypeError(f"expected a function of two sequences or None as merge, found {self.merge!r}")

    def children(self) -> dict[str, Layer]:
        backward = self.cell if self.backward_cell is None else self.backward_cell
        return {"forward": self.cell, "backward": backward}

    def forward(self, x: Any, ps: Any, st: Any) -> tuple[Any, Any]:
        ys, new = [], {}
        for name, cell in self.children().items():
            run = Recurrence(cell, return_sequence=True, reverse=name == "backward")
            y, new[name] = run(x, getattr(ps, name), st[name])
            ys.append(y)
        return tuple(ys) if self.merge is None else self.merge(*ys), st.replace(**new)


# Shorthands


def RNN(in_dims: int, hidden_dims: int, **options: Any) -> Recurrence:
    """A simple recurrent network over time: `Recurrence(RNNCell(in_dims, hidden_dims))`.

    **Arguments:** those of `RNNCell` and, by name, those of `Recurrence`.

    >>> import flatlayers as fl
    >>> fl.RNN(3, 2, use_bias=False, return_sequence=True)
    Recurrence(RNNCell(3, 2, use_bias=False), return_sequence=True)
    """
    return _over_time(RNNCell, in_dims, hidden_dims, **options)


def LSTM(in_dims: int, hidden_dims: int, **options: Any) -> Recurrence:
    """A long short-term memory over time: `Recurrence(LSTMCell(in_dims, hidden_dims))`.

    **Arguments:** those of `LSTMCell` and, by name, those of `Recurrence`.

    >>> import flatlayers as fl
    >>> fl.LSTM(3, 2, reverse=True)
    Recurrence(LSTMCell(3, 2), reverse=True)
    """
    return _over_time(LSTMCell, in_dims, hidden_dims, **options)


def GRU(in_dims: int, hidden_dims: int, **options: Any) -> Recurrence:
    """A gated recurrent unit over time: `Recurrence(GRUCell(in_dims, hidden_dims))`.

    **Arguments:** those of `GRUCell` and, by name, those of `Recurrence`.

    >>> import flatlayers as fl
    >>> fl.GRU(3, 2, time_axis=0)
    Recurrence(GRUCell(3, 2), time_axis=0)
    """
    return _over_time(GRUCell, in_dims, hidden_dims, **options)


def _over_time(
    cell: Callable[..., Layer],
    in_dims: int,
    hidden_dims: int,
    *,
    return_sequence: bool = False,
    time_axis: int = -2,
    reverse: bool = False,
    **options: Any,
) -> Recurrence:
    return Recurrence(
        cell(in_dims, hidden_dims, **options),
        return_sequence=return_sequence,
        time_axis=time_axis,
        reverse=reverse,
    )


# Steps


def _step(cell: Layer, x: Any, carry: Any, ps: Any, st: Any) -> tuple[Any, Any, Any]:
    """One step of a cell, from its initial state if `carry` is empty: `y`, the carry, the state."""
    result, st = cell((x, *carry) if carry else x, ps, st)
    if not isinstance(result, tuple) or len(result) != 2:
        raise TypeError(
            f"expected a cell that returns ((y, carry), st), found (y, st) with y: {describe(result)}"
        )
    return *result, st


def _input_and_carry(x: Any) -> tuple[Any, tuple[Any, ...]]:
    """The input and the carry that came with it, in a tuple of one; an empty one if there is none."""
    if type(x) is not tuple:
        return x, ()
    if len(x) != 2:
        raise ValueError(f"expected x or a tuple (x, carry), found a tuple of {len(x)}")
    return x[0], x[1:]


def _checked_carry(carry: Any, shape: tuple[int, ...], count: int) -> tuple[jax.Array, ...]:
    names = ("(h,)", "(h, c)")[count - 1]
    if not isinstance(carry, tuple):
        raise TypeError(f"expected a carry that is a tuple {names}, found {describe(carry)}")
    if len(carry) != count or any(jnp.shape(part) != shape for part in carry):
        raise ValueError(f"expected a carry {names} of arrays of shape {shape}, found {describe(carry)}")
    return tuple(map(jnp.asarray, carry))


def _steps(x: jax.Array, time_axis: int) -> jax.Array:
    """The input with time in front."""
    if not -x.ndim <= time_axis < x.ndim:
        raise ValueError(
            f"expected x of shape (..., time, features), with an axis {time_axis}, found shape {x.shape}"
        )
    if x.shape[time_axis] == 0:
        raise ValueError(f"expected at least one step along the time axis {time_axis}, found shape {x.shape}")
    return jnp.moveaxis(x, time_axis, 0)


def _affine(weight: jax.Array, x: jax.Array, bias: jax.Array | None) -> jax.Array:
    y = weight @ x if x.ndim == 1 else x @ weight.T
    return y if bias is None else y + along_last(bias, y.ndim)
