"""`freeze`: parameters that are not trained leave the vector and become state."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax

from ..core.declaration import Param, Stacked, Tied
from ..core.layer import Layer, Wrapper, as_layer, layout_of
from ..core.setup import initial_values
from ..layers.fields import AnyLayer, Text, as_tuple_of
from ..vectors.layout import Layout
from ..vectors.names import describe, join_path
from ..vectors.record import Record, as_record
from ..vectors.vector import ComponentVector


class FrozenLayer(Wrapper):
    """A layer some of whose parameters are state: what `fl.freeze` makes.

    **Arguments:**

    - `layer`: the layer.
    - `names`: patterns of the names of the frozen parameters, as `Layout.mask` takes them.

    **Inputs:** those of `layer`. **Returns:** what it returns.

    **Parameters:** those of `layer` that are not frozen. **States:** `frozen`, those that are, under their
    names; and `layer`, the state of the layer.

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
        super().check_fields()
        _ = self.frozen_names

    @functools.cached_property
    def frozen_names(self) -> frozenset[str]:
        """The paths of the frozen leaves, both names of a tie included."""
        layout = self.layer.layout
        mask = layout.mask(*self.names)
        return frozenset(path for path, slot in layout.slots() if mask[slot.positions()].any())

    @functools.cached_property
    def frozen_layout(self) -> Layout:
        """The layout of the frozen values, a tied one once."""
        return layout_of(_selected(self.layer, self._is_stored))

    def parameters(self) -> Mapping[str, Any]:
        frozen = self.frozen_names
        ties = {a: b for a, b in self.layer.layout.ties.items() if a not in frozen}
        return Tied(_selected(self.layer, lambda path: path not in frozen), ties)

    def states(self, key: jax.Array) -> Mapping[str, Any]:
        def drawn(path: str) -> Callable[..., Any]:
            # With the key that the parameter would have in the layer itself.
            declared = _selected(self.layer, lambda other: other == path)
            return lambda _, shape, dtype: Record(initial_values(key, declared, dtype))[path]

        shapes = self.frozen_layout.view_shapes
        params = {path: Param(shape, drawn(path)) for path, shape in shapes.items()}
        return {"frozen": self.frozen_layout.nest(params), "layer": dict(self.layer.states(key))}

    def forward(self, x: Any, ps: Any, st: Any) -> tuple[Any, Any]:
        y, new = self.layer(x, self.joined(ps, st.frozen), st.layer)
        return y, st.replace(layer=new)

    def joined(self, ps: Any, frozen: Any) -> Record:
        """All parameters of the layer: those in the vector and those in the state."""
        layout, leaves = self.layer.layout, {}
        for path in layout.view_shapes:
            place = layout.ties.get(path, path)
            leaves[path] = _leaf(frozen if place in self.frozen_names else ps, place)
        return layout.nest(leaves)

    def _is_stored(self, path: str) -> bool:
        return path in self.frozen_names and path not in self.layer.layout.ties


def freeze(layer: Layer, names: str | tuple[str, ...] | None = None, ps: Any = None, st: Any = None) -> Any:
    """Take parameters out of the vector: they become state, and are not trained.

    The output does not change, and `fl.setup` with the same key gives the same values.

    **Arguments:**

    - `layer`: the layer.
    - `names`: a shell-style pattern over dotted paths, or a tuple of them, as for `Layout.mask`; `None`
        freezes all parameters, an empty tuple none.
    - `ps`, `st`: its parameters and its state, to be taken along.

    **Returns:** the `FrozenLayer`; with `ps` and `st`, `(layer, ps, st)`, where `ps` is a shorter
    `ComponentVector` and `st` a `Record(frozen=..., layer=...)`.

    **Raises:** `KeyError` (also a `ValueError`) for a pattern that matches nothing; `TypeError` for `ps`
    without `st`.

    >>> import jax
    >>> import flatlayers as fl
    >>> model = fl.Chain(encoder=fl.Dense(8, 4), head=fl.Dense(4, 1))
    >>> ps, st = fl.setup(jax.random.key(0), model)
    >>> tuned, trained, st = fl.freeze(model, "encoder.*", ps, st)
    >>> trained
    ComponentVector(float32[5], head=(weight=(1, 4), bias=(1,)))
    >>> st.frozen.encoder.weight.shape
    (4, 8)
    """
    layer = as_layer(layer)
    if names is None:
        names = ("*",) * bool(layer.layout.length)
    names = (names,) if isinstance(names, str) else as_tuple_of(Text, "freeze: names", names)
    frozen = FrozenLayer(layer, names)
    if ps is None and st is None:
        return frozen
    _check_state(st)
    whole = _all_of(layer, ps)
    return (
        frozen,
        _trained(whole, frozen.layout, ps),
        Record(frozen=_part(whole, frozen.frozen_layout), layer=as_record(st)),
    )


def unfreeze(layer: Layer, ps: Any = None, st: Any = None) -> Any:
    """Put frozen parameters back into the vector: the inverse of `fl.freeze`.

    **Arguments:**

    - `layer`: what `fl.freeze` made.
    - `ps`, `st`: its parameters and its state, to be taken along.

    **Returns:** the layer inside; with `ps` and `st`, `(layer, ps, st)` with the values that they had.

    **Raises:** `TypeError` for a layer that is not frozen and for `ps` without `st`.

    >>> import jax
    >>> import flatlayers as fl
    >>> model = fl.freeze(fl.Dense(3, 2), "weight")
    >>> ps, st = fl.setup(jax.random.key(0), model)
    >>> fl.unfreeze(model, ps, st)[1]
    ComponentVector(float32[8], weight=(2, 3), bias=(2,))
    """
    if not isinstance(layer, FrozenLayer):
        raise TypeError(f"expected a layer that `fl.freeze` made, found {layer!r}")
    if ps is None and st is None:
        return layer.layer
    _check_state(st)
    st = as_record(st)
    return (
        layer.layer,
        ComponentVector.of(layer.joined(_all_of(layer, ps), st.frozen), layer.layer.layout),
        st.layer,
    )


def _selected(declared: Any, keep: Callable[[str], bool], path: str = "") -> Any:
    """The part of a declaration with the leaves that are kept; groups without any are left out."""
    if isinstance(declared, Param):
        return declared if keep(path) else {}
    if isinstance(declared, Stacked):
        inner = _selected(declared.declared, keep, path)
        return inner if _is_empty(inner) else Stacked(inner, declared.n)
    parts = declared.parameters() if isinstance(declared, Layer) else declared
    kept = {name: _selected(part, keep, join_path(path, name)) for name, part in parts.items()}
    return {name: part for name, part in kept.items() if not _is_empty(part)}


def _is_empty(declared: Any) -> bool:
    return isinstance(declared, Mapping) and not declared


def _leaf(source: Any, path: str) -> Any:
    return functools.reduce(getattr, path.split("."), source)


def _part(whole: Record, layout: Layout) -> Record:
    return layout.nest({path: _leaf(whole, path) for path in layout.view_shapes})


def _trained(whole: Record, layout: Layout, ps: Any) -> ComponentVector:
    """The vector of what is not frozen. One without numbers has the dtype and the leading axes of `ps`."""
    if not layout.length and isinstance(ps, ComponentVector):
        return ComponentVector(ps.data[..., :0], layout)
    return ComponentVector.of(_part(whole, layout), layout)


def _check_state(st: Any) -> None:
    if not isinstance(st, Mapping):
        raise TypeError(f"expected the state of the layer with its parameters, found {describe(st)}")


def _all_of(layer: Layer, ps: Any) -> Record:
    if isinstance(ps, ComponentVector):
        return layer.layout.unpack(ps)
    if not isinstance(ps, Mapping):
        raise TypeError(f"expected the parameters of the layer, a ComponentVector, found {describe(ps)}")
    return as_record(ps)
