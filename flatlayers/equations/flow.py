"""`FFJORD`: a density that is the flow of a neural ODE."""

import functools
import math
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal, NamedTuple, Protocol

import diffrax
import jax
import jax.numpy as jnp

from ..core.composite import Wrapper
from ..core.declaration import fold_in_name
from ..core.fields import Finite, Flag, Size
from ..core.layer import Layer, call
from ..core.values import plain
from ..dtypes import as_floating, common_real_dtype
from ..vectors.names import describe
from ..vectors.record import Record
from . import solving as shared
from .solver_dtypes import Dtypes
from .times import Times, freeze_times


class Base(Protocol):
    """What a flow starts from: any object with these two methods, and a hash."""

    def log_prob(self, x: jax.Array) -> jax.Array:
        """The log density of each sample: `(..., n)` → `(...)`."""
        ...

    def sample(self, key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        """Samples, as an array of the given shape `(..., n)` and dtype."""
        ...


class _TraceField:
    """The field `trace`, kept under another name: `jax.jit` copies the attributes of a callable to the
    function that it makes of it, and calls `trace` there."""

    def __get__(self, layer: Any, kind: Any = None) -> Any:
        return "exact" if layer is None else layer.__dict__["_trace"]

    def __set__(self, layer: Any, value: Any) -> None:
        layer.__dict__["_trace"] = value


class FFJORD(Wrapper):
    """A continuous normalizing flow: the density of `x = z(t1)` for `dz/dt = f(z)`, `f = model`, from a base
    density of `z(t0)`,

        `log p(x) = log p_base(z(t0)) - ∫ tr(df/dz) dt` from `t0` to `t1`.

    A call gives `log p(x)`, by a solve from `t1` back to `t0`; `sample` solves from `t0` to `t1`. The paths
    in between are those of `NeuralODE(model)` with the same parameters.

    The trace is exact, by `n` products with the Jacobian in one vectorised pass, or the estimate of
    Hutchinson, which costs `probes` products: the mean of `e' (df/dz) e` over random signs `e`, which are
    drawn once a solve, so that the vector field is a function. Use it from some tens of dimensions on: its
    log density is right on average, its density is not.

    The model is called once an evaluation, on the whole batch. So each sample's `f` has to depend on that
    sample alone: a model that couples the samples, as `BatchNorm` does in training, is one to put into test
    mode first. The batch is solved as one system; under `jax.vmap` each sample has steps of its own.

    **Arguments:**

    - `model`: the layer that gives `dz/dt`, of the shape of `z`.
    - `t0`, `t1`: the times of the base density and of the data.
    - `trace`: `"exact"` or `"hutchinson"`.
    - `probes`: how many random signs a sample Hutchinson's estimate takes.
    - `base`: an object with a hash and the methods `log_prob(x)` → `(...)` and `sample(key, shape, dtype)`;
        `None` is the standard normal.
    - `regularise`: whether to compute the two terms of Finlay et al. (2020), which keep the paths straight
        and so the steps few; add a multiple of each to the loss.
    - `solver`: a diffrax solver; `None` is `Tsit5()`.
    - `stepsize_controller`: `None` is `PIDController(rtol=1e-4, atol=1e-6)`.
    - `adjoint`: how the solve is differentiated; `None` as for `NeuralODE`.
    - `dt0`: the first step from `t0` to `t1`, and `-dt0` that from `t1` to `t0`; or `None` to let the
        controller choose it.
    - `max_steps`: the most steps the solver may take.
    - `with_time`: whether the model is called with `(t, z)` instead of `z`.
    - `throw`: whether a failed solve raises; its result code is in the state either way.

    **Inputs:** `x` of shape `(..., n)`. **Returns:** `(log_density, st)` with `log_density` of shape `(...)`.

    **Parameters:** the model's own.

    **States:** `stats` of the last solve (`num_steps, num_accepted_steps, num_rejected_steps, result`), with
    `regularise` also the means over the batch `kinetic`, of `∫ |f|² dt`, and `jacobian`, of `∫ |df/dz|² dt`
    (Frobenius; by Hutchinson's estimate `∫ |df/dz e|² dt`), which `sample` leaves as they are; `key`, if the
    trace is Hutchinson's; and the model's states under `model`, if it has any.

    **Raises:** `ValueError` for options out of range (NaN among them), for an `x` without axes, and for a
    model whose output is not like `x` or a base whose log density is not of shape `(...)`; `TypeError` for a
    base without the two methods and for an `x` that is not floating. With `throw`, `ValueError` for an `x`,
    or a sample of the base, that is not finite, and the error of diffrax for a solve that fails.

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
    t0: Finite = 0.0
    t1: Finite = 1.0
    trace: Literal["exact", "hutchinson"] = _TraceField()  # pyright: ignore[reportAssignmentType]
    probes: Size = 1
    base: Base | Any = None
    regularise: Flag = False
    solver: diffrax.AbstractSolver | None = None
    stepsize_controller: diffrax.AbstractStepSizeController | None = None
    adjoint: diffrax.AbstractAdjoint | None = None
    dt0: Finite | None = None
    max_steps: Size | None = 4096
    with_time: Flag = False
    throw: Flag = True

    def __post_init__(self) -> None:
        shared.freeze_options(self, "solver", "stepsize_controller", "adjoint", "base")
        freeze_times(self)
        if not all(callable(getattr(self._base, name, None)) for name in ("log_prob", "sample")):
            raise TypeError(
                "expected a base with the methods `log_prob(x)` and `sample(key, shape, dtype)`, "
                f"found {self._base!r}"
            )

    @property
    def _base(self) -> Base:
        return _STANDARD_NORMAL if self.base is None else plain(self.base)

    def states(self, key: jax.Array) -> dict[str, Any]:
        regularisers = dict.fromkeys(("kinetic", "jacobian"), 0.0) if self.regularise else {}
        keys = {"key": fold_in_name(key, "probes")} if self.trace == "hutchinson" else {}
        return {"stats": shared.initial_stats() | regularisers} | keys | shared.model_states(self.model, key)

    def forward(self, x: Any, ps: Any, st: Any) -> tuple[Any, Any]:
        solution, st = self._solve(x, ps, st)
        start: Path = jax.tree.map(lambda y: y[-1], solution.ys)
        log_density = self._base.log_prob(start.z)
        if jnp.shape(log_density) != start.log_density.shape:
            raise ValueError(
                f"expected a base whose log_prob(x) is of shape {start.log_density.shape} for x of shape "
                f"{start.z.shape}, found {describe(log_density)}"
            )
        return log_density + start.log_density, st

    def solve(self, x: Any, ps: Any, st: Any) -> tuple[diffrax.Solution, Record]:
        """Solve from `t1` back to `t0`, and return `(solution, st)` with diffrax's own solution object.

        Its `ys` are `z` at `t0`, and integrals from `t1` to `t0`: `log_density` of the trace, and with
        `regularise` also `kinetic` and `jacobian` for each sample. All have an axis of length 1 for time.

        **Arguments:** as for a call of the layer.
        """
        return call(self, self._solve, x, ps, st)

    def sample(self, key: jax.Array, shape: tuple[int, ...], ps: Any, st: Any) -> tuple[jax.Array, Record]:
        """Samples, by a solve from `t0` to `t1`: `(x, st)`.

        **Arguments:**

        - `key`: a PRNG key for the base density. That of the state is for probes, of which this needs none.
        - `shape`: the whole shape of `x`, `(..., n)`.
        - `ps`, `st`: as for a call of the layer. The samples are of the dtype of `ps`.
        """
        return call(self, functools.partial(self._sample, tuple(shape)), key, ps, st)

    def _solve(self, x: Any, ps: Any, st: Any) -> tuple[diffrax.Solution, Record]:
        x = shared.check_start(as_floating(x), self.throw)
        if x.ndim == 0:
            raise ValueError("expected x of shape (..., n), found shape ()")
        directions, st = self._directions(x.shape, st)
        zero = jnp.zeros(x.shape[:-1], x.dtype)
        path = Path(x, zero, *([zero, zero] if self.regularise else []))
        field = _Density(self._velocity, self.trace, self.regularise)
        solution, st = self._integrate(field, path, directions, ps, st, backwards=True)
        return solution, st.replace(stats=_with_regularisers(st.stats, solution.ys))

    def _directions(self, shape: tuple[int, ...], st: Record) -> tuple[jax.Array, Record]:
        """The vectors to multiply the Jacobian with, leading. Integers: no adjoint differentiates by them."""
        if self.trace == "exact":
            return jnp.eye(shape[-1], dtype=jnp.int8), st
        key, now = jax.random.split(st.key)
        return jax.random.rademacher(now, (self.probes, *shape), jnp.int8), st.replace(key=key)

    def _sample(self, shape: tuple[int, ...], key: Any, ps: Any, st: Any) -> tuple[jax.Array, Record]:
        z = shared.check_start(self._base.sample(key, shape, common_real_dtype(ps)), self.throw)
        solution, st = self._integrate(self._velocity, z, None, ps, st)
        return solution.ys[-1], st

    @property
    def _velocity(self) -> "_Velocity":
        return _Velocity(self.model, self.with_time)

    def _integrate(
        self, field: Any, y0: Any, directions: Any, ps: Any, st: Any, *, backwards: bool = False
    ) -> tuple[Any, Record]:
        """Solve, and return the solution and the state after it, with the counts of the solve."""
        z = y0.z if isinstance(y0, Path) else y0
        start, end, dt0 = self.t0, self.t1, self.dt0
        if backwards:
            start, end, dt0 = end, start, None if dt0 is None else -dt0
        args = (ps, shared.model_state(self.model, st), directions)
        dz = shared.check_field(self._velocity, z, args)

        def terms(dtypes: Dtypes) -> diffrax.ODETerm:
            return diffrax.ODETerm(dtypes.field(field, y0, dz))

        solution = shared.integrate(self, terms, Times(start, end, dt0), y0, args, dz)
        t = jnp.asarray(start, common_real_dtype(z))
        st = shared.state_after(self.model, (t, z) if self.with_time else z, ps, st)
        return solution, st.replace(stats=st.stats.replace(**shared.stats_of(solution)))


class Path(NamedTuple):
    """The state of the solve for a log density: where the samples are, and integrals so far."""

    z: Any
    log_density: Any
    kinetic: Any = None
    jacobian: Any = None


@dataclass(frozen=True)
class _Velocity:
    """The vector field of a model. Equal models give equal fields, which diffrax traces once."""

    model: Layer
    with_time: bool

    def __call__(self, t: Any, z: Any, args: Any) -> Any:
        ps, st, _ = args
        return self.model((t, z) if self.with_time else z, ps, st)[0]


@dataclass(frozen=True)
class _Density:
    """The vector field of a `Path`: the velocity, the trace of its Jacobian, and the regularisers."""

    velocity: _Velocity
    trace: str
    regularise: bool

    def __call__(self, t: Any, path: Path, args: Any) -> Path:
        f, jacobian = jax.linearize(lambda z: self.velocity(t, z, args), path.z)

        def product(direction: jax.Array) -> tuple[jax.Array, jax.Array]:
            e = jnp.broadcast_to(direction, f.shape).astype(f.dtype)
            change = jacobian(e)
            return jnp.sum(change * e, -1), jnp.sum(change**2, -1)

        over_directions = jnp.sum if self.trace == "exact" else jnp.mean
        trace, square = (over_directions(terms, 0) for terms in jax.vmap(product)(args[-1]))
        return Path(f, trace, jnp.sum(f**2, -1), square) if self.regularise else Path(f, trace)


def _with_regularisers(stats: Record, path: Path) -> Record:
    """The statistics with the batch's means. Time runs backwards in a `Path`, and they are positive."""
    means = {
        name: jnp.abs(jnp.mean(getattr(path, name))).astype(stats[name].dtype)
        for name in ("kinetic", "jacobian")
        if name in stats
    }
    return stats.replace(**means)


@dataclass(frozen=True)
class _StandardNormal:
    def log_prob(self, x: jax.Array) -> jax.Array:
        return -0.5 * jnp.sum(x**2 + math.log(2 * math.pi), -1)

    def sample(self, key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        return jax.random.normal(key, shape, dtype)


_STANDARD_NORMAL = _StandardNormal()
