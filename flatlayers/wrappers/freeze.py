"""`freeze`: parameters that are not trained leave the vector and become state."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

from ..core.composite import Wrapper
from ..core.constraints import constrained, free_leaves
from ..core.declaration import Group, Param, Tied
from ..core.layer import Layer, as_layer
from ..layers.fields import AnyLayer, Text, sequence_of
from ..types import Array, Input, Key, Output, Params, State
from ..vectors.layout import Layout, check_same_layout, leaves_of
from ..vectors.names import describe
from ..vectors.record import Record, as_record
from ..vectors.vector import ComponentVector


class FrozenLayer(Wrapper):
    """A layer some of whose parameters are state, made by `fl.freeze`.

    **Arguments:**

    - `layer`: the layer.
    - `names`: patterns of the names of the frozen parameters, as `Layout.mask` takes them.

    **Inputs:** those of `layer`. **Returns:** what it returns.

    **Parameters:** those of `layer` that are not frozen. **States:** `frozen`, those that are, under their
    names, as the layer sees them; and `layer`, the state of the layer.

    **Raises:** `KeyError` (also a `ValueError`) for a pattern that matches nothing.

    >>> import fnmatch, jax
    >>> import flatlayers as fl
    >>> layer = fl.FrozenLayer(fl.Dense(3, 2), ("weight",))
    >>> ps, st = fl.setup(jax.random.key(0), layer)
    >>> ps, st.frozen.weight.shape
    (ComponentVector(float32[2], bias=(2,)), (2, 3))
    """

    layer: AnyLayer
    names: tuple[Text, ...]

    def check_fields(self) -> None:
        # A pattern that matches nothing is an error where the layer is made.
        _ = self.frozen_names

    @functools.cached_property
    def frozen_names(self) -> frozenset[str]:
        """Return the paths of the frozen leaves, with both names of a tie."""
        layout = self.layer.layout
        mask = layout.mask(*self.names)
        return frozenset(path for path, slot in layout.slots() if mask[slot.positions()].any())

    @functools.cached_property
    def frozen_layout(self) -> Layout:
        """Return the layout of the frozen values, a tied one once."""
        return _selected(self.layer, self._is_stored).layout

    @property
    def places_of_frozen(self) -> dict[str, str]:
        """Return the places in the state of the frozen leaves, by their paths."""
        ties = self.layer.layout.ties
        return {path: f"frozen.{ties.get(path, path)}" for path in sorted(self.frozen_names)}

    def parameters(self) -> Mapping[str, Any]:
        frozen = self.frozen_names
        ties = {a: b for a, b in self.layer.layout.ties.items() if a not in frozen}
        return Tied(_selected(self.layer, lambda path: path not in frozen), ties)

    def states(self, key: Key) -> Mapping[str, Any]:
        def drawn(path: str) -> Callable[..., Array]:
            # With the key that the parameter would have in the layer itself.
            declared = _selected(self.layer, lambda other: other == path)
            return lambda _, shape, dtype: declared.initial_leaves(key, dtype)[path]

        shapes = self.frozen_layout.view_shapes
        params = {path: Param(shape, drawn(path)) for path, shape in shapes.items()}
        return {"frozen": self.frozen_layout.nest(params), "layer": dict(self.layer.states(key))}

    def forward(self, x: Input, ps: Params, st: State) -> tuple[Output, State]:
        y, new = self.layer(x, self.joined(ps, st.frozen), st.layer)
        return y, st.replace(layer=new)

    def joined(self, ps: Params, frozen: Params) -> Record:
        """Return all parameters of the layer: those in the vector and those in the state."""
        layout, leaves = self.layer.layout, {}
        for path in layout.view_shapes:
            place = layout.ties.get(path, path)
            leaves[path] = _leaf(frozen if place in self.frozen_names else ps, place)
        return layout.nest(leaves)

    def _is_stored(self, path: str) -> bool:
        return path in self.frozen_names and path not in self.layer.layout.ties


def freeze(model: Layer, names: str | tuple[str, ...] | None = None) -> FrozenLayer:
    """Take parameters out of the vector: they become state, and are not trained.

    The output does not change, and `fl.setup` with the same key gives the same values.
    `fl.freeze_parameters` takes along what a model has learned.

    Running statistics of frozen layers, as of `fl.BatchNorm`, go on moving in training mode. To hold them,
    put that part of the state into test mode:
    `st.replace(layer=st.layer.replace(encoder=fl.testmode(st.layer.encoder)))`.

    **Arguments:**

    - `model`: a layer.
    - `names`: a shell-style pattern over dotted paths, or a tuple of them, as for `Layout.mask`; `None`
        freezes all parameters, an empty tuple none.

    **Returns:** the `FrozenLayer`.

    **Raises:** `KeyError` (also a `ValueError`) for a pattern that matches nothing.

    >>> import jax
    >>> import flatlayers as fl
    >>> model = fl.freeze(fl.Chain(encoder=fl.Dense(8, 4), head=fl.Dense(4, 1)), "encoder.*")
    >>> fl.initial_parameters(jax.random.key(0), model)
    ComponentVector(float32[5], head=(weight=(1, 4), bias=(1,)))
    """
    model = as_layer(model)
    if names is None:
        names = ("*",) * bool(model.layout.length)
    patterns = (names,) if isinstance(names, str) else sequence_of(Text)("freeze: names", names)
    return FrozenLayer(model, patterns)


def freeze_parameters(
    model: Layer, names: str | tuple[str, ...] | None, ps: Params, st: State
) -> tuple[FrozenLayer, ComponentVector, Record]:
    """Freeze a model as `fl.freeze` does, and take the values of its parameters and states along.

    **Arguments:**

    - `model`, `names`: as for `fl.freeze`.
    - `ps`: its parameters, a `ComponentVector` or a mapping.
    - `st`: its state.

    **Returns:** `(model, ps, st)`: the `FrozenLayer`, a shorter vector and a `Record(frozen=..., layer=...)`.

    **Raises:** as `fl.freeze`, and `TypeError` for the vector of another model or another kind of `ps` or
    `st`.

    >>> import jax
    >>> import flatlayers as fl
    >>> model = fl.Chain(encoder=fl.Dense(8, 4), head=fl.Dense(4, 1))
    >>> ps, st = fl.setup(jax.random.key(0), model)
    >>> tuned, trained, st = fl.freeze_parameters(model, "encoder.*", ps, st)
    >>> trained
    ComponentVector(float32[5], head=(weight=(1, 4), bias=(1,)))
    >>> st.frozen.encoder.weight.shape
    (4, 8)
    """
    frozen = freeze(model, names)
    _check_state(st)
    trained = _trained(frozen.layer, frozen.layout, ps)
    values = constrained(frozen.layer, ps) if isinstance(ps, ComponentVector) else as_record(ps)
    return frozen, trained, Record(frozen=_part(values, frozen.frozen_layout), layer=as_record(st))


def unfreeze(model: Layer) -> Layer:
    """Put frozen parameters back into the vector: the inverse of `fl.freeze`.

    **Arguments:**

    - `model`: a layer that `fl.freeze` made.

    **Returns:** the layer inside.

    **Raises:** `TypeError` for a layer that is not frozen.

    >>> import flatlayers as fl
    >>> fl.unfreeze(fl.freeze(fl.Dense(3, 2), "weight"))
    Dense(3, 2)
    """
    return _frozen(model).layer


def unfreeze_parameters(model: Layer, ps: Params, st: State) -> tuple[Layer, ComponentVector, Record]:
    """Unfreeze a model with its parameters and states: the inverse of `fl.freeze_parameters`.

    **Arguments:**

    - `model`: a layer that `fl.freeze` made.
    - `ps`: its parameters, a `ComponentVector` or a mapping.
    - `st`: its state.

    **Returns:** `(model, ps, st)`: the layer inside, with all of its parameters and its own state.

    **Raises:** `TypeError` for a layer that is not frozen, for the vector of another model and for another
    kind of `ps` or `st`.

    >>> import jax
    >>> import flatlayers as fl
    >>> model = fl.freeze(fl.Dense(3, 2), "weight")
    >>> ps, st = fl.setup(jax.random.key(0), model)
    >>> fl.unfreeze_parameters(model, ps, st)[1]
    ComponentVector(float32[8], weight=(2, 3), bias=(2,))
    """
    frozen = _frozen(model)
    _check_state(st)
    st, layer = as_record(st), frozen.layer
    stored = _free(layer, frozen.frozen_layout, st.frozen)
    joined = frozen.joined(_free_numbers(frozen, ps), stored)
    return layer, ComponentVector.of(joined, layer.layout), st.layer


def _frozen(model: Layer) -> FrozenLayer:
    if not isinstance(model, FrozenLayer):
        raise TypeError(f"expected a layer that `fl.freeze` made, found {model!r}")
    return model


def _selected(layer: Layer, keep: Callable[[str], bool]) -> Group:
    """Return the part of a declaration with the leaves that are kept, without groups that have none."""
    found = layer.declared_where(keep)
    return found if isinstance(found, Group) else Group({})


def _leaf(source: Params, path: str) -> Any:
    return functools.reduce(getattr, path.split("."), source)


def _part(whole: Record, layout: Layout) -> Record:
    return layout.nest({path: _leaf(whole, path) for path in layout.view_shapes})


def _trained(layer: Layer, layout: Layout, ps: Params) -> ComponentVector:
    """Return the vector of what is not frozen. Without numbers it has the dtype and leading axes of `ps`."""
    whole = _free_numbers(layer, ps)
    if not layout.length and isinstance(ps, ComponentVector):
        return ComponentVector(ps.data[..., :0], layout)
    return ComponentVector.of(_part(whole, layout), layout)


def _check_state(st: State) -> None:
    if not isinstance(st, Mapping):
        raise TypeError(f"expected the state of the layer with its parameters, found {describe(st)}")


def _free_numbers(layer: Layer, ps: Params) -> Record:
    """Return the numbers of a vector under their names; a mapping has values, which become free numbers."""
    if isinstance(ps, ComponentVector):
        check_same_layout(layer.layout, ps.layout)
        return ps.unpack()
    if not isinstance(ps, Mapping):
        raise TypeError(f"expected the parameters of the layer, a ComponentVector, found {describe(ps)}")
    return _free(layer, layer.layout, as_record(ps))


def _free(layer: Layer, layout: Layout, values: Record) -> Record:
    """Return the free numbers of values, some or all of the layer's."""
    transforms = layer.declared_transforms()
    return layout.nest(free_leaves(transforms, leaves_of(layout, values))) if transforms else values
