"""From the free numbers of a vector to the values that layers see, and back."""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from ..dtypes import is_traced
from ..transforms import Transform
from ..types import Array, ArrayLike, DType
from ..vectors.layout import Layout, leaves_of
from ..vectors.names import describe
from ..vectors.packing import pack
from ..vectors.record import Record
from ..vectors.vector import ComponentVector
from .declaration import Declared, as_declared
from .matching import check_parameters


# The transforms of the parameters that have one, by path.
Transforms = Mapping[str, Transform]


def constrained(model: "Declared | Mapping[str, Any]", ps: ComponentVector) -> Record:
    """Return all parameters as the layers of a model see them: inside of their bounds.

    A vector holds free numbers, a `Record` values. A layer that is called with a vector does this itself;
    called with the record it takes it as it is. So a mechanism that is no layer reads its rates from here,
    and hands on what belongs to a layer: `values = fl.constrained(model, ps)`, then `values.growth` and
    `net(x, values.net, st.net)`.

    **Arguments:**

    - `model`: a layer, or a mapping as `fl.setup` takes it.
    - `ps`: its vector, which may have leading axes: an ensemble, a chain of samples.

    **Returns:** a `Record`. Without bounds and transforms it is `ps.unpack()`.

    **Raises:** `TypeError` for what is no vector, `ValueError` for the vector of another model and for a
    transform that changes shapes or dtypes.

    >>> import jax
    >>> import flatlayers as fl
    >>> model = {"growth": fl.Param((), fl.initializers.ones, bounds=(0, 10)), "net": fl.Dense(2, 1)}
    >>> ps, st = fl.setup(jax.random.key(0), model)
    >>> ps.growth, fl.constrained(model, ps).growth
    (Array(-2.1972246, dtype=float32), Array(1., dtype=float32))
    """
    if not isinstance(ps, ComponentVector):
        raise TypeError(f"constrained: expected a ComponentVector, found {describe(ps)}")
    declared = as_declared(model)
    check_parameters(_layout_of(declared), ps.layout)
    return constrain(declared.declared_transforms(), ps.unpack())


def unconstrained(
    model: "Declared | Mapping[str, Any]", values: Mapping[str, Any], dtype: DType | None = None
) -> ComponentVector:
    """Return the vector whose layers see the given values: the inverse of `fl.constrained`.

    **Arguments:**

    - `model`: a layer, or a mapping as `fl.setup` takes it.
    - `values`: a `Record` or a nested mapping of all parameters. As for `ComponentVector.of`, all may have
        the same leading axes.
    - `dtype`: the dtype of the vector; without it that of the arrays.

    **Returns:** a `ComponentVector`.

    **Raises:** `ValueError` for a value on or outside of its bounds, where numbers are known (else it is not
    finite), with its path; `TypeError` for a vector, which has free numbers already; and as
    `ComponentVector.of`.

    >>> import jax.numpy as jnp
    >>> import flatlayers as fl
    >>> model = {"growth": fl.Param((), fl.initializers.ones, bounds=(0, 10))}
    >>> fl.unconstrained(model, {"growth": 5.0}).data
    Array([0.], dtype=float32)
    """
    if isinstance(values, ComponentVector):
        raise TypeError(
            "unconstrained: expected values in a Record or a mapping, found a ComponentVector, whose numbers "
            "are free ones"
        )
    declared = as_declared(model)
    layout = _layout_of(declared)
    leaves = free_leaves(declared.declared_transforms(), leaves_of(layout, values), dtype)
    return ComponentVector(pack(layout, leaves, dtype), layout)


def constrain(transforms: Transforms, values: Record) -> Record:
    """Return the record with the values of the free numbers at some paths; itself, if there are none."""
    for path, transform in transforms.items():
        values = _changed(values, path.split("."), lambda free, p=path, t=transform: _forward(p, t, free))
    return values


def free_leaves(
    transforms: Transforms, leaves: Mapping[str, Any], dtype: DType | None = None
) -> dict[str, Any]:
    """Return all leaves by path, with the free numbers of the values at some paths."""
    known = {path: transform for path, transform in transforms.items() if path in leaves}
    free = {path: _inverse(path, transform, leaves[path], dtype) for path, transform in known.items()}
    return {**leaves, **free}


def _forward(path: str, transform: Transform, free: Array) -> Array:
    value = transform.forward(free)
    if value.shape != free.shape or value.dtype != free.dtype:
        raise ValueError(f"{path!r}: expected {transform} to keep {describe(free)}, found {describe(value)}")
    return value


def _inverse(path: str, transform: Transform, value: ArrayLike, dtype: DType | None) -> Array:
    value = jnp.asarray(value, dtype)
    if jnp.issubdtype(value.dtype, jnp.complexfloating):
        raise TypeError(f"{path!r}: expected real numbers for {transform}, found {describe(value)}")
    free = transform.inverse(value)
    if not is_traced(free):
        wrong = np.flatnonzero(~np.isfinite(np.asarray(free, float)))
        if wrong.size:
            found = np.asarray(value, float).ravel()[wrong[0]]
            raise ValueError(f"{path!r}: expected values inside of {transform}, found {found:g}")
    return free


def _changed(values: Record, path: list[str], change: Callable[[Array], Array]) -> Record:
    name, *below = path
    part = values[name]
    return values.replace(**{name: _changed(part, below, change) if below else change(part)})


def _layout_of(declared: Declared) -> Layout:
    layout = declared.layout
    if not isinstance(layout, Layout):
        raise TypeError(f"expected a layer or a mapping, found {declared!r}")
    return layout
