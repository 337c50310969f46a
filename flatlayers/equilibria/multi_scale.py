"""`MultiScaleDeepEquilibriumNetwork`: the fixed point of several scales at once."""

import dataclasses
import functools
import operator
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY
from typing import Any

import jax
import jax.numpy as jnp
import optimistix as optx

from ..core.composite import Container
from ..core.fields import Flag, Size
from ..core.layer import Layer, WrappedFunction, as_layer, call
from ..core.values import hashable, plain
from ..layers.shapes import as_dims, check_count
from ..vectors.record import Record
from .deq import DeepEquilibriumNetwork, float_dtype


class MultiScaleDeepEquilibriumNetwork(Container):
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
    - `adjoint`, `max_steps`, `fixed_depth`, `jacobian_regularisation`, `throw`: as in
        `DeepEquilibriumNetwork`.

    **Inputs:** `x`, with as many axes after the batch axes as the first scale; or a tuple of an input a
    scale, `None` for none, and then each branch that has one is called with `(z_i, x_i)`.
    **Returns:** `(z, st)` with the tuple of all `z_i`, of shapes `(..., *scale)`.

    **Parameters:** `branches.layer_0`, ..., `couplings.layer_0.layer_1`, ... and, if they are layers,
    `fusion.layer_0`, .... **States:** the same, and those that `DeepEquilibriumNetwork` has of its own.

    **Raises:** `ValueError` for other numbers of layers than scales; what `DeepEquilibriumNetwork` raises.

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
    fusion: tuple[Layer, ...] | Callable[..., Any] | None
    solver: Any
    scales: tuple[Size | tuple[Size, ...], ...]
    _: KW_ONLY
    adjoint: Any = None
    max_steps: Size = 50
    fixed_depth: Size | None = None
    jacobian_regularisation: Size | Flag | None = None
    throw: Flag = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "scales", tuple(map(as_dims, self.scales)))
        object.__setattr__(self, "solver", hashable(self.solver))
        object.__setattr__(self, "adjoint", hashable(self.adjoint))
        object.__setattr__(self, "branches", tuple(map(as_layer, self.branches)))
        object.__setattr__(self, "couplings", tuple(tuple(map(as_layer, row)) for row in self.couplings))
        if isinstance(self.fusion, tuple | list):
            object.__setattr__(self, "fusion", tuple(map(as_layer, self.fusion)))
        n = len(self.scales)
        sized = {"branches": self.branches, "couplings": self.couplings, "fusion": self.fusion}
        sized |= {f"couplings[{i}]": row for i, row in enumerate(self.couplings)}
        for name, part in sized.items():
            if isinstance(part, tuple) and len(part) != n:
                raise ValueError(f"expected {name} to have {n} parts, one for each scale, found {len(part)}")
        _ = self.network

    @functools.cached_property
    def network(self) -> DeepEquilibriumNetwork:
        """The deep equilibrium network of the tuple of scales that this is."""
        return DeepEquilibriumNetwork(
            _Scales(self.branches, self.couplings, self.fusion),
            plain(self.solver),
            init=WrappedFunction(_ZeroScales(tuple(map(as_dims, self.scales)))),
            adjoint=plain(self.adjoint),
            max_steps=self.max_steps,
            fixed_depth=self.fixed_depth,
            jacobian_regularisation=self.jacobian_regularisation,
            throw=self.throw,
        )

    def states(self, key: jax.Array) -> Mapping[str, Any]:
        own = {name: part for name, part in self.network.states(key).items() if name not in _PARTS}
        return {**super().states(key), **own}

    def forward(self, x: Any, ps: Any, st: Any) -> tuple[Any, Any]:
        solution, st = self._solve(x, ps, st)
        return solution.value, st

    def solve(self, x: Any, ps: Any, st: Any) -> tuple[optx.Solution, Record]:
        """Solve, and return `(solution, st)` with optimistix's own solution object."""
        return call(self, self._solve, x, ps, st)

    def _solve(self, x: Any, ps: Any, st: Any) -> tuple[optx.Solution, Record]:
        names = self.children()
        inner = Record({name: part for name, part in st.items() if name in names})
        own = {name: part for name, part in st.items() if name not in names}
        solution, new = self.network._solve(x, Record(model=ps, init={}), Record(own, model=inner, init={}))
        return solution, st.replace(**new.model, **{name: new[name] for name in own})


class _Scales(Container):
    """One application of a `MultiScaleDeepEquilibriumNetwork`: called with the tuple of scales and `x`."""

    branches: tuple[Layer, ...]
    couplings: tuple[tuple[Layer, ...], ...]
    fusion: tuple[Layer, ...] | Callable[..., Any] | None

    def forward(self, x: Any, ps: Any, st: Any) -> tuple[Any, Any]:
        zs, x = x
        inputs = x if type(x) is tuple else (x, *(None,) * (len(zs) - 1))
        check_count(len(inputs), len(zs), "scale")
        zs = [z if x is None else (z, x) for z, x in zip(zs, inputs, strict=True)]
        ys, branches = _call_each(self.branches, zs, ps.branches, st.branches)
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


@dataclasses.dataclass(frozen=True)
class _ZeroScales:
    """Zeros for each scale, with the batch axes of the input."""

    scales: tuple[tuple[int, ...], ...]

    def __call__(self, x: Any) -> Any:
        first = jnp.asarray(next(iter(jax.tree.leaves(x))))
        batch = first.shape[: max(0, first.ndim - len(self.scales[0]))]
        return tuple(jnp.zeros((*batch, *scale), float_dtype(first)) for scale in self.scales)


def _call_each(layers: Any, xs: Any, ps: Any, st: Record) -> tuple[list[Any], Record]:
    ys = []
    for i, (layer, x) in enumerate(zip(layers, xs, strict=True)):
        y, new = layer(x, getattr(ps, f"layer_{i}"), st[f"layer_{i}"])
        ys.append(y)
        st = st.replace(**{f"layer_{i}": new})
    return ys, st


_PARTS = ("model", "init")
