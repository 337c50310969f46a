"""Telling whether an optimiser works leaf by leaf, by trying it on a few numbers."""

import functools
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np

from ..core.layout import Layout
from ..core.plan import Shape
from .per_leaf import is_vector, per_leaf, show, with_extra_args


if TYPE_CHECKING:
    import optax


def differs_by_leaf(optimizer: "optax.GradientTransformation", ps: Any) -> bool:
    """Whether an optimiser takes other steps on the vectors in `ps` than on their leaves.

    It is tried on a small stand-in for `ps`, so that this costs the same for any model. For many, such as
    Adam, reading the program of a step is enough; others take a few steps.

    The answer is no, too, where it cannot be told: if the optimiser draws random numbers (other ones for
    other shapes) or has side effects; and if it cannot be run on the stand-in, since it needs more than
    gradients and a loss, or has arrays of its own of the shape of `ps`.
    """
    if not any(map(is_vector, jax.tree.leaves(ps, is_leaf=is_vector))):
        return False
    try:
        small = jax.tree.map(functools.partial(_stand_in, np.random.default_rng(0)), ps, is_leaf=is_vector)
        return not _same_operations(optimizer, small) and _takes_other_steps(optimizer, small)
    except Exception:  # an optimiser may raise anything; what is wrong with it shows where it is used
        return False


# The stand-in

_MOST_LEAVES = 8


def _stand_in(rng: np.random.Generator, part: Any) -> Any:
    """A few random numbers in the place of a vector, or of an array beside it."""
    if is_vector(part):
        layout = _small(part.layout)
        return layout.vector(_random(rng, (layout.length,), part.dtype))
    return _random(rng, _shrunk(np.shape(part)), jnp.result_type(part))


def _random(rng: np.random.Generator, shape: Shape, dtype: Any) -> jax.Array:
    numbers = 3 * rng.normal(size=shape)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        numbers = numbers + 3j * rng.normal(size=shape)
    # In half precision there is more rounding than difference.
    return jnp.asarray(numbers, jnp.float32 if jnp.finfo(dtype).bits < 32 else dtype)


def _small(layout: Layout) -> Layout:
    """Some leaves of a layout, shrunk: the largest of each last name and number of axes, then others."""
    places = {path: slot for path, slot in layout.slots() if path not in layout.ties}
    by_size = sorted(places, key=lambda path: -places[path].size)
    kinds: dict[tuple[str, int], str] = {}
    for path in by_size:
        kinds.setdefault((path.split(".")[-1], len(places[path].shape)), path)
    chosen = list(dict.fromkeys([*kinds.values(), *by_size]))[:_MOST_LEAVES]
    names: dict[str, Any] = {}
    for path in chosen:
        *groups, name = path.split(".")
        inner = functools.reduce(lambda group, part: group.setdefault(part, {}), groups, names)
        # From 128 numbers along two axes on, Adafactor factors.
        inner[name] = _shrunk(places[path].shape, 128 if path == by_size[0] else 4)
    stacked = len(chosen) == 1 and math.prod(places[chosen[0]].copies) > 1
    return Layout(names).stack(2) if stacked else Layout(names)


def _shrunk(shape: Shape, most: int = 4) -> Shape:
    """At most so many numbers along the two longest axes, and at most 4 along the others."""
    longest = sorted(range(len(shape)), key=lambda axis: -shape[axis])[:2]
    return tuple(min(size, most if axis in longest else 4) for axis, size in enumerate(shape))


def _loss(ps: Any, step: Any) -> jax.Array:
    """A loss that falls, in the dtype that one of `ps` has."""
    return (1 / (1 + jnp.asarray(step))).astype(jax.tree.leaves(ps)[0].real.dtype)


# What an optimiser does to it, by its program


def _same_operations(optimizer: Any, ps: Any) -> bool:
    """Whether each number, in the vectors and in their leaves, goes through the same on its own."""
    whole, by_leaf = _operations(optimizer, ps), _operations(optimizer, show(ps))
    if whole is None or by_leaf is None or whole[1] != by_leaf[1]:
        return False
    vectors, leaves = len(jax.tree.leaves(ps)), len(jax.tree.leaves(show(ps)))
    expected = {operation: n * leaves for operation, n in whole[0].items()}
    return expected == {operation: n * vectors for operation, n in by_leaf[0].items()}


def _operations(optimizer: Any, ps: Any) -> tuple[Counter[Any], set[Any]] | None:
    """The operations of a step, each with its constants: how often on arrays, and which on scalars.

    `None` if one of them joins the numbers of an array or moves them.
    """
    transformation = with_extra_args(optimizer)
    state = jax.eval_shape(transformation.init, ps)
    program = jax.make_jaxpr(functools.partial(transformation.update, value=_loss(ps, 0)))(ps, state, ps)
    on_arrays, on_scalars = Counter(), set()
    for eqn in _equations(program.jaxpr):
        taken, given = ({_shape(x) for x in part} - {()} for part in (eqn.invars, eqn.outvars))
        operation = (eqn.primitive.name, *(str(x.val) for x in eqn.invars if isinstance(x, jex.Literal)))
        if len(taken | given) > 1 or (taken and not given):
            return None
        if given:
            on_arrays[operation] += 1
        else:
            on_scalars.add(operation)
    return on_arrays, on_scalars


def _shape(value: Any) -> Shape:
    return value.aval.shape


def _equations(jaxpr: jex.Jaxpr) -> Iterator[jex.JaxprEqn]:
    """All equations of a jaxpr, those of inner ones included."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in _inner(eqn.params.values()):
            yield from _equations(inner)


def _inner(parameters: Iterable[Any]) -> Iterator[jex.Jaxpr]:
    for value in parameters:
        if isinstance(value, jex.ClosedJaxpr | jex.Jaxpr):
            yield value.jaxpr if isinstance(value, jex.ClosedJaxpr) else value
        elif isinstance(value, tuple | list):
            yield from _inner(value)


# What an optimiser does to it, by its steps

# One that clips only long gradients shows, and so does one that waits, such as `optax.MultiSteps`.
_LENGTHS = (1.0, 1e3, 1e-2, 1.0, 1.0, 10.0, 1.0, 1.0)

# Far above rounding in float32, far below what weight decay of 1e-4 changes in a step of Adam.
_SMALL = 1e-5


def _takes_other_steps(optimizer: Any, ps: Any) -> bool:
    traced = jax.jit(functools.partial(_differences, optimizer)).trace(ps)
    names = {eqn.primitive.name for eqn in _equations(traced.jaxpr.jaxpr)}
    if traced.jaxpr.effects or any(name.startswith(("random_", "rng_")) for name in names):
        return False
    by_leaf, by_rounding = map(np.asarray, traced.lower().compile()(ps))
    # What is not a number compares as false.
    return bool(by_leaf.max() > _SMALL + 10 * by_rounding.max())


def _differences(optimizer: Any, ps: Any) -> tuple[jax.Array, jax.Array]:
    """How far the updates of vectors are from those of their leaves, and from those for gradients that are
    different in their last digits, relative to the largest number of the update: one of each per step.

    The parameters stay where they are.
    """
    whole, by_leaf = with_extra_args(optimizer), per_leaf(optimizer)

    def step(states: Any, number: jax.Array) -> Any:
        length, loss = jnp.array(_LENGTHS)[number], _loss(ps, number)
        gradient = jax.tree.map(lambda x: length.astype(x.dtype) * jnp.sin(x + number.astype(x.dtype)), ps)
        two = jax.tree.map(lambda g, x: jnp.stack([g, g * (1 + 1e-6 * jnp.cos(x))]), gradient, ps)
        update = jax.vmap(functools.partial(whole.update, value=loss), in_axes=(0, 0, None))
        both, first = update(two, states[0], ps)
        leaves, second = by_leaf.update(gradient, states[1], ps, value=loss)
        one, near = (jax.tree.map(lambda x, i=i: x[i], both) for i in range(2))
        return (first, second), (_distance(one, leaves), _distance(one, near))

    states = jax.vmap(whole.init, in_axes=None, axis_size=2)(ps), by_leaf.init(ps)
    return jax.lax.scan(step, states, jnp.arange(len(_LENGTHS)))[1]


def _distance(updates: Any, others: Any) -> jax.Array:
    largest = jnp.maximum(_largest(updates), _largest(others))
    difference = _largest(jax.tree.map(jnp.subtract, updates, others))
    return difference / jnp.where(largest == 0, 1, largest)


def _largest(tree: Any) -> jax.Array:
    return jnp.array([jnp.max(jnp.abs(leaf), initial=0.0) for leaf in jax.tree.leaves(tree)]).max()
