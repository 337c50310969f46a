"""Checks of what a user gives to `train_loop` and `batches`."""

from collections.abc import Mapping
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

from ..core.fields import Check, Function, checked
from ..dtypes import is_inexact
from ..types import Array
from ..vectors.names import describe
from .per_leaf import Optimizer


def check_arguments(loss: object, ps: object, optimizer: object, callback: object) -> None:
    """Say what cannot be an argument of `train_loop`. **Raises:** `TypeError`."""
    checked(Function, "train_loop: loss", loss)
    checked(_OfOptax, "train_loop: optimizer", optimizer)
    checked(Function | None, "train_loop: callback", callback)
    for path, leaf in jax.tree_util.tree_flatten_with_path(ps)[0]:
        if not (is_inexact(leaf) if hasattr(leaf, "dtype") else isinstance(leaf, float | complex)):
            place = "" if hasattr(ps, "layout") else jax.tree_util.keystr(path)
            raise TypeError(
                f"train_loop: expected floating parameters, found {describe(leaf)} as ps{place}; what is not "
                "trained can be in the state"
            )


def metrics_as_arrays(metrics: object) -> dict[str, Array]:
    """Return the metrics of a loss. **Raises:** `TypeError` for what is no mapping of names to numbers."""
    if not isinstance(metrics, Mapping) or not all(map(_is_metric, metrics, metrics.values())):
        raise TypeError(f"train_loop: expected metrics as a mapping of numbers, found {describe(metrics)}")
    return {name: jnp.asarray(metric) for name, metric in metrics.items()}


def check_key(where: str, key: object) -> None:
    """Say what is no PRNG key, of the new kind or the old. **Raises:** `TypeError`."""
    is_old = isinstance(key, jax.Array | np.ndarray) and key.dtype == jnp.uint32 and key.ndim == 1
    is_new = isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and not key.ndim
    if not (is_old or is_new):
        raise TypeError(f"{where}: expected a PRNG key such as jax.random.key(0), found {describe(key)}")


def _is_metric(name: object, value: Any) -> bool:
    if not hasattr(value, "dtype"):
        return isinstance(name, str) and isinstance(value, bool | int | float)
    is_real = any(jnp.issubdtype(value.dtype, kind) for kind in (jnp.bool_, jnp.integer, jnp.floating))
    return isinstance(name, str) and is_real and value.shape == ()


def _optimizer(value: object) -> object:
    if not isinstance(value, Optimizer) or isinstance(value, type):
        raise TypeError
    return value


_OfOptax = Annotated[object, Check("an optimiser of optax, such as optax.adam(1e-3)", _optimizer)]
