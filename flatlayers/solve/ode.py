"""`NeuralODE`: a layer that solves `dy/dt = model(y)`."""

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ..core.calling import apply, display_name
from ..core.layer import Layer, Wrapper
from ..core.layout import check_same_layout
from ..core.names import describe
from ..core.record import Record
from ..core.setup import count_states
from ..core.vector import ComponentVector
from .hashable import Hashable, hashable, plain


_COUNTS = ("num_steps", "num_accepted_steps", "num_rejected_steps")


class NeuralODE(Wrapper):
    """Solve `dy/dt = model(y)` from `y0` (Chen et al., 2018), by diffrax.

    The parameter vector is unpacked once, outside the solve. During the solve the model's state is
    frozen, so that the vector field is a function; after it, the state is that of one evaluation at
    the initial point.

    The times, and the `t` that the model sees, have the dtype of `y0`. (Plain `diffeqsolve` takes
    JAX's default dtype for them, so that with x64 on it turns a float32 `y0` into float64.)

    **Arguments:**

    - `model`: the layer that gives `dy/dt`, with the structure and shapes of `y`.
    - `t0`, `t1`: the start and the end of the solve.
    - `saveat`: the times to save at, or a `diffrax.SaveAt`; `None` saves the final state.
    - `solver`: a diffrax solver; `None` is `Tsit5()`.
    - `stepsize_controller`: `None` is `PIDController(rtol=1e-4, atol=1e-6)`.
    - `adjoint`: how the solve is differentiated; `None` is diffrax's default.
    - `dt0`: the first step, or `None` to let the controller choose it.
    - `max_steps`: the most steps the solver may take.
    - `with_time`: whether the model is called with `(t, y)` instead of `y`.
    - `throw`: whether a failed solve raises; its result code is in the state either way.

    **Inputs:** `y0`: an array, a `ComponentVector` or any pytree of arrays.

    **Returns:** `(ys, st)`: the final state, with the shape of `y0`; or the saved states with time
    leading, if `saveat` has times.

    **Parameters:** the model's own. **States:** `stats` (`num_steps, num_accepted_steps,
    num_rejected_steps, result`) of the last solve; and the model's under `model`, if it has any.

    **Raises:** `ValueError` for times outside of `t0` to `t1` and for a model whose output is not like
    `y0`; the error of diffrax for a solve that fails, with `throw`.

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
    t0: float = 0.0
    t1: float = 1.0
    saveat: diffrax.SaveAt | Sequence[float] | Hashable | None = None
    solver: diffrax.AbstractSolver | None = None
    stepsize_controller: diffrax.AbstractStepSizeController | None = None
    adjoint: diffrax.AbstractAdjoint | None = None
    dt0: float | None = None
    max_steps: int | None = 4096
    with_time: bool = False
    throw: bool = True

    def __post_init__(self) -> None:
        for name in ("t0", "t1", "dt0"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, float(getattr(self, name)))
        object.__setattr__(self, "saveat", _canonical(self.saveat))
        for name in ("solver", "stepsize_controller", "adjoint"):
            object.__setattr__(self, name, hashable(getattr(self, name)))
        if isinstance(self.saveat, tuple):
            object.__setattr__(self, "saveat", tuple(map(self._snap, self.saveat)))
            low, high = sorted((self.t0, self.t1))
            for t in self.saveat:
                if not low <= t <= high:
                    raise ValueError(
                        f"expected times in `saveat` from t0={self.t0} to t1={self.t1}, found {t}"
                    )

    def _snap(self, t: float) -> float:
        """Times come from float32 arrays: one within rounding of an end is that end."""
        close = [end for end in (self.t0, self.t1) if math.isclose(t, end, rel_tol=1e-6, abs_tol=1e-9)]
        return close[0] if close else t

    def states(self, key: jax.Array) -> dict[str, Any]:
        model = Record(self.model.states(key))
        stats = {name: jnp.zeros((), jnp.int32) for name in (*_COUNTS, "result")}
        return {"stats": stats} | ({"model": model} if count_states(model) else {})

    def forward(self, x: Any, ps: Any, st: Any) -> tuple[Any, Any]:
        solution, st = self._solve(x, ps, st)
        if self._saves_final_only():
            return jax.tree.map(lambda y: y[-1], solution.ys), st
        return solution.ys, st

    def solve(self, y0: Any, ps: Any, st: Any) -> tuple[diffrax.Solution, Record]:
        """Solve, and return `(solution, st)` with diffrax's own solution object.

        **Arguments:** as for a call of the layer.
        """
        return apply(_Solution(self), y0, ps, st)

    def _solve(self, y0: Any, ps: Any, st: Any) -> tuple[diffrax.Solution, Record]:
        y0 = jax.tree.map(jnp.asarray, y0)
        dtype = _time_dtype(y0)
        # Whatever varies is in `args`: adjoints do not see what a vector field closes over.
        args = (ps, st.model if "model" in st else self._empty_state())
        t0 = jnp.asarray(self.t0, dtype)
        self._check_field(t0, y0, args)
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(_Field(self.model, self.with_time)),
            plain(self.solver) or _SOLVER,
            t0=t0,
            t1=jnp.asarray(self.t1, dtype),
            dt0=None if self.dt0 is None else jnp.asarray(self.dt0, dtype),
            y0=y0,
            args=args,
            saveat=_as_saveat(self.saveat, dtype),
            stepsize_controller=plain(self.stepsize_controller) or _CONTROLLER,
            adjoint=plain(self.adjoint) or _ADJOINT,
            max_steps=self.max_steps,
            throw=self.throw,
        )
        if "model" in st:
            st = st.replace(model=self.model((t0, y0) if self.with_time else y0, *args)[1])
        return solution, st.replace(stats=_stats(solution))

    def _empty_state(self) -> Record:
        return Record(self.model.states(jax.random.key(0)))

    def _check_field(self, t0: Any, y0: Any, args: Any) -> None:
        dy = jax.eval_shape(_Field(self.model, self.with_time), t0, y0, args)
        if isinstance(y0, ComponentVector) and isinstance(dy, ComponentVector):
            check_same_layout(y0.layout, dy.layout)
        same = jax.tree.structure(dy) == jax.tree.structure(y0)
        if not same or any(
            a.shape != b.shape for a, b in zip(jax.tree.leaves(dy), jax.tree.leaves(y0), strict=True)
        ):
            raise ValueError(
                f"expected a model whose output is like y0, {describe(y0)}, found {describe(dy)}"
            )

    def _saves_final_only(self) -> bool:
        return self.saveat is None or self.saveat == _FINAL


@dataclass(frozen=True)
class _Field:
    """The vector field of a model. Equal models give equal fields, which diffrax traces once."""

    model: Layer
    with_time: bool

    def __call__(self, t: Any, y: Any, args: Any) -> Any:
        dy, _ = self.model((t, y) if self.with_time else y, *args)
        if isinstance(y, ComponentVector) and isinstance(dy, jax.Array):
            return y.layout.vector(dy)
        return dy


class _Solution(Wrapper):
    """`NeuralODE.solve` as a call of a layer, so that its errors carry the same notes."""

    node: NeuralODE

    @property
    def name(self) -> str:
        return display_name(self.node)

    def __repr__(self) -> str:
        return repr(self.node)

    def forward(self, x: Any, ps: Any, st: Any) -> tuple[Any, Any]:
        return self.node._solve(x, ps, st)


_SOLVER = diffrax.Tsit5()
_CONTROLLER = diffrax.PIDController(rtol=1e-4, atol=1e-6)
_ADJOINT = diffrax.RecursiveCheckpointAdjoint()
_FINAL = diffrax.SaveAt(t1=True)


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


def _as_saveat(saveat: Any, dtype: Any) -> diffrax.SaveAt:
    if saveat is None:
        return _FINAL
    if isinstance(saveat, tuple):
        return diffrax.SaveAt(ts=jnp.asarray(saveat, dtype))
    return jax.tree.map(lambda x: jnp.asarray(x, dtype) if isinstance(x, np.ndarray) else x, plain(saveat))


def _time_dtype(y0: Any) -> Any:
    dtypes = [leaf.dtype for leaf in jax.tree.leaves(y0)]
    with jax.numpy_dtype_promotion("standard"):
        dtype = jnp.result_type(*dtypes, jnp.result_type(float) if not dtypes else dtypes[0])
    return jnp.finfo(dtype).dtype if jnp.issubdtype(dtype, jnp.inexact) else jnp.result_type(float)


def _stats(solution: diffrax.Solution) -> Record:
    (code,) = jax.tree.leaves(solution.result)
    stats = {name: solution.stats[name] for name in _COUNTS} | {"result": code}
    return Record({name: jnp.asarray(value, jnp.int32) for name, value in stats.items()})
