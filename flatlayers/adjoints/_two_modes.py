"""Functions with a derivative of their own for each mode: tangents by one way, cotangents by another.

The tangent is a linear primitive. Forward mode evaluates it, which is the derivative of the function itself;
reverse mode never does, but transposes it, which is the way back that the function was given. So a program of
reverse mode has nothing of forward mode in it.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias, TypeVar

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
from jax.extend.core import Primitive, unmapped_aval
from jax.interpreters import ad, batching, mlir

from ..types import Array, PyTree
from ._modes import reversed_never


Arrays: TypeAlias = Sequence[Array]
# Of each array its cotangent, `None` where there is none.
Cotangents: TypeAlias = Sequence[Array | None]
T = TypeVar("T")


@dataclass(frozen=True)
class TwoModes:
    """A function `(problem, constants)`, differentiated by its `problem` in either mode.

    **Arguments:**

    - `function`: gives a pytree. Its tangents are those of itself, so it has to have forward mode.
    - `forward`, `backward`: reverse mode, with the arguments that `equinox.filter_custom_vjp` asks for:
        `forward(perturbed, problem, constants)` gives the result and residuals,
        `backward(residuals, cotangents, perturbed, problem, constants)` the cotangents of `problem`.
    - `name`: that of the adjoint, for the error where reverse mode comes to a tangent.
    """

    function: Callable[[Any, Any], PyTree]
    forward: Callable[[Any, Any, Any], tuple[PyTree, PyTree]]
    backward: Callable[[Any, PyTree, Any, Any, Any], PyTree]
    name: str

    def __call__(self, problem: PyTree, constants: PyTree) -> Any:
        arrays, rest = _result(self, problem, eqxi.nondifferentiable(constants, name=self.name))
        return eqx.combine(arrays, rest.value)


@eqx.filter_custom_jvp
def _result(modes: TwoModes, problem: PyTree, constants: PyTree) -> tuple[PyTree, PyTree]:
    arrays, rest = _arrays_and_rest(modes.function(problem, constants))
    return _batched_as_one(arrays, (problem, constants)), rest


@_result.def_jvp
def _result_jvp(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[PyTree, PyTree]:
    modes, problem, constants = primals
    structure = jax.tree.structure(problem)
    given = structure.flatten_up_to(tangents[1])
    moves = [tangent is not None for tangent in given]
    perturbed = structure.unflatten(moves)
    forward, rest = _call(partial(modes.forward, perturbed), problem, constants)
    # JAX gives constants back in a type of its own, which is no array for Equinox.
    out, residuals = eqx.combine(jax.tree.map(jnp.asarray, forward), rest.value)
    arrays, rest = _arrays_and_rest(out)
    arrays = _batched_as_one(arrays, (problem, constants))
    leaves, of_arrays = jax.tree.flatten(arrays)
    differ = list(map(eqx.is_inexact_array, leaves))
    point, parts = _flat((residuals, problem, constants))

    def push(point: Arrays, tangents: Arrays) -> Arrays:
        _, problem, constants = parts(point)

        def result(moving: Arrays) -> Arrays:
            moved = structure.unflatten(_put(jax.tree.leaves(problem), moves, moving))
            return _taken(jax.tree.leaves(_arrays_and_rest(modes.function(moved, constants))[0]), differ)

        moved = jax.jvp(result, (_taken(jax.tree.leaves(problem), moves),), (list(tangents),))[1]
        return reversed_never(moved, modes.name)

    def pull(point: Arrays, cotangents: Cotangents) -> Cotangents:
        residuals, problem, constants = parts(point)
        of_out = of_arrays.unflatten(_put([None] * len(leaves), differ, cotangents))
        found = modes.backward(residuals, of_out, perturbed, problem, constants)
        return _taken(structure.flatten_up_to(_with_all_leaves(found, problem)), moves)

    avals = [jax.typeof(x).to_tangent_aval() for x in _taken(leaves, differ)]
    derivative = Derivative(push, pull, len(point), avals)
    moved = tangent_p.bind(*point, *_taken(given, moves), derivative=derivative)
    return (arrays, rest), (of_arrays.unflatten(_put([None] * len(leaves), differ, moved)), rest)


@eqx.filter_custom_jvp
def _call(function: Callable[..., PyTree], *args: PyTree) -> tuple[PyTree, eqxi.Static]:
    """Call a function as one equation. JAX linearises a rule with a trace of the loops that it sees in it."""
    return _arrays_and_rest(function(*args))


@_call.def_jvp
def _call_jvp(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[PyTree, PyTree]:
    function, *args = primals
    leaves, structure = jax.tree.flatten(args)
    given = structure.flatten_up_to(list(tangents[1:]))
    moves = [tangent is not None for tangent in given]

    def moved_to(moving: Arrays) -> tuple[PyTree, eqxi.Static]:
        return _arrays_and_rest(function(*structure.unflatten(_put(leaves, moves, moving))))

    out, moved = jax.jvp(moved_to, (_taken(leaves, moves),), (_taken(given, moves),))
    return out, jax.tree.map(lambda x, t: t if eqx.is_inexact_array(x) else None, out, moved)


def _arrays_and_rest(tree: PyTree) -> tuple[PyTree, eqxi.Static]:
    arrays, rest = eqx.partition(tree, eqx.is_array)
    return arrays, eqxi.Static(rest)


def _flat(tree: PyTree) -> tuple[Arrays, Callable[[Arrays], Any]]:
    """Return the arrays of a tree, and the function that makes it of them."""
    arrays, rest = eqx.partition(tree, eqx.is_array)
    arrays, structure = jax.tree.flatten(arrays)
    return arrays, lambda arrays: eqx.combine(structure.unflatten(arrays), rest)


def _with_all_leaves(tree: PyTree, like: PyTree) -> PyTree:
    """Return a tree of cotangents with a `None` for each leaf of a part for which there is one alone."""

    def part(cotangent: PyTree, of: PyTree) -> PyTree:
        return jax.tree.map(lambda _: None, of) if cotangent is None else cotangent

    return jax.tree.map(part, tree, like, is_leaf=lambda x: x is None)


def _taken(items: Iterable[T], flags: Sequence[bool]) -> list[T]:
    return [item for item, flag in zip(items, flags, strict=True) if flag]


def _put(items: Iterable[T], flags: Sequence[bool], new: Iterable[T]) -> list[T]:
    """Return the items, those with a flag from `new`, one after the other."""
    left = iter(new)
    return [next(left) if flag else item for item, flag in zip(items, flags, strict=True)]


def _batched_as_one(tree: PyTree, inputs: PyTree) -> PyTree:
    """Return `tree`, of which under `jax.vmap` all is batched if anything of `inputs` is.

    The tangents are the results of one equation, so they are. `jax.custom_jvp` asks for the same of a result
    and its tangent, and takes what it found without a derivative: there a time may be that of all samples.
    """
    leaves, structure = jax.tree.flatten(tree)
    inputs = jax.tree.leaves(eqx.filter(inputs, eqx.is_array))
    return structure.unflatten(as_one_p.bind(*leaves, *inputs, count=len(leaves)))


def _first(*args: T, count: int) -> list[T]:
    return list(args[:count])


def _as_one(
    axis: Any, args: Sequence[Array], axes: Sequence[int | None], count: int
) -> tuple[Arrays, list[int | None]]:
    if all(i is None for i in axes):
        return as_one_p.bind(*args, count=count), [None] * count
    found = [
        jnp.broadcast_to(x, (axis.size, *jnp.shape(x))) if i is None else jnp.moveaxis(x, i, 0)
        for x, i in zip(args[:count], axes[:count], strict=True)
    ]
    return found, [0] * count


as_one_p = Primitive("as_one")
as_one_p.multiple_results = True
as_one_p.def_impl(_first)
as_one_p.def_abstract_eval(_first)
mlir.register_lowering(as_one_p, mlir.lower_fun(_first, multiple_results=True))
batching.fancy_primitive_batchers[as_one_p] = _as_one
ad.primitive_jvps[as_one_p] = lambda primals, tangents, count: (
    as_one_p.bind(*primals, count=count),
    list(tangents[:count]),
)


# The tangent


@dataclass(frozen=True, eq=False)
class Derivative:
    """The derivative of a function at a point, which is known by `count` arrays.

    `push(point, tangents)` is linear in the tangents, and gives tangents of the types `avals`;
    `pull(point, cotangents)` is its transpose.
    """

    push: Callable[[Arrays, Arrays], Arrays]
    pull: Callable[[Arrays, Cotangents], Cotangents]
    count: int
    avals: Sequence[Any]

    def batched(self, axis: Any, axes: Sequence[int | None]) -> "Derivative":
        """Return that of samples side by side, tangents at the axis 0; `axes` are those of all operands."""
        of_point, of_tangents = list(axes[: self.count]), list(axes[self.count :])
        names = {"axis_name": axis.name, "spmd_axis_name": axis.spmd_name}
        vmap = partial(jax.vmap, axis_size=axis.size, **names)

        def push(point: Arrays, tangents: Arrays) -> Arrays:
            return vmap(self.push, in_axes=(of_point, of_tangents))(list(point), list(tangents))

        def pull(point: Arrays, cotangents: Cotangents) -> Cotangents:
            of_cotangents = [None if ct is None else 0 for ct in cotangents]
            found = vmap(self.pull, in_axes=(of_point, of_cotangents))(list(point), list(cotangents))
            # What all samples have in common has the sum of their cotangents.
            return [
                ct.sum(0) if ct is not None and axis is None else ct
                for ct, axis in zip(found, of_tangents, strict=True)
            ]

        avals = [unmapped_aval(axis.size, 0, aval, axis.explicit_mesh_axis) for aval in self.avals]
        return Derivative(push, pull, self.count, avals)


def _evaluate(*args: Array, derivative: Derivative) -> Arrays:
    return derivative.push(args[: derivative.count], args[derivative.count :])


def _transpose(cotangents: Sequence[Any], *args: Any, derivative: Derivative) -> list[Any]:
    point, tangents = args[: derivative.count], args[derivative.count :]
    cotangents = [None if type(ct) is ad.Zero else ct for ct in cotangents]
    found = derivative.pull(point, cotangents)
    zeros = [ad.Zero(x.aval) for x in tangents]
    return [None] * len(point) + [z if ct is None else ct for ct, z in zip(found, zeros, strict=True)]


def _jvp(primals: Sequence[Array], tangents: Sequence[Any], derivative: Derivative) -> tuple[Any, Any]:
    moves = [type(tangent) is not ad.Zero for tangent in tangents]
    bind = partial(tangent_p.bind, derivative=derivative)
    if not any(moves[: derivative.count]):
        moved = map(ad.instantiate_zeros, tangents[derivative.count :])
        return bind(*primals), bind(*primals[: derivative.count], *moved)

    def moved_to(numbers: Arrays) -> Arrays:
        return _evaluate(*_put(primals, moves, numbers), derivative=derivative)

    return jax.jvp(moved_to, (_taken(primals, moves),), (_taken(tangents, moves),))


def _batch(
    axis: Any, args: Sequence[Array], axes: Sequence[int | None], derivative: Derivative
) -> tuple[Arrays, list[int | None]]:
    if all(i is None for i in axes):
        return tangent_p.bind(*args, derivative=derivative), [None] * len(derivative.avals)
    count = derivative.count
    tangents = [
        x if i is None else jnp.moveaxis(x, i, 0) for x, i in zip(args[count:], axes[count:], strict=True)
    ]
    axes = [*axes[:count], *(None if i is None else 0 for i in axes[count:])]
    batched = derivative.batched(axis, axes)
    return tangent_p.bind(*args[:count], *tangents, derivative=batched), [0] * len(batched.avals)


tangent_p = Primitive("tangent_of_two_modes")
tangent_p.multiple_results = True
tangent_p.def_impl(_evaluate)
tangent_p.def_abstract_eval(lambda *_, derivative: derivative.avals)
mlir.register_lowering(tangent_p, mlir.lower_fun(_evaluate, multiple_results=True))
ad.primitive_jvps[tangent_p] = _jvp
ad.primitive_transposes[tangent_p] = _transpose
batching.fancy_primitive_batchers[tangent_p] = _batch
