"""Layers made of layers: one after another, side by side, around."""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any

import jax.numpy as jnp
import numpy as np

from ..core.composite import Container
from ..core.fields import Check, Count, a_callable, checked
from ..core.layer import Layer
from ..core.values import FrozenDict
from ..dtypes import as_real
from ..types import Input, Output, Params, State
from ..vectors.names import UnknownAttributeError, UnknownNameError, unknown_name
from .fields import AnyLayer, LayerLike, Text
from .shapes import check_count


Connection = Annotated[Callable[..., Any], Check("a function or a layer", a_callable)]


def child_named(layer: Container, layers: Mapping[str, Layer], name: str) -> Layer:
    """The child of a name, which a container has as an attribute.

    **Raises:** `AttributeError` with the nearest names. Also for those that Python, JAX and others ask every
    object for: no child begins with an underscore.
    """
    if name.startswith("_"):
        raise AttributeError(f"{type(layer).__name__!r} object has no attribute {name!r}")
    if name not in layers:
        where = f"{type(layer).__name__}: "
        raise UnknownAttributeError(lambda: where + unknown_name(name, layers))
    return layers[name]


def connected(
    layer: Container, field: str, inputs: tuple[Any, ...], ps: Params, st: State
) -> tuple[Any, Any]:
    """Join `inputs` by what a field has: a function of them, a layer of one tuple; `None` returns it."""
    connection = getattr(layer, field)
    if connection is None:
        return inputs, st
    if not isinstance(connection, Layer):
        return connection(*inputs), st
    y, new = connection(inputs, getattr(ps, field), st[field])
    return y, st.replace(**{field: new})


class NamedLayers(Container):
    """The base of containers whose children are arguments: `layer_0`, `layer_1`, ... or keywords.

    The children stand directly under the container, and so does the connection if it is a layer. Each is an
    attribute of the container, too, if its name is not that of another: `chain.layer_1`, `chain.encoder`.
    """

    layers: FrozenDict

    def __init__(self, *layers: LayerLike, **named: LayerLike):
        numbered = {f"layer_{i}": layer for i, layer in enumerate(layers)}
        if isinstance(given := named.get("layers"), Mapping):  # as dataclasses.replace gives them
            named = {**given, **{name: layer for name, layer in named.items() if name != "layers"}}
        if both := numbered.keys() & named.keys():
            raise ValueError(f"expected a name for each layer, found two layers named {min(both)!r}")
        where = type(self).__name__
        self.layers = FrozenDict(
            {n: checked(AnyLayer, f"{where}.{n}", layer) for n, layer in (numbered | named).items()}
        )

    def __getattr__(self, name: str) -> Layer:
        return child_named(self, self.__dict__.get("layers", {}), name)

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self.layers]

    def children(self) -> Mapping[str, Any]:
        return {**self.layers, **{k: c for k, c in super().children().items() if k != "layers"}}

    def call_layer(self, name: str, x: Input, ps: Params, st: State) -> tuple[Any, Any]:
        y, new = self.layers[name](x, getattr(ps, name), st[name])
        return y, st.replace(**{name: new})

    def call_layers(self, xs: tuple[Input, ...], ps: Params, st: State) -> tuple[tuple[Any, ...], Any]:
        """Call each layer with its own input."""
        ys = []
        for name, x in zip(self.layers, xs, strict=True):
            y, st = self.call_layer(name, x, ps, st)
            ys.append(y)
        return tuple(ys), st

    def constructor_arguments(self) -> Iterator[tuple[str, Any, bool]]:
        own = [argument for argument in super().constructor_arguments() if argument[0] != "layers"]
        yield from (argument for argument in own if not argument[2])
        keyword = False
        for i, (name, layer) in enumerate(self.layers.items()):
            keyword = keyword or name != f"layer_{i}"
            yield name, layer, keyword
        yield from (argument for argument in own if argument[2])


class Chain(NamedLayers):
    """Layers one after another: `y = layer_n(... layer_0(x))`.

    `chain[0]`, `chain["head"]`, `chain.head` and negative indices give a layer, `chain[1:]` a chain whose
    layers keep their names, so that the whole's `ps` serves the part. `Chain()` is the identity.

    **Arguments:**

    - `*layers`: layers, or functions, which become `WrappedFunction`; named `layer_0`, `layer_1`, ...
    - `name`: the name that displays and messages use.
    - `**named`: layers with names of their own, after the others.

    **Inputs:** what the first layer takes. **Returns:** `(y, st)`, what the last layer returns.

    **Parameters and states:** those of each layer, under its name.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import flatlayers as fl
    >>> model = fl.Chain(fl.Dense(2, 16, jnp.tanh), head=fl.Dense(16, 1))
    >>> ps, st = fl.setup(jax.random.key(0), model)
    >>> ps
    ComponentVector(float32[65], layer_0=(weight=(16, 2), bias=(16,)), head=(weight=(1, 16), bias=(1,)))
    >>> model(jnp.ones((5, 2)), ps, st)[0].shape
    (5, 1)
    >>> model[1:]
    Chain(head=Dense(16, 1))
    >>> model.head
    Dense(16, 1)
    """

    name: Text | None = None

    def __init__(self, *layers: LayerLike, name: str | None = None, **named: LayerLike):
        super().__init__(*layers, **named)
        self.name = name

    def forward(self, x: Input, ps: Params, st: State) -> tuple[Output, State]:
        for name in self.layers:
            x, st = self.call_layer(name, x, ps, st)
        return x, st

    def __len__(self) -> int:
        return len(self.layers)

    def __bool__(self) -> bool:
        return True

    def __iter__(self) -> Iterator[Layer]:
        return iter(self.layers.values())

    def __getitem__(self, key: int | slice | str) -> Layer:
        if isinstance(key, slice):
            part = list(self.layers.items())[key]
            return Chain(name=self.name, **dict(part))
        if isinstance(key, str):
            if key not in self.layers:
                raise UnknownNameError(unknown_name(key, self.layers))
            return self.layers[key]
        return list(self.layers.values())[key]


class Parallel(NamedLayers):
    """Layers side by side, joined: `y = connection(layer_0(x_0), layer_1(x_1), ...)`.

    **Arguments:**

    - `connection`: a function, called once with all outputs; a layer, called with their tuple;
        or `None`, which returns the tuple.
    - `*layers`, `**named`: the layers, as in `Chain`.

    **Inputs:** a tuple is distributed, one input per layer; anything else goes to all.
    **Returns:** `(y, st)`.

    **Parameters and states:** those of each layer under its name, and under `connection` if that is
    a layer.

    **Raises:** `ValueError` for a tuple of another length.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import flatlayers as fl
    >>> model = fl.Parallel(jnp.add, fl.NoOpLayer(), jnp.square)
    >>> ps, st = fl.setup(jax.random.key(0), model)
    >>> float(model((1.0, 3.0), ps, st)[0])
    10.0
    """

    connection: Connection | None

    def __init__(self, connection: Connection | None, *layers: LayerLike, **named: LayerLike):
        super().__init__(*layers, **named)
        self.connection = connection

    def forward(self, x: Input, ps: Params, st: State) -> tuple[Output, State]:
        xs = x if type(x) is tuple else (x,) * len(self.layers)
        check_count(len(xs), len(self.layers), "layer")
        ys, st = self.call_layers(xs, ps, st)
        return connected(self, "connection", ys, ps, st)


class BranchLayer(NamedLayers):
    """One input to every layer: `y = fusion(layer_0(x), layer_1(x), ...)`.

    **Arguments:**

    - `*layers`, `**named`: the layers, as in `Chain`.
    - `fusion`: a function, called once with all outputs; a layer, called with their tuple; or
        `None`, which returns the tuple.

    **Inputs:** `x`, anything; a tuple goes to every layer as it is. **Returns:** `(y, st)`.

    **Parameters and states:** those of each layer under its name, and under `fusion` if that is a
    layer.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import flatlayers as fl
    >>> model = fl.BranchLayer(jnp.sin, jnp.cos, fusion=lambda s, c: s**2 + c**2)
    >>> ps, st = fl.setup(jax.random.key(0), model)
    >>> print(f"{model(0.3, ps, st)[0]:.3f}")
    1.000
    """

    fusion: Connection | None = None

    def __init__(self, *layers: LayerLike, fusion: Connection | None = None, **named: LayerLike):
        super().__init__(*layers, **named)
        self.fusion = fusion

    def forward(self, x: Input, ps: Params, st: State) -> tuple[Output, State]:
        ys, st = self.call_layers((x,) * len(self.layers), ps, st)
        return connected(self, "fusion", ys, ps, st)


class PairwiseFusion(NamedLayers):
    """A chain that takes one input per step: `y = x_0`, then `y = connection(layer_i(y), x_{i+1})`.

    **Arguments:**

    - `connection`: a function of two arguments, or a layer, called with their tuple.
    - `*layers`, `**named`: the layers, as in `Chain`.

    **Inputs:** a tuple of one input more than there are layers; anything else is used again at
    each step. **Returns:** `(y, st)`.

    **Parameters and states:** those of each layer under its name, and under `connection` if that is
    a layer.

    **Raises:** `ValueError` for a tuple of another length.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import flatlayers as fl
    >>> model = fl.PairwiseFusion(jnp.add, jnp.square, jnp.square)
    >>> ps, st = fl.setup(jax.random.key(0), model)
    >>> float(model((1.0, 2.0, 3.0), ps, st)[0])
    12.0
    """

    connection: Connection

    def __init__(self, connection: Connection, *layers: LayerLike, **named: LayerLike):
        super().__init__(*layers, **named)
        self.connection = connection

    def forward(self, x: Input, ps: Params, st: State) -> tuple[Output, State]:
        xs = x if type(x) is tuple else (x,) * (len(self.layers) + 1)
        check_count(len(xs), len(self.layers) + 1, "layer and one to start with")
        y = xs[0]
        for name, part in zip(self.layers, xs[1:], strict=True):
            y, st = self.call_layer(name, y, ps, st)
            y, st = connected(self, "connection", (y, part), ps, st)
        return y, st


class Maxout(NamedLayers):
    """The largest output of several layers, number by number: `y = max(layer_0(x), layer_1(x), ...)`.

    With `Dense` layers it is a learned convex activation (Goodfellow et al., 2013).

    **Arguments:**

    - `*layers`, `**named`: the layers, as in `Chain`; or
    - `make_layer, n`: a function without arguments that makes a layer, and how often it is called.

    **Inputs:** what every layer takes. **Returns:** `(y, st)` with `y` of the shape that all outputs have.

    **Parameters and states:** those of each layer under its name.

    **Raises:** `ValueError` for no layer and for outputs of different shapes; `TypeError` for complex
    outputs.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import flatlayers as fl
    >>> model = fl.Maxout(lambda: fl.Dense(3, 2), 4)
    >>> ps, st = fl.setup(jax.random.key(0), model)
    >>> ps.layout.names
    ('layer_0', 'layer_1', 'layer_2', 'layer_3')
    >>> model(jnp.ones((5, 3)), ps, st)[0].shape
    (5, 2)
    """

    def __init__(self, *layers: Any, **named: LayerLike):
        if len(layers) == 2 and _is_number(layers[1]) and not isinstance(layers[0], Layer):
            make_layer, n = layers[0], checked(Count, "Maxout.n", layers[1])
            if not callable(make_layer):
                raise TypeError(f"Maxout: expected a function that makes a layer, found {make_layer!r}")
            layers = tuple(make_layer() for _ in range(n))
        super().__init__(*layers, **named)
        if not self.layers:
            raise ValueError("Maxout: expected one layer or more, found none")

    def forward(self, x: Input, ps: Params, st: State) -> tuple[Output, State]:
        ys, st = self.call_layers((x,) * len(self.layers), ps, st)
        ys = [as_real(y) for y in ys]
        if len({y.shape for y in ys}) > 1:
            raise ValueError(f"expected outputs of one shape, found {[y.shape for y in ys]}")
        return functools.reduce(jnp.maximum, ys), st


def _is_number(value: object) -> bool:
    return isinstance(value, int | float | np.number)


class SkipConnection(Container):
    """A layer and a way around it: `y = connection(layer(x), x)`.

    **Arguments:**

    - `layer`: a layer or a function.
    - `connection`: a function of two arguments, or a layer, called with the tuple `(layer(x), x)`.

    **Inputs:** what the layer takes. **Returns:** `(y, st)`.

    **Parameters and states:** those of the layer under `layer`, and of the connection under
    `connection` if that is a layer.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import flatlayers as fl
    >>> model = fl.SkipConnection(fl.Dense(2, 2, init_weight=fl.initializers.zeros), jnp.add)
    >>> ps, st = fl.setup(jax.random.key(0), model)
    >>> model(jnp.arange(2.0), ps, st)[0]
    Array([0., 1.], dtype=float32)
    """

    layer: AnyLayer
    connection: Connection

    def forward(self, x: Input, ps: Params, st: State) -> tuple[Output, State]:
        y, new = self.layer(x, ps.layer, st.layer)
        return connected(self, "connection", (y, x), ps, st.replace(layer=new))
