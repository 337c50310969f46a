"""`differs_by_leaf`: whether an optimiser works leaf by leaf, by trying it on a few numbers."""

import functools
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np

from ..types import Array, ArrayLike, DType, Params, PyTree, Shape
from ..vectors.layout import Layout
from ..vectors.vector import ComponentVector
from .per_leaf import Optimizer, UpdateByLeaf, is_vector, show, with_extra_args


if TYPE_CHECKING:
    import optax


def differs_by_leaf(optimizer: Optimizer, ps: Params) -> bool:
    """Tell whether an optimiser takes other steps on the vectors in `ps` than on their leaves.

    It is tried on a small stand-in for `ps`: one small compilation, which takes as long for any model.

    The answer is no, too, where it cannot be told: if the optimiser draws random numbers (other ones for
    other shapes) or has side effects; and if it cannot be run on the stand-in, since it needs more than
    gradients and a loss, or has arrays of its own of the shape of `ps`.
    """
    vectors = any(map(is_vector, jax.tree.leaves(ps, is_leaf=is_vector)))
    if not vectors or isinstance(getattr(optimizer, "update", None), UpdateByLeaf):
        return False
    try:
        with jax.enable_x64(True):  # here alone: in single precision, rounding may be taken for a difference
            stand_in = functools.partial(_stand_in, np.random.default_rng(0))
            small = jax.tree.map(stand_in, ps, is_leaf=is_vector)
            return _takes_other_steps(with_extra_args(optimizer), small)
    except Exception:  # an optimiser may raise anything; what is wrong with it shows where it is used
        return False


# Far above rounding, far below what weight decay of 1e-4 for some of the leaves changes in a step of Adam.
_SMALL = 1e-5

# One that clips only long gradients shows, and so does one that waits, such as `optax.MultiSteps`.
_LENGTHS = (1.0, 1e3, 1e-2, 1.0, 1.0, 10.0, 1.0, 1.0)


def _takes_other_steps(optimizer: "optax.GradientTransformationExtraArgs", ps: Params) -> bool:
    def compare(ps: Params) -> tuple[Array, Array]:
        updates = jax.tree.leaves(show(_updates(optimizer, ps)))
        expected = jax.tree.leaves(_updates(optimizer, show(ps)))
        differences = [a - b for a, b in zip(updates, expected, strict=True)]
        return _largest(differences), _largest([*updates, *expected])

    traced = jax.jit(compare).trace(ps)
    draws = any(name.startswith(("random_", "rng_", "threefry")) for name in _names(traced.jaxpr.jaxpr))
    if draws or traced.jaxpr.effects:
        return False
    difference, size = traced.lower().compile()(ps)
    # A NaN compares as false.
    return bool((difference > _SMALL * size).any())


def _updates(optimizer: "optax.GradientTransformationExtraArgs", ps: Params) -> Params:
    """Return the updates of some steps, stacked: all from one place, with gradients of several lengths."""

    def step(state: PyTree, number_and_length: tuple[Array, Array]) -> tuple[PyTree, Params]:
        number, length = number_and_length
        gradient = jax.tree.map(lambda x: (length * jnp.sin(x + number)).astype(x.dtype), ps)
        updates, state = optimizer.update(gradient, state, ps, value=1 / (1 + number))
        return state, updates

    lengths = jnp.array(_LENGTHS)
    return jax.lax.scan(step, optimizer.init(ps), (jnp.arange(len(_LENGTHS), dtype=float), lengths))[1]


def _largest(arrays: list[Array]) -> Array:
    """Return the largest absolute value of each step."""
    rows = [jnp.abs(x).astype(float).reshape(len(_LENGTHS), -1) for x in arrays]
    return jnp.stack([row.max(1, initial=0) for row in rows]).max(0)


def _names(jaxpr: jax.extend.core.Jaxpr) -> Iterator[str]:
    """Yield the names of all operations, those of inner functions included."""
    for eqn in jaxpr.eqns:
        yield eqn.primitive.name
        for inner in jax.extend.core.jaxprs_in_params(eqn.params):
            yield from _names(inner)


# The stand-in

_MOST_LEAVES = 8


def _stand_in(rng: np.random.Generator, part: ComponentVector | ArrayLike) -> Any:
    """Return a few random numbers in the place of a vector, or of an array beside it."""
    if is_vector(part):
        layout = _small(part.layout)
        return ComponentVector(_random(rng, (layout.length,), part.dtype), layout)
    return _random(rng, _shrunk(np.shape(part)), jnp.result_type(part))


def _random(rng: np.random.Generator, shape: Shape, dtype: DType) -> np.ndarray:
    numbers = 3 * rng.normal(size=shape)
    return numbers + 3j * rng.normal(size=shape) if jnp.issubdtype(dtype, jnp.complexfloating) else numbers


def _small(layout: Layout) -> Layout:
    """Return some leaves of a layout, shrunk: the largest of each last name and number of axes, then others.

    The largest is the one that is longest along its second longest axis: the first that Adafactor factors.
    """
    places = {path: slot for path, slot in layout.slots() if path not in layout.ties}
    lengths = {path: (sorted((0, 0, *slot.shape))[-2], slot.size) for path, slot in places.items()}
    by_size = sorted(lengths, key=lambda path: lengths[path], reverse=True)
    kinds: dict[tuple[str, int], str] = {}
    for path in by_size:
        kinds.setdefault((path.split(".")[-1], len(places[path].shape)), path)
    chosen = list(dict.fromkeys([*kinds.values(), *by_size]))[:_MOST_LEAVES]
    names: dict[str, Any] = {}
    for path in chosen:
        *groups, name = path.split(".")
        inner = functools.reduce(lambda group, part: group.setdefault(part, {}), groups, names)
        # By default it does so from 128 numbers along two axes on.
        inner[name] = _shrunk(places[path].shape, 128 if path == by_size[0] else 4)
    stacked = len(chosen) == 1 and math.prod(places[chosen[0]].copies) > 1
    return Layout(names).stack(2) if stacked else Layout(names)


def _shrunk(shape: Shape, most: int = 4) -> Shape:
    """Return a shape with at most so many numbers along the two longest axes, at most 4 along the others."""
    longest = sorted(range(len(shape)), key=lambda axis: -shape[axis])[:2]
    return tuple(min(size, most if axis in longest else 4) for axis, size in enumerate(shape))
