"""`StatefulLayer`: a layer, its parameters and its state in one mutable box."""

import dataclasses
from dataclasses import KW_ONLY

import jax

from ..core.layer import Layer, apply, as_layer, display_name
from ..types import Input, Output, Params, PyTree, State
from ..vectors.names import describe, join_path
from ..vectors.record import Record, as_record, is_static


@dataclasses.dataclass(eq=False, repr=False)
class StatefulLayer:
    """A layer with its parameters and its state: `m(x)` returns `y` alone and keeps the new state in `m.st`.

    A small mutable box for use inside a function. Make it in the function that `jax.jit` compiles or
    `jax.grad` differentiates, and return `m.st` if the state is wanted after it: it is no pytree, so it
    does not pass through a transformation, and neither does a state that changed inside of one. A vector
    field may close over it if its state does not change (no states, or test mode); else make it in the
    field, so that each evaluation sees the same state.

    **Arguments:**

    - `layer`: the layer, or a function.
    - `ps`: its parameters.
    - `st`: its state.
    - `fixed_state`: whether a change of the state's structure, shapes or dtypes is an error. A static flag
        such as `training` is part of the structure.

    All four are attributes, and may be assigned.

    **Inputs:** `m(x)`, or `m(x, ps)` with other parameters for this one call. **Returns:** `y`.

    **Raises:** `ValueError` with the path of the field for a state that changed its type, with
    `fixed_state`; `m.st` is then what it was.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import flatlayers as fl
    >>> layer = fl.Chain(fl.Dense(3, 8, jnp.tanh), fl.Dropout(0.5), fl.Dense(8, 1))
    >>> ps, st = fl.setup(jax.random.key(0), layer)
    >>> @jax.jit
    ... def loss(ps, st, x):
    ...     m = fl.StatefulLayer(layer, ps, st)
    ...     return jnp.mean((m(x) - m(-x)) ** 2), m.st
    >>> value, st = loss(ps, st, jnp.ones((5, 3)))
    >>> value.shape
    ()
    """

    layer: Layer
    ps: Params
    st: State
    _: KW_ONLY
    fixed_state: bool = True

    def __post_init__(self) -> None:
        self.layer = as_layer(self.layer)
        self.st = as_record(self.st)

    def __call__(self, x: Input, ps: Params | None = None) -> Output:
        try:
            y, st = apply(self.layer, x, self.ps if ps is None else ps, self.st)
        except jax.errors.UnexpectedTracerError as error:
            error.add_note(
                "the state of a StatefulLayer changed inside a transformation: make the StatefulLayer there"
            )
            raise
        if self.fixed_state:
            _check_type(self.layer, as_record(self.st), st)
        self.st = st
        return y

    def __repr__(self) -> str:
        parts = [repr(self.layer), repr(as_record(self.ps)), repr(self.st)]
        return f"StatefulLayer({', '.join(parts)}{'' if self.fixed_state else ', fixed_state=False'})"


def _check_type(layer: Layer, old: Record, new: Record) -> None:
    if difference := _difference(old, new, ""):
        path, expected, found = difference
        raise ValueError(
            f"the state of {display_name(layer)} changed its type at {path!r}: expected {expected}, found "
            f"{found}; with `fixed_state=False` it may change"
        )


def _difference(old: State, new: State, path: str) -> tuple[str, str, str] | None:
    """Find the first field of another structure, shape or dtype: its path, what it was and what it is."""
    if not (isinstance(old, Record) and isinstance(new, Record)):
        return None if _type_of(old) == _type_of(new) else (path, describe(old), describe(new))
    for name in (*old, *new):
        if name not in old or name not in new:
            one, other = (describe(st[name]) if name in st else "no such field" for st in (old, new))
            return join_path(path, name), one, other
    if list(old) != list(new):
        return path, f"the order {', '.join(old)}", ", ".join(new)
    differences = (_difference(old[name], new[name], join_path(path, name)) for name in old)
    return next(filter(None, differences), None)


def _type_of(value: PyTree) -> object:
    """Return what a compiled function depends on, but for weak types: values of flags, shapes and dtypes."""
    if is_static(value):
        return value
    leaves, structure = jax.tree.flatten(value)
    return structure, [(kind.shape, kind.dtype) for kind in map(jax.typeof, leaves)]
