"""Layers made of layers: `Container`, whose children have names, and `Wrapper`, whose child has none."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ..types import Input, Key, Output, Params, State
from .declaration import as_declared
from .layer import Layer, as_layer, holds_layers


class Container(Layer):
    """A layer made of layers: each field that is a layer is a child, under the field's name.

    A field that is annotated as `fl.Layer` takes a bare function too, which becomes a `WrappedFunction`.
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

    def _complete(self) -> None:
        for field in dataclasses.fields(self):  # pyright: ignore[reportArgumentType]
            value = getattr(self, field.name)
            if field.type in (Layer, "Layer", "fl.Layer") and value is not None:
                try:
                    setattr(self, field.name, as_layer(value))
                except TypeError as error:
                    raise TypeError(f"{type(self).__name__}.{field.name}: {error}") from None
        super()._complete()

    def children(self) -> Mapping[str, Any]:
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}  # pyright: ignore
        return {name: child_tree(value) for name, value in fields.items() if holds_layers(value)}

    def parameters(self) -> Mapping[str, Any]:
        return self.children()

    def states(self, key: Key) -> Mapping[str, Any]:
        return as_declared(self.children()).declared_states(key) or {}


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

    def _complete(self) -> None:
        fields = dataclasses.fields(self)  # pyright: ignore[reportArgumentType]
        # In the order of the constructor's arguments.
        names = [field.name for field in sorted(fields, key=lambda field: bool(field.kw_only))]
        if names and not any(isinstance(getattr(self, name), Layer) for name in names):
            setattr(self, names[0], as_layer(getattr(self, names[0])))
        super()._complete()
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

    def states(self, key: Key) -> Mapping[str, Any]:
        return self.child.states(key)

    def forward(self, x: Input, ps: Params, st: State) -> tuple[Output, State]:
        return self.child(x, ps, st)


def named_parts(value: Any) -> Mapping[str, Any]:
    """Return the parts of a tuple or dict by their names as children."""
    return {f"layer_{i}": part for i, part in enumerate(value)} if isinstance(value, tuple) else value


def child_tree(value: object) -> Any:
    """Return a field that holds layers as what it is among the children: a layer, or a mapping."""
    if isinstance(value, Layer):
        return value
    return {name: child_tree(part) for name, part in named_parts(value).items()}
