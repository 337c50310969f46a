"""A function that has been traced, so that an adjoint sees what it closes over."""

from collections.abc import Callable
from functools import partial
from typing import Any

import equinox as eqx
import jax
from jax.core import eval_jaxpr
from jax.extend.core import Jaxpr

from ..types import Array, PyTree


class TracedFunction(eqx.Module):
    """A function of pytrees of arrays, traced: what it closed over is in its leaves.

    As `equinox.filter_closure_convert` makes it, which compares what it is called with with its example,
    devices included. In `jax.shard_map` these differ, though all is as it should be: there an array that is
    made anew is said to lie elsewhere than one that came in.
    """

    converted: PyTree

    @classmethod
    def of(cls, function: Callable[..., PyTree], *example: PyTree) -> "TracedFunction":
        """Trace at an example, of arrays or of their shapes and dtypes."""
        # A function that closes over nothing would be left as it is; of a partial one this is not known.
        return cls(eqx.filter_closure_convert(partial(function), *example))

    @property
    def jaxpr(self) -> Jaxpr:
        return self.converted.jaxpr

    @property
    def consts(self) -> list[Array]:
        """The arrays that it closed over."""
        return self.converted.consts

    @property
    def out_struct(self) -> PyTree:
        """The tree that it gives, with shapes and dtypes in the place of arrays."""
        return self.converted.out_struct

    def __call__(self, *args: PyTree) -> PyTree:
        inputs = jax.tree.leaves(eqx.filter(args, eqx.is_array))
        out = iter(eval_jaxpr(self.jaxpr, self.consts, *inputs))

        def value(leaf: Any) -> Any:
            return next(out) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf

        return jax.tree.map(value, self.out_struct)
