"""Layers that run a cell over a sequence."""

from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY
from typing import Annotated, Any, ClassVar

import jax
import jax.numpy as jnp

from ..core.composite import Container, Wrapper
from ..core.fields import Check, Flag, Integer
from ..core.layer import Layer
from ..devices import varying_like
from ..types import Input, Key, Output, Params, PyTree, State
from ..vectors.names import describe
from ..vectors.record import Record
from .cells import GRUCell, LSTMCell, RecurrentCell, RNNCell, input_and_carry
from .compiled import compiled_once
from .fields import AnyLayer, a_function


Merge = Annotated[Callable[[Any, Any], Any], Check("a function of two sequences", a_function)]


class Recurrence(Wrapper):
    """A cell run over time: `(y_t, carry) = cell(x_t, carry)` for each `t`, in one `jax.lax.scan`.

    The state of the cell goes from step to step too: a dropout in the cell draws anew each time.

    **Arguments:**

    - `cell`: a cell, a layer that takes `x` or `(x, carry)` and returns `((y, carry), st)`.
    - `return_sequence`: whether `y` has all steps, or the last one alone.
    - `time_axis`: the axis of the input that is time; of the sequence that is returned, too.
    - `reverse`: whether to run from the last step to the first. The sequence comes back in the
        order of the input; the last step is then that of the first input.
    - `return_carry`: whether the carry after the last step is returned too, for another layer to start
        from: a decoder from what an encoder has read, or the next piece of a long sequence.

    **Inputs:** `x` of shape `(..., time, in_dims)`, or `(x, carry)`, to start from a carry.
    **Returns:** `(y, st)` with `y` of shape `(..., time, hidden_dims)` or `(..., hidden_dims)`; with
    `return_carry` it is `((y, carry), st)`, as of a cell, whose carry it is.

    **Parameters and states:** those of the cell.

    **Raises:** `ValueError` if `x` has no such axis, or no step along it.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import flatlayers as fl
    >>> layer = fl.Recurrence(fl.GRUCell(3, 2), return_sequence=True)
    >>> ps, st = fl.setup(jax.random.key(0), layer)
    >>> layer(jnp.ones((5, 10, 3)), ps, st)[0].shape
    (5, 10, 2)

    A carry joins two layers:

    >>> encoder, decoder = fl.GRU(3, 2, return_carry=True), fl.GRU(1, 2, return_sequence=True)
    >>> ps, st = fl.setup(jax.random.key(0), {"encoder": encoder, "decoder": decoder})
    >>> (y, carry), _ = encoder(jnp.ones((5, 10, 3)), ps.encoder, st.encoder)
    >>> decoder((jnp.ones((5, 4, 1)), carry), ps.decoder, st.decoder)[0].shape
    (5, 4, 2)
    """

    cell: AnyLayer
    _: KW_ONLY
    return_sequence: Flag = False
    time_axis: Integer = -2
    reverse: Flag = False
    return_carry: Flag = False

    def forward(self, x: Input, ps: Params, st: State) -> tuple[Output, State]:
        x, carry = input_and_carry(x)
        xs = _steps(jnp.asarray(x), self.time_axis)
        own_cell = isinstance(self.cell, RecurrentCell) and type(self.cell).forward is RecurrentCell.forward
        run: Any = _run_cell if own_cell else _run_layer
        options = self.cell, self.reverse, self.return_sequence
        y, carry, ys, st = compiled_once(run, options, xs, carry, ps, st)
        y = jnp.moveaxis(ys, 0, self.time_axis) if self.return_sequence else y
        return ((y, carry) if self.return_carry else y), st


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

    cell: AnyLayer

    keeps_state_type: ClassVar[bool] = False

    def states(self, key: Key) -> Mapping[str, Any]:
        return {**self.cell.states(key), "carry": None}

    def forward(self, x: Input, ps: Params, st: State) -> tuple[Output, State]:
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
    - `return_carry`: whether the carries after the last step of each are returned too.

    **Inputs:** `x` of shape `(..., time, in_dims)`, or `(x, (forward, backward))` to start from two carries.
    **Returns:** `(y, st)` with `y` of shape `(..., time, 2 * hidden_dims)`; with `return_carry` it is
    `((y, (forward, backward)), st)`.

    **Parameters and states:** those of the cells, under `forward` and `backward`.

    **Raises:** `TypeError` for a `merge` that is no function and for carries that are no pair.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import flatlayers as fl
    >>> layer = fl.BidirectionalRNN(fl.LSTMCell(3, 2))
    >>> ps, st = fl.setup(jax.random.key(0), layer)
    >>> layer(jnp.ones((5, 10, 3)), ps, st)[0].shape
    (5, 10, 4)
    """

    cell: AnyLayer
    backward_cell: AnyLayer | None = None
    _: KW_ONLY
    merge: Merge | None = concatenate
    return_carry: Flag = False

    def children(self) -> dict[str, Layer]:
        backward = self.cell if self.backward_cell is None else self.backward_cell
        return {"forward": self.cell, "backward": backward}

    def forward(self, x: Input, ps: Params, st: State) -> tuple[Output, State]:
        x, given = input_and_carry(x)
        starts = [(x,), (x,)] if not given else [(x, carry) for carry in _pair(given[0])]
        ys, carries, new = [], [], {}
        for start, (name, cell) in zip(starts, self.children().items(), strict=True):
            run = Recurrence(cell, return_sequence=True, return_carry=True, reverse=name == "backward")
            (y, carry), new[name] = run(start if given else x, getattr(ps, name), st[name])
            ys.append(y)
            carries.append(carry)
        y = tuple(ys) if self.merge is None else self.merge(*ys)
        return ((y, tuple(carries)) if self.return_carry else y), st.replace(**new)


def _pair(carries: PyTree) -> tuple[PyTree, PyTree]:
    if not isinstance(carries, tuple) or len(carries) != 2:
        raise TypeError(f"expected a pair of carries, forward and backward, found {describe(carries)}")
    return carries


def _run_cell(
    cell: RecurrentCell, reverse: bool, return_sequence: bool, xs: Input, carry: PyTree, ps: Params, st: State
) -> tuple[Any, Any, Any, Any]:
    """Run a recurrent cell: its carry and its weights are known before the loop."""
    dtype = jnp.result_type(xs, ps.weight_ih)
    start = tuple(h.astype(jnp.result_type(h, dtype)) for h in cell.start(xs[0], carry, ps))
    kernels = cell.kernels(xs[0], ps)
    start = varying_like(start, (xs, kernels))

    def step(carry: PyTree, x: Input) -> tuple[Any, Any]:
        carry = cell.advance(x, carry, kernels)
        return carry, carry[0] if return_sequence else None

    carry, ys = jax.lax.scan(step, start, xs, reverse=reverse)
    return carry[0], carry, ys, st


def _run_layer(
    cell: Layer, reverse: bool, return_sequence: bool, xs: Input, carry: PyTree, ps: Params, st: State
) -> tuple[Any, Any, Any, Any]:
    """Run a layer that takes `x` or `(x, carry)`."""
    first, rest = (xs[-1], xs[:-1]) if reverse else (xs[0], xs[1:])
    # The first step gives the carry, and a state of the first call, the type of all others.
    y_first, carry, st = _step(cell, first, carry, ps, st)

    def step(loop: PyTree, x: Input) -> tuple[Any, Any]:
        _, carry, st = loop
        y, carry, st = _step(cell, x, (carry,), ps, st)
        return (y, carry, st), y if return_sequence else None

    (y, carry, st), ys = jax.lax.scan(step, (y_first, carry, st), rest, reverse=reverse)
    if return_sequence:
        ys = jnp.concatenate([ys, y_first[None]] if reverse else [y_first[None], ys])
    return y, carry, ys, st


def _steps(x: jax.Array, time_axis: int) -> jax.Array:
    """The input with time in front."""
    if not -x.ndim <= time_axis < x.ndim:
        raise ValueError(
            f"expected x of shape (..., time, features), with an axis {time_axis}, found shape {x.shape}"
        )
    if x.shape[time_axis] == 0:
        raise ValueError(f"expected at least one step along the time axis {time_axis}, found shape {x.shape}")
    return jnp.moveaxis(x, time_axis, 0)


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


def _over_time(cell: Callable[..., Layer], in_dims: int, hidden_dims: int, **options: Any) -> Recurrence:
    over_time = {
        name: options.pop(name)
        for name in ("return_sequence", "time_axis", "reverse", "return_carry")
        if name in options
    }
    return Recurrence(cell(in_dims, hidden_dims, **options), **over_time)


# Steps


def _step(cell: Layer, x: Input, carry: PyTree, ps: Params, st: State) -> tuple[Any, Any, Any]:
    """One step of a cell, from its initial state if `carry` is empty: `y`, the carry, the state."""
    result, st = cell((x, *carry) if carry else x, ps, st)
    if not isinstance(result, tuple) or len(result) != 2:
        raise TypeError(
            f"expected a cell that returns ((y, carry), st), found (y, st) with y: {describe(result)}"
        )
    return *result, st
