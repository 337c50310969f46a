"""`NeuralSDE`: a layer that solves `dy = drift(y) dt + diffusion(y) dW`."""

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ..core.composite import Container
from ..core.declaration import fold_in_name
from ..core.fields import Finite, Flag, Positive, Size
from ..core.layer import Layer, as_layer, call
from ..core.setup import count_states
from ..core.values import Hashable, plain
from ..dtypes import common_real_dtype, promoted
from ..vectors.names import describe
from ..vectors.record import Record
from ..vectors.vector import ComponentVector
from . import solving as shared
from .solver_dtypes import Dtypes
from .times import Times, check_saves_values, freeze_times, saves_final_only


SOLVER = diffrax.Euler()
CONTROLLER = diffrax.ConstantStepSize()


class NeuralSDE(Container):
    """Solve `dy = drift(y) dt + diffusion(y) dW` from `y0`, by diffrax (Li et al., 2020).

    `W` is a Brownian motion for each sample, a `diffrax.VirtualBrownianTree` whose key is in the state:
    the same state gives the same path, and the returned state has a new key. The default solver is
    Euler-Maruyama with steps of `dt0`, so that the equation is meant in the sense of Itô. Its error is
    `O(sqrt(dt0))` along a path and `O(dt0)` in the mean; a Stratonovich solver, such as `diffrax.Heun()`,
    makes it an equation in the sense of Stratonovich.

    Both parameter vectors are unpacked once, outside the solve. During the solve the states of `drift` and
    `diffusion` are frozen; after it, they are those of one evaluation at the initial point.

    **Arguments:**

    - `drift`: the layer that gives the drift, of the shape of `y`.
    - `diffusion`: the layer that gives the diffusion: of the shape of `y` for diagonal noise,
        `(..., n * noise_dims)` for general noise, which is reshaped to matrices `(..., n, noise_dims)`.
    - `t0`, `t1`: the start and the end of the solve, `t0 < t1`.
    - `dt0`: the size of the steps; the first one if the controller is adaptive, or `None`.
    - `noise`: `"diagonal"`, one noise for each entry of `y`, or `"general"`.
    - `noise_dims`: the number of noises of a sample, for general noise only.
    - `solver`: a diffrax solver for SDEs; `None` is `Euler()`. Higher orders need commutative noise or ask
        for Lévy areas, which the path then has. Diagonal noise commutes if each entry of the diffusion
        depends on the same entry of `y` alone.
    - `saveat`: the times to save at, or a `diffrax.SaveAt`; `None` saves the final state.
    - `adjoint`: how the solve is differentiated; `None` is the default of `NeuralODE`.
    - `stepsize_controller`: `None` is `ConstantStepSize()`; an adaptive one needs a solver with an error
        estimate, which `Euler()` does not have.
    - `max_steps`: the most steps the solver may take.
    - `with_time`: whether the layers are called with `(t, y)` instead of `y`.
    - `throw`: whether a failed solve raises; its result code is in the state either way.
    - `tol`: the shortest time in which the path is resolved, to be less than each step. `None` is half of the
        shortest step, where steps are constant or given, and `(t1 - t0) / 2**14` otherwise.

    **Inputs:** `y0 (..., n)`, an array or a `ComponentVector`. Leading axes are a batch: each sample has a
    noise of its own, and all take the same steps. Under `jax.vmap`, samples with the same state have the
    same noise.

    **Returns:** `(ys, st)`: the final state, with the shape of `y0`; or the saved states with time leading,
    if `saveat` has times.

    **Parameters:** `drift`, `diffusion`. **States:** `drift`, `diffusion`, `key`, split once a solve, and
    `stats` (`num_steps, num_accepted_steps, num_rejected_steps, result`) of the last solve.

    **Raises:** `ValueError` for options out of range (NaN among them), for a `tol` that is not less than the
    shortest step that is known, or than `t1 - t0`, for a missing `noise_dims`, for times outside of `t0` to
    `t1` and for a drift or a diffusion of another shape. With `throw`, `ValueError` for a `y0` that is not
    finite (under `jax.jit` the error of Equinox), and the error of diffrax for a solve that fails.

    Reference: Li et al., "Scalable Gradients for Stochastic Differential Equations", AISTATS 2020.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import flatlayers as fl
    >>> model = fl.NeuralSDE(lambda y: -y, lambda y: 0.5 * jnp.ones_like(y), t1=4.0, dt0=0.05)
    >>> ps, st = fl.setup(jax.random.key(0), model)
    >>> y, st = model(jnp.ones((4000, 1)), ps, st)
    >>> print(f"{y.mean():.2f} {y.std():.2f}")
    0.01 0.35
    """

    drift: Layer
    diffusion: Layer
    _: KW_ONLY
    t0: Finite = 0.0
    t1: Finite = 1.0
    dt0: Positive | None = 0.01
    noise: Literal["diagonal", "general"] = "diagonal"
    noise_dims: Size | None = None
    solver: diffrax.AbstractSolver | None = None
    saveat: diffrax.SaveAt | Sequence[float] | np.ndarray | Hashable | None = None
    adjoint: diffrax.AbstractAdjoint | None = None
    stepsize_controller: diffrax.AbstractStepSizeController | None = None
    max_steps: Size | None = 4096
    with_time: Flag = False
    throw: Flag = True
    tol: Positive | None = None

    def __post_init__(self) -> None:
        for name in ("drift", "diffusion"):
            object.__setattr__(self, name, as_layer(getattr(self, name)))
        shared.freeze_options(self, "solver", "stepsize_controller", "adjoint")
        if not self.t0 < self.t1:
            raise ValueError(f"NeuralSDE: expected t0 < t1, found t0={self.t0} and t1={self.t1}")
        freeze_times(self)
        _check_noise(self.noise, self.noise_dims)
        shortest = self._shortest_step()
        if self.tol is not None and not self.tol < shortest:
            raise ValueError(
                f"NeuralSDE.tol: expected less than the shortest step, {shortest}, in which the path has to "
                f"be resolved, found {self.tol}"
            )

    def states(self, key: jax.Array) -> dict[str, Any]:
        return {
            **super().states(key),
            "key": fold_in_name(key, "key"),
            "stats": shared.initial_stats(),
        }

    def forward(self, x: Any, ps: Any, st: Any) -> tuple[Any, Any]:
        check_saves_values(self.saveat)
        solution, st = self._solve(x, ps, st)
        if saves_final_only(self.saveat):
            return jax.tree.map(lambda y: y[-1], solution.ys), st
        return solution.ys, st

    def solve(self, y0: Any, ps: Any, st: Any) -> tuple[diffrax.Solution, Record]:
        """Solve, and return `(solution, st)` with diffrax's own solution object.

        **Arguments:** as for a call of the layer.
        """
        return call(self, self._solve, y0, ps, st)

    def brownian_path(self, y0: Any, st: Any) -> diffrax.VirtualBrownianTree:
        """The path `W` of a solve from `y0` with the state `st`.

        `path.evaluate(t)` is `W(t) - W(t0)`, of shape `(..., n)` or `(..., noise_dims)`.
        """
        dtype = self._times().dtype(common_real_dtype(y0), constant=False)
        return self._path(y0, st, dtype)

    def _path(self, y0: Any, st: Any, dtype: Any) -> diffrax.VirtualBrownianTree:
        """The path with times of that dtype. Its values are of the dtype of `y0`, but at least float32: they
        do not depend on what else promotes the state."""
        shape = y0.shape if self.noise == "diagonal" else (*y0.shape[:-1], self.noise_dims)
        _, key = jax.random.split(st["key"])
        areas = (diffrax.SpaceTimeTimeLevyArea, diffrax.SpaceTimeLevyArea, diffrax.BrownianIncrement)
        needed = getattr(plain(self.solver), "minimal_levy_area", diffrax.BrownianIncrement)
        return diffrax.VirtualBrownianTree(
            jnp.asarray(self.t0, dtype),
            jnp.asarray(self.t1, dtype),
            self._tolerance(),
            jax.ShapeDtypeStruct(shape, promoted(y0.dtype, jnp.float32)),
            key,
            levy_area=[area for area in areas if issubclass(area, needed)][-1],
        )

    def _times(self) -> Times:
        return Times(self.t0, self.t1, self.dt0, self.saveat)

    def _tolerance(self) -> float:
        if self.tol is not None:
            return self.tol
        shortest = self._shortest_step()
        return (self.t1 - self.t0) / 2**14 if shortest == self.t1 - self.t0 else shortest / 2

    def _shortest_step(self) -> float:
        """The length of the shortest step if it is known, else that of the whole solve, which is longer."""
        controller = plain(self.stepsize_controller) or CONTROLLER
        if isinstance(controller, diffrax.ConstantStepSize) and self.dt0 is not None:
            return min(self.dt0, self.t1 - self.t0)
        if isinstance(controller, diffrax.StepTo):
            return float(np.diff(np.asarray(controller.ts, float)).min())
        return self.t1 - self.t0

    def _solve(self, y0: Any, ps: Any, st: Any) -> tuple[diffrax.Solution, Record]:
        y0 = shared.check_start(y0, self.throw)
        args = (ps, st)
        drift = _Drift(self.drift, self.with_time)
        diffusion = _Diffusion(self.diffusion, self.with_time, self.noise_dims)
        outputs = _check_shapes(drift, diffusion, y0, args)

        def terms(dtypes: Dtypes) -> diffrax.MultiTerm:
            f, g = (dtypes.field(field, y0, outputs) for field in (drift, diffusion))
            path = self._path(y0, st, dtypes.solver)
            noise = _NoiseTerm(g, path, jax.tree.structure(y0), dtypes)
            return diffrax.MultiTerm(diffrax.ODETerm(f), noise)

        solution = shared.integrate(
            self, terms, self._times(), y0, args, outputs, solver=SOLVER, controller=CONTROLLER
        )
        t0 = jnp.asarray(self.t0, common_real_dtype(y0))
        x = (t0, y0) if self.with_time else y0
        key, _ = jax.random.split(st.key)
        return solution, st.replace(
            drift=_state_after(self.drift, x, ps.drift, st.drift),
            diffusion=_state_after(self.diffusion, x, ps.diffusion, st.diffusion),
            key=key,
            stats=shared.stats_of(solution),
        )


@dataclass(frozen=True)
class _Drift:
    """The drift as diffrax calls it. Equal models give equal fields, which diffrax traces once."""

    model: Layer
    with_time: bool

    def __call__(self, t: Any, y: Any, args: Any) -> Any:
        ps, st = args
        dy, _ = self.model((t, y) if self.with_time else y, ps.drift, st.drift)
        return (
            ComponentVector(dy, y.layout)
            if isinstance(y, ComponentVector) and isinstance(dy, jax.Array)
            else dy
        )


@dataclass(frozen=True)
class _Diffusion:
    """The diffusion as diffrax calls it: an array, of `(..., n)` or `(..., n, noise_dims)`."""

    model: Layer
    with_time: bool
    noise_dims: int | None

    def flat(self, t: Any, y: Any, args: Any) -> jax.Array:
        ps, st = args
        g, _ = self.model((t, y) if self.with_time else y, ps.diffusion, st.diffusion)
        return g.data if isinstance(g, ComponentVector) else g

    def __call__(self, t: Any, y: Any, args: Any) -> jax.Array:
        g = self.flat(t, y, args)
        return g if self.noise_dims is None else g.reshape(*y.shape, self.noise_dims)


class _NoiseTerm(diffrax.AbstractTerm):
    """`diffusion dW`, sample by sample. (`diffrax.ControlTerm` contracts all axes of the noise.)"""

    diffusion: Callable[..., Any]
    path: diffrax.AbstractBrownianPath
    structure: Any = eqx.field(static=True)  # of `y`, an array or a `ComponentVector`
    dtypes: Dtypes = eqx.field(static=True)

    def vf(self, t: Any, y: Any, args: Any) -> Any:
        return self.diffusion(t, y, args)

    def contr(self, t0: Any, t1: Any, **kwargs: Any) -> Any:
        return self.dtypes.inside(self.path.evaluate(t0, t1, **kwargs))

    def prod(self, vf: Any, control: Any) -> Any:
        diagonal = vf.ndim == control.ndim
        product = vf * control if diagonal else jnp.einsum("...ij,...j->...i", vf, control)
        return jax.tree.unflatten(self.structure, [product])


def _state_after(model: Layer, x: Any, ps: Any, st: Record) -> Record:
    """The state after the solve: `x` is the model's input at the initial point. No state, no evaluation."""
    return model(x, ps, st)[1] if count_states(st) else st


def _check_noise(noise: str, noise_dims: int | None) -> None:
    if noise == "diagonal" and noise_dims is not None:
        raise ValueError(
            f"expected no noise_dims with diagonal noise, which has one for each entry of y, found "
            f'{noise_dims}; use noise="general" for matrices'
        )
    if noise == "general" and noise_dims is None:
        raise ValueError(
            "expected noise_dims to be the number of noises of a sample, which general noise needs, "
            f"found {noise_dims!r}"
        )


def _check_shapes(drift: _Drift, diffusion: _Diffusion, y0: Any, args: Any) -> list[Any]:
    """What the drift and the diffusion give; raises unless they fit to `y0`. Nothing is computed."""
    if not isinstance(y0, jax.Array | ComponentVector) or y0.ndim == 0:
        raise ValueError(f"expected y0 to be an array of shape (..., n), found {describe(y0)}")
    t = jax.ShapeDtypeStruct((), common_real_dtype(y0))
    f = jax.eval_shape(drift, t, y0, args)
    if jax.tree.structure(f) != jax.tree.structure(y0) or f.shape != y0.shape:
        raise ValueError(f"expected a drift whose output is like y0, {describe(y0)}, found {describe(f)}")
    g = jax.eval_shape(diffusion.flat, t, y0, args)
    expected = (*y0.shape[:-1], y0.shape[-1] * (diffusion.noise_dims or 1))
    if getattr(g, "shape", None) != expected:
        kind = "n" if diffusion.noise_dims is None else "n * noise_dims"
        raise ValueError(
            f"expected a diffusion whose output has the shape (..., {kind}), here {expected}, "
            f"found {describe(g)}"
        )
    return [f, g]
