"""`NeuralCDE`: a layer that solves `dz = field(z) dX`, driven by data."""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np

from ..core.composite import Wrapper
from ..core.fields import Finite, Flag, Size
from ..core.layer import Layer, call
from ..core.values import Hashable, plain
from ..dtypes import common_real_dtype
from ..vectors.names import describe
from ..vectors.record import Record
from ..vectors.vector import ComponentVector
from . import solving as shared
from .solver_dtypes import Dtypes
from .times import ULPS, Times, check_saves_values, freeze_times, saves_final_only


class NeuralCDE(Wrapper):
    """Solve `dz = field(z) dX` from `z0`, by diffrax; the path `X` is data (Kidger et al., 2020).

    `X` is differentiable, and what is solved is `dz/dt = field(z) X'(t)`, with a matrix `field(z)`. For data
    with times, let one channel be the time: `diffrax.backward_hermite_coefficients(ts, data)` gives the
    coefficients of a `diffrax.CubicInterpolation(ts, coefficients)`.

    The parameter vector is unpacked once, outside the solve. During the solve the field's state is frozen;
    after it, the state is that of one evaluation at the initial point. Dtypes are as in `NeuralODE`; the
    path's own ends have its dtype.

    **Arguments:**

    - `field`: the layer that gives the matrices: `(..., hidden * channels)`, reshaped to
        `(..., hidden, channels)`.
    - `channels`: the number of channels of the path.
    - `t0`, `t1`: the start and the end of the solve; `None` is that of the path.
    - `saveat`: the times to save at, or a `diffrax.SaveAt`; `None` saves the final state.
    - `solver`: a diffrax solver; `None` is `Tsit5()`.
    - `stepsize_controller`: `None` is `PIDController(rtol=1e-4, atol=1e-6)`.
    - `adjoint`: how the solve is differentiated; `None` is the default of `NeuralODE`.
    - `event`: a `diffrax.Event` that ends the solve. The `args` of its function are `(ps, st, control)`, with
        the field's `ps` and `st`. What would have been saved after the end is infinite.
    - `dt0`: the first step, or `None` to let the controller choose it.
    - `max_steps`: the most steps the solver may take.
    - `with_time`: whether the field is called with `(t, z)` instead of `z`.
    - `throw`: whether a failed solve raises; its result code is in the state either way.

    **Inputs:** a pair `(z0, control)`: `z0 (..., hidden)`, an array or a `ComponentVector`, and any
    differentiable `diffrax.AbstractPath`. Leading axes of `z0` are a batch, solved as one system. A path
    with `(channels,)` drives all of it; one of data `(time, batch, channels)` drives each sample by its own.
    For samples with times of their own, `jax.vmap` over the pair: each then takes its own steps.

    **Returns:** `(zs, st)`: the final state, with the shape of `z0`; or the saved states with time leading,
    if `saveat` has times.

    **Parameters:** the field's own. **States:** `stats` of the last solve, those of `NeuralODE`; and the
    field's under `field`, if it has any.

    **Raises:** `TypeError` for a control that is no differentiable path; `ValueError` for options out of
    range (NaN among them), for a path with other channels, for a field whose output has another shape, and
    for times outside of `t0` to `t1` or of the path (under `jax.jit` an error at run time). With `throw`,
    `ValueError` for a `z0` that is not finite, and the error of diffrax for a solve that fails.

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

    field: Layer
    channels: Size
    _: KW_ONLY
    t0: Finite | None = None
    t1: Finite | None = None
    saveat: diffrax.SaveAt | Sequence[float] | np.ndarray | Hashable | None = None
    solver: diffrax.AbstractSolver | None = None
    stepsize_controller: diffrax.AbstractStepSizeController | None = None
    adjoint: diffrax.AbstractAdjoint | None = None
    event: diffrax.Event | Hashable | None = None
    dt0: Finite | None = None
    max_steps: Size | None = 4096
    with_time: Flag = False
    throw: Flag = True

    def __post_init__(self) -> None:
        shared.freeze_options(self, "solver", "stepsize_controller", "adjoint", "event")
        freeze_times(self)

    def states(self, key: jax.Array) -> dict[str, Any]:
        stats = shared.initial_stats("num_evaluations")
        return {"stats": stats} | shared.model_states(self.field, key, "field")

    def forward(self, x: Any, ps: Any, st: Any) -> tuple[Any, Any]:
        check_saves_values(self.saveat)
        solution, st = self._solve(x, ps, st)
        if saves_final_only(self.saveat):
            return jax.tree.map(lambda z: z[-1], solution.ys), st
        return solution.ys, st

    def solve(self, x: Any, ps: Any, st: Any) -> tuple[diffrax.Solution, Record]:
        """Solve, and return `(solution, st)` with diffrax's own solution object.

        **Arguments:** as for a call of the layer; `x` is the pair `(z0, control)`.
        """
        return call(self, self._solve, x, ps, st)

    def _ends(self, control: diffrax.AbstractPath, z0: Any) -> tuple[Any, Any, Any]:
        """`(z0, t0, t1)`; raises for ends beyond those of the path, which would be extrapolated there."""
        first, last = jnp.asarray(control.t0), jnp.asarray(control.t1)
        t0 = first if self.t0 is None else self.t0
        t1 = last if self.t1 is None else self.t1
        if self.t0 is None and self.t1 is None:
            return z0, t0, t1
        room = ULPS * float(jnp.finfo(common_real_dtype(first, last)).eps)  # the path's times may be rounded
        low, high = jnp.minimum(t0, t1), jnp.maximum(t0, t1)
        inside = (first - room * abs(first) <= low) & (high <= last + room * abs(last))
        message = f"expected t0={self.t0} and t1={self.t1} within the times of the control"
        return shared.require(inside, message, z0), t0, t1

    def _solve(self, x: Any, ps: Any, st: Any) -> tuple[diffrax.Solution, Record]:
        z0, control = _check_input(x)
        z0, t0, t1 = self._ends(control, shared.check_start(z0, self.throw))
        field = _Field(self.field, self.channels, self.with_time)
        args = (ps, shared.model_state(self.field, st, "field"), control)
        matrices = field.check(z0, args)

        def terms(dtypes: Dtypes) -> diffrax.ODETerm:
            return diffrax.ODETerm(dtypes.field(field, z0, matrices))

        times = Times(t0, t1, self.dt0, self.saveat)
        solution = shared.integrate(self, terms, times, z0, args, matrices)
        x0 = field.inputs(jnp.asarray(t0, common_real_dtype(z0)), z0)
        st = shared.state_after(self.field, x0, ps, st, "field")
        evaluations = shared.evaluations(plain(self.solver) or shared.SOLVER, solution)
        return solution, st.replace(stats=shared.stats_of(solution, num_evaluations=evaluations))


@dataclass(frozen=True)
class _Field:
    """The vector field `field(z) X'(t)`. Equal models give equal fields, which diffrax traces once."""

    model: Layer
    channels: int
    with_time: bool

    def inputs(self, t: Any, z: Any) -> Any:
        """What the model is called with."""
        return (t, z) if self.with_time else z

    def __call__(self, t: Any, z: Any, args: Any) -> Any:
        matrices = self.flat(t, z, args).reshape(*z.shape, self.channels)
        dx = self.derivative(t, args).astype(matrices.dtype)
        dz = jnp.einsum("...ij,...j->...i", matrices, dx)
        return ComponentVector(dz, z.layout) if isinstance(z, ComponentVector) else dz

    def flat(self, t: Any, z: Any, args: Any) -> Any:
        ps, st, _ = args
        y, _ = self.model(self.inputs(t, z), ps, st)
        return y.data if isinstance(y, ComponentVector) else y

    def derivative(self, t: Any, args: Any) -> Any:
        *_, control = args
        return control.derivative(t)

    def check(self, z0: Any, args: Any) -> Any:
        """What the model gives; raises unless that and the path fit to `z0`. Nothing is computed."""
        t = jax.ShapeDtypeStruct((), common_real_dtype(z0))
        found = jax.eval_shape(self.derivative, t, args)
        shapes = [(self.channels,), (*z0.shape[:-1], self.channels)]
        if getattr(found, "shape", None) not in shapes:
            raise ValueError(
                f"expected a control with {self.channels} channels, of shape "
                f"{' or '.join(map(str, dict.fromkeys(shapes)))} at a time, found {describe(found)}"
            )
        found = jax.eval_shape(self.flat, t, z0, args)
        expected = (*z0.shape[:-1], z0.shape[-1] * self.channels)
        if getattr(found, "shape", None) != expected:
            raise ValueError(
                f"expected a field whose output has the shape (..., hidden * channels), here {expected}, "
                f"found {describe(found)}"
            )
        return found


def _check_input(x: Any) -> tuple[Any, diffrax.AbstractPath]:
    """The pair `(z0, control)`, or an error that says what is wrong with it."""
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
