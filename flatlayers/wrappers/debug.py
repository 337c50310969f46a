"""`debug`: the layer in which the first NaN or infinity appears."""

import functools
import math
import textwrap
from collections.abc import Callable
from dataclasses import KW_ONLY
from typing import Any, Literal

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
from jax.interpreters import ad, batching, mlir

from ..checks import error_if
from ..core.fields import checked as checked_field
from ..core.layer import Layer, display_name
from ..core.rebuild import shared_names
from ..dtypes import is_traced
from ..layers.fields import Text
from ..types import Input, Output, Params, PyTree, State
from ..vectors.names import join_path
from .layer_map import Model, Part, rebuilt, replaceable_parts
from .transparent import Transparent


Direction = Literal["forward", "backward", "both"]


def debug(model: Model, *, nan: Direction = "both") -> Any:
    """Return the same model, which raises at the first NaN or infinity and names the layer it comes from.

    It has the same parameters and states and computes the same. Each leaf layer (one that has no others in
    its fields) is checked in each call, under `jax.jit`, `jax.grad` and `jax.vmap` too, and inside solvers:
    also in steps that an adaptive solver would reject. The message says what was found, and so who made it:

    - the layer, for its output, and for the cotangents that leave it backward, those of its input and of its
        parameters;
    - what is around the layer, for its input, for its parameters, and for the cotangent of its output.

    Checks take time, and keep XLA from fusing layers with each other, so that compiled results may differ in
    the last digit. A value that XLA does not compute, because nothing needs it, is not checked.

    **Arguments:**

    - `model`: a layer, or a mapping as `fl.setup` takes it.
    - `nan`: what to check: `"forward"`, input, parameters and output; `"backward"`, their cotangents; or
        `"both"`.

    **Returns:** the model, with a `DebugLayer` around each leaf.

    **Raises:** `ValueError` for another `nan`. The call raises what `equinox.error_if` raises, when it runs:
    with `jax.jit` a `jax.errors.JaxRuntimeError`, with `equinox.filter_jit` and without either a shorter
    `EquinoxRuntimeError`.

    >>> import jax, re
    >>> import jax.numpy as jnp
    >>> import flatlayers as fl
    >>> model = fl.debug(fl.Chain(jnp.sin, jnp.log))
    >>> try:
    ...     model(-jnp.ones(2), *fl.setup(jax.random.key(0), model))
    ... except RuntimeError as error:
    ...     print(re.findall("NaN.*", str(error))[-1])
    NaN or infinity in the output of layer 'layer_1' (WrappedFunction(log))
    """
    return _debugged(model, "", checked_field(Direction, "debug: nan", nan))


class DebugLayer(Transparent):
    """A layer that raises at a NaN or an infinity and says where. `fl.debug` puts one around each leaf.

    **Arguments:**

    - `layer`: the layer. Its attributes are those of the wrapper, too.
    - `path`: where it stands in the model, for the message.
    - `nan`: `"forward"`, `"backward"` or `"both"`, as for `fl.debug`.

    **Inputs:** those of `layer`. **Returns:** what it returns.

    **Parameters and states:** those of `layer`.

    >>> import flatlayers as fl
    >>> fl.debug(fl.Chain(fl.Dense(2, 3))).layers["layer_0"]
    DebugLayer(Dense(2, 3), 'layer_0')
    """

    path: Text
    _: KW_ONLY
    nan: Direction = "both"

    def forward(self, x: Input, ps: Params, st: State) -> tuple[Output, State]:
        x = self.watched(x, "input", "its own backward pass made it")
        ps = self.watched(ps, "parameters", "its own backward pass made it")
        y, st = self.layer(x, ps, st)
        return self.watched(y, "output", "it comes from what follows the layer"), st

    def watched(self, tree: PyTree, what: str, origin: str) -> PyTree:
        """Return `tree`, in which a NaN or an infinity raises, and so does one in its cotangent."""
        line = textwrap.shorten(repr(self.layer), 160, placeholder="...")
        place = f"the {what} of layer {self.path or display_name(self.layer)!r} ({line})"
        if self.nan != "backward":
            tree = _on_numbers(lambda x: checked(x, f"NaN or infinity in {place}"), tree)
        if self.nan != "forward":
            message = f"NaN or infinity in the cotangent of {place}: {origin}"
            check = functools.partial(cotangent_checked.bind, message=message, transposed=False)
            tree = _on_numbers(check, tree)
        return tree


def _debugged(model: Part, path: str, nan: Direction) -> Any:
    children = replaceable_parts(model)
    if isinstance(model, Layer) and not children:
        return DebugLayer(model, path, nan=nan)
    shared = shared_names(model) if isinstance(model, Layer) else {}
    return rebuilt(
        model,
        {
            name: _debugged(child, join_path(path, shared.get(name, name)), nan)
            for name, child in children.items()
        },
    )


def checked(x: jax.Array, message: str) -> jax.Array:
    """Return `x` if all of its numbers are finite; else raise when it is used."""
    bad = ~jnp.isfinite(x).all()
    if not is_traced(bad) and not bad:
        # `equinox.error_if` would compile a program to find out the same.
        return x
    return error_if(x, bad, f"flatlayers debug: {message}")


def _identity(x: jax.Array, *, message: str, transposed: bool) -> jax.Array:
    return checked(x, message) if transposed else x


# The identity, whose transpose is checked. It has to be a primitive: `jax.custom_vjp` would stop `jax.jvp`,
# which implicit solvers need, and `jax.custom_derivatives.linear_call` has no rule for `jax.vmap`. A linear
# primitive passes through all transformations. The tangent of a cotangent is checked too: it is what
# `diffrax.BacksolveAdjoint` computes with.
cotangent_checked = jax.extend.core.Primitive("cotangent_checked")
cotangent_checked.def_impl(_identity)
cotangent_checked.def_abstract_eval(lambda x, *, message, transposed: x)
ad.deflinear2(
    cotangent_checked,
    lambda cotangent, x, *, message, transposed: [
        cotangent_checked.bind(cotangent, message=message, transposed=not transposed)
    ],
)
batching.defvectorized(cotangent_checked)
mlir.register_lowering(cotangent_checked, mlir.lower_fun(_identity, multiple_results=False))


def _on_numbers(f: Callable[[jax.Array], jax.Array], tree: PyTree) -> PyTree:
    """Apply `f` to the floating arrays in a tree, and to numbers that are not finite."""
    return jax.tree.map(lambda leaf: f(jnp.asarray(leaf)) if _is_checked(leaf) else leaf, tree)


def _is_checked(leaf: object) -> bool:
    if isinstance(leaf, float):
        return not math.isfinite(leaf)
    return isinstance(leaf, jax.Array | np.ndarray) and jnp.issubdtype(leaf.dtype, jnp.inexact)
