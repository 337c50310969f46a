"""The dtypes of a solve: one real dtype inside the solver, one for the states outside.

Diffrax promotes the state to the dtype of the times, and takes everything else as it comes: a float64
parameter, jump time or tolerance in a float32 solve fails somewhere inside. So both dtypes are decided once,
before the solve, and all that goes into it is brought into the first.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from ..dtypes import is_floating, is_inexact, promoted
from ..types import Args, Array, PyTree, Time, Y


T = TypeVar("T")
Field = Callable[[Time, Y, Args], PyTree]


@dataclass(frozen=True)
class Dtypes:
    """The real dtypes of a solve.

    **Arguments:**

    - `state`: of the states that the model sees and that are returned: what the given one and the model's
        output promote to.
    - `solver`: of times, and of states inside the solver: the same, but at least float32, and float64 where
        times need it.
    - `models`: of what goes into the models and comes out of them, leaf by leaf.
    - `args`: for each leaf of the models' arguments its dtype, if it has another one inside the solver;
        `None` if none has.
    """

    state: np.dtype
    solver: np.dtype
    models: tuple[np.dtype, ...]
    args: tuple[np.dtype | None, ...] | None = None

    @staticmethod
    def of(y0: Y, outputs: PyTree, state: np.dtype, solver: np.dtype) -> "Dtypes":
        """Return the dtypes of a solve from `y0`, where the models return `outputs`, or what is like them."""
        return Dtypes(state, solver, tuple(leaf.dtype for leaf in jax.tree.leaves((y0, outputs))))

    def with_arguments(self, args: Args) -> tuple["Dtypes", Args]:
        """Return the same with the floating numbers of `args` in the solver's dtype as well, and these."""
        given = tuple(x.dtype if is_floating(x) else None for x in jax.tree.leaves(args))
        if set(given) <= {None, self.solver}:
            return self, args
        return dataclasses.replace(self, args=given), self.options(args)

    def given(self, args: Args) -> Args:
        """Return the model's arguments, from those inside the solver."""
        if self.args is None:
            return args
        leaves, structure = jax.tree.flatten(args)
        pairs = zip(leaves, self.args, strict=True)
        return structure.unflatten([x if dtype is None else jnp.asarray(x, dtype) for x, dtype in pairs])

    def inside(self, tree: PyTree) -> PyTree:
        """Return all numbers in the solver's dtype; complex ones stay complex."""
        return jax.tree.map(lambda x: _as_real(x, self.solver), tree)

    def outside(self, tree: PyTree) -> PyTree:
        """Return floating and complex numbers of the solver in the state's dtype."""
        if self.state == self.solver:
            return tree
        return jax.tree.map(lambda x: _as_real(x, self.state) if is_inexact(x) else x, tree)

    def options(self, tree: T) -> T:
        """Return an option with arrays in it, such as a controller, with these in the solver's dtype."""
        return jax.tree.map(lambda x: jnp.asarray(x, self.solver) if is_floating(x) else x, tree)

    def field(self, field: Field) -> Field:
        """Return the vector field that the solver sees: `field` itself where the dtypes are the same."""
        fits = all(dtype == _like(dtype, self.solver) for dtype in self.models)
        fits = fits and self.state == self.solver and self.args is None
        return field if fits else _Cast(field, self)


@dataclass(frozen=True)
class _Cast:
    """A vector field whose model has another dtype than the solver."""

    field: Field
    dtypes: Dtypes

    def __call__(self, t: Time, y: Y, args: Args) -> PyTree:
        leaves, structure = jax.tree.flatten(self.field(t, self.dtypes.outside(y), self.dtypes.given(args)))
        pairs = zip(leaves, jax.tree.leaves(y), strict=True)
        return jax.tree.unflatten(structure, [jnp.asarray(leaf, like.dtype) for leaf, like in pairs])


def _as_real(x: Array, real: np.dtype) -> Array:
    return jnp.asarray(x, _like(x.dtype, real))


def _like(dtype: np.dtype, real: np.dtype) -> np.dtype:
    """Return the complex dtype of a real one for a complex dtype, else the real one."""
    return promoted(real, jnp.complex64) if jnp.issubdtype(dtype, jnp.complexfloating) else real
