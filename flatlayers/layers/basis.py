"""Bases of functions, and the layer that is linear in their products."""

import functools
import operator
from collections.abc import Callable
from dataclasses import KW_ONLY
from typing import Annotated

import jax
import jax.numpy as jnp

from ..core.declaration import Param
from ..core.fields import Check, Count, Size
from ..core.layer import Layer
from ..dtypes import floating
from ..initializers import glorot_uniform
from ..types import Array, Input, Output, Params, State
from .fields import Initial
from .shapes import check_trailing


class Basis(Layer):
    """The base of layers that expand a number in `n` functions: a subclass gives its `terms`.

    **Inputs:** `x` of shape `(...)`. **Returns:** `(y, st)` with `y` of shape `(..., n)`.
    """

    n: Size

    def terms(self, x: jax.Array) -> list[jax.Array]:
        """The `n` functions at `x`."""
        raise TypeError(f"{type(self).__name__} does not define `terms(self, x)`")

    def forward(self, x: Input, ps: Params, st: State) -> tuple[Output, State]:
        return jnp.stack(self.terms(floating(x)), axis=-1), st


class Polynomial(Basis):
    """The powers `1, x, x^2, ..., x^(n-1)`.

    **Arguments:**

    - `n`: the number of functions.

    **Inputs:** `x` of shape `(...)`. **Returns:** `(y, st)` with `y` of shape `(..., n)`.
    **Parameters and states:** none.

    >>> import flatlayers as fl
    >>> print(fl.Polynomial(4)(2.0, {}, {})[0])
    [1. 2. 4. 8.]
    """

    def terms(self, x: jax.Array) -> list[jax.Array]:
        return _by_recurrence(self.n, x, lambda k, last, before: x * last)


class Chebyshev(Basis):
    """The Chebyshev polynomials of the first kind, `T_0` to `T_{n-1}`: `T_k(cos t) = cos(k t)`.

    By `T_{k+1} = 2 x T_k - T_{k-1}`, for any `x`; orthogonal on `[-1, 1]`.

    **Arguments:**

    - `n`: the number of functions.

    **Inputs:** `x` of shape `(...)`. **Returns:** `(y, st)` with `y` of shape `(..., n)`.
    **Parameters and states:** none.

    >>> import flatlayers as fl
    >>> print(fl.Chebyshev(4)(0.5, {}, {})[0])
    [ 1.   0.5 -0.5 -1. ]
    """

    def terms(self, x: jax.Array) -> list[jax.Array]:
        return _by_recurrence(self.n, x, lambda k, last, before: 2 * x * last - before)


class Legendre(Basis):
    """The Legendre polynomials, `P_0` to `P_{n-1}`, with `P_k(1) = 1`.

    By `(k + 1) P_{k+1} = (2k + 1) x P_k - k P_{k-1}`, for any `x`; orthogonal on `[-1, 1]`.

    **Arguments:**

    - `n`: the number of functions.

    **Inputs:** `x` of shape `(...)`. **Returns:** `(y, st)` with `y` of shape `(..., n)`.
    **Parameters and states:** none.

    >>> import flatlayers as fl
    >>> print(fl.Legendre(3)(0.5, {}, {})[0])
    [ 1.     0.5   -0.125]
    """

    def terms(self, x: jax.Array) -> list[jax.Array]:
        def following(k: int, last: Array, before: Array) -> Array:
            return ((2 * k + 1) * x * last - k * before) / (k + 1)

        return _by_recurrence(self.n, x, following)


class Fourier(Basis):
    """Sines and cosines: `1, sin x, cos x, sin 2x, cos 2x, ...`, `n` of them.

    **Arguments:**

    - `n`: the number of functions.

    **Inputs:** `x` of shape `(...)`. **Returns:** `(y, st)` with `y` of shape `(..., n)`.
    **Parameters and states:** none.

    >>> import flatlayers as fl
    >>> print(fl.Fourier(5)(0.0, {}, {})[0])
    [1. 0. 1. 0. 1.]
    """

    def terms(self, x: jax.Array) -> list[jax.Array]:
        return [jnp.sin((j + 1) // 2 * x) if j % 2 else jnp.cos(j // 2 * x) for j in range(self.n)]


class Cosine(Basis):
    """Cosines of orders 0 to n-1: `1, cos x, cos 2x, ..., cos (n-1)x`.

    **Arguments:**

    - `n`: the number of functions.

    **Inputs:** `x` of shape `(...)`. **Returns:** `(y, st)` with `y` of shape `(..., n)`.
    **Parameters and states:** none.

    >>> import flatlayers as fl
    >>> print(fl.Cosine(3)(0.0, {}, {})[0])
    [1. 1. 1.]
    """

    def terms(self, x: jax.Array) -> list[jax.Array]:
        return [jnp.cos(k * x) for k in range(self.n)]


class Sine(Basis):
    """Sines of orders 1 to n: `sin x, sin 2x, ..., sin nx`.

    **Arguments:**

    - `n`: the number of functions.

    **Inputs:** `x` of shape `(...)`. **Returns:** `(y, st)` with `y` of shape `(..., n)`.
    **Parameters and states:** none.

    >>> import flatlayers as fl
    >>> print(fl.Sine(3)(0.0, {}, {})[0])
    [0. 0. 0.]
    """

    def terms(self, x: jax.Array) -> list[jax.Array]:
        return [jnp.sin(k * x) for k in range(1, self.n + 1)]


def _bases(value: object) -> tuple[Basis, ...]:
    if not isinstance(value, tuple | list) or not value or not all(isinstance(b, Basis) for b in value):
        raise TypeError
    return tuple(value)


Bases = Annotated[tuple[Basis, ...], Check("a tuple of bases such as (Chebyshev(4),)", _bases)]


class TensorProductLayer(Layer):
    """A linear map of all products of basis functions: `y = weight @ (b_1(x_1) ⊗ b_2(x_2) ⊗ ...)`.

    The number of products is that of all bases multiplied: for a few inputs.

    **Arguments:**

    - `bases`: a tuple of bases, one for each input feature.
    - `out_dims`: the number of output features.
    - `init_weight`: the initializer.

    **Inputs:** `x` of shape `(..., len(bases))`. **Returns:** `(y, st)` with `y` of shape
    `(..., out_dims)`.

    **Parameters:** `weight (out_dims, n1 * n2 * ...)`, row-major: the last basis varies fastest.
    **States:** none.

    **Raises:** `ValueError` for another number of features, `TypeError` for what is no basis.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import flatlayers as fl
    >>> layer = fl.TensorProductLayer((fl.Fourier(5), fl.Legendre(3)), 2)
    >>> ps, st = fl.setup(jax.random.key(0), layer)
    >>> ps.weight.shape, layer(jnp.ones((7, 2)), ps, st)[0].shape
    ((2, 15), (7, 2))
    """

    bases: Bases
    out_dims: Count
    _: KW_ONLY
    init_weight: Initial = glorot_uniform

    def parameters(self) -> dict[str, Param]:
        products = functools.reduce(operator.mul, (basis.n for basis in self.bases))
        return {"weight": Param((self.out_dims, products), self.init_weight)}

    def forward(self, x: Input, ps: Params, st: State) -> tuple[Output, State]:
        check_trailing(x, (len(self.bases),))
        x = floating(x)
        values = [basis(x[..., i], {}, {})[0] for i, basis in enumerate(self.bases)]
        return functools.reduce(_outer, values) @ ps.weight.T, st


def _by_recurrence(n: int, x: jax.Array, following: Callable[[int, Array, Array], Array]) -> list[jax.Array]:
    """`1, x` and what follows: term `k + 1` is `following(k, term k, term k - 1)`."""
    terms = [jnp.ones_like(x), x]
    for k in range(1, n - 1):
        terms.append(following(k, terms[k], terms[k - 1]))
    return terms[:n]


def _outer(a: jax.Array, b: jax.Array) -> jax.Array:
    """All products of the last axes, row-major."""
    products = a[..., :, None] * b[..., None, :]
    return products.reshape(*a.shape[:-1], a.shape[-1] * b.shape[-1])
