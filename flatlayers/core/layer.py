"""`Layer`: a frozen description that declares its parameters; calling one is a pure function."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, dataclass_transform

import jax

from ..types import Input, Key, Output, Params, State
from ..vectors.layout import Layout
from ..vectors.names import describe, join_path
from ..vectors.record import as_record
from ..vectors.text import as_html, as_text
from ..vectors.vector import ComponentVector
from .absent import construct, tell_where
from .constraints import Transforms, constrain
from .declaration import Declared, as_declared
from .drawing import Drawing
from .fields import Check, checks_of, is_class_variable
from .matching import Shapes, check_parameters, check_state, shapes_of_states
from .replacing import Replaceable, check_declared, seal
from .values import FrozenDict, Value, has_hash, is_array, value_text


# A method of a layer that takes and returns what `forward` does.
Method = Callable[[Input, Params, State], tuple[Output, State]]


def _then_seal(init: Callable[..., None]) -> Callable[..., None]:
    """Seal the layer after `__init__`, but after that of its own class alone, not of a base."""

    @functools.wraps(init)
    def __init__(self: "Layer", *args: object, **kwargs: object) -> None:
        construct(init, self, *args, **kwargs)
        if type(self).__init__ is __init__:
            seal(self)

    return __init__


@dataclass_transform()
class Layer(Value, Declared, Replaceable):
    """The base of all layers: hyper-parameters and the declaration of parameters, no arrays.

    A subclass is a frozen dataclass; its fields are hyper-parameters, static and hashable (lists
    become tuples, dicts immutable). It declares `parameters`, and `states` if it has any, and
    defines `forward`. `layer(x, ps, st)` then returns `(y, st)` and is a pure function: the same
    arguments give the same result. A layer is a pytree without leaves, so that `jax.jit` takes it
    as an argument, and equal layers share what was compiled.

    A field is checked by its annotation (see `flatlayers.core.fields`). Checks that no annotation can
    express, and fields that follow from others, go into `check_fields(self)`: it is called once, after
    `__init__`, and may assign `self.x = ...`. Then the fields are frozen. A field `name`, if there is one,
    is the name that messages and displays use.

    **Raises:** `TypeError` for an array in a field or a field that has no hash.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import flatlayers as fl
    >>> class Linear(fl.Layer):
    ...     in_dims: int
    ...     out_dims: int
    ...
    ...     def parameters(self):
    ...         shape = (self.out_dims, self.in_dims)
    ...         return {
    ...             "weight": fl.Param(shape, fl.initializers.glorot_uniform),
    ...             "bias": fl.Param((self.out_dims,), fl.initializers.zeros),
    ...         }
    ...
    ...     def forward(self, x, ps, st):
    ...         return x @ ps.weight.T + ps.bias, st
    >>> layer = Linear(3, 2)
    >>> ps, st = fl.setup(jax.random.key(0), layer)
    >>> ps
    ComponentVector(float32[8], weight=(2, 3), bias=(2,))
    >>> y, st = layer(jnp.ones((5, 3)), ps, st)
    >>> y.shape
    (5, 2)
    """

    # True unless a call may return a state of another structure, other shapes or dtypes.
    keeps_state_type: ClassVar[bool] = True
    # The checks of its fields, by name.
    _checks: ClassVar[Mapping[str, Check]] = {}

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        # A subclass without fields of its own keeps the `__init__` that it inherits.
        own = [kind for kind in inspect.get_annotations(cls).values() if not is_class_variable(kind, cls)]
        init = "__init__" not in cls.__dict__ and bool(own)
        dataclasses.dataclass(init=init, repr=False, eq=False)(cls)
        cls._checks = {**cls._checks, **checks_of(cls)}
        if "__init__" in cls.__dict__:
            cls.__init__ = _then_seal(cls.__init__)
        jax.tree_util.register_static(cls)

    @_then_seal
    def __init__(self) -> None:
        pass

    def check_fields(self) -> None:
        """Check the fields together, and complete them by plain assignment; called once, after `__init__`.

        A layer that is rebuilt with other children is checked again: what was completed has to pass.
        """

    def parameters(self) -> Mapping[str, Any]:
        """Declare what the layer learns: name → `Param`, `Layer`, `Stacked` or mapping, in vector order."""
        return {}

    def states(self, key: Key) -> Mapping[str, Any]:
        """Make what it carries from call to call: name → array, static flag, `Param` or mapping of them.

        A `Param` is drawn with the dtype of the vector: a parameter that is not trained.
        """
        return {}

    def forward(self, x: Input, ps: Params, st: State) -> tuple[Output, State]:
        """Compute `(y, st)` from the input, the parameters and the state."""
        raise TypeError(f"{type(self).__name__} does not define `forward(self, x, ps, st)`")

    def children(self) -> Mapping[str, Any]:
        """Return the layers inside, as `parameters` declares them: name → `Layer`, or a mapping of them."""
        return as_declared(self.parameters()).as_child() or {}

    def __call__(self, x: Input, ps: Params, st: State) -> tuple[Output, State]:
        return call(self, self.forward, x, ps, st)

    @functools.cached_property
    def layout(self) -> Layout:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The layout of the parameter vector."""
        return as_declared(self.parameters()).layout  # pyright: ignore[reportReturnType]

    @functools.cached_property
    def state_shapes(self) -> Shapes:
        """The shapes of the arrays of the state that it declares, by path; `None` for what may change."""
        if type(self).states is Layer.states:
            return {}
        shapes = shapes_of_states(self.states)
        return shapes if keeps_state_type(self) else dict.fromkeys(shapes)

    @functools.cached_property
    def _transforms(self) -> Transforms:
        return self.declared_transforms()

    # As a part of the declaration of another layer

    def drawings(self, path: str = "", folds: tuple[str | int, ...] = ()) -> Iterator[Drawing]:
        return as_declared(self.parameters()).drawings(path, folds)

    def declared_transforms(self, path: str = "") -> dict[str, Any]:
        return as_declared(self.parameters()).declared_transforms(path)

    def declared_states(self, key: Key) -> dict[str, Any]:
        return dict(self.states(key))

    def declared_parts(self) -> Mapping[str, "Layer"]:
        return dict(sublayers(self))

    def as_child(self) -> "Layer":
        return self

    def declared_where(self, keep: Callable[[str], bool], path: str = "") -> Declared | None:
        return as_declared(self.parameters()).declared_where(keep, path)

    # Immutable

    def _complete(self) -> None:
        check_declared(self)
        self.check_fields()
        declares_none = type(self).parameters is Layer.parameters and type(self).children is Layer.children
        for field in dataclasses.fields(self):  # pyright: ignore[reportArgumentType]
            where = f"{type(self).__name__}.{field.name}"
            value = frozen_field(getattr(self, field.name), where, "declare it in `parameters`")
            if declares_none and holds_layers(value):
                raise TypeError(
                    f"{where}: expected no layer inside of a plain layer, found one; use fl.Container"
                )
            vars(self)[field.name] = value

    def __setattr__(self, name: str, value: object) -> None:
        if "_ready" in self.__dict__:
            raise dataclasses.FrozenInstanceError(
                f"layers are immutable: cannot assign {name!r} of {type(self).__name__}"
            )
        check = self._checks.get(name)
        object.__setattr__(
            self, name, value if check is None else check(f"{type(self).__name__}.{name}", value)
        )

    def __delattr__(self, name: str) -> None:
        raise dataclasses.FrozenInstanceError(f"layers are immutable: cannot delete {name!r}")

    def __copy__(self) -> "Layer":
        return self

    def __deepcopy__(self, memo: object) -> "Layer":
        return self

    def constructor_arguments(self) -> Iterator[tuple[str, Any, bool]]:
        """Yield what makes an equal layer, but defaults, as in a call: `(name, value, whether by name)`."""
        fields = dataclasses.fields(self)  # pyright: ignore[reportArgumentType]
        # A base that declares options by keyword comes before the class, and so do its fields.
        by_place = {
            field.name for field in fields if not field.kw_only and field.default is dataclasses.MISSING
        }
        for field in sorted(fields, key=lambda field: field.name not in by_place):
            value = getattr(self, field.name)
            if field.name in by_place or value != field.default:
                yield field.name, value, field.name not in by_place

    def __repr__(self) -> str:
        inside = (
            f"{name}={value_text(value)}" if named else value_text(value)
            for name, value, named in self.constructor_arguments()
        )
        return f"{constructor_name(self)}({', '.join(inside)})"

    def __str__(self) -> str:
        return as_text(self)

    def _repr_html_(self) -> str | None:
        return as_html(self)


def constructor_name(layer: Layer) -> str:
    """Return what stands before the arguments: the name of the class, or of what the layer is made of."""
    is_argument = any(field.name == "name" for field in dataclasses.fields(layer))  # pyright: ignore
    return type(layer).__name__ if is_argument else display_name(layer)


class WrappedFunction(Layer):
    """A function as a layer without parameters: `y = function(x)`.

    Containers make one of a bare function among their layers.

    **Arguments:**

    - `function`: the function.

    **Inputs:** `x`, whatever the function takes. **Returns:** `(function(x), st)`.
    **Parameters:** none. **States:** none.

    >>> import jax.numpy as jnp
    >>> import flatlayers as fl
    >>> layer = fl.WrappedFunction(jnp.sin)
    >>> layer
    WrappedFunction(sin)
    >>> float(layer(0.0, {}, {})[0])
    0.0
    """

    function: Callable[[Any], Any]

    def forward(self, x: Input, ps: Params, st: State) -> tuple[Output, State]:
        return self.function(x), st


def as_layer(x: object) -> Layer:
    """Return a layer as it is, a function as a `WrappedFunction`. **Raises:** `TypeError` for others."""
    if isinstance(x, Layer):
        return x
    if isinstance(x, type) or not callable(x):
        hint = f"; write {x.__name__}(...)" if isinstance(x, type) else ""
        raise TypeError(f"expected a layer or a function, found {x!r}{hint}")
    return WrappedFunction(x)


# Calling


def apply(layer: Layer, x: Input, ps: Params, st: State) -> tuple[Output, State]:
    """Call a layer: `layer(x, ps, st)` is `apply(layer, x, ps, st)`.

    **Arguments:**

    - `layer`: the layer.
    - `x`: its input.
    - `ps`: its parameters: a `ComponentVector`, which is unpacked once, a mapping, or any object
        with the right attributes, such as a `Record` or a named tuple. A vector has free numbers, the others
        values: of a layer with bounds, `fl.constrained(layer, ps)` in the place of `ps.unpack()`.
    - `st`: its state, a `Record` or a mapping.

    With a vector, the names and shapes that the layer declares have to be in its layout and in `st`; more
    names are allowed. Parameters of any other kind are taken as they are, and the state with them.

    **Returns:** `(y, st)`, the output and the new state.

    **Raises:** `ValueError` for the vector or the state of another model; what `forward` raises. A note
    names the path of the layer that failed, its display line and the shape of its input.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import flatlayers as fl
    >>> model = fl.Dense(3, 2)
    >>> ps, st = fl.setup(jax.random.key(0), model)
    >>> y, st = fl.apply(model, jnp.ones(3), ps, st)
    >>> y.shape
    (2,)
    """
    return call(layer, layer.forward, x, ps, st)


def call(layer: Layer, method: Method, x: Input, ps: Params, st: State) -> tuple[Output, State]:
    """Call a method of a layer as `apply` calls `forward`: parameters unpacked once, errors with a note."""
    st = as_record(st)
    try:
        if isinstance(ps, ComponentVector):
            check_parameters(layer.layout, ps.layout)
            check_state(layer.state_shapes, st)
            ps = constrain(layer._transforms, ps.unpack())
        else:
            ps = as_record(ps)
        with jax.named_scope(display_name(layer)):
            result = method(x, ps, st)
        if not isinstance(result, tuple) or len(result) != 2:
            raise TypeError(f"expected `forward` to return (y, st), found {describe(result)}")
        return result[0], as_record(result[1])
    except Exception as error:
        tell_where(error, layer, ps, st)
        _note_place(error, layer, x, ps)
        raise


def display_name(layer: Layer) -> str:
    """Return the name that displays and messages use: the field `name` if it is a string, else the class.

    >>> import flatlayers as fl
    >>> fl.display_name(fl.Dense(3, 2))
    'Dense'
    """
    name = getattr(layer, "name", None)
    return name if isinstance(name, str) else type(layer).__name__


class _Note(str):
    """The note on an exception: which layer of the model raised it. Python prints a note as a string.

    Each enclosing layer puts the name of its child in front of `path`. `layer` and `ps` are those of the last
    layer that did so, by which the next one tells its child, `innermost` what raised: its name, its display
    line and its input.
    """

    layer: Layer
    ps: Params
    path: str
    innermost: tuple[str, str, str]

    @staticmethod
    def of(layer: Layer, ps: Params, path: str, innermost: tuple[str, str, str]) -> "_Note":
        name, line, x = innermost
        note = _Note(f"in the layer {path or name}: {line}\n  called with x: {x}")
        note.layer, note.ps, note.path, note.innermost = layer, ps, path, innermost
        return note

    def __reduce__(self) -> tuple[object, ...]:
        return str, (str(self),)


def _note_place(error: Exception, layer: Layer, x: Input, ps: Params) -> None:
    notes = getattr(error, "__notes__", [])
    for position, note in enumerate(notes):
        if isinstance(note, _Note):
            path = join_path(_name_of_child(layer, ps, note), note.path)
            notes[position] = _Note.of(layer, ps, path, note.innermost)
            return
    line = repr(layer)
    innermost = (display_name(layer), line if len(line) <= 160 else line[:157] + "...", describe(x))
    error.add_note(_Note.of(layer, ps, "", innermost))
    added = error.__notes__
    added.insert(0, added.pop())  # in front of what JAX has to say of its traceback


def _name_of_child(layer: Layer, ps: Params, inner: _Note) -> str:
    # By its parameters, which tell apart two uses of one layer; else by the layer itself.
    if inner.ps is ps:
        return ""
    children = list(sublayers(layer))
    for path, _ in children:
        if functools.reduce(lambda part, name: getattr(part, name, None), path.split("."), ps) is inner.ps:
            return path
    return next((path for path, child in children if child is inner.layer), "")


# The layers inside


def sublayers(layer: Layer) -> Iterator[tuple[str, Layer]]:
    """Yield the layers directly inside as `(path, layer)`; the path of a wrapper's child is empty."""
    yield from _below(layer.children(), "")


def _below(children: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Layer]]:
    for name, child in children.items():
        path = join_path(prefix, name)
        if isinstance(child, Mapping):
            yield from _below(child, path)
        else:
            yield path, child


def keeps_state_type(layer: Layer) -> bool:
    """Tell whether a layer and all that are in it return a state of the type that they were given."""
    return layer.keeps_state_type and all(keeps_state_type(child) for _, child in sublayers(layer))


# Fields


def frozen_field(value: object, where: str, way_out: str) -> Any:
    """Return a field in its final form: tuples for lists, immutable dicts, layers for functions among layers.

    **Raises:** `TypeError` for an array, which says the `way_out`, and for a value without a hash.
    """
    value = _frozen(value)
    if any(map(is_array, jax.tree.leaves(value))):
        raise TypeError(f"{where}: layers hold no arrays; {way_out}")
    if not has_hash(value):
        raise TypeError(f"{where}: expected a value with a hash, found {value!r}")
    return value


def _frozen(value: object) -> object:
    if isinstance(value, tuple | list) and not hasattr(value, "_fields"):
        return tuple(_among_layers([_frozen(part) for part in value]))
    # A `FrozenDict` is final: that of a `fl.compact` layer has layers and other values side by side.
    if isinstance(value, Mapping) and not isinstance(value, FrozenDict):
        parts = _among_layers([_frozen(part) for part in value.values()])
        return FrozenDict(dict(zip(value, parts, strict=True)))
    return value


def _among_layers(parts: list[object]) -> list[object]:
    """With a layer among the parts, all that are neither layers nor made of them become layers."""
    if not any(isinstance(part, Layer) for part in parts):
        return parts
    return [part if holds_layers(part) else as_layer(part) for part in parts]


def holds_layers(value: object) -> bool:
    """Tell whether a field is a layer, or a tuple or dict of nothing else."""
    if isinstance(value, tuple):
        return bool(value) and all(map(holds_layers, value))
    if isinstance(value, FrozenDict):
        return bool(value) and all(map(holds_layers, value.values()))
    return isinstance(value, Layer)
