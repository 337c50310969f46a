"""What the layers with a solver inside share: options, times, the state rule, statistics, defaults."""

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from ..core.calling import apply, display_name
from ..core.hashable import hashable, plain
from ..core.layer import Layer, Wrapper
from ..core.layout import check_same_layout
from ..core.names import describe
from ..core.record import Record
from ..core.setup import count_states
from ..core.vector import ComponentVector
from . import _diffrax
from .adjoints import AdaptiveCheckpointAdjoint


# Defaults


SOLVER = diffrax.Tsit5()
CONTROLLER = diffrax.PIDController(rtol=1e-4, atol=1e-6)
FINAL = diffrax.SaveAt(t1=True)


def default_adjoint(event: Any = None, max_steps: int | None = 4096) -> diffrax.AbstractAdjoint:
    """How a solve with these options is differentiated where a layer's `adjoint` is `None`.

    By `AdaptiveCheckpointAdjoint`, and as diffrax does by default where that does not apply.
    """
    if event is not None or max_steps is None or not _diffrax.is_tested():
        return diffrax.RecursiveCheckpointAdjoint()
    return AdaptiveCheckpointAdjoint()


# Options: fields of a layer, so hashable


def freeze_options(layer: Layer, numbers: Iterable[str], options: Iterable[str]) -> None:
    """Bring fields into their final form, in `__post_init__`: floats, and values with a hash."""
    for name in numbers:
        value = getattr(layer, name)
        object.__setattr__(layer, name, None if value is None else float(value))
    for name in options:
        object.__setattr__(layer, name, hashable(getattr(layer, name)))


def freeze_saveat(layer: Any) -> None:
    """The same for `saveat`: times as a tuple of floats from `t0` to `t1`; anything else hashable.

    An end that is `None` comes with the input, and the solver checks the times.
    """
    saveat = _canonical(layer.saveat)
    if isinstance(saveat, tuple) and None not in (layer.t0, layer.t1):
        saveat = tuple(_time_between(t, layer.t0, layer.t1) for t in saveat)
    object.__setattr__(layer, "saveat", saveat)


def _canonical(saveat: Any) -> Any:
    """Times as a tuple of floats; a `SaveAt` with times alone as well, so that equal nodes are equal."""
    if saveat is None:
        return None
    if not isinstance(saveat, diffrax.SaveAt):
        return tuple(np.asarray(saveat, float).ravel().tolist())
    times = getattr(saveat.subs, "ts", None)
    if times is not None and bool(eqx.tree_equal(saveat, diffrax.SaveAt(ts=times))):
        return tuple(np.asarray(times, float).tolist())
    return hashable(saveat)


def _time_between(t: float, t0: float, t1: float) -> float:
    """Times come from float32 arrays: one within rounding of an end is that end."""
    close = [end for end in (t0, t1) if math.isclose(t, end, rel_tol=1e-6, abs_tol=1e-9)]
    if not close and not min(t0, t1) <= t <= max(t0, t1):
        raise ValueError(f"expected times in `saveat` from t0={t0} to t1={t1}, found {t}")
    return close[0] if close else t


def as_saveat(saveat: Any, dtype: Any) -> diffrax.SaveAt:
    """The `diffrax.SaveAt` that the field `saveat` means, its times of the given dtype."""
    if saveat is None:
        return FINAL
    if isinstance(saveat, tuple):
        return diffrax.SaveAt(ts=jnp.asarray(saveat, dtype))
    return jax.tree.map(lambda x: jnp.asarray(x, dtype) if isinstance(x, np.ndarray) else x, plain(saveat))


def check_saves_values(saveat: Any) -> None:
    """Raise for a `SaveAt` that gives no values for a call to return."""
    if isinstance(saveat, diffrax.SaveAt) and saveat.subs is None:
        raise ValueError(
            f"expected saveat to save values, which a call returns, found {saveat}; "
            "use `solution, st = layer.solve(y0, ps, st)`, or add t1=True"
        )


def saves_final_only(saveat: Any) -> bool:
    """Whether the field `saveat` means the final state alone, which has no time axis then."""
    if isinstance(saveat, diffrax.SaveAt):
        return bool(eqx.tree_equal(saveat.subs, FINAL.subs))
    return saveat is None


# Times


def time_dtype(y0: Any) -> Any:
    """The real dtype of a state. Diffrax's default would turn a float32 state into float64 with x64 on."""
    dtypes = [leaf.dtype for leaf in jax.tree.leaves(y0)]
    with jax.numpy_dtype_promotion("standard"):
        dtype = jnp.result_type(*dtypes, jnp.result_type(float) if not dtypes else dtypes[0])
    return jnp.finfo(dtype).dtype if jnp.issubdtype(dtype, jnp.inexact) else jnp.result_type(float)


def as_time(t: float | None, dtype: Any) -> Any:
    """A time, or a step, that is a field: an array of the given dtype; `None` stays."""
    return None if t is None else jnp.asarray(t, dtype)


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


def check_solution(solution: diffrax.Solution, y0: Any, controller: Any, throw: bool) -> diffrax.Solution:
    """The solution, with the code `nonfinite` if it started from, or saved, numbers that are not finite.

    Adaptive steps end with a code of diffrax's own there, which has raised with `throw`.
    """
    if throw and isinstance(controller, diffrax.AbstractAdaptiveStepSizeController):
        return solution
    finite = all_finite(y0) & _saved_finite(solution)
    nonfinite: Any = diffrax.RESULTS.nonfinite
    result = diffrax.RESULTS.where(finite, solution.result, nonfinite)
    solution = eqx.tree_at(lambda s: s.result, solution, result)
    return result.error_if(solution, ~finite) if throw else solution


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


def check_field(field: Callable[..., Any], t0: Any, y0: Any, args: Any) -> None:
    """Raise unless `field(t0, y0, args)` is like `y0`. Nothing is computed."""
    dy = jax.eval_shape(field, t0, y0, args)
    if isinstance(y0, ComponentVector) and isinstance(dy, ComponentVector):
        check_same_layout(y0.layout, dy.layout)
    same = jax.tree.structure(dy) == jax.tree.structure(y0)
    if not same or any(
        a.shape != b.shape for a, b in zip(jax.tree.leaves(dy), jax.tree.leaves(y0), strict=True)
    ):
        raise ValueError(f"expected a model whose output is like y0, {describe(y0)}, found {describe(dy)}")


def call_solve(layer: Any, x: Any, ps: Any, st: Any) -> tuple[Any, Record]:
    """`layer._solve(x, ps, st)` as a call of the layer: unpacked once, errors with the same notes."""
    return apply(_Solve(layer), x, ps, st)


class _Solve(Wrapper):
    layer: Layer

    @property
    def name(self) -> str:
        return display_name(self.layer)

    def __repr__(self) -> str:
        return repr(self.layer)

    def forward(self, x: Any, ps: Any, st: Any) -> tuple[Any, Any]:
        return self.layer._solve(x, ps, st)  # pyright: ignore[reportAttributeAccessIssue]
