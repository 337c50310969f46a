"""`SolverLayer`: the base of the layers that solve a differential equation by diffrax."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ..adjoints.checkpoint import AdaptiveCheckpointAdjoint
from ..core.fields import Finite, Flag, Positive, Size
from ..core.layer import Layer, as_layer, call
from ..core.values import plain
from ..dtypes import common_real_dtype, is_complex, is_floating, promoted
from ..types import Args, Array, Input, Key, Output, Params, PyTree, State, Time, Y
from ..vectors.layout import check_same_layout
from ..vectors.names import describe
from ..vectors.record import Record
from ..vectors.vector import ComponentVector
from . import given_times, model_states
from .controllers import fitted
from .failures import advice, check_solution, check_start
from .given_times import SolveTimes
from .options import (
    Adjoint,
    Controller,
    End,
    Event,
    SaveAt,
    Solver,
    Throwing,
    check_divides,
    default_adjoint,
    in_its_modes,
    with_tolerances,
)
from .solver_dtypes import Dtypes
from .start import Start
from .statistics import initial_statistics, statistics_of
from .time_gradients import MovingTimes
from .times import Times, canonical, check_first_step, check_saves_values, saves_final_only


class SolverLayer(Layer):
    """The base of layers that solve a differential equation by diffrax: `NeuralODE`, `NeuralSDE` and others.

    It has the options of a solve, its statistics, its errors and the rule for states, `forward` and `solve`.
    A new layer is a class with this base and, for the models inside, `fl.Wrapper` (one model, whose
    parameters are the layer's) or `fl.Container` (parameters and states by name). It defines `field`, and may
    define others of these:

    - `field(t, y, *data, ps, st)` → `(dy/dt, st)`: the vector field. `ps` are the layer's parameters. `st`
        are the states of the models inside, as `fl.Wrapper` and `fl.Container` have them.
    - `inputs(x, ps, st)` → `(fl.Start, st)`: the state at the start, and data for the field, made of what the
        layer is called with. By default `x` is the state at the start.
    - `terms(y0, args, dtypes)`: the terms for diffrax. By default an `ODETerm` of `field`. A vector field
        `f(t, y, args)` of one's own goes through `dtypes.field(f)`; `args` are `(ps, st, *data)`.
    - `check(y0, args)`: raises unless the models fit to the state, and returns the shapes and dtypes of what
        they give. By default `field` gives what is like `y0`.
    - `outputs(solution)`: what a call returns. By default the final state, or the saved ones.
    - `within(start)`: returns the start; raises unless the equation reaches to the times of an input with
        `fl.SolveTimes`. By default it does.
    - `state_after(t, y, *data, ps, st)`: the states of the models after the solve. By default those that
        `field` returns.

    Each field of the class that is annotated as `fl.Layer` may be given a function. An option that makes no
    sense for a layer is taken away by an annotation such as `event: ClassVar[None] = None`.

    During the solve the states of the models are frozen, so that the vector field is a function; after it,
    they are those of one evaluation at the initial point. The parameter vector is unpacked once, outside
    the solve. `forward` and `solve` need not be written again.

    **Arguments:** all by keyword.

    - `t0`, `t1`: the start and the end of the solve; an infinite `t1` needs an event.
    - `saveat`: the times to save at, or a `diffrax.SaveAt`; `None` saves the final state. One with
        `dense=True` is for `solve`, whose solution can be evaluated at any time. A time that lies outside of
        an end by no more than rounding, 4 units of the end's last place in the dtype of the times, is taken
        for the end; all others are as they are.
    - `solver`: a diffrax solver.
    - `stepsize_controller`: a step size controller of diffrax.
    - `rtol`, `atol`: short for `stepsize_controller=diffrax.PIDController(rtol=rtol, atol=atol)`, which is
        what the layer then has; of one that is not given it is the default, 1e-4 or 1e-6.
    - `adjoint`: how the solve is differentiated; `None` is `fl.AdaptiveCheckpointAdjoint()`, or diffrax's
        default with an event or without `max_steps`.
    - `event`: a `diffrax.Event` that ends the solve. The `args` of its function are `(ps, st, *data)`, those
        of `field`. Times and states to save after the end are infinite.
    - `dt0`: the first step, or `None` to let the controller choose it.
    - `max_steps`: the most steps the solver may take. With `None` an adaptive solve ends, without success,
        where its steps become too short to change the time.
    - `with_time`: whether the models are called with `(t, y)` instead of `y`; `self.at(t, y)` is the one or
        the other.
    - `batching`: `"shared"` solves a batch as one system, with the same steps for all samples. With `"each"`
        it is solved sample by sample: the last axis is the state, and each sample takes its own steps. The
        models then see one sample, and one state for all of them: a dropout mask is shared, and the state
        after the solve is that of the first sample.
    - `throw`: whether a failed solve raises; its result code is in the state either way.

    **States:** `stats` of the last solve, integers: `num_steps, num_accepted_steps, num_rejected_steps`;
    `num_evaluations` of the field in the steps of an explicit Runge-Kutta method, else -1; `result`, the code
    of diffrax's `RESULTS`, 0 for success. With `batching="each"` they are the largest counts and the worst
    code. And the states of each model under the name of its field, if it has any.

    **Raises:** `TypeError` for an option of another kind; `ValueError` for options out of range (NaN among
    them), for times outside of `t0` to `t1` or that the solve's dtype does not tell apart, and for a field
    that is not like the state. With `throw`, `ValueError` for a start that is not finite (under `jax.jit` the
    error of Equinox), and the error of diffrax for a solve that fails: by too many steps, or by numbers that
    are not finite.

    >>> import diffrax
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import flatlayers as fl
    >>> class ReactionDiffusion(fl.SolverLayer, fl.Container):
    ...     model: fl.Layer  # the reaction, from one number to one
    ...
    ...     def parameters(self):
    ...         return {**super().parameters(), "rate": fl.Param((), fl.initializers.ones)}
    ...
    ...     def field(self, t, y, ps, st):  # on a ring of points: y (..., points)
    ...         reaction, model = self.model(y[..., None], ps.model, st.model)
    ...         neighbours = jnp.roll(y, 1, -1) + jnp.roll(y, -1, -1)
    ...         return ps.rate * (neighbours - 2 * y) + reaction[..., 0], st.replace(model=model)
    >>> layer = ReactionDiffusion(lambda y: y * (1 - y), t1=20.0, solver=diffrax.Heun())
    >>> ps, st = fl.setup(jax.random.key(0), layer)
    >>> y, st = layer(jnp.zeros((5, 32)).at[:, 0].set(0.1), ps, st)
    >>> print(f"{y.mean():.2f}", y.shape, 0 < st.stats.num_accepted_steps <= st.stats.num_steps)
    1.00 (5, 32) True
    """

    _: KW_ONLY
    t0: Finite = 0.0
    t1: End = 1.0
    saveat: SaveAt | None = None
    solver: Solver = diffrax.Tsit5()
    stepsize_controller: Controller = diffrax.PIDController(rtol=1e-4, atol=1e-6)
    rtol: Positive | None = None
    atol: Positive | None = None
    adjoint: Adjoint | None = None
    event: Event | None = None
    dt0: Finite | None = None
    max_steps: Size | None = 4096
    with_time: Flag = False
    batching: Literal["shared", "each"] = "shared"
    throw: Flag = True

    def check_fields(self) -> None:
        for name in self._models():
            setattr(self, name, as_layer(getattr(self, name)))
        where = type(self).__name__
        if self.t1 is not None and math.isinf(self.t1) and self.event is None:
            raise ValueError(f"{where}.t1: expected a finite number without an event, found {self.t1}")
        check_first_step(f"{where}.dt0", self.t0, self.t1, self.dt0)
        if self.saveat is not None:
            self.saveat = canonical(self.saveat, self.t0, self.t1)
        if not (self.rtol is None and self.atol is None):
            given, default = self.stepsize_controller, type(self).stepsize_controller
            self.stepsize_controller = with_tolerances(where, given, default, self.rtol, self.atol)
            self.rtol = self.atol = None
        super().check_fields()

    # What a layer may define; a signature `(*args: Any, **kwargs: Any)` lets it name the arguments

    def field(self, t: Time, y: Y, *args: Any, **kwargs: Any) -> tuple[Y, State]:
        """Return `(dy/dt, st)`, called with `(t, y, *data, ps, st)`."""
        raise TypeError(f"{type(self).__name__} does not define `field(self, t, y, ps, st)`")

    def inputs(self, x: Input, ps: Params, st: State) -> tuple[Start, State]:
        """Return the start of the solve, made of what the layer is called with, and the state."""
        return Start(x), st

    def check(self, y0: Y, args: Args) -> PyTree:
        """Return the shapes and dtypes of what the models give at `y0`; raise unless they fit to it."""
        return check_field(VectorField(self), y0, args)

    def terms(self, y0: Y, args: Args, dtypes: Dtypes) -> diffrax.AbstractTerm:
        """Return the terms of the equation for diffrax."""
        return diffrax.ODETerm(dtypes.field(VectorField(self)))

    def outputs(self, solution: diffrax.Solution) -> Output:
        """Return what a call of the layer does: the final state, or the saved ones with time leading."""
        ys = time_leading(solution)
        return jax.tree.map(lambda y: y[-1], ys) if saves_final_only(self.saveat) else ys

    def state_after(self, t: Time, y: Y, *args: Any, **kwargs: Any) -> State:
        """Return the models' states after an evaluation, called with `(t, y, *data, ps, st)`."""
        return self.field(t, y, *args, **kwargs)[1]

    # Calls

    def at(self, t: Time, y: Y) -> Input:
        """Return the input of a model: `(t, y)` or, without `with_time`, `y`."""
        return (t, y) if self.with_time else y

    def states(self, key: Key) -> dict[str, State]:
        own = super().states(key)
        parts = own if self._only is None else {self._only: own}
        return {"stats": Record(initial_statistics()), **model_states.with_any(Record(parts))}

    def forward(self, x: Input, ps: Params, st: State) -> tuple[Output, State]:
        saving = given_times.saving(self, x)
        check_saves_values(saving.saveat)
        solution, st = self._solve(x, ps, st)
        return saving.outputs(solution), st

    def solve(self, x: Input, ps: Params, st: State) -> tuple[diffrax.Solution, State]:
        """Solve, and return `(solution, st)` with diffrax's own solution object.

        With `SaveAt(dense=True)`, `solution.evaluate(t)` is the state at any time. With `batching="each"`
        every array in the solution has the leading axes of the batch: `jax.vmap` over it takes one at a time.

        **Arguments:** as for a call of the layer.
        """
        return call(self, self._solve, x, ps, st)

    def _solve(self, x: Input, ps: Params, st: State) -> tuple[diffrax.Solution, State]:
        x, given = given_times.split(x)
        start, st = self.inputs(x, ps, st)
        return self.run(start if given is None else self._at_times(start, given), ps, st)

    def _at_times(self, start: Start, given: SolveTimes) -> Start:
        """Return the start with the times that are given."""
        if "saveat" not in [field.name for field in dataclasses.fields(self)]:  # pyright: ignore
            raise TypeError(f"{type(self).__name__} has no save times, found {describe(given)}")
        batch = jnp.shape(jax.tree.leaves(start.y0)[0])[: self._batch_axes(start)]
        constant = isinstance(plain(self.stepsize_controller), diffrax.ConstantStepSize)
        base, state = start.times or self.times, common_real_dtype(start.y0)
        event = plain(self.event) is not None
        times = given_times.resolved(given, base, batch, state, constant=constant, event=event)
        return self.within(dataclasses.replace(start, times=times))

    def within(self, start: Start) -> Start:
        """Return the start. **Raises:** if the equation does not reach to times that are given."""
        return start

    def run(self, start: Start, ps: Params, st: State) -> tuple[diffrax.Solution, State]:
        """Solve from a start: `(solution, st)`, by parameters that are unpacked."""
        start = dataclasses.replace(start, y0=check_start(start.y0, self.throw))
        solution = self._integrate(start, ps, st)
        st = self._after(start, ps, st)
        counts = statistics_of(plain(self.solver), solution)
        return solution, st.replace(stats=st.stats.replace(**counts))

    def integrate(
        self, x: Input, t0: Time, t1: Time, saveat: SaveAt | None, ps: Params, st: State
    ) -> diffrax.Solution:
        """Solve from `t0` to `t1` with the layer's other options, and return diffrax's solution alone.

        **Arguments:**

        - `x`: as for a call of the layer.
        - `t0`, `t1`: numbers or arrays, which may differ from sample to sample under `jax.vmap`. Gradients by
            these and by the times of `saveat` are as of `SolveTimes`.
        - `saveat`: as the field.
        - `ps`, `st`: parameters, which are best given unpacked, and the state of the layer.
        """
        start, st = self.inputs(x, ps, st)
        return self._integrate(dataclasses.replace(start, times=Times(t0, t1, self.dt0, saveat)), ps, st)

    def _integrate(self, start: Start, ps: Params, st: State) -> diffrax.Solution:
        y0 = jax.tree.map(jnp.asarray, start.y0)
        args = (ps, self._frozen(st), *start.data)
        times = start.times or self.times

        axes = self._batch_axes(start)
        samples = math.prod(jax.tree.leaves(y0)[0].shape[:axes]) if axes else 1

        def solve(y0: Y, each: tuple[PyTree, ...], own: tuple[Array, ...]) -> diffrax.Solution:
            return diffeqsolve(self, times.of_sample(own), y0, (*args, *each), samples)

        for _ in range(axes):
            solve = jax.vmap(solve)
        return solve(y0, start.each, times.own())

    @property
    def times(self) -> Times:
        """The times of the fields."""
        return Times(self.t0, self.t1, self.dt0, self.saveat)

    def _batch_axes(self, start: Start) -> int:
        """Return the number of leading axes that are solved sample by sample."""
        if self.batching == "shared":
            return 0
        return batch_axes(start.y0) if start.batch_axes is None else start.batch_axes

    # States

    @classmethod
    def _models(cls) -> list[str]:
        """Return the names of the fields that are annotated as layers."""
        fields = dataclasses.fields(cls)  # pyright: ignore[reportArgumentType]
        return [field.name for field in fields if field.type in (Layer, "Layer", "fl.Layer")]

    @property
    def _only(self) -> str | None:
        """The name of the model whose parameters are the layer's; `None` if they are by name."""
        return self._models()[0] if "" in self.children() else None

    def _named_models(self) -> model_states.Models:
        """Return the models inside by their names in the state."""
        return {name or self._models()[0]: model for name, model in self.children().items()}

    def _frozen(self, st: State) -> State:
        """Return the models' states during the whole solve, as `field` takes them."""
        states = model_states.frozen(self._named_models(), st)
        return states if self._only is None else states[self._only]

    def _after(self, start: Start, ps: Params, st: State) -> State:
        """Return the state after the solve. Without states of models there is no evaluation."""
        if not any(name in st for name in self._named_models()):
            return st
        times, first = start.times or self.times, (0,) * self._batch_axes(start)
        y0, each, own = jax.tree.map(lambda leaf: leaf[first], (start.y0, start.each, times.own()))
        t = jnp.asarray(times.of_sample(own).t0, common_real_dtype(start.y0))
        new = self.state_after(t, y0, *start.data, *each, ps, self._frozen(st))
        return model_states.replaced(st, new if self._only is None else Record({self._only: new}))


@dataclass(frozen=True)
class VectorField:
    """The vector field of a layer, as diffrax calls it. Equal layers give equal fields, traced once."""

    layer: SolverLayer

    def __call__(self, t: Time, y: Y, args: Args) -> Y:
        ps, st, *data = args
        dy, _ = self.layer.field(t, y, *data, ps, st)
        return like_state(dy, y)


def like_state(dy: Y, y: Y) -> Y:
    """Return a derivative as a `ComponentVector` if the state is one."""
    return (
        ComponentVector(dy, y.layout) if isinstance(y, ComponentVector) and isinstance(dy, jax.Array) else dy
    )


def time_leading(solution: diffrax.Solution) -> PyTree:
    """Return the saved states, with time before the axes of a batch that was solved sample by sample."""
    axes = jnp.ndim(solution.stats["num_steps"])
    return jax.tree.map(lambda y: jnp.moveaxis(y, axes, 0), solution.ys)


def batch_axes(y0: Y) -> int:
    """Return the number of axes before the last one. **Raises:** unless all arrays have them in common."""
    batches = {jnp.shape(leaf)[:-1] for leaf in jax.tree.leaves(y0)}
    if len(batches) != 1 or not all(map(jnp.size, jax.tree.leaves(y0))):
        raise ValueError(
            'expected y0 of shape (*batch, n) with batching="each", the same batch for all of its arrays '
            f"and not empty, found {describe(y0)}"
        )
    return len(batches.pop())


# The solve itself


def diffeqsolve(layer: SolverLayer, times: Times, y0: Y, args: Args, samples: int = 1) -> diffrax.Solution:
    """Solve with the options of a layer, all in one dtype; what is saved has that of the state.

    `samples`: how many such solves there are side by side, under `jax.vmap`.
    """
    outputs = layer.check(y0, args)
    controller, event = plain(layer.stepsize_controller), plain(layer.event)
    state = common_real_dtype(y0, [leaf for leaf in jax.tree.leaves(outputs) if not leaf.weak_type])
    # Diffrax looks for the zero of an event's condition in JAX's own dtype.
    least = state if getattr(event, "root_finder", None) is None else promoted(state, promoted())
    solver_dtype = times.dtype(least, isinstance(controller, diffrax.ConstantStepSize))
    dtypes = Dtypes.of(y0, outputs, state, solver_dtype)
    adjoint = plain(layer.adjoint) or default_adjoint(event, layer.max_steps)
    check_divides(adjoint, layer.adjoint is not None)
    solver = dtypes.options(plain(layer.solver))
    y0, args = in_its_modes((y0, args), type(layer).__name__, adjoint, solver)
    if isinstance(adjoint, diffrax.BacksolveAdjoint):  # it solves for the cotangents of `args` as well
        dtypes, args = dtypes.with_arguments(args)
    t0, t1, dt0, saveat = times.arrays(dtypes.solver)
    terms, start = layer.terms(y0, args, dtypes), dtypes.inside(y0)
    moving = MovingTimes.of(t0, t1, saveat, terms, args, event)
    if moving is not None:
        start, t0, t1, saveat = moving.constant(start)
    solution = diffrax.diffeqsolve(
        terms,
        solver,
        t0=t0,
        t1=t1,
        dt0=dt0,
        y0=start,
        args=args,
        saveat=saveat,
        stepsize_controller=fitted(controller, dtypes, layer.max_steps),
        adjoint=_of_one_solve(adjoint, layer.throw, samples),
        event=_in_dtype(event, dtypes),
        max_steps=layer.max_steps,
        throw=False,  # `check_solution` raises
    )
    if moving is not None:
        solution = moving.of_solution(solution)
    if solution.ys is not None:
        solution = eqx.tree_at(lambda s: s.ys, solution, dtypes.outside(solution.ys))
    return check_solution(solution, y0, advice(layer, state) if layer.throw else None)


def _of_one_solve(adjoint: diffrax.AbstractAdjoint, throw: bool, samples: int) -> diffrax.AbstractAdjoint:
    """Return an adjoint with the bytes of one of `samples` solves, or one that raises if it is to."""
    if isinstance(adjoint, AdaptiveCheckpointAdjoint):
        return adjoint.shared_by(samples)
    return Throwing(adjoint) if throw else adjoint


class _Condition(eqx.Module):
    """The condition of an event, its value in the dtype of the solve."""

    function: Callable[..., Array]
    dtype: np.dtype = eqx.field(static=True)

    def __call__(self, *args: Any, **kwargs: Any) -> Array:
        value = jnp.asarray(self.function(*args, **kwargs))
        return value.astype(self.dtype) if is_floating(value) else value


def _in_dtype(event: diffrax.Event | None, dtypes: Dtypes) -> diffrax.Event | None:
    if event is None:
        return None
    found = dtypes.options(event)
    conditions = jax.tree.map(lambda f: _Condition(f, dtypes.solver), found.cond_fn, is_leaf=callable)
    return eqx.tree_at(lambda event: event.cond_fn, found, conditions, is_leaf=callable)


def check_field(field: Callable[[Time, Y, Args], Y], y0: Y, args: Args) -> PyTree:
    """Return the shapes and dtypes of `field(t, y0, args)`; raise unless they are those of `y0`.

    Nothing is computed. The time is of the state's dtype here, so that it does not count for the dtype of
    the solve.
    """
    dy = jax.eval_shape(field, jax.ShapeDtypeStruct((), common_real_dtype(y0)), y0, args)
    if isinstance(y0, ComponentVector) and isinstance(dy, ComponentVector):
        check_same_layout(y0.layout, dy.layout)
    same = jax.tree.structure(dy) == jax.tree.structure(y0)
    if not same or any(map(_differ, jax.tree.leaves(dy), jax.tree.leaves(y0))):
        raise ValueError(f"expected a model whose output is like y0, {describe(y0)}, found {describe(dy)}")
    return dy


def _differ(dy: Array, y0: Array) -> bool:
    return dy.shape != y0.shape or (is_complex(dy) and not is_complex(y0))
