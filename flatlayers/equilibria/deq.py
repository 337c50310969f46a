"""`DeepEquilibriumNetwork`: a layer whose output is the fixed point of another one."""

import dataclasses
import functools
import operator
from collections.abc import Iterator, Mapping
from dataclasses import KW_ONLY
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import optimistix as optx

from ..core.composite import Container
from ..core.fields import Flag, Size, checked, integer
from ..core.layer import Layer, as_layer, call
from ..core.setup import count_states
from ..core.values import hashable, plain
from ..dtypes import at_least_float32
from ..vectors.names import describe
from ..vectors.record import Record
from .accelerated import Anderson
from .implicit import as_adjoint, as_solver, check_solver


class DeepEquilibriumNetwork(Container):
    """Solve `z = model((z, x))` for `z` (Bai, Kolter and Koltun, 2019), by optimistix.

    One layer as deep as need be: its output does not depend on how it was found. So the gradient is that of
    the equation, by the implicit function theorem, and takes the memory of one application.

    The parameter vector is unpacked once, outside the solve. During the solve the model's state is frozen:
    one dropout mask; after it, the state is that of one evaluation at the start.

    A solve may well end at `max_steps` in training, and the point that came closest still serves. So by
    default it does not raise: `st.stats.result` says whether all is well.

    **Arguments:**

    - `model`: the layer that is called with `(z, x)` and returns what is like `z`.
    - `solver`: an optimistix fixed-point solver such as `Anderson`, `Broyden` and `SteadyState`, or a root
        finder such as `optimistix.Newton` for `model((z, x)) - z`. `Anderson(..., batch_axes=1)` solves for
        each sample of a batch by itself.
    - `init`: where to start: a layer or a function of `x`. `None` is zeros, of the shape that the model
        keeps: that of `x`, or with as many features as the model's parameters allow. The output has no
        gradient with respect to the start; a loss such as `|z - start|^2`, with the start of
        `layer.init(x, ps.init, st.init)`, teaches it (Skip DEQ, Pal et al., 2022).
    - `adjoint`: how the solve is differentiated. `None` is the implicit function theorem. Its linear system
        is solved by GMRES without a matrix, to a thousandth of the solver's tolerance, or to rounding if
        that is more. It may take 1000 products with the Jacobian, or `4 max_steps` if these are more; if
        that does not do, the whole gradient is NaN, or an error with `throw`. `"phantom"` is
        `PhantomAdjoint()`, `"unroll"` goes back through the solver's steps, with checkpoints, to a gradient
        that converges later than `z`; or any adjoint of optimistix, which has its own way to fail.
    - `max_steps`: the most steps the solver may take.
    - `fixed_depth`: apply the model so many times instead, and differentiate through that: to train first.
    - `jacobian_regularisation`: the number of probes for `stats.jacobian_loss` (`True` is 1), or `None`.
    - `throw`: whether a failed solve raises, forward or backward. The result code of the forward one is in
        the state either way; the backward one comes too late for that.

    **Inputs:** `x`, whatever the model takes. **Returns:** `(z, st)`.

    **Parameters:** `model` and, if there is one, `init`. **States:** the same, and `stats` of the last solve:

    - `steps`: the steps of the solver, or the fixed depth;
    - `residual`: `max |model((z, x)) - z|`, over the batch too;
    - `result`: the code of `optimistix.RESULTS`, 0 for success;
    - `jacobian_loss`: Hutchinson's estimate of `|J|_F^2 / n`, where `J` is the Jacobian of the model with
        respect to `z` and `n` the number of entries of `z`, batch included: the mean over samples. It can be
        part of a loss (Bai, Koltun and Kolter, 2021). Zero without `jacobian_regularisation`.

    With `jacobian_regularisation`, `key` draws the probes and is split once a call.

    **Raises:** `ValueError` for a model whose output is not like `z` and for options out of range,
    `TypeError` for other kinds; Equinox's error for a solve that fails, forward or backward, with `throw`.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import flatlayers as fl
    >>> cell = fl.Parallel(lambda z, x: jnp.tanh(0.5 * z + x), fl.Dense(8, 8), fl.Dense(3, 8))
    >>> layer = fl.DeepEquilibriumNetwork(cell)
    >>> ps, st = fl.setup(jax.random.key(0), layer)
    >>> x = jnp.ones((5, 3))
    >>> z, st = layer(x, ps, st)
    >>> z.shape, bool(st.stats.residual < 1e-4), int(st.stats.result)
    ((5, 8), True, 0)
    """

    model: Layer
    solver: Any = Anderson(rtol=1e-4, atol=1e-4)
    _: KW_ONLY
    init: Layer | None = None
    adjoint: Any = None
    max_steps: Size = 50
    fixed_depth: Size | None = None
    jacobian_regularisation: Size | Flag | None = None
    throw: Flag = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "model", as_layer(self.model))
        if self.init is not None:
            object.__setattr__(self, "init", as_layer(self.init))
        check_solver(plain(self.solver), plain(self.adjoint))
        for name in ("solver", "adjoint"):
            object.__setattr__(self, name, hashable(getattr(self, name)))
        if isinstance(self.jacobian_regularisation, bool):
            self.jacobian_regularisation = 1 if self.jacobian_regularisation else None

    def states(self, key: jax.Array) -> Mapping[str, Any]:
        count = jnp.zeros((), jnp.int32)
        stats = {"steps": count, "residual": 0.0, "result": count, "jacobian_loss": 0.0}
        probes = {"key": key} if self.jacobian_regularisation else {}
        return {**super().states(key), **probes, "stats": stats}

    def forward(self, x: Any, ps: Any, st: Any) -> tuple[Any, Any]:
        solution, st = self._solve(x, ps, st)
        return solution.value, st

    def solve(self, x: Any, ps: Any, st: Any) -> tuple[optx.Solution, Record]:
        """Solve, and return `(solution, st)` with optimistix's own solution object.

        **Arguments:** as for a call of the layer.
        """
        return call(self, self._solve, x, ps, st)

    def _solve(self, x: Any, ps: Any, st: Any) -> tuple[optx.Solution, Record]:
        # Whatever varies is in `args`: adjoints do not see what a function closes over.
        fn, args = _Application(self.model), (x, ps.model, st.model)
        z0, st = self._start(fn, args, ps, st)
        solution = self._find(fn, z0, args)
        if count_states(st.model):
            st = st.replace(model=self.model((z0, x), ps.model, st.model)[1])
        st, loss = self._jacobian_loss(fn, solution.value, args, st)
        (code,) = jax.tree.leaves(solution.result)
        stats = {
            "steps": solution.stats["num_steps"],
            "residual": _residual(fn, *jax.lax.stop_gradient((solution.value, args))),
            "result": code,
            "jacobian_loss": loss,
        }
        stats = {name: jnp.asarray(stats[name]).astype(old.dtype) for name, old in st.stats.items()}
        return solution, st.replace(stats=stats)

    def _start(self, fn: Any, args: Any, ps: Any, st: Any) -> tuple[Any, Record]:
        if self.init is None:
            kept = _kept_shape(fn, args, self.model)
            z0 = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), kept)
        else:
            z0, new = self.init(args[0], ps.init, st.init)
            z0, st = jax.tree.map(jnp.asarray, z0), st.replace(init=new)
        found = jax.eval_shape(fn, z0, args)
        check_like(z0, found)
        # The dtype is that of the output, which may be another one at the first application only.
        z0 = jax.tree.map(lambda z, out: z.astype(out.dtype), z0, found)
        check_like(z0, jax.eval_shape(fn, z0, args), dtypes=True)
        return z0, st

    def _find(self, fn: Any, z0: Any, args: Any) -> optx.Solution:
        if self.fixed_depth is not None:
            return _applied(fn, z0, args, self.fixed_depth, self.throw)
        solver = as_solver(plain(self.solver))
        adjoint = as_adjoint(plain(self.adjoint), solver, self.max_steps, self.throw)
        try:
            return optx.fixed_point(
                fn, solver, z0, args, max_steps=self.max_steps, adjoint=adjoint, throw=self.throw
            )
        except Exception as error:  # Not every solver takes every dtype.
            error.add_note(f"in the solve for z, {describe(z0)}, by {type(solver).__name__}")
            raise

    def _jacobian_loss(self, fn: Any, z: Any, args: Any, st: Record) -> tuple[Record, Any]:
        if not self.jacobian_regularisation:
            return st, 0.0
        key, now = jax.random.split(st.key)
        n = sum(leaf.size for leaf in jax.tree.leaves(z))

        def estimate(key: jax.Array) -> jax.Array:
            _, product = jax.jvp(lambda z: fn(z, args), (z,), (_signs(key, z),))
            squares = [jnp.sum(jnp.abs(_raised(leaf)) ** 2) for leaf in jax.tree.leaves(product)]
            return functools.reduce(operator.add, squares) / n

        probes = jax.random.split(now, self.jacobian_regularisation)
        return st.replace(key=key), jax.vmap(estimate)(probes).mean()


def spectral_radius(
    model: Any, z: Any, x: Any, ps: Any, st: Any, *, steps: int = 100, key: jax.Array | None = None
) -> jax.Array:
    """The spectral radius of the Jacobian of `model((z, x))` with respect to `z`, by power iteration.

    Below 1 at a fixed point, plain iteration converges to it, and the faster the smaller it is. For a batch
    it is the largest of all samples.

    It is the mean growth of a random vector over the last half of the steps. With a gap between the largest
    eigenvalue and the next this converges geometrically. With none, such as for a pair of complex
    eigenvalues or of `1` and `-1`, the vector does not settle but its growth does, with an error like
    `1 / steps`. A nilpotent Jacobian, which ends the vector, gives 0.

    **Arguments:**

    - `model`: the layer inside a `DeepEquilibriumNetwork`, with its own `ps` and `st`.
    - `z`: where the Jacobian is taken; `x`: the input.
    - `steps`: how many products with the Jacobian.
    - `key`: for the first vector; `None` is always the same one.

    **Returns:** a scalar.

    **Raises:** `ValueError` for less than 2 steps or a model whose output is not like `z`.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import flatlayers as fl
    >>> z = jnp.ones(2)
    >>> radius = fl.spectral_radius(lambda zx: jnp.array([0.5, -0.2]) * zx[0] + zx[1], z, z, {}, {})
    >>> print(f"{radius:.3f}")
    0.500
    """
    steps = checked(Annotated[int, integer(2)], "steps", steps)
    fn, args = _Application(as_layer(model)), (x, ps, st)
    z = jax.tree.map(jnp.asarray, z)
    check_like(z, jax.eval_shape(fn, z, args))
    _, product = jax.linearize(lambda z: fn(z, args), z)

    def step(v: Any, _: Any) -> tuple[Any, jax.Array]:
        v = product(v)
        norm = optx.two_norm(jax.tree.map(_raised, v))
        safe = jnp.maximum(norm, jnp.finfo(norm.dtype).tiny)
        return jax.tree.map(lambda leaf: leaf / safe.astype(leaf.dtype), v), norm

    _, norms = jax.lax.scan(step, _signs(jax.random.key(0) if key is None else key, z), length=steps)
    return jnp.exp(jnp.log(norms[steps // 2 :]).mean())


@dataclasses.dataclass(frozen=True)
class _Application:
    """`model((z, x))` as a function for optimistix. Equal models give equal functions, traced once."""

    model: Layer

    def __call__(self, z: Any, args: Any) -> Any:
        x, ps, st = args
        return self.model((z, x), ps, st)[0]


def _applied(fn: Any, z0: Any, args: Any, depth: int, throw: bool) -> optx.Solution:
    """`depth` applications as a solution."""
    z, _ = jax.lax.scan(lambda z, _: (fn(z, args), None), z0, length=depth)
    finite = jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(z)]).all()
    result = optx.RESULTS.where(finite, optx.RESULTS.successful, optx.RESULTS.nonfinite)
    if throw:
        z = result.error_if(z, ~finite)
    return optx.Solution(value=z, result=result, aux=None, stats={"num_steps": depth}, state=None)


def _kept_shape(fn: Any, args: Any, model: Layer) -> Any:
    """The shape of z that the model keeps, if there is one: else what it makes of z like x."""
    x, ps, _ = args
    first, failure = None, None
    dtype = float_dtype(*jax.tree.leaves(x), *jax.tree.leaves(ps))
    for shape in _possible_shapes(x, model):
        try:
            found = jax.eval_shape(fn, jax.ShapeDtypeStruct(shape, dtype), args)
        except Exception as error:
            failure = failure or error
            continue
        if isinstance(found, jax.ShapeDtypeStruct) and found.shape == shape:
            return found
        first = found if first is None else first
    if first is None:
        assert failure is not None
        failure.add_note("The shape of z is not known: `init=...` gives a start")
        raise failure
    return first


def _possible_shapes(x: Any, model: Layer) -> Iterator[tuple[int, ...]]:
    """That of the input, and with other numbers of features: those in the shapes of the parameters."""
    shape = jnp.shape(next(iter(jax.tree.leaves(x)), 0.0))
    yield shape
    sizes = {size for _, slot in model.layout.slots() for size in slot.shape} - set(shape[-1:])
    yield from ((*shape[:-1], size) for size in sorted(sizes) if shape)


def check_like(z: Any, found: Any, dtypes: bool = False) -> None:
    """Raise unless an output has the structure and shapes of `z`, and its dtypes if they count."""
    leaves, structure = jax.tree.flatten(z)
    others, other_structure = jax.tree.flatten(found)
    if structure != other_structure or any(
        a.shape != b.shape or (dtypes and a.dtype != b.dtype) for a, b in zip(leaves, others, strict=True)
    ):
        raise ValueError(
            f"expected a model whose output is like z, {describe(z)}, found {describe(found)}; "
            "`init` says what z is like"
        )


def float_dtype(*leaves: Any) -> Any:
    """The dtype of the first floating array; JAX's default if there is none."""
    dtypes = [jnp.result_type(leaf) for leaf in leaves]
    return next((dtype for dtype in dtypes if jnp.issubdtype(dtype, jnp.floating)), jnp.result_type(float))


def _residual(fn: Any, z: Any, args: Any) -> jax.Array:
    return optx.max_norm(jax.tree.map(lambda a, b: _raised(a) - _raised(b), fn(z, args), z))


def _raised(x: jax.Array) -> jax.Array:
    return x.astype(at_least_float32(x.dtype))


def _signs(key: jax.Array, like: Any) -> Any:
    """A random vector of +1 and -1."""
    leaves, structure = jax.tree.flatten(like)
    keys = jax.random.split(key, len(leaves))
    return structure.unflatten(
        [jax.random.rademacher(key, leaf.shape, leaf.dtype) for key, leaf in zip(keys, leaves, strict=True)]
    )
