"""`SplineLayer`: a learned curve."""

import itertools
import math
from dataclasses import KW_ONLY
from typing import Annotated, Literal

import jax
import jax.numpy as jnp

from ..core.declaration import Param
from ..core.fields import Count, Finite, Flag
from ..core.layer import Layer
from ..dtypes import at_least_float32, floating, real_dtype
from ..initializers import from_array, normal
from ..types import Input, Output, Params, State
from .fields import Initial, sequence_of
from .shapes import as_dims


class SplineLayer(Layer):
    """A curve through learned points: `y = s(x)` with `s(grid[i]) = points[i]`.

    It is linear between the points, or the natural cubic spline, whose first two derivatives are
    continuous and whose second derivative is zero at both ends; a call of the latter solves a tridiagonal
    system of the length of the grid. Outside of the grid the first and the last point are held.

    **Arguments:**

    - `grid`: the places of the points, increasing, 2 or more.
    - `dims`: the shape of a point: an integer or a tuple, `()` for a scalar curve.
    - `kind`: `"linear"` or `"cubic"`.
    - `learn_grid`: whether the grid is a parameter too. It has to stay increasing, which is not checked.
    - `init_points`: the initializer of the points, such as `initializers.from_array` for known ones.

    **Inputs:** `x` of shape `(...)`. **Returns:** `(y, st)` with `y` of shape `(..., *dims)`.

    **Parameters:** `points (len(grid), *dims)`, and `grid (len(grid),)` with `learn_grid`, starting at the
    given one. **States:** none.

    **Raises:** `ValueError` for a grid that is too short or not increasing, and for another kind; `TypeError`
    for a complex `x` or a learned grid that is complex.

    >>> import flatlayers as fl
    >>> layer = fl.SplineLayer((0.0, 1.0, 3.0), ())
    >>> layer(2.0, {"points": [5.0, 1.0, 2.0]}, {})[0]
    Array(1.5, dtype=float32)
    """

    grid: Annotated[tuple[float, ...], sequence_of(Finite)]
    dims: Count | tuple[Count, ...]
    _: KW_ONLY
    kind: Literal["linear", "cubic"] = "linear"
    learn_grid: Flag = False
    init_points: Initial = normal

    def check_fields(self) -> None:
        if len(self.grid) < 2 or any(b <= a for a, b in itertools.pairwise(self.grid)):
            raise ValueError(
                f"SplineLayer.grid: expected a grid of 2 or more increasing numbers, found {self.grid}"
            )

    def parameters(self) -> dict[str, Param]:
        n = len(self.grid)
        parameters = {"points": Param((n, *as_dims(self.dims)), self.init_points)}
        return parameters | ({"grid": Param((n,), from_array(self.grid))} if self.learn_grid else {})

    def forward(self, x: Input, ps: Params, st: State) -> tuple[Output, State]:
        x, points = floating(x), floating(ps.points)
        learned = (floating(ps.grid),) if self.learn_grid else ()
        for part in (x, *learned):
            if jnp.issubdtype(part.dtype, jnp.complexfloating):
                raise TypeError(f"expected a real x and a real grid, found {part.dtype}{list(part.shape)}")
        dtype = jnp.result_type(x, points, *learned)
        # Half precisions compute in float32: in theirs points of the grid would fall together.
        wide = at_least_float32(dtype)
        grid = jnp.asarray(learned[0] if learned else self.grid, real_dtype(wide))
        points = points.astype(wide).reshape(len(self.grid), math.prod(as_dims(self.dims)))
        y = _evaluate(x.astype(grid.dtype), grid, points, self.kind == "cubic")
        return y.astype(dtype).reshape(*x.shape, *as_dims(self.dims)), st


def _evaluate(x: jax.Array, grid: jax.Array, points: jax.Array, cubic: bool) -> jax.Array:
    if jnp.iscomplexobj(points):
        return jax.lax.complex(*(_evaluate(x, grid, part, cubic) for part in (points.real, points.imag)))
    # Not `clip`, whose derivative at the ends is a half.
    x = jnp.where(x < grid[0], grid[0], jnp.where(x > grid[-1], grid[-1], x))
    i = jnp.clip(jnp.searchsorted(grid, x, side="right") - 1, 0, grid.size - 2)
    h = (grid[i + 1] - grid[i])[..., None]
    b = (x - grid[i])[..., None] / h
    a = 1 - b
    y = a * points[i] + b * points[i + 1]
    if cubic:
        bend = _second_derivatives(grid, points)
        y = y + h**2 / 6 * ((a**3 - a) * bend[i] + (b**3 - b) * bend[i + 1])
    return y


def _second_derivatives(grid: jax.Array, points: jax.Array) -> jax.Array:
    """Solve for the second derivatives of the natural spline at its points: its first one is continuous."""
    h = jnp.diff(grid)
    slope = jnp.diff(points, axis=0) / h[:, None]
    return jax.lax.linalg.tridiagonal_solve(
        jnp.pad(h[:-1], 1),
        jnp.pad(2 * (h[:-1] + h[1:]), 1, constant_values=1),
        jnp.pad(h[1:], 1),
        jnp.pad(6 * jnp.diff(slope, axis=0), ((1, 1), (0, 0))),
    )
