"""In which dtypes a solve computes: one real dtype inside the solver, one for the states outside.

Diffrax promotes the state to the dtype of the times, and takes everything else as it comes: a float64
parameter, jump time or tolerance in a float32 solve fails somewhere inside. So both dtypes are decided once,
before the solve, and all that goes into it is brought into the first.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..dtypes import is_floating, is_inexact, promoted


@dataclass(frozen=True)
class Dtypes:
    """The real dtypes of a solve.

    **Arguments:**

    - `state`: of the states that the model sees and that are returned: what the given one and the model's
        output promote to.
    - `solver`: of times, and of states inside the solver: the same, but at least float32, and float64 where
        times need it.
    - `args`: of the model's arguments, leaf by leaf, the dtype if they are in another inside the solver:
        `None` is that none are.
    """

    state: np.dtype
    solver: np.dtype
    args: tuple[Any, ...] | None = None

    def with_arguments(self, args: Any) -> tuple["Dtypes", Any]:
        """The same with the floating numbers of `args` in the solver's dtype as well, and these `args`."""
        given = tuple(x.dtype if is_floating(x) else None for x in jax.tree.leaves(args))
        if set(given) <= {None, self.solver}:
            return self, args
        return dataclasses.replace(self, args=given), self.options(args)

    def given(self, args: Any) -> Any:
        """The model's arguments of those in the solver."""
        if self.args is None:
            return args
        leaves, structure = jax.tree.flatten(args)
        pairs = zip(leaves, self.args, strict=True)
        return structure.unflatten([x if dtype is None else jnp.asarray(x, dtype) for x, dtype in pairs])

    def inside(self, tree: Any) -> Any:
        """All numbers in the solver's dtype; complex ones stay complex."""
        return jax.tree.map(lambda x: _as_real(x, self.solver), tree)

    def outside(self, tree: Any) -> Any:
        """Floating and complex numbers of the solver in the state's dtype."""
        if self.state == self.solver:
            return tree
        return jax.tree.map(lambda x: _as_real(x, self.state) if is_inexact(x) else x, tree)

    def options(self, tree: Any) -> Any:
        """What goes into the solver with arrays in it, such as a controller, with these in its dtype."""
        return jax.tree.map(lambda x: jnp.asarray(x, self.solver) if is_floating(x) else x, tree)

    def field(self, field: Callable[..., Any], y0: Any, *outputs: Any) -> Callable[..., Any]:
        """A vector field that sees and gives what it should, for `outputs` from `y0`: itself if it does."""
        fits = all(leaf.dtype == _like(leaf.dtype, self.solver) for leaf in jax.tree.leaves((y0, outputs)))
        fits = fits and self.state == self.solver and self.args is None
        return field if fits else _Cast(field, self)


@dataclass(frozen=True)
class _Cast:
    """A vector field whose model has another dtype than the solver."""

    field: Callable[..., Any]
    dtypes: Dtypes

    def __call__(self, t: Any, y: Any, args: Any) -> Any:
        leaves, structure = jax.tree.flatten(self.field(t, self.dtypes.outside(y), self.dtypes.given(args)))
        pairs = zip(leaves, jax.tree.leaves(y), strict=True)
        return jax.tree.unflatten(structure, [jnp.asarray(leaf, like.dtype) for leaf, like in pairs])


def _as_real(x: Any, real: np.dtype) -> jax.Array:
    return jnp.asarray(x, _like(x.dtype, real))


def _like(dtype: Any, real: np.dtype) -> np.dtype:
    """The complex dtype of a real one for a complex dtype, else the real one."""
    return promoted(real, jnp.complex64) if jnp.issubdtype(dtype, jnp.complexfloating) else real
