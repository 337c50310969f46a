"""`DeepEquilibriumNetwork`: a layer whose output is the fixed point of another one."""

import dataclasses
import functools
import operator
from collections.abc import Callable
from dataclasses import KW_ONLY
from typing import Annotated

import jax
import jax.numpy as jnp
import optimistix as optx

from ..checks import checked_by, raising
from ..core.composite import Container
from ..core.fields import Flag, Size, checked, integer
from ..core.layer import Layer, as_layer, call
from ..core.setup import count_states
from ..core.values import Hashable, hashable, plain
from ..devices import varying_like
from ..dtypes import at_least_float32, float_dtype
from ..equations import model_states
from ..types import Args, Array, Input, Key, Output, Params, PyTree, State
from ..vectors.names import describe
from ..vectors.record import Record
from .accelerated import Anderson
from .implicit import Solver, as_adjoint, as_solver, check_solver


Z = PyTree


class Equilibrium(Container):
    """The base of layers that solve `z = once(z, x)`: options, states, statistics, `forward` and `solve`.

    A subclass has a field `solver`, and the methods `once` and `start`.
    """

    _: KW_ONLY
    adjoint: optx.AbstractAdjoint | Hashable | str | None = None
    max_steps: Size = 50
    fixed_depth: Size | None = None
    jacobian_regularization: Size | Flag | None = None
    throw: Flag = False

    def check_fields(self) -> None:
        check_solver(plain(self.solver), plain(self.adjoint))  # pyright: ignore
        self.solver, self.adjoint = hashable(self.solver), hashable(self.adjoint)  # pyright: ignore
        if isinstance(self.jacobian_regularization, bool):
            self.jacobian_regularization = 1 if self.jacobian_regularization else None
        super().check_fields()

    def once(self, z: Z, x: Input, ps: Params, st: State) -> tuple[Z, State]:
        """Return one application, and the states of the models."""
        raise TypeError(f"{type(self).__name__} does not define `once(self, z, x, ps, st)`")

    def start(self, x: Input, ps: Params, st: State) -> tuple[Z, State]:
        """Return the start, and the states of the models."""
        raise TypeError(f"{type(self).__name__} does not define `start(self, x, ps, st)`")

    def states(self, key: Key) -> dict[str, State]:
        count = jnp.zeros((), jnp.int32)
        stats = Record({"num_steps": count, "residual": 0.0, "result": count, "jacobian_loss": 0.0})
        probes = {"key": key} if self.jacobian_regularization else {}
        return {**model_states.with_any(Record(super().states(key))), **probes, "stats": stats}

    def forward(self, x: Input, ps: Params, st: State) -> tuple[Output, State]:
        solution, st = self._solve(x, ps, st)
        return solution.value, st

    def solve(self, x: Input, ps: Params, st: State) -> tuple[optx.Solution, State]:
        """Solve, and return `(solution, st)` with optimistix's own solution object.

        **Arguments:** as for a call of the layer.
        """
        return call(self, self._solve, x, ps, st)

    def _solve(self, x: Input, ps: Params, st: State) -> tuple[optx.Solution, State]:
        z0, models = self.start(x, ps, model_states.frozen(self.children(), st))
        # Whatever varies is in `args`: adjoints do not see what a function closes over.
        fn, args = _Application(self), (x, ps, models)
        z0 = _in_dtype_of_output(fn, jax.tree.map(jnp.asarray, z0), args)
        solution = self._find(fn, z0, args)
        if any(count_states(part) for name, part in models.items() if name != "init"):
            models = self.once(z0, x, ps, models)[1]
        st, loss = self._jacobian_loss(fn, solution.value, args, model_states.replaced(st, models))
        (code,) = jax.tree.leaves(solution.result)
        stats = {
            "num_steps": solution.stats["num_steps"],
            "residual": _residual(fn, *jax.lax.stop_gradient((solution.value, args))),
            "result": code,
            "jacobian_loss": loss,
        }
        stats = {name: jnp.asarray(stats[name]).astype(old.dtype) for name, old in st.stats.items()}
        return solution, st.replace(stats=stats)

    def _find(self, fn: "_Application", z0: Z, args: Args) -> optx.Solution:
        if self.fixed_depth is not None:
            return _applied(fn, z0, args, self.fixed_depth, self.throw)
        solver = as_solver(plain(self.solver))  # pyright: ignore
        adjoint = as_adjoint(plain(self.adjoint), solver, self.max_steps, self.throw)
        try:
            solution = optx.fixed_point(
                fn, solver, z0, args, max_steps=self.max_steps, adjoint=adjoint, throw=False
            )
        except Exception as error:  # Not every solver takes every dtype.
            error.add_note(f"in the solve for z, {describe(z0)}, by {type(plain(self.solver)).__name__}")
            raise
        failed = solution.result != optx.RESULTS.successful
        return _checked(solution, failed) if self.throw else solution

    def _jacobian_loss(self, fn: "_Application", z: Z, args: Args, st: State) -> tuple[State, Array | float]:
        if not self.jacobian_regularization:
            return st, 0.0
        key, now = jax.random.split(st.key)
        n = sum(leaf.size for leaf in jax.tree.leaves(z))

        def estimate(key: Key) -> Array:
            _, product = jax.jvp(lambda z: fn(z, args), (z,), (_signs(key, z),))
            squares = [jnp.sum(jnp.abs(_raised(leaf)) ** 2) for leaf in jax.tree.leaves(product)]
            return functools.reduce(operator.add, squares) / n

        probes = jax.random.split(now, self.jacobian_regularization)
        return st.replace(key=key), jax.vmap(estimate)(probes).mean()


class DeepEquilibriumNetwork(Equilibrium):
    """Solve `z = model((z, x))` for `z` (Bai, Kolter and Koltun, 2019), by optimistix.

    The output does not depend on how it was found. So the gradient is that of the equation, by the implicit
    function theorem, and takes the memory of one application, however many steps the solver takes.

    The parameter vector is unpacked once, outside the solve. During the solve the model's state is frozen:
    one dropout mask; after it, the state is that of one evaluation at the start.

    A solve may well end at `max_steps` in training, and the point that came closest still serves. So by
    default it does not raise: `st.stats.result` says whether all is well.

    **Arguments:**

    - `model`: the layer that is called with `(z, x)` and returns an output that is like `z`.
    - `solver`: an optimistix fixed-point solver such as `Anderson`, `Broyden` and `SteadyState`, or a root
        finder such as `optimistix.Newton` for `model((z, x)) - z`. `Anderson(..., batch_axes=1)` solves for
        each sample of a batch by itself.
    - `init`: the start: a layer or a function of `x`. `None` is zeros of the shape of `x`, or of the first
        array in it, if the model keeps that shape. The output has no gradient with respect to the start; a
        loss such as `|z - start|^2`, with the start of `layer.init(x, ps.init, st.init)`, teaches it
        (Skip DEQ, Pal et al., 2022).
    - `adjoint`: how the solve is differentiated. `None` is the implicit function theorem. Its linear system
        is solved by GMRES without a matrix, to a thousandth of the solver's tolerance, or to rounding if
        that is more. It may take 1000 products with the Jacobian, or `4 max_steps` if these are more. A
        system that is not solved by then makes the whole gradient NaN, or an error with `throw`.
        `"phantom"` is `PhantomAdjoint()`, `"unroll"` goes back through the solver's steps, with checkpoints,
        to a gradient that converges later than `z`; or any adjoint of optimistix, which
        has its own way to fail.
    - `max_steps`: the most steps the solver may take.
    - `fixed_depth`: the number of times to apply the model instead of solving, and to differentiate through:
        a cheap start of a training.
    - `jacobian_regularization`: the number of probes for `stats.jacobian_loss` (`True` is 1), or `None`.
    - `throw`: whether a failed solve raises, forward or backward. The result code of the forward one is in
        the state either way; the backward one comes too late for that.

    **Inputs:** `x`, whatever the model takes. **Returns:** `(z, st)`.

    **Parameters:** `model` and, if there is one, `init`. **States:** the same, for those that have any, and
    `stats` of the last solve:

    - `num_steps`: the steps of the solver, or the fixed depth;
    - `residual`: `max |model((z, x)) - z|`, over the batch too;
    - `result`: the code of `optimistix.RESULTS`, 0 for success;
    - `jacobian_loss`: Hutchinson's estimate of `|J|_F^2 / n`, where `J` is the Jacobian of the model with
        respect to `z` and `n` the number of entries of `z`, batch included: the mean over samples. It can be
        part of a loss (Bai, Koltun and Kolter, 2021). Zero without `jacobian_regularization`.

    With `jacobian_regularization`, `key` draws the probes and is split once per call.

    **Raises:** `ValueError` for a model whose output is not like `z` and for options out of range,
    `TypeError` for other kinds; Equinox's error for a solve that fails, forward or backward, with `throw`.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import flatlayers as fl
    >>> cell = fl.Parallel(lambda z, x: jnp.tanh(0.5 * z + x), fl.Dense(8, 8), fl.Dense(3, 8))
    >>> layer = fl.DeepEquilibriumNetwork(cell, init=fl.Dense(3, 8))
    >>> ps, st = fl.setup(jax.random.key(0), layer)
    >>> x = jnp.ones((5, 3))
    >>> z, st = layer(x, ps, st)
    >>> z.shape, bool(st.stats.residual < 1e-4), int(st.stats.result)
    ((5, 8), True, 0)
    """

    model: Layer
    solver: Solver | Hashable = Anderson(rtol=1e-4, atol=1e-4)
    _: KW_ONLY
    init: Layer | None = None

    def check_fields(self) -> None:
        self.model = as_layer(self.model)
        if self.init is not None:
            self.init = as_layer(self.init)
        super().check_fields()

    def once(self, z: Z, x: Input, ps: Params, st: State) -> tuple[Z, State]:
        z, model = self.model((z, x), ps.model, st.model)
        return z, st.replace(model=model)

    def start(self, x: Input, ps: Params, st: State) -> tuple[Z, State]:
        if self.init is not None:
            z, init = self.init(x, ps.init, st.init)
            return z, st.replace(init=init)
        first = jnp.shape(next(iter(jax.tree.leaves(x)), 0.0))
        z = jax.ShapeDtypeStruct(first, float_dtype((x, ps), jnp.result_type(float)))
        try:
            found = jax.eval_shape(_Application(self), z, (x, ps, st))
        except Exception as error:
            error.add_note(f"with a start like x, {describe(z)}: `init=...` gives one of another shape")
            raise
        check_like(z, found, way_out="; `init=...` gives a start of another shape")
        return jnp.zeros(found.shape, found.dtype), st


def spectral_radius(
    model: Layer | Callable[[PyTree], Z],
    z: Z,
    x: Input,
    ps: Params,
    st: State,
    *,
    steps: int = 100,
    key: Key | None = None,
) -> Array:
    """Return the spectral radius of the Jacobian of `model((z, x))` with respect to `z`, by power iteration.

    Below 1 at a fixed point, plain iteration converges to it, and the faster the smaller it is. For a batch
    it is the largest of all samples.

    It is the mean growth of a random vector over the last half of the steps. With a gap between the largest
    eigenvalue and the next this converges geometrically. With none, such as for a pair of complex
    eigenvalues or of `1` and `-1`, the vector does not settle but its growth does, with an error like
    `1 / steps`. A nilpotent Jacobian, which ends the vector, gives 0.

    **Arguments:**

    - `model`: the layer inside a `DeepEquilibriumNetwork`, or a function.
    - `z`: the point at which the Jacobian is taken.
    - `x`: the input.
    - `ps`, `st`: the model's own; `{}` is the state of a model that has none.
    - `steps`: the number of products with the Jacobian.
    - `key`: a PRNG key for the first vector; `None` is always the same one.

    **Returns:** a scalar.

    **Raises:** `ValueError` for fewer than 2 steps or a model whose output is not like `z`.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import flatlayers as fl
    >>> z = jnp.ones(2)
    >>> radius = fl.spectral_radius(lambda zx: jnp.array([0.5, -0.2]) * zx[0] + zx[1], z, z, {}, {})
    >>> print(f"{radius:.3f}")
    0.500
    """
    steps = checked(Annotated[int, integer(2)], "steps", steps)
    model = as_layer(model)
    args = (x, ps, st or model_states.stateless(model))

    def fn(z: Z, args: Args) -> Z:
        x, ps, st = args
        return model((z, x), ps, st)[0]

    z = jax.tree.map(jnp.asarray, z)
    check_like(z, jax.eval_shape(fn, z, args))
    _, product = jax.linearize(lambda z: fn(z, args), z)

    def step(v: Z, _: None) -> tuple[Z, Array]:
        v = product(v)
        norm = optx.two_norm(jax.tree.map(_raised, v))
        safe = jnp.maximum(norm, jnp.finfo(norm.dtype).tiny)
        return jax.tree.map(lambda leaf: leaf / safe.astype(leaf.dtype), v), norm

    _, norms = jax.lax.scan(step, _signs(jax.random.key(0) if key is None else key, z), length=steps)
    return jnp.exp(jnp.log(norms[steps // 2 :]).mean())


@dataclasses.dataclass(frozen=True)
class _Application:
    """One application as a function for optimistix. Equal layers give equal functions, traced once."""

    layer: Equilibrium

    def __call__(self, z: Z, args: Args) -> Z:
        x, ps, st = args
        return self.layer.once(z, x, ps, st)[0]


def _in_dtype_of_output(fn: _Application, z0: Z, args: Args) -> Z:
    """Return the start in the dtypes of the output, which may be others at the first application only.

    **Raises:** `ValueError` unless the output is like the start.
    """
    found = jax.eval_shape(fn, z0, args)
    check_like(z0, found)
    z0 = jax.tree.map(lambda z, out: z.astype(out.dtype), z0, found)
    check_like(z0, jax.eval_shape(fn, z0, args), dtypes=True)
    return z0


def _applied(fn: _Application, z0: Z, args: Args, depth: int, throw: bool) -> optx.Solution:
    """Return `depth` applications as a solution."""
    z0 = varying_like(z0, (z0, args))
    z, _ = jax.lax.scan(lambda z, _: (fn(z, args), None), z0, length=depth)
    finite = jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(z)]).all()
    result = optx.RESULTS.where(finite, optx.RESULTS.successful, optx.RESULTS.nonfinite)
    solution = optx.Solution(value=z, result=result, aux=None, stats={"num_steps": depth}, state=None)
    return _checked(solution, ~finite) if throw else solution


def _checked(solution: optx.Solution, failed: Array) -> optx.Solution:
    """Return the solution. **Raises:** if it `failed`."""
    return checked_by(raising, solution, solution.result, failed)


def check_like(z: Z, found: Z, dtypes: bool = False, way_out: str = "") -> None:
    """Raise unless an output has the structure and shapes of `z`, and its dtypes if they count."""
    leaves, structure = jax.tree.flatten(z)
    others, other_structure = jax.tree.flatten(found)
    if structure != other_structure or any(
        a.shape != b.shape or (dtypes and a.dtype != b.dtype) for a, b in zip(leaves, others, strict=True)
    ):
        raise ValueError(
            f"expected a model whose output is like z, {describe(z)}, found {describe(found)}{way_out}"
        )


def _residual(fn: _Application, z: Z, args: Args) -> Array:
    return optx.max_norm(jax.tree.map(lambda a, b: _raised(a) - _raised(b), fn(z, args), z))


def _raised(x: Array) -> Array:
    return x.astype(at_least_float32(x.dtype))


def _signs(key: Key, like: Z) -> Z:
    """Return a random vector of +1 and -1."""
    leaves, structure = jax.tree.flatten(like)
    keys = jax.random.split(key, len(leaves))
    return structure.unflatten(
        [jax.random.rademacher(key, leaf.shape, leaf.dtype) for key, leaf in zip(keys, leaves, strict=True)]
    )
