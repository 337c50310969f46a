"""`NeuralODE`: a layer that solves `dy/dt = model(y)`."""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal

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
from .times import Times, check_saves_values, freeze_times, saves_final_only


class NeuralODE(Wrapper):
    """Solve `dy/dt = model(y)` from `y0` (Chen et al., 2018), by diffrax.

    The parameter vector is unpacked once, outside the solve. During the solve the model's state is
    frozen, so that the vector field is a function; after it, the state is that of one evaluation at
    the initial point.

    What is returned has the dtype that `y0` and the model's output promote to, and the model sees states of
    that dtype. The solver computes in it too, times and the `t` that the model sees included, but at least in
    float32; and in float64, if x64 is on, for times that float32 does not tell apart, and where the zero of
    an event is looked for. (Plain `diffeqsolve` takes JAX's default dtype for times, so that with x64 on it
    turns a float32 `y0` into float64.) Arrays of a controller have no say. For a half precision the
    controller's `rtol` is at least a quarter of its epsilon.

    A batch is solved as one system, with the same steps for all samples, or with
    `batching="each"` sample by sample: the last axis is the state, and each sample takes its own
    steps. The model then sees one sample, and one state for all of them: a dropout mask is shared, and
    the state after the solve is that of the first sample. On an accelerator the loop runs until the last
    sample is done; what is gained is that no sample's error hides in the others'.

    **Arguments:**

    - `model`: the layer that gives `dy/dt`, with the structure and shapes of `y`.
    - `t0`, `t1`: the start and the end of the solve; an infinite `t1` needs an event.
    - `saveat`: the times to save at, or a `diffrax.SaveAt`; `None` saves the final state. One with
        `dense=True` is for `solve`, whose solution can be evaluated at any time. A time that lies outside of
        an end by no more than rounding, 4 units of the end's last place in the dtype of the times, is taken
        for the end; all others are as they are.
    - `solver`: a diffrax solver; `None` is `Tsit5()`.
    - `stepsize_controller`: `None` is `PIDController(rtol=1e-4, atol=1e-6)`.
    - `adjoint`: how the solve is differentiated; `None` is `fl.AdaptiveCheckpointAdjoint()`, or diffrax's
        default with an event or without `max_steps`.
    - `event`: a `diffrax.Event` that ends the solve. The `args` of its function are `(ps, st)` of the model.
        What would have been saved after the end is infinite.
    - `dt0`: the first step, or `None` to let the controller choose it.
    - `max_steps`: the most steps the solver may take. With `None` an adaptive solve ends, without success,
        where its steps become too short to change the time.
    - `with_time`: whether the model is called with `(t, y)` instead of `y`.
    - `batching`: `"shared"` or `"each"`.
    - `throw`: whether a failed solve raises; its result code is in the state either way.

    **Inputs:** `y0`: an array, a `ComponentVector` or any pytree of arrays; with `batching="each"` of
    shapes `(*batch, n)`.

    **Returns:** `(ys, st)`: the final state, with the shape of `y0`; or the saved states with time
    leading, if `saveat` has times.

    **Parameters:** the model's own. **States:** `stats` of the last solve, integers: `num_steps,
    num_accepted_steps, num_rejected_steps`; `num_evaluations` of the model in the steps of an explicit
    Runge-Kutta method, else -1; `result`, the code of diffrax's `RESULTS`, 0 for success. Of a batch with
    `"each"` they are the largest counts and the worst code. And the model's states under `model`, if it
    has any.

    **Raises:** `ValueError` for options out of range (NaN among them), for times outside of `t0` to `t1` or
    that the solve's dtype does not tell apart, and for a model whose output is not like `y0`. With `throw`,
    `ValueError` for a `y0` that is not finite (under `jax.jit` the error of Equinox), and the error of
    diffrax for a solve that fails: by too many steps, or by numbers that are not finite.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import flatlayers as fl
    >>> decay = fl.NeuralODE(lambda y: -y, t1=1.0)
    >>> ps, st = fl.setup(jax.random.key(0), decay)
    >>> y1, st = decay(jnp.array([1.0]), ps, st)
    >>> print(f"{y1[0]:.3f}")
    0.368
    """

    model: Layer
    _: KW_ONLY
    t0: Finite = 0.0
    t1: shared.End = 1.0
    saveat: diffrax.SaveAt | Sequence[float] | np.ndarray | Hashable | None = None
    solver: diffrax.AbstractSolver | None = None
    stepsize_controller: diffrax.AbstractStepSizeController | None = None
    adjoint: diffrax.AbstractAdjoint | None = None
    event: diffrax.Event | Hashable | None = None
    dt0: Finite | None = None
    max_steps: Size | None = 4096
    with_time: Flag = False
    batching: Literal["shared", "each"] = "shared"
    throw: Flag = True

    def __post_init__(self) -> None:
        shared.freeze_options(self, "solver", "stepsize_controller", "adjoint", "event")
        shared.check_end(self)
        freeze_times(self)

    @property
    def field(self) -> "Field":
        """The vector field that the solver sees."""
        return Field(self.model, self.with_time)

    def states(self, key: jax.Array) -> dict[str, Any]:
        stats = shared.initial_stats("num_evaluations")
        return {"stats": stats} | shared.model_states(self.model, key)

    def forward(self, x: Any, ps: Any, st: Any) -> tuple[Any, Any]:
        check_saves_values(self.saveat)
        solution, st = self._solve(x, ps, st)
        ys = self.time_leading(solution.ys, x)
        return (jax.tree.map(lambda y: y[-1], ys) if saves_final_only(self.saveat) else ys), st

    def solve(self, y0: Any, ps: Any, st: Any) -> tuple[diffrax.Solution, Record]:
        """Solve, and return `(solution, st)` with diffrax's own solution object.

        With `SaveAt(dense=True)`, `solution.evaluate(t)` is the state at any time. With `batching="each"`
        every array in the solution has the leading axes of `y0`: `jax.vmap` over it takes one at a time.

        **Arguments:** as for a call of the layer.
        """
        return call(self, self._solve, y0, ps, st)

    def _solve(self, x: Any, ps: Any, st: Any) -> tuple[diffrax.Solution, Record]:
        y0 = shared.check_start(x, self.throw)
        solution = self.integrate(y0, ps, st, self.t0, self.t1, self.saveat)
        first = jax.tree.map(lambda y: y[(0,) * self._lead(y0)], y0)
        t0 = jnp.asarray(self.t0, common_real_dtype(y0))
        st = shared.state_after(self.model, self.field.inputs(t0, first), ps, st)
        evaluations = shared.evaluations(plain(self.solver) or shared.SOLVER, solution)
        return solution, st.replace(stats=shared.stats_of(solution, num_evaluations=evaluations))

    def integrate(self, y0: Any, ps: Any, st: Any, t0: Any, t1: Any, saveat: Any) -> diffrax.Solution:
        """The solve alone: from `t0` to `t1`, numbers or arrays, with the layer's other options."""
        y0 = jax.tree.map(jnp.asarray, y0)
        # Whatever varies is in `args`: adjoints do not see what a vector field closes over.
        args = (ps, shared.model_state(self.model, st))
        times = Times(t0, t1, self.dt0, saveat)

        def solve(y0: Any) -> diffrax.Solution:
            dy0 = shared.check_field(self.field, y0, args)

            def terms(dtypes: Dtypes) -> diffrax.ODETerm:
                return diffrax.ODETerm(dtypes.field(self.field, y0, dy0))

            return shared.integrate(self, terms, times, y0, args, dy0)

        for _ in range(self._lead(y0)):
            solve = jax.vmap(solve)
        return solve(y0)

    def time_leading(self, ys: Any, y0: Any) -> Any:
        """What `integrate` saved from `y0`, with time before the batch."""
        return jax.tree.map(lambda y: jnp.moveaxis(y, self._lead(y0), 0), ys)

    def _lead(self, y0: Any) -> int:
        """The number of leading axes that are solved sample by sample."""
        if self.batching == "shared":
            return 0
        batches = {jnp.shape(leaf)[:-1] for leaf in jax.tree.leaves(y0)}
        if len(batches) != 1 or not all(map(jnp.size, jax.tree.leaves(y0))):
            raise ValueError(
                'expected y0 of shape (*batch, n) with batching="each", the same batch for all of its arrays '
                f"and not empty, found {describe(y0)}"
            )
        return len(batches.pop())


@dataclass(frozen=True)
class Field:
    """The vector field of a model. Equal models give equal fields, which diffrax traces once."""

    model: Layer
    with_time: bool

    def inputs(self, t: Any, y: Any) -> Any:
        """What the model is called with."""
        return (t, y) if self.with_time else y

    def __call__(self, t: Any, y: Any, args: Any) -> Any:
        dy, _ = self.model(self.inputs(t, y), *args)
        if isinstance(y, ComponentVector) and isinstance(dy, jax.Array):
            return ComponentVector(dy, y.layout)
        return dy
