"""`SteadyState`: a fixed point as the steady state of a differential equation."""

from collections.abc import Callable
from dataclasses import KW_ONLY

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import optimistix as optx

from ..core.fields import Function, NonNegative, Positive, Size, check_module_fields
from ..dtypes import at_least_float32, common_real_dtype
from ..equations.solver_dtypes import Dtypes
from ..types import Args, Array, PyTree, Time, Y
from .accelerated import Fn, Options, Tags, as_python


class _Progress(eqx.Module):
    """The state of a solver whose one step is the whole solve."""

    num_steps: Array
    result: optx.RESULTS
    done: Array


class SteadyState(optx.AbstractFixedPointSolver):
    """Solve `y = fn(y)` by following `dy/dt = fn(y) - y` until nothing changes, by diffrax.

    Plain iteration jumps; the flow goes in steps as small as they have to be: it settles where the real
    parts of the eigenvalues of `fn`'s Jacobian are below 1, such as at -5. It is a solver of
    `optimistix.fixed_point`, one step of which is the whole solve; `num_steps` are those of diffrax.

    **Arguments:**

    - `rtol`, `atol`: the tolerances of the default event and step size controller.
    - `norm`: the norm of the default event.
    - `solver`: a diffrax solver.
    - `event`: the condition that ends the solve, such as `diffrax.steady_state_event(...)`; `None` is the one
        with `rtol`, `atol` and `norm`: `norm(fn(y) - y) < atol + rtol norm(y)`.
    - `stepsize_controller`: `None` is `PIDController(rtol / 10, atol / 10, dtmax=1)`. Its tolerances have to
        be below those of the event: the state moves about as much as they allow.
    - `dt0`: the first step; `None` lets the controller choose it.
    - `max_steps`: the most steps of the differential equation. (Those of optimistix count the solve as one.)

    A half precision is solved in float32, by an `fn` that sees its own; tolerances below its rounding are not
    reached.

    **Raises:** `ValueError` for an option out of range or not finite, `TypeError` for one of another kind. A
    solve raises nothing: the result is `nonlinear_max_steps_reached` if the event did not come in time,
    `nonfinite` or `nonlinear_divergence` for other failures.

    >>> import diffrax
    >>> import jax.numpy as jnp
    >>> import optimistix as optx
    >>> import flatlayers as fl
    >>> solver = fl.SteadyState(rtol=1e-5, atol=1e-5, solver=diffrax.Heun())
    >>> solution = optx.fixed_point(lambda y, _: 1 - 5 * y, solver, jnp.ones(1))
    >>> print(f"{solution.value[0]:.4f}")
    0.1667
    """

    rtol: NonNegative = eqx.field(default=1e-4, converter=as_python)
    atol: NonNegative = eqx.field(default=1e-4, converter=as_python)
    norm: Function = optx.max_norm
    _: KW_ONLY
    solver: diffrax.AbstractSolver = diffrax.Tsit5()
    event: Callable[..., Array] | diffrax.Event | None = None
    stepsize_controller: diffrax.AbstractStepSizeController | None = None
    dt0: Positive | None = eqx.field(default=None, converter=as_python)
    max_steps: Size = eqx.field(default=4096, converter=as_python)

    def __check_init__(self) -> None:
        check_module_fields(self)
        kinds = {
            "solver": diffrax.AbstractSolver,
            "stepsize_controller": diffrax.AbstractStepSizeController,
            "event": diffrax.Event | Callable,
        }
        for name, kind in kinds.items():
            value = getattr(self, name)
            if not (isinstance(value, kind) or (value is None and name != "solver")):
                words = "a function or an event" if name == "event" else f"an {kind.__name__}"
                words += " of diffrax" if name == "solver" else " of diffrax or None"
                raise TypeError(f"SteadyState.{name}: expected {words}, found {value!r}")

    def init(
        self, fn: Fn, y: Y, args: Args, options: Options, f_struct: PyTree, aux_struct: PyTree, tags: Tags
    ) -> _Progress:
        return _Progress(jnp.array(0), optx.RESULTS.successful, jnp.array(False))

    def step(
        self, fn: Fn, y: Y, args: Args, options: Options, state: _Progress, tags: Tags
    ) -> tuple[Y, _Progress, PyTree]:
        def field(t: Time, y: Y, args: Args) -> Y:
            return jax.tree.map(jnp.subtract, fn(y, args)[0], y)

        dtype = common_real_dtype(y)
        dtypes = Dtypes.of(y, (), dtype, jnp.dtype(at_least_float32(dtype)))
        event = self.event or diffrax.steady_state_event(self.rtol, self.atol, self.norm)
        # Where plain iteration converges, so do steps of 1.
        controller = diffrax.PIDController(self.rtol / 10, self.atol / 10, dtmax=1.0)
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(dtypes.field(field)),
            self.solver,
            t0=jnp.zeros((), dtypes.solver),
            t1=jnp.full((), jnp.inf, dtypes.solver),
            dt0=None if self.dt0 is None else jnp.asarray(self.dt0, dtypes.solver),
            y0=dtypes.inside(y),
            args=args,
            stepsize_controller=self.stepsize_controller or controller,
            event=event if isinstance(event, diffrax.Event) else diffrax.Event(event),
            max_steps=self.max_steps,
            throw=False,
        )
        y = jax.tree.map(lambda ys, y: ys[-1].astype(y.dtype), solution.ys, y)
        return y, _Progress(solution.stats["num_steps"], _result(solution), jnp.array(True)), fn(y, args)[1]

    def terminate(
        self, fn: Fn, y: Y, args: Args, options: Options, state: _Progress, tags: Tags
    ) -> tuple[Array, optx.RESULTS]:
        return state.done, state.result

    def postprocess(
        self,
        fn: Fn,
        y: Y,
        aux: PyTree,
        args: Args,
        options: Options,
        state: _Progress,
        tags: Tags,
        result: optx.RESULTS,
    ) -> tuple[Y, PyTree, dict[str, Array]]:
        return y, aux, {"num_steps": state.num_steps}


def _result(solution: diffrax.Solution) -> optx.RESULTS:
    """Return the code of optimistix for the end of a solve: only the event is a success."""
    kinds = optx.RESULTS
    slow = solution.result == diffrax.RESULTS.max_steps_reached
    other = kinds.where(slow, kinds.nonlinear_max_steps_reached, kinds.nonlinear_divergence)
    return kinds.where(solution.result == diffrax.RESULTS.event_occurred, kinds.successful, other)
