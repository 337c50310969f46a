"""What the layers with a solver inside share: defaults, the state rule, statistics, the solve itself."""

import functools
import math
from collections.abc import Callable
from typing import Annotated, Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from ..adjoints import _diffrax
from ..adjoints.checkpoint import AdaptiveCheckpointAdjoint
from ..core.fields import Check
from ..core.layer import Layer
from ..core.setup import count_states
from ..core.values import hashable, plain
from ..dtypes import common_real_dtype, is_complex, is_floating, promoted
from ..vectors.layout import check_same_layout
from ..vectors.names import describe
from ..vectors.record import Record
from ..vectors.vector import ComponentVector
from .controllers import fitted
from .solver_dtypes import Dtypes
from .times import Times


# Defaults


SOLVER = diffrax.Tsit5()
CONTROLLER = diffrax.PIDController(rtol=1e-4, atol=1e-6)


def default_adjoint(event: Any = None, max_steps: int | None = 4096) -> diffrax.AbstractAdjoint:
    """How a solve with these options is differentiated where a layer's `adjoint` is `None`.

    By `AdaptiveCheckpointAdjoint`, and as diffrax does by default where that does not apply.
    """
    if event is not None or max_steps is None or not _diffrax.is_tested():
        return diffrax.RecursiveCheckpointAdjoint()
    return AdaptiveCheckpointAdjoint()


# Options: fields of a layer, so hashable


def _end(value: Any) -> float:
    if isinstance(value, bool | np.bool_ | str | Tracer) or np.ndim(value):
        raise TypeError
    if math.isnan(value):
        raise ValueError
    return float(value)


# The end of a solve, which is infinite if an event ends it.
End = Annotated[float, Check("a finite number, or an infinite one with an event", _end)]


def check_end(layer: Any) -> None:
    """Raise for an infinite `t1` without an event."""
    if math.isinf(layer.t1) and layer.event is None:
        raise ValueError(
            f"{type(layer).__name__}.t1: expected a finite number without an event, found {layer.t1}"
        )


def freeze_options(layer: Layer, *names: str) -> None:
    """Bring fields that hold arrays into their final form, in `__post_init__`: values with a hash."""
    for name in names:
        object.__setattr__(layer, name, hashable(getattr(layer, name)))


def time_dtype(y0: Any) -> np.dtype:
    """The real dtype of a state. Diffrax's default would turn a float32 state into float64 with x64 on."""
    return common_real_dtype(y0)


# The state rule: frozen during the solve, then that of one evaluation at the initial point


def model_states(model: Layer, key: jax.Array, name: str = "model") -> dict[str, Record]:
    """What a layer's `states` has for a model inside: `{name: its states}`, or nothing if it has none."""
    states = Record(model.states(key))
    return {name: states} if count_states(states) else {}


def model_state(model: Layer, st: Record, name: str = "model") -> Record:
    """The state that the model has during the whole solve."""
    return st[name] if name in st else Record(model.states(jax.random.key(0)))


def state_after(model: Layer, x: Any, ps: Any, st: Record, name: str = "model") -> Record:
    """The state after the solve: `x` is the model's input at the initial point. No state, no evaluation."""
    return st.replace(**{name: model(x, ps, st[name])[1]}) if name in st else st


# Statistics


COUNTS = ("num_steps", "num_accepted_steps", "num_rejected_steps")


def initial_stats(*more: str) -> dict[str, Any]:
    """The statistics of no solve, as `states` has them under `stats`; `more`: the names of further counts."""
    return {name: jnp.zeros((), jnp.int32) for name in (*COUNTS, *more, "result")}


def stats_of(solution: diffrax.Solution, **more: Any) -> Record:
    """The statistics of a solve: diffrax's counts, and the code of its `RESULTS` as an integer.

    Of a batch of solves: the largest counts, and the worst code.
    """
    (code,) = jax.tree.leaves(solution.result)
    counts = {name: jnp.max(solution.stats[name], initial=0) for name in COUNTS}
    stats = counts | more | {"result": _worst(code)}
    return Record({name: jnp.asarray(value, jnp.int32) for name, value in stats.items()})


def _worst(code: jax.Array) -> jax.Array:
    """The largest code of a failure, else that of an event, else that of success, which is 0."""
    (event,) = jax.tree.leaves(diffrax.RESULTS.event_occurred)
    failures = jnp.max(jnp.where(code == event, 0, code), initial=0)
    return jnp.where(failures > 0, failures, jnp.max(code, initial=0))


def evaluations(solver: Any, solution: diffrax.Solution) -> Any:
    """How often the steps of an explicit Runge-Kutta method evaluated the field; -1 for any other method.

    Diffrax does not count them: these are the stages of all steps, less a first one that is the last of the
    step before. The few that choose a first step, or begin it again, are not in it.
    """
    if not isinstance(solver, diffrax.AbstractERK):
        return -1
    tableau: Any = solver.tableau
    reused = int(tableau.fsal)
    return jnp.max(solution.stats["num_steps"], initial=0) * (tableau.num_stages - reused) + reused


# Solving


def integrate(
    layer: Any,
    terms: Callable[[Dtypes], diffrax.AbstractTerm],
    times: Times,
    y0: Any,
    args: Any,
    outputs: Any,
    *,
    solver: diffrax.AbstractSolver = SOLVER,
    controller: diffrax.AbstractStepSizeController = CONTROLLER,
) -> diffrax.Solution:
    """Solve with the options of a layer, all in one dtype; what is saved has that of the state.

    **Arguments:**

    - `layer`: has the fields `solver`, `stepsize_controller`, `adjoint`, `max_steps`, `throw` and perhaps
        `event`.
    - `terms`: gives the terms for the dtypes of the solve.
    - `times`, `y0`, `args`: as given. Whatever varies is in `args`: adjoints do not see what a vector field
        closes over.
    - `outputs`: a pytree of what the models return from `y0`, of which the dtypes count.
    - `solver`, `controller`: where the fields are `None`.
    """
    controller = plain(layer.stepsize_controller) or controller
    state = common_real_dtype(y0, [leaf for leaf in jax.tree.leaves(outputs) if not leaf.weak_type])
    event = plain(getattr(layer, "event", None))
    # Diffrax looks for the zero of an event's condition in JAX's own dtype.
    least = state if getattr(event, "root_finder", None) is None else promoted(state, promoted())
    dtypes = Dtypes(state, times.dtype(least, isinstance(controller, diffrax.ConstantStepSize)))
    controller = fitted(controller, dtypes, layer.max_steps)
    adjoint = plain(layer.adjoint)
    if isinstance(adjoint, diffrax.BacksolveAdjoint):  # it solves for their cotangents as well
        dtypes, args = dtypes.with_arguments(args)
    t0, t1, dt0, saveat = times.arrays(dtypes.solver)
    solution = diffrax.diffeqsolve(
        terms(dtypes),
        dtypes.options(plain(layer.solver) or solver),
        t0=t0,
        t1=t1,
        dt0=dt0,
        y0=dtypes.inside(y0),
        args=args,
        saveat=saveat,
        stepsize_controller=controller,
        adjoint=adjoint or default_adjoint(event, layer.max_steps),
        event=_in_dtype(event, dtypes),
        max_steps=layer.max_steps,
        # The default ones have no solve on the way back that could fail: `check_solution` raises for all.
        throw=layer.throw and adjoint is not None,
    )
    if solution.ys is not None:
        solution = eqx.tree_at(lambda s: s.ys, solution, dtypes.outside(solution.ys))
    return check_solution(solution, y0, layer.throw)


class _Condition(eqx.Module):
    """The condition of an event, its value in the dtype of the solve."""

    function: Callable[..., Any]
    dtype: np.dtype = eqx.field(static=True)

    def __call__(self, *args: Any, **kwargs: Any) -> jax.Array:
        value = jnp.asarray(self.function(*args, **kwargs))
        return value.astype(self.dtype) if is_floating(value) else value


def _in_dtype(event: diffrax.Event | None, dtypes: Dtypes) -> diffrax.Event | None:
    if event is None:
        return None
    found: diffrax.Event = dtypes.options(event)
    conditions = jax.tree.map(lambda f: _Condition(f, dtypes.solver), found.cond_fn, is_leaf=callable)
    return eqx.tree_at(lambda event: event.cond_fn, found, conditions, is_leaf=callable)


# Failures


def require(ok: Any, message: str, token: Any) -> Any:
    """`token`, a pytree of arrays; raises unless `ok`: `ValueError` if it is known, else Equinox's error."""
    if isinstance(ok, Tracer):
        return eqx.error_if(token, ~ok, message)
    if not ok:
        raise ValueError(message)
    return token


def check_start(y0: Any, throw: bool) -> Any:
    """`y0` as arrays. With `throw`, numbers that are not finite raise."""
    y0 = jax.tree.map(jnp.asarray, y0)
    if not throw or not jax.tree.leaves(y0):
        return y0
    return require(all_finite(y0), "expected an initial state of finite numbers, found NaN or infinity", y0)


def check_solution(solution: diffrax.Solution, y0: Any, throw: bool) -> diffrax.Solution:
    """The solution, with the code `nonfinite` if it started from, or saved, numbers that are not finite.

    Steps of any kind can end there, adaptive ones by an overflow. A code of diffrax's own stays, unless the
    start was not finite. With `throw`, all codes but success and that of an event raise.
    """
    fine = _saved_finite(solution) | ~diffrax.is_okay(solution.result)
    fine = fine if throw else fine & all_finite(y0)  # `check_start` has raised
    nonfinite: Any = diffrax.RESULTS.nonfinite
    result = diffrax.RESULTS.where(fine, solution.result, nonfinite)
    solution = eqx.tree_at(lambda s: s.result, solution, result)
    return result.error_if(solution, ~diffrax.is_okay(result)) if throw else solution


def _saved_finite(solution: diffrax.Solution) -> Any:
    """Whether all that was saved is finite; after the end, times and values are infinite."""
    if solution.ys is None:
        return all_finite(solution.evaluate(solution.t1)) if solution.interpolation is not None else True

    def until_end(t: Any, y: Any) -> Any:
        return jnp.where(jnp.isfinite(jnp.expand_dims(t, range(1, y.ndim))), y, jnp.zeros_like(y))

    values = jax.tree.map(
        lambda t, ys: jax.tree.map(functools.partial(until_end, t), ys), solution.ts, solution.ys
    )
    return all_finite(values)


def all_finite(tree: Any) -> jax.Array:
    """Whether all floating numbers of a pytree are finite."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return functools.reduce(jnp.logical_and, [jnp.isfinite(leaf).all() for leaf in leaves], jnp.array(True))


# Calls


def check_field(field: Callable[..., Any], y0: Any, args: Any) -> Any:
    """What `field(t, y0, args)` is like; raises unless that is `y0`. Nothing is computed.

    The time is of the state's dtype here, so that it does not count for the dtype of the solve.
    """
    dy = jax.eval_shape(field, jax.ShapeDtypeStruct((), common_real_dtype(y0)), y0, args)
    if isinstance(y0, ComponentVector) and isinstance(dy, ComponentVector):
        check_same_layout(y0.layout, dy.layout)
    same = jax.tree.structure(dy) == jax.tree.structure(y0)
    if not same or any(map(_differ, jax.tree.leaves(dy), jax.tree.leaves(y0))):
        raise ValueError(f"expected a model whose output is like y0, {describe(y0)}, found {describe(dy)}")
    return dy


def _differ(dy: Any, y0: Any) -> bool:
    return dy.shape != y0.shape or (is_complex(dy) and not is_complex(y0))
