"""Floating numbers in another dtype, and a layer that computes in one of its own."""

from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

from ..core.composite import Wrapper
from ..core.fields import Check
from ..layers.fields import AnyLayer
from ..types import DType, Input, Output, Params, PyTree, State


def cast(ps: PyTree, dtype: DType) -> PyTree:
    """Convert floating numbers to another dtype.

    Integers, booleans, keys, complex numbers and the static flags of a state stay as they are. For a
    `ComponentVector` it is one conversion of the whole vector, and its transpose is another: a model called
    with `fl.cast(ps, jnp.bfloat16)` computes in bfloat16, and the gradient with respect to `ps`
    has the dtype of `ps`. (It is the float32 vector that an optimiser steps: half precisions round small
    updates away.)

    **Arguments:**

    - `ps`: a `ComponentVector`, a state, an array, or any pytree of them.
    - `dtype`: a floating dtype.

    **Returns:** what `ps` is, with the same layout or structure.

    **Raises:** `TypeError` for a dtype that is not floating; `ValueError` for float64 where
    `jax_enable_x64` is off, and JAX would give float32 in its place.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import flatlayers as fl
    >>> model = fl.Dense(3, 2)
    >>> ps, st = fl.setup(jax.random.key(0), model)
    >>> fl.cast(ps, jnp.bfloat16)
    ComponentVector(bfloat16[8], weight=(2, 3), bias=(2,))
    >>> x = jnp.ones(3, jnp.bfloat16)
    >>> jax.grad(lambda ps: model(x, fl.cast(ps, jnp.bfloat16), st)[0].sum())(ps).dtype
    dtype('float32')
    """
    found = _available(_floating_dtype(dtype))
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, found) if _is_floating(leaf) else leaf, ps)


def f16(ps: PyTree) -> PyTree:
    """Return `fl.cast(ps, jnp.float16)`: 5 bits of exponent, so that 65504 is the largest number; 3 digits.

    >>> import jax.numpy as jnp
    >>> import flatlayers as fl
    >>> fl.f16(jnp.ones(2))
    Array([1., 1.], dtype=float16)
    """
    return cast(ps, jnp.float16)


def bf16(ps: PyTree) -> PyTree:
    """Return `fl.cast(ps, jnp.bfloat16)`: the range of float32, with 2 to 3 digits.

    >>> import jax.numpy as jnp
    >>> import flatlayers as fl
    >>> fl.bf16(jnp.array([1.0, 1e30])).dtype
    dtype(bfloat16)
    """
    return cast(ps, jnp.bfloat16)


def f32(ps: PyTree) -> PyTree:
    """Return `fl.cast(ps, jnp.float32)`.

    >>> import flatlayers as fl
    >>> fl.f32(fl.Record(mean=0.5, count=3, training=True))
    Record(mean=float32[], count=3, training=True)
    """
    return cast(ps, jnp.float32)


def f64(ps: PyTree) -> PyTree:
    """Return `fl.cast(ps, jnp.float64)`.

    **Raises:** `ValueError` where `jax_enable_x64` is off.

    >>> import jax
    >>> import flatlayers as fl
    >>> with jax.enable_x64(True):
    ...     print(fl.f64(fl.ComponentVector.of({"a": 1.0}, dtype="float32")).dtype)
    float64
    """
    return cast(ps, jnp.float64)


def _floating_dtype(dtype: DType | None) -> np.dtype:
    # `float` is JAX's default float, as everywhere in JAX.
    try:
        found = jnp.dtype(jnp.result_type(float) if dtype is float else dtype)
    except TypeError:
        found = None
    if dtype is None or found is None or not jnp.issubdtype(found, jnp.floating):
        raise TypeError(f"expected a floating dtype, found {dtype!r}")
    return found


# As a class all spellings of a dtype are equal, and it is shown as `float16`.
FloatingDtype = Annotated[Any, Check("a floating dtype", lambda dtype: _floating_dtype(dtype).type)]


class AlternatePrecision(Wrapper):
    """Compute a layer in another dtype: `y = layer(cast(x), cast(ps))`, cast back to the dtype of `x`.

    The parameters stay as they are in the vector, and so do the states: running statistics, which half
    precisions would lose, are handed on in their own dtype and returned in it. Gradients come back in the
    dtype of `x` and `ps`; on the way through the layer they are in `dtype`, where float16 takes those under
    6e-8 for zero.

    For a whole model, cast the vector instead: that is one conversion, this is one per leaf.

    **Arguments:**

    - `layer`: the layer.
    - `dtype`: the floating dtype to compute in.

    **Inputs:** those of `layer`; its integers, booleans and keys stay as they are. Frozen
    parameters are state: `fl.freeze` goes around this layer, not inside.

    **Returns:** what it returns, with floating numbers in the dtype of `x`: the promoted one, if `x` has
    several; that of the parameters, if it has none, as for the indices of an `Embedding`.

    **Parameters and states:** those of `layer`.

    **Raises:** `TypeError` for a dtype that is not floating; `ValueError`, when it is called, for float64
    where `jax_enable_x64` is off.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import flatlayers as fl
    >>> layer = fl.AlternatePrecision(fl.Chain(lambda x: x / 3), jnp.float16)
    >>> ps, st = fl.setup(jax.random.key(0), layer)
    >>> layer(jnp.ones(()), ps, st)[0]
    Array(0.33325195, dtype=float32)
    """

    layer: AnyLayer
    dtype: FloatingDtype

    def forward(self, x: Input, ps: Params, st: State) -> tuple[Output, State]:
        y, new = self.layer(cast(x, self.dtype), cast(ps, self.dtype), st)
        return _in_dtype_of((x, ps), y), _in_dtypes_of(st, new)


def _is_floating(leaf: object) -> bool:
    return jnp.issubdtype(getattr(leaf, "dtype", type(leaf)), jnp.floating)


def _available(dtype: np.dtype) -> np.dtype:
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise ValueError(
            f"expected a dtype that JAX has, found {dtype} while jax_enable_x64 is off; "
            'jax.config.update("jax_enable_x64", True), first of all, turns it on'
        )
    return dtype


def _in_dtype_of(trees: tuple[PyTree, ...], y: PyTree) -> PyTree:
    """Return `y` in the dtype of the floating arrays of the first tree that has any."""
    for tree in trees:
        floats = [leaf for leaf in jax.tree.leaves(tree) if hasattr(leaf, "dtype") and _is_floating(leaf)]
        if floats:
            with jax.numpy_dtype_promotion("standard"):
                return cast(y, jnp.result_type(*floats))
    return y


def _in_dtypes_of(old: State, new: State) -> State:
    """Return a new state in the dtypes of the old one, if they are of one structure."""
    if jax.tree.structure(old) != jax.tree.structure(new):
        return new
    return jax.tree.map(
        lambda a, b: jnp.asarray(b, jnp.result_type(a)) if _is_floating(a) and _is_floating(b) else b,
        old,
        new,
    )
