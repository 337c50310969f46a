"""`MultiScaleDeepEquilibriumNetwork`: the fixed point of several scales at once."""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp

from ..core.fields import Size
from ..core.layer import Layer, as_layer
from ..core.values import Hashable
from ..dtypes import float_dtype
from ..layers.shapes import as_dims, check_count
from ..types import Array, Input, Params, State
from .deq import Equilibrium
from .implicit import Solver


Scales: TypeAlias = tuple[Array, ...]


class MultiScaleDeepEquilibriumNetwork(Equilibrium):
    """A deep equilibrium of several scales (Bai, Koltun and Kolter, 2020): one fixed point of all `z_i`.

    `z_i = fusion_i(couplings[i][0](y_0) + couplings[i][1](y_1) + ...)`, with `y_0 = branches[0]((z_0, x))`
    and `y_j = branches[j](z_j)` for the others. All scales are solved as one state, from zeros.

    **Arguments:**

    - `branches`: a layer for each scale. The first gets the input.
    - `couplings`: a row of layers for each scale: `couplings[i][j]` goes from scale `j` to scale `i`.
    - `fusion`: a layer for each scale, after the sum; a function, which joins the terms of a scale instead of
        the sum; or `None`.
    - `solver`: as in `DeepEquilibriumNetwork`.
    - `scales`: the shape of each `z_i` without batch axes, as a tuple or an integer.
    - `adjoint`, `max_steps`, `fixed_depth`, `jacobian_regularization`, `throw`: as in
        `DeepEquilibriumNetwork`.

    **Inputs:** `x`, with as many axes after the batch axes as the first scale; or a tuple of
    one input per scale, or `None`, and then each branch that has one is called with `(z_i, x_i)`.
    **Returns:** `(z, st)` with the tuple of all `z_i`, of shapes `(..., *scale)`.

    **Parameters:** `branches.layer_0`, ..., `couplings.layer_0.layer_1`, ... and, if they are layers,
    `fusion.layer_0`, .... **States:** the same, for those that have any, and those that
    `DeepEquilibriumNetwork` has of its own.

    **Raises:** `ValueError` for other numbers of layers than scales; and all that
    `DeepEquilibriumNetwork` raises.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import flatlayers as fl
    >>> first = fl.Parallel(lambda z, x: jnp.tanh(z + x), fl.Dense(4, 4), fl.Dense(3, 4))
    >>> couplings = [[lambda z: 0.1 * z, fl.Dense(2, 4)], [fl.Dense(4, 2), lambda z: 0.1 * z]]
    >>> layer = fl.MultiScaleDeepEquilibriumNetwork(
    ...     [first, fl.Dense(2, 2, jnp.tanh)], couplings, None, fl.Anderson(1e-4, 1e-4), [4, 2]
    ... )
    >>> ps, st = fl.setup(jax.random.key(0), layer)
    >>> (fine, coarse), st = layer(jnp.ones((5, 3)), ps, st)
    >>> fine.shape, coarse.shape
    ((5, 4), (5, 2))
    """

    branches: tuple[Layer, ...]
    couplings: tuple[tuple[Layer, ...], ...]
    fusion: tuple[Layer, ...] | Callable[..., Array] | None
    solver: Solver | Hashable
    scales: tuple[Size | tuple[Size, ...], ...]

    def check_fields(self) -> None:
        self.scales = tuple(map(as_dims, self.scales))
        self.branches = tuple(map(as_layer, self.branches))
        self.couplings = tuple(tuple(map(as_layer, row)) for row in self.couplings)
        if isinstance(self.fusion, tuple | list):
            self.fusion = tuple(map(as_layer, self.fusion))
        n = len(self.scales)
        sized = {"branches": self.branches, "couplings": self.couplings, "fusion": self.fusion}
        sized |= {f"couplings[{i}]": row for i, row in enumerate(self.couplings)}
        for name, part in sized.items():
            if isinstance(part, tuple) and len(part) != n:
                raise ValueError(f"expected {name} to have {n} parts, one for each scale, found {len(part)}")
        super().check_fields()

    def start(self, x: Input, ps: Params, st: State) -> tuple[Scales, State]:
        scales = tuple(map(as_dims, self.scales))
        first = jnp.asarray(next(iter(jax.tree.leaves(x))))
        batch = first.shape[: max(0, first.ndim - len(scales[0]))]
        dtype = float_dtype(first, jnp.result_type(float))
        return tuple(jnp.zeros((*batch, *scale), dtype) for scale in scales), st

    def once(self, z: Scales, x: Input, ps: Params, st: State) -> tuple[Scales, State]:
        inputs = x if type(x) is tuple else (x, *(None,) * (len(z) - 1))
        check_count(len(inputs), len(z), "scale")
        pairs = [z if x is None else (z, x) for z, x in zip(z, inputs, strict=True)]
        ys, branches = _call_each(self.branches, pairs, ps.branches, st.branches)
        rows, couplings = [], st.couplings
        for i, row in enumerate(self.couplings):
            name = f"layer_{i}"
            terms, new = _call_each(row, ys, getattr(ps.couplings, name), couplings[name])
            rows.append(terms)
            couplings = couplings.replace(**{name: new})
        join = self.fusion if callable(self.fusion) else lambda *terms: functools.reduce(operator.add, terms)
        zs, st = [join(*terms) for terms in rows], st.replace(branches=branches, couplings=couplings)
        if isinstance(self.fusion, tuple):
            zs, fusion = _call_each(self.fusion, zs, ps.fusion, st.fusion)
            st = st.replace(fusion=fusion)
        return tuple(zs), st


def _call_each(
    layers: Sequence[Layer], xs: Sequence[Input], ps: Params, st: State
) -> tuple[list[Array], State]:
    """Return the outputs of layers, each called with its own input, and their states."""
    ys = []
    for i, (layer, x) in enumerate(zip(layers, xs, strict=True)):
        y, new = layer(x, getattr(ps, f"layer_{i}"), st[f"layer_{i}"])
        ys.append(y)
        st = st.replace(**{f"layer_{i}": new})
    return ys, st
