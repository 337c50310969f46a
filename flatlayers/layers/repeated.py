"""`Repeated`: one layer applied many times, compiled once."""

from dataclasses import KW_ONLY
from typing import Any

import jax
import jax.numpy as jnp

from ..core.composite import Container
from ..core.constraints import constrain
from ..core.declaration import Stacked, as_declared
from ..core.fields import Flag, Size
from ..devices import varying_like
from ..types import Input, Key, Output, Params, PyTree, State
from ..vectors.names import describe
from ..vectors.vector import ComponentVector
from .compiled import compiled_once
from .fields import AnyLayer


class Repeated(Container):
    """A layer applied `n` times: `y = layer_n(... layer_1(x))`.

    It is one `jax.lax.scan`: neither the time to compile nor the size of the program grows with `n`. A
    few small layers run faster written out in a `Chain`.

    **Arguments:**

    - `layer`: a layer or a function, whose output is like its input.
    - `n`: how often it is applied, 1 or more.
    - `shared`: whether all applications have the same parameters; otherwise each has its own.
    - `input_injection`: whether the layer gets `(y, x)`, what came out last and the input of all,
        instead of `y`; `y` starts at `x`.

    **Inputs:** `x`, what the layer takes. **Returns:** `(y, st)` with `y` like `x`, in their promoted
    dtype.

    **Parameters:** those of the layer under `layer`, `n` copies stacked along a leading axis, each drawn
    with the key folded with its index; just the layer's own if they are `shared`. **States:** those of
    the layer under `layer`, stacked: each application has its own, `shared` or not.

    **Raises:** `ValueError` for `n` below 1 and for a layer whose output is not like its input.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import flatlayers as fl
    >>> model = fl.Repeated(fl.Dense(3, 3, jnp.tanh), 4)
    >>> ps, st = fl.setup(jax.random.key(0), model)
    >>> ps.layer.weight.shape
    (4, 3, 3)
    >>> model(jnp.ones((5, 3)), ps, st)[0].shape
    (5, 3)
    >>> float(fl.Repeated(lambda x: x + 1, 4)(3.0, {"layer": {}}, {"layer": {}})[0])
    7.0
    """

    layer: AnyLayer
    n: Size
    _: KW_ONLY
    shared: Flag = False
    input_injection: Flag = False

    def parameters(self) -> dict[str, Any]:
        return {"layer": self.layer if self.shared else Stacked(self.layer, self.n)}

    def states(self, key: Key) -> dict[str, Any]:
        return as_declared({"layer": Stacked(self.layer, self.n)}).declared_states(key) or {}

    def forward(self, x: Input, ps: Params, st: State) -> tuple[Output, State]:
        ps = ps.layer
        if isinstance(ps, ComponentVector):
            ps = constrain(self.layer.declared_transforms(), ps.unpack())

        x = jax.tree.map(jnp.asarray, x)
        y, states = compiled_once(_run, (self,), x, ps, st.layer)
        return y, st.replace(layer=states)


def _run(model: Repeated, x: Input, ps: Params, st: State) -> tuple[Output, State]:
    """Apply the layer `n` times: what came out last, and the states of all applications."""

    def step(y: PyTree, own: PyTree) -> tuple[Any, Any]:
        parameters, state = own
        inputs = (y, x) if model.input_injection else y
        return model.layer(inputs, ps if model.shared else parameters, state)

    own = (None if model.shared else ps, st)
    x = _like_output(x, jax.eval_shape(lambda x: step(x, jax.tree.map(lambda a: a[0], own))[0], x))
    x = varying_like(x, (x, ps, own))
    return jax.lax.scan(step, x, own, length=model.n)


def _like_output(x: Input, y: PyTree) -> PyTree:
    """`x` in the dtypes that it and the output of a layer promote to, if they have the same shapes."""
    same = jax.tree.structure(x) == jax.tree.structure(y)
    if not same or jax.tree.map(jnp.shape, x) != jax.tree.map(jnp.shape, y):
        raise ValueError(f"expected a layer whose output is like x, {describe(x)}, found {describe(y)}")
    return jax.tree.map(lambda a, b: a.astype(jnp.result_type(a, b)), x, y)
