"""`FFJORD`: a density that is the flow of a neural ODE."""

import functools
import math
from dataclasses import KW_ONLY, dataclass
from typing import Annotated, ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

import diffrax
import jax
import jax.numpy as jnp

from ..core.composite import Wrapper
from ..core.drawing import fold_in_name
from ..core.fields import Finite, Flag, Size
from ..core.layer import Layer, call
from ..core.values import Hashable, plain
from ..dtypes import as_floating, common_real_dtype
from ..types import Args, Array, DType, Input, Key, Output, Params, PyTree, Shape, State, Time
from ..vectors.names import describe
from ..vectors.record import Record
from .options import option
from .solving import SolverLayer, batch_axes, check_field
from .start import Start
from .times import Times


@runtime_checkable
class Base(Protocol):
    """The density that a flow starts from: any object with these two methods, and a hash."""

    def log_prob(self, x: Array) -> Array:
        """Return the log density of each sample: `(..., n)` → `(...)`."""
        ...

    def sample(self, key: Key, shape: Shape, dtype: DType) -> Array:
        """Return samples, as an array of the given shape `(..., n)` and dtype."""
        ...


@dataclass(frozen=True)
class StandardNormal:
    """The standard normal density."""

    def log_prob(self, x: Array) -> Array:
        return -0.5 * jnp.sum(x**2 + math.log(2 * math.pi), -1)

    def sample(self, key: Key, shape: Shape, dtype: DType) -> Array:
        return jax.random.normal(key, shape, dtype)


class Path(NamedTuple):
    """The state of the solve for a log density: where the samples are, and integrals so far."""

    z: Array
    log_density: Array
    kinetic: Array | None = None
    jacobian: Array | None = None


class FFJORD(SolverLayer, Wrapper):
    """A continuous normalizing flow: the density of `x = z(t1)` for `dz/dt = f(z)`, `f = model`, from a base
    density of `z(t0)`,

        `log p(x) = log p_base(z(t0)) - ∫ tr(df/dz) dt` from `t0` to `t1`.

    A call gives `log p(x)`, by a solve from `t1` back to `t0`; `sample` solves from `t0` to `t1`. The paths
    in between are those of `NeuralODE(model)` with the same parameters.

    The divergence of `f`, the trace of its Jacobian, is exact, by `n` products with the Jacobian in one
    vectorised pass, or the estimate of Hutchinson, which costs `probes` products: the mean of
    `e' (df/dz) e` over random signs `e`, which are drawn once per solve, so that the vector field is a
    function. Use it from some tens of dimensions on: its log density is right on average, its density is not.

    The model is called once per evaluation, on the whole batch. So each sample's `f` has to depend on that
    sample alone: a model that couples the samples, as `BatchNorm` does in training, is one to put into test
    mode first. The batch is solved as one system, or with `batching="each"` sample by sample.

    **Arguments:**

    - `model`: the layer that gives `dz/dt`, of the shape of `z`.
    - `t0`, `t1`: the times of the base density and of the data.
    - `divergence`: `"exact"` or `"hutchinson"`.
    - `probes`: how many random signs per sample Hutchinson's estimate takes.
    - `base`: an object with a hash and the methods `log_prob(x)` → `(...)` and `sample(key, shape, dtype)`;
        the default is the standard normal.
    - `regularize`: whether to compute the two terms of Finlay et al. (2020), which keep the paths straight
        and so the steps few; add a multiple of each to the loss.
    - The others, by keyword, are those of `SolverLayer`; there is no `saveat` and no `event`. `dt0` is the
        first step from `t0` to `t1`, and `-dt0` that from `t1` to `t0`.

    **Inputs:** `x` of shape `(..., n)`. **Returns:** `(log_density, st)` with `log_density` of shape `(...)`.

    **Parameters:** the model's own.

    **States:** `stats` of the last solve, as of `SolverLayer`; with `regularize` also the means over the
    batch `kinetic`, of `∫ |f|² dt`, and `jacobian`, of `∫ |df/dz|² dt` (Frobenius; by Hutchinson's estimate
    `∫ |df/dz e|² dt`), which `sample` leaves as they are; `key`, if the divergence is Hutchinson's; and the
    model's states under `model`, if it has any.

    **Raises:** what `SolverLayer` raises; `ValueError` for an `x` without axes, and for a model whose output
    is not like `x` or a base whose log density is not of shape `(...)`; `TypeError` for a base without the
    two methods and for an `x` that is not floating.

    References: Grathwohl et al., "FFJORD: Free-form Continuous Dynamics for Scalable Reversible Generative
    Models", ICLR 2019; Finlay et al., "How to Train Your Neural ODE: the World of Jacobian and Kinetic
    Regularization", ICML 2020.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import flatlayers as fl
    >>> flow = fl.FFJORD(lambda z: jnp.log(2.0) * z)  # x = 2 z
    >>> ps, st = fl.setup(jax.random.key(0), flow)
    >>> log_density, st = flow(jnp.zeros((5, 1)), ps, st)
    >>> print(f"{jnp.exp(log_density[0]):.4f}")
    0.1995
    >>> x, st = flow.sample(jax.random.key(1), (1000, 1), ps, st)
    >>> print(f"{x.std():.1f}")
    2.0
    """

    model: Layer
    _: KW_ONLY
    t1: Finite = 1.0
    saveat: ClassVar[None] = None  # pyright: ignore[reportIncompatibleVariableOverride]
    event: ClassVar[None] = None  # pyright: ignore[reportIncompatibleVariableOverride]
    divergence: Literal["exact", "hutchinson"] = "exact"
    probes: Size = 1
    base: Annotated[
        Base | Hashable,
        option(Base, "a base with the methods `log_prob(x)` and `sample(key, shape, dtype)`"),
    ] = StandardNormal()
    regularize: Flag = False

    def states(self, key: Key) -> dict[str, State]:
        states = super().states(key)
        if self.regularize:
            states["stats"] = Record(states["stats"], kinetic=0.0, jacobian=0.0)
        keys = {"key": fold_in_name(key, "probes")} if self.divergence == "hutchinson" else {}
        return states | keys

    def inputs(self, x: Input, ps: Params, st: State) -> tuple[Start, State]:
        x = as_floating(x)
        if x.ndim == 0:
            raise ValueError("expected x of shape (..., n), found shape ()")
        directions, st = self._directions(x.shape, st)
        zero = jnp.zeros(x.shape[:-1], x.dtype)
        path = Path(x, zero, *([zero, zero] if self.regularize else []))
        times = Times(self.t1, self.t0, None if self.dt0 is None else -self.dt0)
        axes = batch_axes(x) if self.batching == "each" else 0
        if axes and self.divergence == "hutchinson":
            return Start(path, each=(jnp.moveaxis(directions, 0, axes),), times=times, batch_axes=axes), st
        return Start(path, (directions,), times=times, batch_axes=axes), st

    def field(
        self, t: Time, y: Path | Array, directions: PyTree, ps: Params, st: State
    ) -> tuple[PyTree, State]:
        """Return the velocity and, for a `Path`, its divergence and the regularizers."""
        if not isinstance(y, Path):
            return self.model(self.at(t, y), ps, st)
        f, jacobian, st = jax.linearize(lambda z: self.model(self.at(t, z), ps, st), y.z, has_aux=True)

        def product(direction: Array) -> tuple[Array, Array]:
            e = jnp.broadcast_to(direction, f.shape).astype(f.dtype)
            change = jacobian(e)
            return jnp.sum(change * e, -1), jnp.sum(change**2, -1)

        over_directions = jnp.sum if self.divergence == "exact" else jnp.mean
        divergence, square = (over_directions(terms, 0) for terms in jax.vmap(product)(directions))
        path = Path(f, divergence, jnp.sum(f**2, -1), square) if self.regularize else Path(f, divergence)
        return path, st

    def check(self, y0: Path | Array, args: Args) -> PyTree:
        def velocity(t: Time, z: Array, args: Args) -> Array:
            ps, st, _ = args
            return self.field(t, z, None, ps, st)[0]

        return check_field(velocity, y0.z if isinstance(y0, Path) else y0, args)

    def state_after(self, t: Time, y: Path | Array, directions: PyTree, ps: Params, st: State) -> State:
        return self.model(self.at(t, y.z if isinstance(y, Path) else y), ps, st)[1]

    def outputs(self, solution: diffrax.Solution) -> Output:
        start: Path = super().outputs(solution)
        log_density = plain(self.base).log_prob(start.z)
        if jnp.shape(log_density) != start.log_density.shape:
            raise ValueError(
                f"expected a base whose log_prob(x) is of shape {start.log_density.shape} for x of shape "
                f"{start.z.shape}, found {describe(log_density)}"
            )
        return log_density + start.log_density

    def solve(self, x: Input, ps: Params, st: State) -> tuple[diffrax.Solution, State]:
        """Solve from `t1` back to `t0`, and return `(solution, st)` with diffrax's own solution object.

        Its `ys` are `z` at `t0`, and integrals from `t1` to `t0`: `log_density` of the divergence, and with
        `regularize` also `kinetic` and `jacobian` for each sample. All have an axis of length 1 for time.

        **Arguments:** as for a call of the layer.
        """
        return super().solve(x, ps, st)

    def sample(self, key: Key, shape: Shape, ps: Params, st: State) -> tuple[Array, State]:
        """Return samples, by a solve from `t0` to `t1`: `(x, st)`.

        **Arguments:**

        - `key`: a PRNG key for the base density. The key in the state is for probes, and stays.
        - `shape`: the whole shape of `x`, `(..., n)`.
        - `ps`, `st`: as for a call of the layer. The samples are of the dtype of `ps`.
        """
        return call(self, functools.partial(self._sample, tuple(shape)), key, ps, st)

    def _solve(self, x: Input, ps: Params, st: State) -> tuple[diffrax.Solution, State]:
        solution, st = super()._solve(x, ps, st)
        # Time runs backwards in a `Path`, and the regularizers are positive.
        means = {
            name: jnp.abs(jnp.mean(getattr(solution.ys, name))).astype(st.stats[name].dtype)
            for name in ("kinetic", "jacobian")
            if name in st.stats
        }
        return solution, st.replace(stats=st.stats.replace(**means))

    def _directions(self, shape: Shape, st: State) -> tuple[Array, State]:
        """Return the vectors to multiply the Jacobian with, leading, and the state.

        They are integers, which no adjoint differentiates by.
        """
        if self.divergence == "exact":
            return jnp.eye(shape[-1], dtype=jnp.int8), st
        key, now = jax.random.split(st.key)
        return jax.random.rademacher(now, (self.probes, *shape), jnp.int8), st.replace(key=key)

    def _sample(self, shape: Shape, key: Key, ps: Params, st: State) -> tuple[Array, State]:
        z = plain(self.base).sample(key, shape, common_real_dtype(ps))
        solution, st = self.run(Start(z, (None,)), ps, st)
        return super().outputs(solution), st
