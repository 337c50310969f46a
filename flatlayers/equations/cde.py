"""`NeuralCDE`: a layer that solves `dz = model(z) dX`, driven by data."""

import dataclasses
from dataclasses import KW_ONLY

import diffrax
import jax
import jax.numpy as jnp

from ..core.composite import Wrapper
from ..core.fields import Finite, Size
from ..core.layer import Layer
from ..dtypes import common_real_dtype
from ..types import Args, Array, Input, Params, PyTree, State, Time
from ..vectors.names import describe
from ..vectors.vector import ComponentVector
from .failures import require
from .solving import SolverLayer
from .start import Start
from .times import ULPS, Times


# An array `(..., hidden)`.
Hidden = Array | ComponentVector


class NeuralCDE(SolverLayer, Wrapper):
    """Solve `dz = model(z) dX` from `z0`, by diffrax; the path `X` is data (Kidger et al., 2020).

    `X` is differentiable, and what is solved is `dz/dt = model(z) X'(t)`, with a matrix `model(z)`. For data
    with times, let one channel be the time: `diffrax.backward_hermite_coefficients(ts, data)` gives the
    coefficients of a `diffrax.CubicInterpolation(ts, coefficients)`.

    The parameter vector is unpacked once, outside the solve. During the solve the model's state is frozen;
    after it, the state is that of one evaluation at the initial point. Dtypes are as in `NeuralODE`; the
    path's own ends have its dtype.

    **Arguments:**

    - `model`: the layer that gives the matrices: `(..., hidden * channels)`, reshaped to
        `(..., hidden, channels)`.
    - `channels`: the number of channels of the path.
    - `t0`, `t1`: the start and the end of the solve; `None` is that of the path.
    - The others, by keyword, are those of `SolverLayer`. The `args` of an event's function are
        `(ps, st, control)`, with the model's `ps` and `st`.

    **Inputs:** `x`, a pair `(z0, control)`: `z0 (..., hidden)`, an array or a `ComponentVector`, and any
    differentiable `diffrax.AbstractPath`. Leading axes of `z0` are a batch. A path with `(channels,)` drives
    all of it; in a batch that is solved as one system, one of data `(time, batch, channels)` drives each
    sample by its own. For paths and steps of their own, `jax.vmap` over the pair.

    **Returns:** `(zs, st)`: the final state, with the shape of `z0`; or the saved states with time leading,
    if `saveat` has times.

    **Parameters:** the model's own. **States:** `stats` of the last solve, as of `SolverLayer`, and the
    model's states under `model`, if it has any.

    **Raises:** what `SolverLayer` raises; `TypeError` for a control that is no differentiable path;
    `ValueError` for a path with other channels, for a model whose output has another shape, and for times
    outside of those of the path (under `jax.jit` an error at run time).

    Reference: Kidger et al., "Neural Controlled Differential Equations for Irregular Time Series", NeurIPS
    2020.

    >>> import diffrax
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import flatlayers as fl
    >>> model = fl.NeuralCDE(fl.Dense(4, 4 * 2, jnp.tanh), 2)
    >>> ps, st = fl.setup(jax.random.key(0), model)
    >>> ts = jnp.linspace(0.0, 1.0, 10)
    >>> data = jnp.stack([ts, jnp.sin(6 * ts)], axis=-1)
    >>> path = diffrax.CubicInterpolation(ts, diffrax.backward_hermite_coefficients(ts, data))
    >>> z1, st = model((jnp.ones(4), path), ps, st)
    >>> z1.shape
    (4,)
    """

    model: Layer
    channels: Size
    _: KW_ONLY
    t0: Finite | None = None  # pyright: ignore[reportIncompatibleVariableOverride]
    t1: Finite | None = None  # pyright: ignore[reportIncompatibleVariableOverride]

    def inputs(self, x: Input, ps: Params, st: State) -> tuple[Start, State]:
        z0, control = _check_input(x)
        t0 = jnp.asarray(control.t0) if self.t0 is None else self.t0
        t1 = jnp.asarray(control.t1) if self.t1 is None else self.t1
        start = Start(z0, (control,), times=Times(t0, t1, self.dt0, self.saveat))
        return (start if self.t0 is None and self.t1 is None else self.within(start)), st

    def field(
        self, t: Time, y: Hidden, control: diffrax.AbstractPath, ps: Params, st: State
    ) -> tuple[Array, State]:
        matrices, st = self._flat(t, y, ps, st)
        matrices = matrices.reshape(*y.shape, self.channels)
        dx = control.derivative(t).astype(matrices.dtype)  # pyright: ignore[reportArgumentType]
        return jnp.einsum("...ij,...j->...i", matrices, dx), st

    def check(self, y0: Hidden, args: Args) -> PyTree:
        ps, st, control = args
        t = jax.ShapeDtypeStruct((), common_real_dtype(y0))
        found = jax.eval_shape(lambda t, control: control.derivative(t), t, control)
        shapes = [(self.channels,), (*y0.shape[:-1], self.channels)]
        if getattr(found, "shape", None) not in shapes:
            raise ValueError(
                f"expected a control with {self.channels} channels, of shape "
                f"{' or '.join(map(str, dict.fromkeys(shapes)))} at a time, found {describe(found)}"
            )
        found = jax.eval_shape(lambda *args: self._flat(*args)[0], t, y0, ps, st)
        expected = (*y0.shape[:-1], y0.shape[-1] * self.channels)
        if getattr(found, "shape", None) != expected:
            raise ValueError(
                f"expected a model whose output has the shape (..., hidden * channels), here {expected}, "
                f"found {describe(found)}"
            )
        return found

    def _flat(self, t: Time, z: Hidden, ps: Params, st: State) -> tuple[Array, State]:
        """Return the matrices as the model gives them."""
        y, st = self.model(self.at(t, z), ps, st)
        return (y.data if isinstance(y, ComponentVector) else y), st

    def within(self, start: Start) -> Start:
        """Return the start. **Raises:** for ends beyond those of the path, which would extrapolate."""
        (control,), times = start.data, start.times or self.times
        first, last = jnp.asarray(control.t0), jnp.asarray(control.t1)
        room = ULPS * float(jnp.finfo(common_real_dtype(first, last)).eps)  # the path's times may be rounded
        low, high = jnp.minimum(times.t0, times.t1), jnp.maximum(times.t0, times.t1)
        inside = (first - room * abs(first) <= low) & (high <= last + room * abs(last))
        both_arrays = isinstance(times.t0, jax.Array) and isinstance(times.t1, jax.Array)
        ends = "times" if both_arrays else f"t0={self.t0} and t1={self.t1}"
        message = f"expected {ends} within the times of the control"
        return dataclasses.replace(start, y0=require(inside.all(), message, start.y0))


def _check_input(x: Input) -> tuple[Hidden, diffrax.AbstractPath]:
    """Return the pair `(z0, control)`, or raise an error that says what is wrong with it."""
    if not isinstance(x, tuple) or len(x) != 2:
        raise TypeError(f"expected a pair (z0, control), found {describe(x)}")
    z0, control = x
    if not isinstance(control, diffrax.AbstractPath):
        raise TypeError(
            f"expected the control to be a path, such as diffrax.CubicInterpolation(ts, coefficients), found "
            f"{describe(control)}"
        )
    if isinstance(control, diffrax.AbstractBrownianPath):
        raise TypeError(
            f"expected a control with a derivative, found {type(control).__name__}: for noise use NeuralSDE"
        )
    z0 = jax.tree.map(jnp.asarray, z0)
    if not isinstance(z0, jax.Array | ComponentVector) or z0.ndim == 0:
        raise ValueError(f"expected z0 to be an array of shape (..., hidden), found {describe(z0)}")
    return z0, control
