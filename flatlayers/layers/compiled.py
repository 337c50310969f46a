"""A part of a layer that is compiled once, also where the layer is called without `jax.jit`."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from ..core.data_axis import current_data_axis
from ..types import PyTree


def compiled_once(function: Callable[..., Any], options: tuple[Any, ...], *args: PyTree) -> Any:
    """Return `function(*options, *args)`, compiled once for equal options and arguments of one type.

    A `jax.lax.scan` over a function that is made in the call would be compiled at each call that is not
    inside of a `jax.jit`, and kept. In a program that is being traced nothing is left of it.

    **Arguments:**

    - `function`: a function of a module, which is the same in each call.
    - `options`: values with a hash, such as layers.
    - `args`: pytrees. If they have leaves that are neither arrays nor numbers, nothing is compiled.
    """
    if not all(isinstance(leaf, _NUMBERS) for leaf in jax.tree.leaves(args)):
        return function(*options, *args)
    # The axis is known to layers by a variable, of which JAX's own cache does not know.
    return _compiled(args, function=function, options=options, data_axis=current_data_axis())


_NUMBERS = (jax.Array, np.ndarray, np.generic, int, float, complex)


@functools.partial(jax.jit, static_argnames=("function", "options", "data_axis"), inline=True)
def _compiled(
    args: tuple[PyTree, ...], function: Callable[..., Any], options: tuple[Any, ...], data_axis: str | None
) -> Any:
    return function(*options, *args)
