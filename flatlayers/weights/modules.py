"""`from_equinox` and `from_nnx`: the numbers of a module for a layer, by name."""

from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ..core.layer import Layer
from ..core.setup import initial_states
from ..types import Array, Key
from ..vectors.names import describe
from ..vectors.record import Record
from ..vectors.vector import ComponentVector
from .arrays import Target
from .entries import Library, units_of
from .equinox_table import EQUINOX
from .nnx_table import NNX


def from_equinox(
    module: eqx.Module, layer: Layer, names: Mapping[str, str] | None = None, *, key: Key | None = None
) -> tuple[ComponentVector, Record]:
    """Make the parameters and the state of a layer from an Equinox module, by name.

    Known are `Dense` (`eqx.nn.Linear`), the convolutions, `Embedding`, `LayerNorm`, `GroupNorm`, `RMSNorm`,
    `LSTMCell`, `GRUCell`, `MultiHeadAttention` and `MLP`, inside of any containers; other layers say their
    names in `equinox_names`, see `fl.Foreign`. A child has the name of the attribute there, and `layer_0` of
    a `Chain` or an `MLP` is `layers[0]`. `BatchNorm` of Equinox has its statistics apart, and is refused.
    `fl.FromEquinox` takes any module as it is.

    **Arguments:**

    - `module`: the module.
    - `layer`: the layer.
    - `names`: for the path of a layer of ours that of its module, with dots: `{"layer_1": "layers.2"}`.
    - `key`: the key of states that have one, as a dropout; `jax.random.key(0)` unless given.

    **Returns:** `(ps, st)`, in the dtype of the module's arrays.

    **Raises:** as `fl.from_torch`; `TypeError` for arrays of several dtypes.

    >>> import equinox as eqx
    >>> import jax
    >>> import flatlayers as fl
    >>> module = eqx.nn.MLP(2, 1, 8, 2, key=jax.random.key(0))
    >>> layer = fl.MLP(2, (8, 8), 1, jax.nn.relu)
    >>> ps, st = fl.from_equinox(module, layer)
    >>> bool((ps.layer_1.weight == module.layers[1].weight).all())
    True
    """
    leaves = jax.tree_util.tree_leaves_with_path(eqx.filter(module, eqx.is_inexact_array))
    arrays = {".".join(map(name_of_step, path)): leaf for path, leaf in leaves}
    return _from_arrays(EQUINOX, arrays, layer, names, key)


def from_nnx(
    module: Any, layer: Layer, names: Mapping[str, str] | None = None, *, key: Key | None = None
) -> tuple[ComponentVector, Record]:
    """Make the parameters and the state of a layer from a module of Flax NNX, by name.

    Known are `Dense` (`nnx.Linear`), `Conv`, `CrossCor` and `DepthwiseConv`, `Embedding`, the norms
    (`BatchNorm` with its statistics), `RNNCell` (`nnx.SimpleCell`), `GRUCell`, `LSTMCell` (`nnx.LSTMCell` and
    `OptimizedLSTMCell`), `Recurrence` (`nnx.RNN`) and `MultiHeadAttention`, inside of any containers; other
    layers say their names in `nnx_names`, see `fl.Foreign`. A child has the name of the attribute there, and
    `layer_0` of a `Chain` or an `MLP` is `layers[0]`. Defaults differ: there `epsilon` is 1e-6, or 1e-5 in
    `BatchNorm`, and `nnx.Conv` pads.

    **Arguments:** those of `fl.from_equinox`.

    **Returns:** `(ps, st)`, in the dtype of the module's arrays.

    **Raises:** as `fl.from_equinox`; `ImportError` without Flax.

    >>> import jax
    >>> import flatlayers as fl
    >>> layer = fl.Dense(3, 2)
    >>> try:
    ...     from flax import nnx
    ...     ps, st = fl.from_nnx(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), layer)
    ... except ImportError:  # There is no Flax.
    ...     ps, st = fl.setup(jax.random.key(0), layer)
    >>> ps.weight.shape
    (2, 3)
    """
    try:
        from flax import nnx
    except ImportError:
        raise ImportError("from_nnx: expected Flax, found none; `pip install flax`") from None
    if not isinstance(module, nnx.Module):
        raise TypeError(f"expected a module of Flax NNX, found {describe(module)}")
    # Keys and counts of random numbers are no weights.
    flat = nnx.to_flat_state(nnx.filter_state(nnx.state(module), nnx.Not(nnx.RngState)))
    arrays = {".".join(map(str, path)): jnp.asarray(variable[...]) for path, variable in flat}
    return _from_arrays(NNX, arrays, layer, names, key)


def name_of_step(step: Any) -> str:
    """Return the name of an attribute, the index or the key of a step into a pytree."""
    for attribute in ("name", "idx", "key"):
        if hasattr(step, attribute):
            return str(getattr(step, attribute))
    raise TypeError(f"expected an attribute, an index or a key, found {step!r}")


def _from_arrays(
    library: Library,
    arrays: Mapping[str, Array],
    layer: Layer,
    names: Mapping[str, str] | None,
    key: Key | None,
) -> tuple[ComponentVector, Record]:
    dtypes = {str(array.dtype): key for key, array in arrays.items()}
    if len(dtypes) > 1:
        listed = ", ".join(f"{dtype} for {key!r}" for dtype, key in dtypes.items())
        raise TypeError(f"expected arrays of one dtype, found {listed}")
    dtype = next(iter(dtypes), "float32")
    ps = ComponentVector.zeros(layer.layout, dtype)
    st = initial_states(jax.random.key(0) if key is None else key, layer, ps.dtype)
    target, units = Target(library, layer, ps, st), units_of(library, layer, names, arrays)
    return target.filled(units, {key: np.asarray(array) for key, array in arrays.items()})
