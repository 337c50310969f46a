"""Initial values of parameters: `init(key, shape, dtype)`.

The weights of a layer that maps `fan_in` numbers to `fan_out` are drawn with a spread that keeps
the size of what passes through it. The fans are read off the shape: `(out, in)` for a matrix,
`(*kernel, in, out)` with three axes or more, `(1, n)` for a vector; a `Param` may say otherwise.

A complex parameter has a real and an imaginary part that are drawn alike and apart, each over `sqrt(2)`:
so the mean of `|w|²` is that of a real one. The columns or rows of `orthogonal` are then those of a unitary
matrix.

Called with options, by name, an initializer gives another one: `glorot_uniform(gain=0.1)`,
`normal(stddev=0.02)`.
"""

import dataclasses
import functools
import importlib
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Annotated, Any, overload

import jax
import jax.numpy as jnp
import numpy as np

from .core.counters import from_number
from .core.fields import Check, Finite, Fraction, NonNegative, checked
from .core.values import ArrayContent, Value
from .dtypes import at_least_float32
from .types import Array, ArrayLike, DType, Key, Shape
from .vectors.names import describe


# The numbers of inputs and outputs.
Fans = tuple[int, int]
# The gain of a ReLU.
SQRT_2 = math.sqrt(2)


def _number(value: object) -> complex:
    if not isinstance(value, int | float | complex | np.number | np.bool_):
        raise TypeError
    return value  # pyright: ignore[reportReturnType]


Number = Annotated[complex, Check("a number", _number)]


@dataclasses.dataclass(frozen=True, eq=False)
class Initializer(Value):
    """`init(key, shape, dtype)` draws an array; `init(**options)` gives another initializer.

    The arguments for a draw are given by place, options by name, but for the value of `constant`.

    **Arguments:**

    - `draw`: a function `draw(key, shape, dtype, *, **options)`. If it takes `fans`, it is given the
        pair `(fan_in, fan_out)`.
    - `options`: the options that are set, as pairs of name and value.
    - `fans`: the fans, if they are not those of the shape.
    - `by_number`: whether `draw` draws each number from its own bits and no others, whatever the shape: so
        parameters with very many numbers are drawn in parts.

    **Raises:** `TypeError` for an option by place, for one that there is not or that is no number,
    `ValueError` for one that is not finite or out of range; when it draws, `TypeError` for complex values of
    a real parameter.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> from flatlayers.initializers import constant, normal
    >>> normal(stddev=0.1)
    normal(stddev=0.1)
    >>> constant(3.0)(jax.random.key(0), (2,), jnp.float32)
    Array([3., 3.], dtype=float32)
    """

    draw: Callable[..., jax.Array]
    options: tuple[tuple[str, Any], ...] = ()
    fans: tuple[int | None, int | None] = (None, None)
    by_number: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "__doc__", self.draw.__doc__)

    @overload
    def __call__(self, key: Key, shape: Shape, dtype: DType = float, /) -> Array: ...
    @overload
    def __call__(self, value: complex, /) -> "Initializer": ...
    @overload
    def __call__(self, /, **options: complex) -> "Initializer": ...
    def __call__(self, /, *args: Any, **options: object) -> "Array | Initializer":
        names = self._options()
        by_place = [name for name, kind in names.items() if kind.kind is not kind.KEYWORD_ONLY]
        if len(args) in (2, 3) and not options and not isinstance(args[0], int | float):
            return self._draw(*args)
        if len(args) > len(by_place):
            raise TypeError(
                f"{self}: expected (key, shape, dtype) to draw, or options by name "
                f"({', '.join(names) or 'there are none'}), found {describe(args)}"
            )
        return self._configured({**dict(zip(by_place, args, strict=False)), **options}, names)

    def _configured(self, options: dict[str, object], names: dict[str, inspect.Parameter]) -> "Initializer":
        for name in options:
            if name not in names:
                raise TypeError(f"{self}: no option {name!r}; there are: {', '.join(names) or 'none'}")
        function = self.draw.__name__
        values = {
            name: checked(names[name].annotation, f"{function}: {name}", value)
            for name, value in options.items()
        }
        return dataclasses.replace(self, options=tuple((dict(self.options) | values).items()))

    def with_fans(self, fan_in: int | None, fan_out: int | None) -> "Initializer":
        """Give the same with the given fans instead of those of the shape; `None` leaves one as it is."""
        return dataclasses.replace(self, fans=(fan_in, fan_out))

    def part(self, shape: Shape, key: Key, dtype: DType, start: int, stop: int) -> Array:
        """Draw the numbers from `start` to `stop`, in row-major order, of what is drawn in a shape."""
        dtype = jax.dtypes.canonicalize_dtype(dtype)
        return self.draw(from_number(key, start), (stop - start,), dtype, **self._options_for(shape))

    def _draw(self, key: Key, shape: Shape | int, dtype: DType = float) -> Array:
        shape = tuple(shape) if isinstance(shape, tuple | list) else (shape,)
        return self.draw(key, shape, jax.dtypes.canonicalize_dtype(dtype), **self._options_for(shape))

    def _options_for(self, shape: Shape) -> dict[str, Any]:
        options = dict(self.options)
        if "fans" in inspect.signature(self.draw).parameters:
            given = zip(self.fans, fans(shape), strict=True)
            options["fans"] = tuple(of_shape if fan is None else fan for fan, of_shape in given)
        return options

    def _options(self) -> dict[str, inspect.Parameter]:
        parameters = list(inspect.signature(self.draw).parameters.items())[3:]
        return {name: kind for name, kind in parameters if name != "fans"}

    def __reduce__(self) -> tuple[object, ...]:
        # By name: under the name of the function stands the initializer that was made of it.
        place = (self.draw.__module__, self.draw.__qualname__)
        return _restore, (*place, self.options, self.fans, self.by_number)

    def __repr__(self) -> str:
        name = self.draw.__name__
        inside = ", ".join(f"{option}={value!r}" for option, value in self.options)
        return f"{name}({inside})" if inside else name


def _restore(
    module: str,
    name: str,
    options: tuple[tuple[str, object], ...],
    fans: Fans,
    by_number: bool = False,
) -> Initializer:
    found = getattr(importlib.import_module(module), name)
    draw = found.draw if isinstance(found, Initializer) else found
    return Initializer(draw, options, fans, by_number)


def _by_number(draw: Callable[..., Array]) -> Initializer:
    return Initializer(draw, by_number=True)


def fans(shape: Shape) -> Fans:
    """Return the numbers of inputs and outputs `(fan_in, fan_out)` of a weight.

    >>> from flatlayers.initializers import fans
    >>> fans((4, 2)), fans((3, 3, 5, 7)), fans((6,))
    ((2, 4), (45, 63), (1, 6))
    """
    if len(shape) < 2:
        return 1, math.prod(shape)
    if len(shape) == 2:
        return shape[1], shape[0]
    *kernel, fan_in, fan_out = shape
    return math.prod(kernel) * fan_in, math.prod(kernel) * fan_out


@_by_number
def zeros(key: Key, shape: Shape, dtype: DType) -> Array:
    """All zeros."""
    return jnp.zeros(shape, dtype)


@_by_number
def ones(key: Key, shape: Shape, dtype: DType) -> Array:
    """All ones."""
    return jnp.ones(shape, dtype)


@_by_number
def constant(key: Key, shape: Shape, dtype: DType, value: Number = 0.0) -> Array:
    """`constant(value)`: all equal to it."""
    _check_real("constant", value, dtype)
    return jnp.full(shape, value, dtype)


@_by_number
def uniform(key: Key, shape: Shape, dtype: DType, *, scale: Finite = 1.0) -> Array:
    """Uniform in `[-scale, scale)`."""
    return _drawn_uniform(key, shape, dtype, scale)


@_by_number
def normal(key: Key, shape: Shape, dtype: DType, *, stddev: NonNegative = 1.0) -> Array:
    """Normal with mean 0 and the given standard deviation."""
    return jax.nn.initializers.normal(stddev)(key, shape, dtype)


@_by_number
def truncated_normal(
    key: Key,
    shape: Shape,
    dtype: DType,
    *,
    stddev: NonNegative = 1.0,
    lower: Finite = -2.0,
    upper: Finite = 2.0,
) -> Array:
    """A normal cut off at `lower` and `upper`, times `stddev`; what is left has a smaller spread."""
    if lower >= upper:
        raise ValueError(f"truncated_normal: expected lower under upper, found {lower} and {upper}")
    draw = jax.nn.initializers.truncated_normal(stddev, lower=lower, upper=upper)
    return _drawn(draw, key, shape, dtype)


@_by_number
def glorot_uniform(key: Key, shape: Shape, dtype: DType, *, gain: Finite = 1.0, fans: Fans) -> Array:
    """Uniform in `±gain * sqrt(6 / (fan_in + fan_out))` (Glorot and Bengio, 2010)."""
    return _drawn_uniform(key, shape, dtype, gain * math.sqrt(6 / max(sum(fans), 1)))


@_by_number
def glorot_normal(key: Key, shape: Shape, dtype: DType, *, gain: Finite = 1.0, fans: Fans) -> Array:
    """Normal with standard deviation `gain * sqrt(2 / (fan_in + fan_out))` (Glorot and Bengio, 2010)."""
    return gain * math.sqrt(2 / max(sum(fans), 1)) * jax.random.normal(key, shape, dtype)


@_by_number
def kaiming_uniform(key: Key, shape: Shape, dtype: DType, *, gain: Finite = SQRT_2, fans: Fans) -> Array:
    """Uniform in `±gain * sqrt(3 / fan_in)` (He et al., 2015)."""
    return _drawn_uniform(key, shape, dtype, gain * math.sqrt(3 / max(fans[0], 1)))


@_by_number
def kaiming_normal(key: Key, shape: Shape, dtype: DType, *, gain: Finite = SQRT_2, fans: Fans) -> Array:
    """Normal with standard deviation `gain * sqrt(1 / fan_in)` (He et al., 2015)."""
    return gain / math.sqrt(max(fans[0], 1)) * jax.random.normal(key, shape, dtype)


@Initializer
def orthogonal(key: Key, shape: Shape, dtype: DType, *, gain: Finite = 1.0) -> Array:
    """Orthonormal rows or columns, whichever are fewer, times `gain` (Saxe et al., 2014).

    With three axes or more the last one is the output; all others together are the input.
    """
    wide = at_least_float32(dtype)  # there is no QR in half precision
    return jax.nn.initializers.orthogonal(gain)(key, shape, wide).astype(dtype)


@Initializer
def identity(key: Key, shape: Shape, dtype: DType, *, gain: Finite = 1.0) -> Array:
    """`gain` times the identity: a matrix with ones on the diagonal, a kernel that passes its centre on."""
    if len(shape) < 2:
        raise ValueError(f"identity: expected a shape with at least two axes, found {shape}")
    eye = gain * jnp.eye(*shape[-2:], dtype=dtype)
    if len(shape) == 2:
        return eye
    centre = tuple((size - 1) // 2 for size in shape[:-2])
    return jnp.zeros(shape, dtype).at[centre].set(eye)


@Initializer
def sparse(
    key: Key, shape: Shape, dtype: DType, *, sparsity: Fraction = 0.9, stddev: NonNegative = 0.01
) -> Array:
    """Normal, with the fraction `sparsity` of every column of a matrix zero (Martens, 2010)."""
    if len(shape) != 2:
        raise ValueError(f"sparse: expected the shape of a matrix, found {shape}")
    value_key, place_key = jax.random.split(key)
    values = stddev * jax.random.normal(value_key, shape, dtype)
    rank = jnp.argsort(jax.random.uniform(place_key, shape), axis=0)
    return jnp.where(rank < math.ceil(sparsity * shape[0]), jnp.zeros((), dtype), values)


def _drawn_uniform(key: Key, shape: Shape, dtype: DType, bound: float) -> Array:
    return _drawn(functools.partial(jax.random.uniform, minval=-bound, maxval=bound), key, shape, dtype)


def _drawn(draw: Callable[[Key, Shape, DType], Array], key: Key, shape: Shape, dtype: DType) -> Array:
    """Call `draw`; for complex numbers twice, over `sqrt(2)`: the mean of `|w|²` stays."""
    if not jnp.issubdtype(dtype, jnp.complexfloating):
        return draw(key, shape, dtype)
    real, imaginary = (draw(part, shape, jnp.finfo(dtype).dtype) for part in jax.random.split(key))
    return jax.lax.complex(real, imaginary) / math.sqrt(2)


def _check_real(name: str, value: ArrayLike, dtype: DType | None) -> None:
    """Raise `TypeError` if a conversion would discard the imaginary part."""
    if np.iscomplexobj(value) and dtype is not None and not jnp.issubdtype(dtype, jnp.complexfloating):
        raise TypeError(
            f"{name}: expected real values for a parameter of dtype {jnp.dtype(dtype)}, found complex ones"
        )


@dataclasses.dataclass(frozen=True)
class GivenArray:
    """The initializer of `from_array`."""

    content: ArrayContent

    def __call__(self, key: Key, shape: Shape, dtype: DType | None = None) -> Array:
        array = self.content.array()
        if tuple(shape) != array.shape:
            raise ValueError(
                f"from_array: expected the parameter's shape {tuple(shape)}, found {array.shape}"
            )
        _check_real("from_array", array, dtype)
        return jnp.asarray(array, dtype)

    def __repr__(self) -> str:
        return f"from_array({self.content.dtype}[{','.join(map(str, self.content.shape))}])"


def from_array(array: ArrayLike | Sequence[object]) -> GivenArray:
    """Make the initializer that gives this array, whatever the key. Equal contents give equal initializers.

    **Raises:** when it is used, `ValueError` if the parameter has another shape, `TypeError` if it is real
    and the array complex.

    >>> import jax
    >>> import flatlayers as fl
    >>> init = fl.initializers.from_array([[1.0, 2.0]])
    >>> layer = fl.Dense(2, 1, init_weight=init)
    >>> fl.initial_parameters(jax.random.key(0), layer).weight
    Array([[1., 2.]], dtype=float32)
    """
    return GivenArray(ArrayContent.of(array))
