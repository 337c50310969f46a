"""`Layer`: a frozen description that declares its parameters; calling one is a pure function."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, dataclass_transform
from zlib import crc32

import jax
import jax.numpy as jnp
import numpy as np

from ..vectors.layout import Layout
from ..vectors.names import describe
from ..vectors.record import Record
from .calling import apply, sublayers
from .declaration import Param as Param, Stacked as Stacked, Tied as Tied
from .fields import Check, checks_of
from .frozen_dict import FrozenDict, value_text
from .identity import Value
from .matching import Shapes, shapes_of_state


def _then_freeze(init: Callable[..., None]) -> Callable[..., None]:
    """`__init__`, after which the fields are in their final form and cannot be assigned."""

    @functools.wraps(init)
    def __init__(self: "Layer", *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        if type(self).__init__ is __init__:
            self.check_fields()
            self.__dict__["_ready"] = True

    return __init__


@dataclass_transform()
class Layer(Value):
    """The base of all layers: hyper-parameters and the declaration of parameters, no arrays.

    A subclass is a frozen dataclass; its fields are hyper-parameters, static and hashable (lists
    become tuples, dicts immutable). It declares `parameters`, and `states` if it has any, and
    defines `forward`. `layer(x, ps, st)` then returns `(y, st)` and is a pure function: the same
    arguments give the same result. A layer is a pytree without leaves, so that `jax.jit` takes it
    as an argument, and equal layers share what was compiled.

    A field `name`, if there is one, is the name that messages and displays use.

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

    # Whether a call returns a state of the structure, shapes and dtypes it was given.
    keeps_state_type: ClassVar[bool] = True
    # What its fields may be, by name.
    _checks: ClassVar[Mapping[str, Check]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # A subclass without fields of its own keeps the `__init__` that it inherits.
        own = [kind for kind in inspect.get_annotations(cls).values() if "ClassVar" not in str(kind)]
        init = "__init__" not in cls.__dict__ and bool(own)
        dataclasses.dataclass(init=init, repr=False, eq=False)(cls)
        cls._checks = {**cls._checks, **checks_of(cls)}
        if "__init__" in cls.__dict__:
            cls.__init__ = _then_freeze(cls.__init__)
        jax.tree_util.register_static(cls)

    def __init__(self) -> None:
        if type(self).__init__ is Layer.__init__:
            self.__dict__["_ready"] = True

    def parameters(self) -> Mapping[str, Any]:
        """What the layer learns: name → `Param`, `Layer`, `Stacked`, or a mapping, in vector order."""
        return {}

    def states(self, key: jax.Array) -> Mapping[str, Any]:
        """What it carries from call to call: name → array, static flag, `Param` or mapping of them.

        A `Param` is drawn with the dtype of the vector: a parameter that is not trained.
        """
        return {}

    def forward(self, x: Any, ps: Any, st: Any) -> tuple[Any, Any]:
        """Compute `(y, st)` from the input, the parameters and the state."""
        raise TypeError(f"{type(self).__name__} does not define `forward(self, x, ps, st)`")

    def children(self) -> Mapping[str, Any]:
        """The layers inside, as `parameters` declares them: name → `Layer`, or a mapping of them."""
        return _only_layers(self.parameters())

    def __call__(self, x: Any, ps: Any, st: Any) -> tuple[Any, Any]:
        return apply(self, x, ps, st)

    @functools.cached_property
    def layout(self) -> Layout:
        """The layout of the parameter vector."""
        return layout_of(self.parameters())

    @functools.cached_property
    def state_shapes(self) -> Shapes:
        """The shapes of the arrays of the state that it declares, by path; `None` for what may change."""

        def declared(key: jax.Array) -> Any:
            return shapes_of_state(Record(states_of(self, key)))

        if type(self).states is Layer.states:
            return {}
        found: list[Shapes] = []
        try:  # with an abstract key: nothing is computed, nor added to what is being traced
            jax.eval_shape(lambda key: found.append(declared(key)), jax.eval_shape(jax.random.key, 0))
        except jax.errors.JAXTypeError:  # the states are made of the numbers of a key
            with jax.ensure_compile_time_eval():
                found.append(declared(jax.random.key(0)))
        return MappingProxyType(found[-1] if keeps_state_type(self) else dict.fromkeys(found[-1]))

    def check_fields(self) -> None:
        """Bring the fields into their final form; called once, after `__init__`."""
        for field in dataclasses.fields(self):  # pyright: ignore[reportArgumentType]
            where = f"{type(self).__name__}.{field.name}"
            value = frozen_field(getattr(self, field.name), where, "declare it in `parameters`")
            object.__setattr__(self, field.name, value)

    def __setattr__(self, name: str, value: Any) -> None:
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

    def __deepcopy__(self, memo: Any) -> "Layer":
        return self

    def constructor_arguments(self) -> Iterator[tuple[str, Any, bool]]:
        """What makes an equal layer: `(name, value, whether it is given by name)`; defaults are left out."""
        for field in dataclasses.fields(self):  # pyright: ignore[reportArgumentType]
            value = getattr(self, field.name)
            positional = field.default is dataclasses.MISSING and not field.kw_only
            if positional or value != field.default:
                yield field.name, value, not positional

    def __repr__(self) -> str:
        inside = (
            f"{name}={value_text(value)}" if named else value_text(value)
            for name, value, named in self.constructor_arguments()
        )
        return f"{type(self).__name__}({', '.join(inside)})"


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

    def forward(self, x: Any, ps: Any, st: Any) -> tuple[Any, Any]:
        return self.function(x), st


class Container(Layer):
    """A layer made of layers: each field that is a layer is a child, under the field's name.

    A field that is a tuple or list of layers has the children `layer_0`, `layer_1`, ... under the
    field's name, a dict its keys; bare functions among them become `WrappedFunction`. `ps` and
    `st` are keyed by field name, always, even for one field. A container that has parameters of
    its own adds them: `{**super().parameters(), "gain": fl.Param(...)}`.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import flatlayers as fl
    >>> class Autoencoder(fl.Container):
    ...     encoder: fl.Layer
    ...     decoder: fl.Layer
    ...
    ...     def forward(self, x, ps, st):
    ...         z, encoder = self.encoder(x, ps.encoder, st.encoder)
    ...         y, decoder = self.decoder(z, ps.decoder, st.decoder)
    ...         return y, st.replace(encoder=encoder, decoder=decoder)
    >>> model = Autoencoder(fl.Dense(4, 2), fl.Dense(2, 4))
    >>> ps, st = fl.setup(jax.random.key(0), model)
    >>> ps.encoder.weight.shape
    (2, 4)
    >>> model(jnp.ones(4), ps, st)[0].shape
    (4,)
    """

    def children(self) -> Mapping[str, Any]:
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}  # pyright: ignore
        return {name: child_tree(value) for name, value in fields.items() if holds_layers(value)}

    def parameters(self) -> Mapping[str, Any]:
        return self.children()

    def states(self, key: jax.Array) -> Mapping[str, Any]:
        return states_of(self.children(), key)


class Wrapper(Layer):
    """A layer around one other layer, without a name in between: `ps` and `st` are the child's own.

    The child is the one field that is a layer; a bare function in the first field becomes one.
    `forward` calls the child; a subclass changes what it has to.

    **Raises:** `TypeError` if there is no such field, or more than one.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import flatlayers as fl
    >>> class Residual(fl.Wrapper):
    ...     layer: fl.Layer
    ...
    ...     def forward(self, x, ps, st):
    ...         y, st = self.layer(x, ps, st)
    ...         return x + y, st
    >>> model = Residual(fl.Dense(3, 3))
    >>> ps, st = fl.setup(jax.random.key(0), model)
    >>> ps.weight.shape
    (3, 3)
    """

    def check_fields(self) -> None:
        names = [field.name for field in dataclasses.fields(self)]  # pyright: ignore[reportArgumentType]
        if names and not any(isinstance(getattr(self, name), Layer) for name in names):
            object.__setattr__(self, names[0], as_layer(getattr(self, names[0])))
        super().check_fields()
        found = [name for name in names if isinstance(getattr(self, name), Layer)]
        if len(found) != 1:
            raise TypeError(
                f"{type(self).__name__}: expected one field that is a layer, found {found or 'none'}"
            )

    @property
    def child(self) -> Layer:
        """The layer inside."""
        values = [getattr(self, field.name) for field in dataclasses.fields(self)]  # pyright: ignore
        return next(value for value in values if isinstance(value, Layer))

    def children(self) -> Mapping[str, Any]:
        return {"": self.child}

    def parameters(self) -> Mapping[str, Any]:
        return self.child.parameters()

    def states(self, key: jax.Array) -> Mapping[str, Any]:
        return self.child.states(key)

    def forward(self, x: Any, ps: Any, st: Any) -> tuple[Any, Any]:
        return self.child(x, ps, st)


# Walking declarations


def layout_of(declared: Any) -> Any:
    """The layout of a mapping of `Param`s, layers and mappings; the shape of one `Param`."""
    if isinstance(declared, Layer):
        return declared.layout
    if isinstance(declared, Param):
        return declared.shape
    if isinstance(declared, Stacked):
        one = layout_of(declared.declared)
        return one.stack(declared.n) if isinstance(one, Layout) else (declared.n, *one)
    if isinstance(declared, Tied):
        return layout_of(declared.declared).tie(declared.ties)
    if isinstance(declared, Mapping):
        parts = {}
        for name, part in declared.items():
            try:
                parts[name] = layout_of(part)
            except (TypeError, ValueError) as error:
                raise type(error)(f"below {name!r}: {error}") from None
        return Layout(parts)
    raise TypeError(f"expected a Param, a Layer or a mapping of them, found {describe(declared)}")


def states_of(declared: Any, key: jax.Array) -> dict[str, Any]:
    """The states of a layer, or of a mapping of layers and mappings, each with its own key.

    A layer's key is the one that its parameters' keys are folded from.
    """
    if isinstance(declared, Layer):
        return dict(declared.states(key))
    if isinstance(declared, Stacked):
        return dict(_stacked_states(declared, key))
    return {
        name: states_of(part, fold_in_name(key, name))
        for name, part in declared.items()
        if not isinstance(_one_of(part), Param)
    }


def _stacked_states(stacked: Stacked, key: jax.Array) -> Record:
    """Each copy's own states; those declared by a `Param` are a `Param` of all copies."""

    def parts(key: jax.Array) -> list[Any]:
        return jax.tree.leaves(Record(states_of(stacked.declared, key)))

    def draw(position: int) -> Callable[..., jax.Array]:
        return lambda _, shape, dtype: for_each_copy(
            lambda key: parts(key)[position].initial(key, dtype), key, stacked.n
        )

    one, structure = jax.tree.flatten(Record(states_of(stacked.declared, key)))
    arrays = [i for i, part in enumerate(one) if not isinstance(part, Param)]
    values = for_each_copy(lambda key: [parts(key)[i] for i in arrays], key, stacked.n)
    drawn = {i: Param((stacked.n, *p.shape), draw(i)) for i, p in enumerate(one) if isinstance(p, Param)}
    found = drawn | dict(zip(arrays, values, strict=True))
    return jax.tree.unflatten(structure, [found[i] for i in range(len(one))])


def for_each_copy(make: Callable[[jax.Array], Any], key: jax.Array, n: int) -> Any:
    """What `make` gives for `n` keys, the given one folded with 0, 1, ..., stacked."""
    return jax.vmap(lambda i: make(jax.random.fold_in(key, i)))(jnp.arange(n))


def fold_in_name(key: jax.Array, name: str) -> jax.Array:
    """A key of its own for a name: it does not depend on what else there is."""
    return jax.random.fold_in(key, crc32(name.encode()))


def keeps_state_type(layer: Layer) -> bool:
    """Whether a layer and all that are in it return a state of the type that they were given."""
    return layer.keeps_state_type and all(keeps_state_type(child) for _, child in sublayers(layer))


def contains_layer(x: Any) -> bool:
    """Whether `x` is a layer, or a mapping, tuple or list with one at any depth.

    >>> import flatlayers as fl
    >>> fl.contains_layer({"a": [1, fl.Dense(2, 2)]}), fl.contains_layer((1, 2))
    (True, False)
    """
    x = _one_of(x)
    if isinstance(x, Mapping):
        return any(map(contains_layer, x.values()))
    if isinstance(x, tuple | list):
        return any(map(contains_layer, x))
    return isinstance(x, Layer)


def as_layer(x: Any) -> Layer:
    """A layer as it is, a function as a `WrappedFunction`. **Raises:** `TypeError` for anything else."""
    if isinstance(x, Layer):
        return x
    if isinstance(x, type) or not callable(x):
        hint = f"; write {x.__name__}(...)" if isinstance(x, type) else ""
        raise TypeError(f"expected a layer or a function, found {x!r}{hint}")
    return WrappedFunction(x)


def _only_layers(declared: Mapping[str, Any]) -> dict[str, Any]:
    layers = {name: _one_of(part) for name, part in declared.items() if contains_layer(part)}
    return {name: part if isinstance(part, Layer) else _only_layers(part) for name, part in layers.items()}


def _one_of(declared: Any) -> Any:
    """One copy of what is stacked; anything else as it is."""
    return _one_of(declared.declared) if isinstance(declared, Stacked) else declared


# Fields


def frozen_field(value: Any, where: str, way_out: str) -> Any:
    """A field in its final form: tuples for lists, immutable dicts, layers for functions among layers.

    **Raises:** `TypeError` for an array, which says the `way_out`, and for a value without a hash.
    """
    value = _frozen(value)
    if any(isinstance(leaf, jax.Array | np.ndarray) for leaf in jax.tree.leaves(value)):
        raise TypeError(f"{where}: layers hold no arrays; {way_out}")
    try:
        hash(value)
    except TypeError:
        raise TypeError(f"{where}: expected a value with a hash, found {value!r}") from None
    return value


def _frozen(value: Any) -> Any:
    if isinstance(value, tuple | list) and not hasattr(value, "_fields"):
        parts = [_frozen(part) for part in value]
        if _needs_layers(parts):
            parts = [part if holds_layers(part) else as_layer(part) for part in parts]
        return tuple(parts)
    if isinstance(value, Mapping):
        parts = {name: _frozen(part) for name, part in value.items()}
        if _needs_layers(list(parts.values())):
            parts = {name: part if holds_layers(part) else as_layer(part) for name, part in parts.items()}
        return FrozenDict(parts)
    return value


def _needs_layers(parts: list[Any]) -> bool:
    return any(isinstance(part, Layer) for part in parts)


def holds_layers(value: Any) -> bool:
    if isinstance(value, tuple):
        return bool(value) and all(map(holds_layers, value))
    if isinstance(value, FrozenDict):
        return bool(value) and all(map(holds_layers, value.values()))
    return isinstance(value, Layer)


def named_parts(value: Any) -> Mapping[str, Any]:
    """The parts of a tuple or dict by their names as children."""
    return {f"layer_{i}": part for i, part in enumerate(value)} if isinstance(value, tuple) else value


def child_tree(value: Any) -> Any:
    if isinstance(value, Layer):
        return value
    return {name: child_tree(part) for name, part in named_parts(value).items()}
