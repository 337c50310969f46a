"""What a layer declares its parameters with."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from .frozen_dict import value_text


@dataclasses.dataclass(frozen=True)
class Param:
    """The declaration of one parameter.

    **Arguments:**

    - `shape`: its shape, a tuple of integers.
    - `init`: a function `init(key, shape, dtype)` that makes its initial value, such as those
        of `flatlayers.initializers`.
    - `fan_in`, `fan_out`: the numbers of inputs and outputs that `init` scales by, where the
        shape does not tell. They are used by an `init` that has a method
        `with_fans(fan_in, fan_out)`.
    - `output_axis`: the axis of the outputs, where the shape does not tell: 0 for a vector and for
        `(out, in)`, -1 for `(*kernel, in, out)`.
    - `key_name`: the name that its key is folded with, if not its own: two parameters of a layer
        with one `key_name` are drawn with the same key.

    >>> import flatlayers as fl
    >>> fl.Param((3, 2), fl.initializers.glorot_uniform).shape
    (3, 2)
    """

    shape: tuple[int, ...]
    init: Callable[..., Any]
    fan_in: int | None = None
    fan_out: int | None = None
    output_axis: int | None = None
    key_name: str | None = None

    def __post_init__(self) -> None:
        shape = self.shape if isinstance(self.shape, tuple | list) else (self.shape,)
        object.__setattr__(self, "shape", tuple(shape))
        if not callable(self.init):
            raise TypeError(f"expected an initializer `init(key, shape, dtype)`, found {self.init!r}")

    def initial(self, key: jax.Array, dtype: Any) -> jax.Array:
        """The initial value. **Raises:** `ValueError` if `init` returns another shape."""
        init = self.init
        if (self.fan_in, self.fan_out) != (None, None) and hasattr(init, "with_fans"):
            init = init.with_fans(self.fan_in, self.fan_out)  # pyright: ignore[reportFunctionMemberAccess]
        value = init(key, self.shape, dtype)
        if np.shape(value) != self.shape:
            raise ValueError(
                f"expected an initial value of shape {self.shape}, found shape {np.shape(value)}"
            )
        return value

    def __repr__(self) -> str:
        options = {name: getattr(self, name) for name in ("fan_in", "fan_out", "output_axis", "key_name")}
        given = "".join(f", {name}={value!r}" for name, value in options.items() if value is not None)
        return f"Param({self.shape}, {value_text(self.init)}{given})"


@dataclasses.dataclass(frozen=True)
class Stacked:
    """`n` copies of what is declared, each with a key of its own: what `jax.lax.scan` runs over.

    `parameters` may give one as a value. A parameter then has shape `(n, *shape)`, and so have the
    states of a layer; copy `i` is drawn with the key folded with `i`.

    **Arguments:**

    - `declared`: a `Layer`, a `Param` or a mapping of them.
    - `n`: how many copies.

    >>> import jax
    >>> import flatlayers as fl
    >>> ps, st = fl.setup(jax.random.key(0), {"blocks": fl.Stacked(fl.Dense(3, 3), 4)})
    >>> ps.blocks.weight.shape
    (4, 3, 3)
    """

    declared: Any
    n: int


class Tied(Mapping[str, Any]):
    """What is declared, with names that have one place: what `Layout.tie` is for a layout.

    `parameters` may return one, or give one as a value. It reads as the mapping it is made of.

    **Arguments:**

    - `declared`: a mapping of names to `Param`s, layers, `Stacked` and mappings.
    - `ties`: which name goes to the place of which other, as dotted paths.
    """

    def __init__(self, declared: Mapping[str, Any], ties: Mapping[str, str]):
        self.declared = declared
        self.ties = ties

    def __getitem__(self, name: str) -> Any:
        return self.declared[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.declared)

    def __len__(self) -> int:
        return len(self.declared)
