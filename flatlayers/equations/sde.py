"""`NeuralSDE`: a layer that solves `dy = drift(y) dt + diffusion(y) dW`."""

import dataclasses
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar, Literal

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ..core.composite import Container
from ..core.drawing import fold_in_name
from ..core.fields import Finite, Positive, Size
from ..core.layer import Layer
from ..core.setup import count_states
from ..core.values import plain
from ..dtypes import common_real_dtype, promoted
from ..types import Args, Array, DType, Input, Key, Params, PyTree, State, Time
from ..vectors.names import describe
from ..vectors.vector import ComponentVector
from .failures import require
from .options import Controller, Solver
from .solver_dtypes import Dtypes, Field
from .solving import SolverLayer, like_state
from .start import Start


# An array `(..., n)`.
Position = Array | ComponentVector
RealTime = float | np.ndarray | Array


class NeuralSDE(SolverLayer, Container):
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
    - `solver`: a diffrax solver for SDEs. Higher orders need commutative noise or ask for Lévy areas, which
        the path then has. Diagonal noise commutes if each entry of the diffusion depends on the same entry of
        `y` alone.
    - `stepsize_controller`: an adaptive one needs a solver with an error estimate, which `Euler()` does not
        have. There is no `rtol` or `atol` beside it.
    - `dt0`: the size of the steps; the first one if the controller is adaptive, or `None`.
    - `noise`: `"diagonal"`, one noise for each entry of `y`, or `"general"`.
    - `noise_dims`: the number of noises of a sample, for general noise only.
    - `tol`: the shortest time in which the path is resolved, to be less than each step. `None` is half of the
        shortest step, where steps are constant or given, and `(t1 - t0) / 2**14` otherwise.
    - The others, by keyword, are those of `SolverLayer`. The `args` of an event's function are
        `(ps, st, key)`, with `ps` and `st` of both layers by name.

    **Inputs:** `x`, the state `y0 (..., n)`, an array or a `ComponentVector`. Leading axes are a batch: each
    sample has a noise of its own, and all take the same steps, or their own with `batching="each"`. Under
    `jax.vmap`, samples with the same state have the same noise.

    **Returns:** `(ys, st)`: the final state, with the shape of `y0`; or the saved states with time leading,
    if `saveat` has times.

    **Parameters:** `drift`, `diffusion`. **States:** `key`, split once per solve; `stats` of the last solve,
    as of `SolverLayer`; and `drift` and `diffusion`, if they have any.

    **Raises:** what `SolverLayer` raises; `ValueError` for a `tol` that is not less than the shortest step
    that is known, or than `t1 - t0`, for a missing `noise_dims`, and for a drift or a diffusion of another
    shape.

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
    t1: Finite = 1.0
    solver: Solver = diffrax.Euler()
    stepsize_controller: Controller = diffrax.ConstantStepSize()
    rtol: ClassVar[None] = None  # pyright: ignore[reportIncompatibleVariableOverride]
    atol: ClassVar[None] = None  # pyright: ignore[reportIncompatibleVariableOverride]
    dt0: Positive | None = 0.01
    noise: Literal["diagonal", "general"] = "diagonal"
    noise_dims: Size | None = None
    tol: Positive | None = None

    def check_fields(self) -> None:
        if not self.t0 < self.t1:
            raise ValueError(f"NeuralSDE: expected t0 < t1, found t0={self.t0} and t1={self.t1}")
        _check_noise(self.noise, self.noise_dims)
        shortest = self._shortest_step()
        if self.tol is not None and not self.tol < shortest:
            raise ValueError(
                f"NeuralSDE.tol: expected less than the shortest step, {shortest}, in which the path has to "
                f"be resolved, found {self.tol}"
            )
        super().check_fields()

    def states(self, key: Key) -> dict[str, State]:
        return {**super().states(key), "key": fold_in_name(key, "key")}

    def inputs(self, x: Input, ps: Params, st: State) -> tuple[Start, State]:
        y0 = jax.tree.map(jnp.asarray, x)
        if not isinstance(y0, jax.Array | ComponentVector) or y0.ndim == 0:
            raise ValueError(f"expected y0 to be an array of shape (..., n), found {describe(y0)}")
        keys = self._keys(y0, st)
        start = Start(y0, data=(keys,)) if self.batching == "shared" else Start(y0, each=(keys,))
        return start, st.replace(key=jax.random.split(st.key)[0])

    def within(self, start: Start) -> Start:
        """Return the start. **Raises:** for ends beyond those of the layer, which are those of its path."""
        times = start.times or self.times
        t0, t1 = jnp.asarray(times.t0), jnp.asarray(times.t1)
        fine = (self.t0 <= t0) & (t0 <= t1) & (t1 <= self.t1)
        message = f"expected times from t0={self.t0} to t1={self.t1} of the layer, where its path is"
        return dataclasses.replace(start, y0=require(fine.all(), message, start.y0))

    def check(self, y0: Position, args: Args) -> PyTree:
        t = jax.ShapeDtypeStruct((), common_real_dtype(y0))
        f = jax.eval_shape(_Drift(self), t, y0, args)
        if jax.tree.structure(f) != jax.tree.structure(y0) or f.shape != y0.shape:
            raise ValueError(f"expected a drift whose output is like y0, {describe(y0)}, found {describe(f)}")
        g = jax.eval_shape(_Diffusion(self).flat, t, y0, args)
        expected = (*y0.shape[:-1], y0.shape[-1] * (self.noise_dims or 1))
        if getattr(g, "shape", None) != expected:
            kind = "n" if self.noise_dims is None else "n * noise_dims"
            raise ValueError(
                f"expected a diffusion whose output has the shape (..., {kind}), here {expected}, "
                f"found {describe(g)}"
            )
        return [f, g]

    def terms(self, y0: Position, args: Args, dtypes: Dtypes) -> diffrax.MultiTerm:
        *_, key = args
        path = self._path(y0, key, dtypes.solver)
        drift, diffusion = dtypes.field(_Drift(self)), dtypes.field(_Diffusion(self))
        noise = _NoiseTerm(diffusion, path, jax.tree.structure(y0), dtypes)
        return diffrax.MultiTerm(diffrax.ODETerm(drift), noise)

    def state_after(self, t: Time, y: Position, key: Key, ps: Params, st: State) -> State:
        x, names = self.at(t, y), [name for name in ("drift", "diffusion") if count_states(st[name])]
        new = {name: getattr(self, name)(x, getattr(ps, name), st[name])[1] for name in names}
        return st.replace(**new)

    def brownian_path(self, y0: Position, st: State) -> diffrax.VirtualBrownianTree:
        """Return the path `W` of a solve from `y0` with the state `st`.

        `path.evaluate(t)` is `W(t) - W(t0)`, of shape `(..., n)` or `(..., noise_dims)`. With
        `batching="each"` it is a batch of paths, for `jax.vmap`.
        """
        dtype = self.times.dtype(common_real_dtype(y0), constant=False)
        path, keys = (lambda y, key: self._path(y, key, dtype)), self._keys(y0, st)
        for _ in range(keys.ndim):
            path = jax.vmap(path)
        return path(y0, keys)

    def _keys(self, y0: Position, st: State) -> Key:
        """Return the key of the path, or the keys of the paths if each sample is solved by itself."""
        _, key = jax.random.split(st["key"])
        return key if self.batching == "shared" else jax.random.split(key, y0.shape[:-1])

    def _path(self, y0: Position, key: Key, dtype: DType) -> diffrax.VirtualBrownianTree:
        """Return the path with times of that dtype.

        Its values have the dtype of `y0`, but at least float32: they do not depend on what else promotes the
        state.
        """
        shape = y0.shape if self.noise == "diagonal" else (*y0.shape[:-1], self.noise_dims)
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

    def _tolerance(self) -> float:
        if self.tol is not None:
            return self.tol
        shortest = self._shortest_step()
        return (self.t1 - self.t0) / 2**14 if shortest == self.t1 - self.t0 else shortest / 2

    def _shortest_step(self) -> float:
        """Return the length of the shortest step if it is known, else that of the whole solve."""
        controller = plain(self.stepsize_controller)
        if isinstance(controller, diffrax.ConstantStepSize) and self.dt0 is not None:
            return min(self.dt0, self.t1 - self.t0)
        if isinstance(controller, diffrax.StepTo):
            return float(np.diff(np.asarray(controller.ts, float)).min())
        return self.t1 - self.t0


@dataclass(frozen=True)
class _Drift:
    """The drift as diffrax calls it. Equal layers give equal fields, which diffrax traces once."""

    layer: NeuralSDE

    def __call__(self, t: Time, y: Position, args: Args) -> Position:
        ps, st, _ = args
        return like_state(self.layer.drift(self.layer.at(t, y), ps.drift, st.drift)[0], y)


@dataclass(frozen=True)
class _Diffusion:
    """The diffusion as diffrax calls it: an array, of `(..., n)` or `(..., n, noise_dims)`."""

    layer: NeuralSDE

    def flat(self, t: Time, y: Position, args: Args) -> Array:
        ps, st, _ = args
        g, _ = self.layer.diffusion(self.layer.at(t, y), ps.diffusion, st.diffusion)
        return g.data if isinstance(g, ComponentVector) else g

    def __call__(self, t: Time, y: Position, args: Args) -> Array:
        g, dims = self.flat(t, y, args), self.layer.noise_dims
        return g if dims is None else g.reshape(*y.shape, dims)


class _NoiseTerm(diffrax.AbstractTerm):
    """`diffusion dW`, sample by sample. (`diffrax.ControlTerm` contracts all axes of the noise.)"""

    diffusion: Field
    path: diffrax.AbstractBrownianPath
    structure: Any = eqx.field(static=True)  # of `y`, an array or a `ComponentVector`
    dtypes: Dtypes = eqx.field(static=True)

    def vf(self, t: Time, y: Position, args: Args) -> Array:
        return self.diffusion(t, y, args)

    def contr(self, t0: RealTime, t1: RealTime, **kwargs: Any) -> PyTree:
        return self.dtypes.inside(self.path.evaluate(t0, t1, **kwargs))

    def prod(self, vf: Array, control: Array) -> Position:
        diagonal = vf.ndim == control.ndim
        product = vf * control if diagonal else jnp.einsum("...ij,...j->...i", vf, control)
        return jax.tree.unflatten(self.structure, [product])


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
