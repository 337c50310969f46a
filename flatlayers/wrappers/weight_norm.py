"""Wrappers that give the weights of a layer a norm of their own."""

import dataclasses
from collections.abc import Mapping
from dataclasses import KW_ONLY
from typing import Any

import jax
import jax.numpy as jnp

from ..core.composite import Wrapper
from ..core.declaration import Param, Tied
from ..core.drawing import fold_in_name
from ..core.fields import Integer, Size
from ..dtypes import at_least_float32, is_traced
from ..layers.fields import AnyLayer, Text
from ..types import DType, Input, Key, Output, Params, Shape, State
from ..vectors.names import UnknownNameError, describe, unknown_name
from ..vectors.record import Record


class WeightNorm(Wrapper):
    """Learn the length and the direction of a weight apart: `w = g * v / ||v||` (Salimans and Kingma, 2016).

    The norm is taken for each output: over all axes of the weight but one. Initially `v` is the weight of the
    layer and `g` its norm, drawn with the layer's own key: for one key `WeightNorm(layer, "weight")` equals
    `layer`.

    **Arguments:**

    - `layer`: the layer.
    - `names`: the name of its parameter, or a tuple of names.
    - `axis`: the axis of the outputs; `None` is that of the layer: 0 for `Dense`, -1 for `Conv`.

    **Inputs:** those of `layer`. **Returns:** what it returns.

    **Parameters:** those of `layer`, where `weight` is replaced by `weight_g`, of its shape with 1 for all
    axes but `axis`, and `weight_v`, of its shape. **States:** those of `layer`.

    **Raises:** `KeyError` for a name that is no parameter of the layer, `ValueError` for an axis that it does
    not have, and for a weight that is zero for some output and so has no direction. This is seen where
    numbers are known: not under `jax.jit`.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import flatlayers as fl
    >>> layer = fl.WeightNorm(fl.Dense(3, 2), "weight")
    >>> ps, st = fl.setup(jax.random.key(0), layer)
    >>> ps
    ComponentVector(float32[10], weight_g=(2, 1), weight_v=(2, 3), bias=(2,))
    >>> plain, _ = fl.setup(jax.random.key(0), fl.Dense(3, 2))
    >>> bool((layer(jnp.ones(3), ps, st)[0] == fl.Dense(3, 2)(jnp.ones(3), plain, st)[0]).all())
    True
    """

    layer: AnyLayer
    names: Text | tuple[Text, ...]
    _: KW_ONLY
    axis: Integer | None = None

    def check_fields(self) -> None:
        _axes_of(self)

    def parameters(self) -> Mapping[str, Any]:
        declared, axes = {}, _axes_of(self)
        parts = self.layer.parameters()
        for name, part in parts.items():
            if name in axes:
                v = dataclasses.replace(part, key_name=part.key_name or name)
                init = InitialNorm(v, axes[name])
                g = Param(_norm_shape(v.shape, axes[name]), init, key_name=v.key_name)
                declared |= {f"{name}_g": g, f"{name}_v": v}
            else:
                declared[name] = part
        return Tied(declared, parts.ties) if isinstance(parts, Tied) else declared

    def forward(self, x: Input, ps: Params, st: State) -> tuple[Output, State]:
        axes = _axes_of(self)
        inner = {name: getattr(ps, name) for name in self.layer.parameters() if name not in axes}
        for name, axis in axes.items():
            g, v = getattr(ps, f"{name}_g"), getattr(ps, f"{name}_v")
            norm = norm_along(v, axis)
            check_not_zero(norm, f"{name}_v")
            # The quotient is exactly 1 at initialisation.
            inner[name] = (g / norm) * v
        return self.layer(x, Record(inner), st)


class SpectralNorm(Wrapper):
    """Divide a weight by its largest singular value `s`: `w = weight / s` (Miyato et al., 2018).

    The weight counts as a matrix `W` of its outputs against all the rest, and `s = ||W' u||`, where `u` is
    the vector of a power iteration: it becomes `W W' u`, scaled to norm 1, `iterations` times in each call
    in training. In the first calls `s` is approximate, and never too large. No gradient passes through `u`.

    **Arguments:**

    - `layer`: the layer.
    - `names`: the name of its parameter, or a tuple of names.
    - `iterations`: the steps of the power iteration in each call in training.
    - `axis`: the axis of the outputs; `None` is that of the layer: 0 for `Dense`, -1 for `Conv`.

    **Inputs:** those of `layer`. **Returns:** what it returns.

    **Parameters:** those of `layer`. **States:** those of `layer`, `weight_u (outputs,)` for a parameter
    `weight`, and the flag `training`.

    **Raises:** `KeyError` for a name that is no parameter of the layer, `ValueError` for an axis that it does
    not have, for `iterations` below 1 and for a weight that is zero, where numbers are known; `TypeError` for
    a complex weight.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import flatlayers as fl
    >>> layer = fl.SpectralNorm(fl.Dense(3, 2), "weight", iterations=20)
    >>> ps, st = fl.setup(jax.random.key(0), layer)
    >>> y, st = layer(jnp.eye(3), ps, st)
    >>> jnp.linalg.svd(y, compute_uv=False)[0].round(3)
    Array(1., dtype=float32)
    """

    layer: AnyLayer
    names: Text | tuple[Text, ...]
    _: KW_ONLY
    iterations: Size = 1
    axis: Integer | None = None

    def check_fields(self) -> None:
        _axes_of(self)

    def states(self, key: Key) -> Mapping[str, Any]:
        declared = self.layer.parameters()
        vectors = {
            f"{name}_u": unit(
                jax.random.normal(fold_in_name(key, f"{name}_u"), declared[name].shape[axis], jnp.float32)
            )
            for name, axis in _axes_of(self).items()
        }
        return {**super().states(key), **vectors, "training": True}

    def forward(self, x: Input, ps: Params, st: State) -> tuple[Output, State]:
        inner, vectors = {name: getattr(ps, name) for name in self.layer.parameters()}, {}
        for name, axis in _axes_of(self).items():
            if jnp.iscomplexobj(inner[name]):
                raise TypeError(f"expected a real {name!r}, found {describe(inner[name])}")
            weight = inner[name].astype(at_least_float32(inner[name].dtype))
            matrix = jnp.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1)
            old = st[f"{name}_u"]
            u = iterate(matrix, old.astype(matrix.dtype), self.iterations if st.training else 0)
            largest = jnp.linalg.norm(matrix.T @ u)
            check_not_zero(largest, name)
            inner[name] = (weight / largest).astype(inner[name].dtype)
            vectors[f"{name}_u"] = u.astype(old.dtype)
        # The layer sees its own state, and the flag, which may be its own too.
        rest = {name: value for name, value in st.items() if name not in vectors}
        y, new = self.layer(x, Record(inner), Record(rest))
        return y, st.replace(**vectors, **new)


@dataclasses.dataclass(frozen=True)
class InitialNorm:
    """An initializer of `weight_g`: the norm of what `weight_v` draws with the same key."""

    v: Param
    axis: int

    def __call__(self, key: Key, shape: Shape, dtype: DType) -> jax.Array:
        norm = norm_along(jnp.asarray(self.v.initial(key, dtype), dtype), self.axis)
        check_not_zero(norm, self.v.key_name or "weight")
        return norm


def norm_along(v: jax.Array, axis: int) -> jax.Array:
    """Return the norm over all axes but one, which stay with size 1."""
    others = tuple(a for a in range(v.ndim) if a != axis % v.ndim)
    return jnp.sqrt(jnp.sum(jnp.real(v * v.conj()), others, keepdims=True)).astype(v.dtype)


def check_not_zero(norm: jax.Array, name: str) -> None:
    """Raise if a norm is known and zero."""
    if is_traced(norm):
        return
    zeros = int(jnp.sum(norm == 0))
    if zeros:
        raise ValueError(
            f"expected norms of {name!r} that are not zero, found {zeros} of {norm.size} zero: "
            "what is divided by them would not be a number"
        )


def iterate(matrix: jax.Array, u: jax.Array, steps: int) -> jax.Array:
    """Find the first left singular vector by power iteration. It is a constant to `jax.grad`."""
    matrix = jax.lax.stop_gradient(matrix)
    for _ in range(steps):
        u = unit(matrix @ unit(matrix.T @ u))
    return jax.lax.stop_gradient(u)


def unit(vector: jax.Array) -> jax.Array:
    """Scale a vector to norm 1; zero stays zero."""
    return vector / jnp.maximum(jnp.linalg.norm(vector), jnp.finfo(vector.dtype).tiny)


def _axes_of(norm: WeightNorm | SpectralNorm) -> dict[str, int]:
    """Return the output axis of each parameter that is named."""
    declared, axes, where = norm.layer.parameters(), {}, type(norm).__name__
    for name in (norm.names,) if isinstance(norm.names, str) else norm.names:
        if name not in declared:
            raise UnknownNameError(
                f"{where}.names: {type(norm.layer).__name__}: {unknown_name(name, declared)}"
            )
        if not isinstance(declared[name], Param):
            raise TypeError(
                f"{where}.names: expected {name!r} to be a parameter of the layer, "
                f"found {describe(declared[name])}"
            )
        if declared[name].declared_transforms():
            raise ValueError(
                f"{where}.names: expected a parameter without bounds, found {name}={declared[name]}: its "
                "norm is not its own to choose"
            )
        axes[name] = output_axis(declared[name]) if norm.axis is None else norm.axis
        shape = declared[name].shape
        if not -len(shape) <= axes[name] < len(shape):
            raise ValueError(
                f"{where}.axis: expected {name!r} with an axis {axes[name]}, found shape {shape}"
            )
    return axes


def output_axis(param: Param) -> int:
    """Return the axis of the outputs: the first of `(out, in)`, the last of `(*kernel, in, out)`."""
    if param.output_axis is not None:
        return param.output_axis
    return 0 if len(param.shape) < 3 else -1


def _norm_shape(shape: Shape, axis: int) -> Shape:
    return tuple(size if a == axis % len(shape) else 1 for a, size in enumerate(shape))
