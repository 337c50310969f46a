"""Equations of motion from one learned scalar: `HamiltonianNN` and `LagrangianNN`."""

from dataclasses import dataclass

import diffrax
import jax
import jax.numpy as jnp

from ..core.composite import Wrapper
from ..core.layer import Layer
from ..devices import varying_like
from ..dtypes import as_floating, at_least_float32, is_traced
from ..types import Array, Input, Params, State, Time
from ..vectors.names import describe


class HamiltonianNN(Wrapper):
    """Hamilton's equations of a learned energy: `(dq/dt, dp/dt) = (dH/dp, -dH/dq)` with `H = model`.

    The flow of this field keeps `H`, whatever the parameters are (Greydanus et al., 2019), if the solver
    does: an adaptive one keeps it up to its tolerance, and drifts. The symplectic solver of diffrax,
    `SemiImplicitEuler`, does not drift. It is for a separable energy, `H(q, p) = T(p) + V(q)`, takes a pair
    of terms (see `separable_terms`) and constant steps. For any energy: `NeuralODE(HamiltonianNN(model))`,
    with any other solver.

    The model is called once, on the whole batch. So each sample's energy has to depend on that sample alone:
    a model that couples the samples, as `BatchNorm` does in training, is one to put into test mode first.

    **Arguments:**

    - `model`: the layer that gives `H`, a scalar per sample. Its gradient is the field, so its activations
        are best smooth (`tanh`, `softplus`), not `relu`.

    **Inputs:** `x` of shape `(..., 2n)`: positions `q`, then momenta `p`. **Returns:** `(dx/dt, st)`, of
    the shape of `x`.

    **Parameters and states:** the model's own.

    **Raises:** `ValueError` for an odd number of features and for a model whose output is not of shape
    `(...)` or `(..., 1)`; `TypeError` for an `x` that is not floating.

    Reference: Greydanus, Dzamba and Yosinski, "Hamiltonian Neural Networks", NeurIPS 2019.

    >>> import diffrax
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import flatlayers as fl
    >>> oscillator = fl.HamiltonianNN(lambda x: jnp.sum(x**2, -1) / 2)
    >>> ps, st = fl.setup(jax.random.key(0), oscillator)
    >>> oscillator(jnp.array([1.0, 2.0]), ps, st)[0]
    Array([ 2., -1.], dtype=float32)
    >>> q, p = diffrax.diffeqsolve(
    ...     oscillator.separable_terms(),
    ...     diffrax.SemiImplicitEuler(),
    ...     t0=0.0,
    ...     t1=100.0,
    ...     dt0=0.01,
    ...     y0=(jnp.array([1.0]), jnp.array([0.0])),
    ...     args=(ps, st),
    ...     max_steps=None,
    ... ).ys
    >>> print(f"{jnp.sum(q**2 + p**2):.2f}")
    1.00
    """

    model: Layer

    def forward(self, x: Input, ps: Params, st: State) -> tuple[Array, State]:
        x = _halves(x, "positions and momenta")
        gradient, st = _gradient(self.model, x, ps, st)
        by_q, by_p = jnp.split(gradient, 2, -1)
        return jnp.concatenate([by_p, -by_q], -1), st

    def separable_terms(self) -> tuple[diffrax.ODETerm, diffrax.ODETerm]:
        """Return the terms of `dq/dt = dT/dp` and `dp/dt = -dV/dq`, for `diffrax.SemiImplicitEuler`.

        They hold for a separable energy, `H(q, p) = T(p) + V(q)`, which is not checked: each gradient
        is taken with zeros for the other half.

        **Returns:** two `diffrax.ODETerm`s, for a state `y0 = (q, p)` and `args = (ps, st)`. The state is
        frozen during the solve; a vector `ps` is best given unpacked, once for all steps:
        `args=(fl.constrained(layer, ps), st)`, which is `ps.unpack()` for a layer without bounds.
        """
        return diffrax.ODETerm(_Half(self, 0)), diffrax.ODETerm(_Half(self, 1))


class LagrangianNN(Wrapper):
    """The Euler-Lagrange equations of a learned Lagrangian: `(dq/dt, dv/dt) = (v, a)` with `L = model` and

        `a = (d²L/dv²)⁻¹ (dL/dq - d²L/dvdq v)`.

    Unlike a Hamiltonian it needs no momenta, only positions and velocities (Cranmer et al., 2020). The
    derivatives of the gradient are `n + 1` products with the Hessian of `L`, in one vectorised pass; the
    linear system is solved by lineax, one of size `n` for each sample.

    The model is called once, on the whole batch. So each sample's Lagrangian has to depend on that sample
    alone: a model that couples the samples, as `BatchNorm` does in training, is one to put into test mode
    first.

    **Arguments:**

    - `model`: the layer that gives `L`, a scalar per sample. It is differentiated twice, so its activations
        are to be smooth (`tanh`, `softplus`): with `relu` the mass matrix is zero.

    **Inputs:** `x` of shape `(..., 2n)`: positions `q`, then velocities `v`. **Returns:** `(dx/dt, st)`, of
    the shape of `x`.

    **Parameters and states:** the model's own.

    **Raises:** `ValueError` for an odd number of features, for a model whose output is not of shape `(...)`
    or `(..., 1)`, and for a singular mass matrix `d²L/dv²`, where numbers are known: under `jax.jit` the
    acceleration is not finite then, which a solver reports. `TypeError` for an `x` that is not floating.

    Reference: Cranmer et al., "Lagrangian Neural Networks", ICLR 2020 Deep Differential Equations Workshop.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import flatlayers as fl
    >>> fall = fl.LagrangianNN(lambda x: x[..., 1] ** 2 / 2 - 9.81 * x[..., 0])
    >>> ps, st = fl.setup(jax.random.key(0), fall)
    >>> fall(jnp.array([5.0, 1.0]), ps, st)[0]
    Array([ 1.  , -9.81], dtype=float32)
    """

    model: Layer

    def forward(self, x: Input, ps: Params, st: State) -> tuple[Array, State]:
        x = _halves(x, "positions and velocities")
        gradient, hessian, st = jax.linearize(lambda x: _gradient(self.model, x, ps, st), x, has_aux=True)
        n = x.shape[-1] // 2
        v = x[..., n:]
        none = jnp.zeros((n, n), x.dtype)
        units = jnp.concatenate([none, jnp.eye(n, dtype=x.dtype)], -1)
        units = varying_like(units, x)
        by_v = jax.vmap(lambda unit: hessian(jnp.broadcast_to(unit, x.shape)), out_axes=-1)(units)
        by_q_along_v = hessian(jnp.concatenate([v, jnp.zeros_like(v)], -1))
        acceleration = _solve(by_v[..., n:, :], gradient[..., :n] - by_q_along_v[..., n:])
        return jnp.concatenate([v, acceleration], -1), st


@dataclass(frozen=True)
class _Half:
    """One half of Hamilton's equations as a function of the other half of the state."""

    layer: HamiltonianNN
    moved: int

    def __call__(self, t: Time, y: Array, args: tuple[Params, State]) -> Array:
        rest = jnp.zeros_like(y)
        halves = [rest, y] if self.moved == 0 else [y, rest]
        change, _ = self.layer(jnp.concatenate(halves, -1), *args)
        return jnp.split(change, 2, -1)[self.moved]


def _halves(x: Input, what: str) -> Array:
    """Return `x` as an array of two halves, named `what`."""
    x = as_floating(x)
    if x.ndim == 0 or x.shape[-1] % 2 or x.shape[-1] == 0:
        raise ValueError(f"expected x of shape (..., 2n), {what}, found shape {x.shape}")
    return x


def _gradient(model: Layer, x: Array, ps: Params, st: State) -> tuple[Array, State]:
    """Return the gradient of each sample's scalar, by that of their sum, and the model's new state."""

    def total(x: Array) -> tuple[Array, State]:
        y, new = model(x, ps, st)
        lead = x.shape[:-1]
        if not hasattr(y, "shape") or y.shape not in (lead, (*lead, 1)):
            raise ValueError(
                f"expected a model that returns a scalar per sample, of shape {lead} or {(*lead, 1)}, "
                f"found {describe(y)}"
            )
        return jnp.sum(y), new

    return jax.grad(total, has_aux=True)(x)


def _solve(matrix: Array, vector: Array) -> Array:
    """Return `matrix⁻¹ vector` for each sample. A singular matrix is an error where numbers are known."""
    dtype = at_least_float32(matrix.dtype)
    # Under `jax.jit` nothing raises: an adaptive solver tries a smaller step after one that is not finite.
    solution = jnp.linalg.solve(matrix.astype(dtype), vector.astype(dtype)[..., None])[..., 0]
    if not is_traced(solution) and bool(jnp.isfinite(vector).all() & ~jnp.isfinite(solution).all()):
        raise ValueError(
            "expected a Lagrangian with an invertible mass matrix d²L/dv², found a singular one: "
            "L has to be curved in each velocity, so its activations smooth (softplus, tanh)"
        )
    return solution.astype(matrix.dtype)
