"""`compact`: a layer written as one function."""

import dataclasses
import functools
import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from ..core.composite import child_tree, named_parts
from ..core.declaration import Param, as_declared, contains_layer
from ..core.drawing import fold_in_name
from ..core.layer import Layer, frozen_field, holds_layers
from ..core.values import FrozenDict, comparison_key, hashable, plain, value_text
from ..dtypes import is_key
from ..types import Input, Key, Output, Params, PyTree, State as States
from ..vectors.names import check_name, describe, listing, unknown_name
from ..vectors.record import Record
from .stateful import StatefulLayer


# A function `f(m, x) -> y`, where `m` is a `Bound`.
Body: TypeAlias = Callable[[Any, Any], Any]

_VALUES = jax.Array | np.ndarray | np.generic | bool | str | int | float | complex | None | Param


@dataclasses.dataclass(frozen=True)
class State:
    """The declaration of one state of a `fl.compact` layer.

    **Arguments:**

    - `init`: its initial value, an array or a number; a `bool`, a string or `None`, which is static: known
        when a function is compiled; or a function of a PRNG key that returns one of these. A `fl.Param` is
        a parameter that is not trained.

    **Raises:** `TypeError` for anything else.

    >>> import jax
    >>> import flatlayers as fl
    >>> @fl.compact(count=fl.State(0), key=fl.State(lambda key: key), training=fl.State(True))
    ... def noise(m, x):
    ...     m.count = m.count + 1
    ...     m.key, now = jax.random.split(m.key)
    ...     return x + jax.random.normal(now, x.shape) if m.training else x
    >>> fl.initial_states(jax.random.key(0), noise)
    Record(count=int32[], key=key<fry>[], training=True)
    """

    init: Any

    def __post_init__(self) -> None:
        if is_key(self.init) or not (isinstance(self.init, _VALUES) or _is_function(self.init)):
            raise TypeError(
                "State: expected an array, a number, a flag or a function of a key (for a key of its own "
                f"`fl.State(lambda key: key)`), found {describe(self.init)}"
            )
        object.__setattr__(self, "init", hashable(self.init))

    def initial(self, key: Key) -> PyTree:
        """Return the initial value, drawn with `key` if it is random."""
        init = plain(self.init)
        return init(key) if callable(init) else init

    def __repr__(self) -> str:
        init = plain(self.init)
        return f"State({describe(init) if isinstance(init, jax.Array | np.ndarray) else value_text(init)})"


def compact(*misplaced: object, **fields: object) -> "Callable[[Body], CompactLayer]":
    """Make a layer of one function, `f(m, x) -> y`, where `m` has what the keywords declare.

    The result is a layer like any other, with the function's name. `m` lives for one call:

    - `m.child(x)` calls a child and keeps its new state, also if it is called twice;
        `m.child.ps`, `m.child.st` and `m.child.layer` are what it is made of. A tuple of layers is read as
        `m.blocks[0](x)`, a dict as `m.blocks["a"](x)` or `m.blocks.a(x)`.
    - `m.scale` is a parameter's value, `m.act` a hyper-parameter.
    - `m.count` is a state's value, and `m.count = m.count + 1` the new one. It is best of the shape and
        dtype that it was, as for any layer. A Python number becomes an array of the state's dtype.

    **Arguments:**

    - `**fields`: layers, and dicts and tuples of layers, are children, as in `fl.Container`; a `fl.Param` is
        a parameter; a `fl.State` a state; anything else a hyper-parameter. The parameters' order is theirs.

    **Returns:** a decorator for the function `f(m, x) -> y`.

    **Parameters and states:** those declared and those of the children, each under its keyword.

    **Raises:** `TypeError` for an array, which a `fl.Param` or a `fl.State` has to declare. In a call,
    `AttributeError` for a name that `m` does not have or, when assigning, one that is no state.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import flatlayers as fl
    >>> @fl.compact(w1=fl.Dense(1, 32), act=jnp.tanh, scale=fl.Param((), fl.initializers.ones))
    ... def net(m, x):
    ...     return m.scale * m.act(m.w1(x))
    >>> net
    net(w1=Dense(1, 32), act=tanh, scale=Param((), ones))
    >>> ps, st = fl.setup(jax.random.key(0), net)
    >>> ps
    ComponentVector(float32[65], w1=(weight=(32, 1), bias=(32,)), scale=())
    >>> y, st = net(jnp.ones((5, 1)), ps, st)
    >>> y.shape
    (5, 32)
    """
    if misplaced:
        raise TypeError(
            "compact: expected keyword arguments alone, as in `@fl.compact(w1=fl.Dense(1, 32))` above "
            f"`def net(m, x)`, found {', '.join(map(value_text, misplaced))}"
        )
    return lambda function: CompactLayer(function, FrozenDict(fields))


class CompactLayer(Layer):
    """A layer made by `fl.compact` of a function and the fields that `m` has, which are its attributes, too.

    Equal functions with equal fields are equal layers.
    """

    function: Body
    fields: Mapping[str, Any]

    def check_fields(self) -> None:
        if not callable(self.function):
            raise TypeError(f"compact: expected a function `f(m, x) -> y`, found {self.function!r}")
        self.fields = FrozenDict(
            {name: _final(value, name, f"{self.name}.{name}") for name, value in self.fields.items()}
        )
        self.__doc__ = self.function.__doc__
        # A wrong name or shape is an error where the layer is made.
        _ = self.layout

    @property
    def name(self) -> str:
        """Return the name of the function."""
        return getattr(self.function, "__name__", type(self.function).__name__)

    def children(self) -> Mapping[str, Any]:
        return {name: child_tree(value) for name, value in self.fields.items() if holds_layers(value)}

    def parameters(self) -> Mapping[str, Any]:
        children = self.children()
        return {
            name: children.get(name, value)
            for name, value in self.fields.items()
            if name in children or isinstance(value, Param)
        }

    def states(self, key: Key) -> Mapping[str, Any]:
        children, states = self.children(), {}
        for name, value in self.fields.items():
            if name in children:
                states[name] = as_declared(children[name]).declared_states(fold_in_name(key, name))
            elif isinstance(value, State):
                states[name] = value.initial(fold_in_name(key, name))
        return states

    def forward(self, x: Input, ps: Params, st: States) -> tuple[Output, States]:
        values = {name: _bound(value, name, ps, st) for name, value in self.fields.items()}
        y = self.function(Bound(self, values), x)
        own = {name: values[name] for name, field in self.fields.items() if isinstance(field, State)}
        below = {name: _states_in(values[name]) for name in self.children()}
        return y, st.replace(**own, **below)

    def __getattr__(self, name: str) -> Any:
        fields = self.__dict__.get("fields", {})
        if name.startswith("_") or name not in fields:
            raise AttributeError(f"{type(self).__name__}: {unknown_name(name, fields)}")
        return fields[name]

    def __reduce__(self) -> tuple[Any, ...]:
        # The decorator has put the layer in the place of its function, which pickle finds by that name: so
        # the layer goes by the name, with the fields that are not those of the one which stands there.
        module, path = (getattr(self.function, name, None) for name in ("__module__", "__qualname__"))
        named = _find(module, path) if module in sys.modules and path else None
        if not isinstance(named, CompactLayer) or named.function is not self.function:
            return CompactLayer, (self.function, self.fields)
        known = {name: comparison_key(value) for name, value in named.fields.items()}
        changed = {
            name: value for name, value in self.fields.items() if comparison_key(value) != known.get(name)
        }
        return _named, (module, path, tuple(self.fields), changed)

    def constructor_arguments(self) -> Iterator[tuple[str, Any, bool]]:
        for name, value in self.fields.items():
            yield name, value, True


class Bound:
    """A compact layer within one call, as its function sees it: with values, and states to assign to."""

    __slots__ = ("_layer", "_values")
    _layer: CompactLayer
    _values: dict[str, Any]

    def __init__(self, layer: CompactLayer, values: dict[str, Any]):
        object.__setattr__(self, "_layer", layer)
        object.__setattr__(self, "_values", values)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in self._values:
            raise AttributeError(f"{self._layer.name}: {unknown_name(name, self._values)}")
        return self._values[name]

    def __setattr__(self, name: str, value: object) -> None:
        fields = self._layer.fields
        if not isinstance(fields.get(name), State):
            states = [name for name, field in fields.items() if isinstance(field, State)]
            raise AttributeError(
                f"{self._layer.name}: cannot assign {name!r}, which is no state; the states are: "
                f"{listing(states) if states else 'none'}; declare it by `{name}=fl.State(...)`"
            )
        self._values[name] = _in_dtype_of(self._values[name], value)

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self._values]

    def __repr__(self) -> str:
        return f"<{self._layer!r} within a call>"


def _final(value: object, name: str, where: str) -> Any:
    """Return a keyword's value as a field."""
    value = frozen_field(value, where, "declare it by `fl.Param(shape, init)` or `fl.State(value)`")
    if isinstance(value, State) or name.startswith("_"):
        check_name(name)
    declares = [type(leaf).__name__ for leaf in jax.tree.leaves(value) if isinstance(leaf, Param | State)]
    if declares and not isinstance(value, Param | State):
        raise TypeError(f"{where}: expected a keyword of its own for each fl.{declares[0]}, found {value!r}")
    if contains_layer(value) and not holds_layers(value):
        raise TypeError(f"{where}: expected layers, or tuples and dicts of layers, found {value!r}")
    return value


def _bound(value: object, name: str, ps: Params, st: Record) -> Any:
    """Return what `m` has for a field."""
    if isinstance(value, Param):
        return getattr(ps, name)
    if isinstance(value, State):
        return st[name]
    return _boxes(value, getattr(ps, name), st[name]) if holds_layers(value) else value


def _boxes(layers: object, ps: Params, st: Record) -> Any:
    """Put each layer in a box with its part of the parameters and states."""
    if isinstance(layers, Layer):
        return StatefulLayer(layers, ps, st, fixed_state=False)
    parts = named_parts(layers).items()
    boxes = {name: _boxes(part, getattr(ps, name), st[name]) for name, part in parts}
    return tuple(boxes.values()) if isinstance(layers, tuple) else Record(boxes)


def _states_in(boxes: object) -> Any:
    """Return the states that are in the boxes now."""
    if isinstance(boxes, StatefulLayer):
        return boxes.st
    return {name: _states_in(part) for name, part in named_parts(boxes).items()}


def _in_dtype_of(old: PyTree, new: object) -> object:
    """Give a Python number the dtype of the array it replaces: a bool would else become a static flag."""
    if isinstance(new, bool | int | float | complex) and hasattr(old, "dtype"):
        return jnp.asarray(new, jnp.result_type(old, new))
    return new


def _is_function(value: object) -> bool:
    return callable(value) and not isinstance(value, Layer)


def _find(module: str, path: str) -> Any:
    """Return what a module has under a dotted name, or `None`."""
    found = importlib.import_module(module)
    return functools.reduce(lambda part, name: getattr(part, name, None), path.split("."), found)


def _named(module: str, path: str, names: tuple[str, ...], changed: Mapping[str, Any]) -> CompactLayer:
    """Return the layer that a module has under a dotted name, with some of its fields changed."""
    layer = _find(module, path)
    fields = {**layer.fields, **changed}
    found = dataclasses.replace(layer, fields={name: fields[name] for name in names})
    return layer if found == layer else found
