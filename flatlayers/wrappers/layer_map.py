"""Finding and changing the layers inside a model: `layer_map`, `select` and `replace_layer`."""

import dataclasses
import fnmatch
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeAlias, TypeVar

import jax
import jax.numpy as jnp

from ..core.constraints import constrain, constrained, free_leaves, unconstrained
from ..core.declaration import Stacked, as_declared, contains_layer
from ..core.layer import Layer, as_layer
from ..core.rebuild import replaceable, with_children
from ..transforms import Transform
from ..types import Params, State
from ..vectors.layout import Layout, leaves_of
from ..vectors.names import (
    UnknownNameError,
    UnknownPatternError,
    as_path,
    describe,
    join_path,
    listing,
    unknown_name,
)
from ..vectors.packing import pack
from ..vectors.record import Record, as_record
from ..vectors.vector import ComponentVector


# A layer, or a mapping of layers, parameters and mappings, as `fl.setup` takes it.
Model: TypeAlias = Layer | Mapping[str, Any]
Kind = TypeVar("Kind", bound=Model)
# A model, and each part of it.
Part: TypeAlias = Model | Stacked
# A function `f(layer, ps, st, path) -> (layer, ps, st)`.
Change: TypeAlias = Callable[[Layer, Any, Any, str], tuple[Any, Any, Any]]


def layer_map(f: Change, model: Model, ps: Params, st: State) -> tuple[Any, Any, Record]:
    """Change every leaf layer of a model, together with its parameters and its state.

    A leaf is a layer in whose fields there are no others; functions among layers are leaves too. So is a
    layer that makes its layers itself, such as `MLP`, and a wrapper whose parameters are not those of the
    layer inside, such as `WeightNorm` and what `fl.freeze` makes. The layer of a `Repeated` is seen once,
    with the parameters and states of all copies stacked. Names tied by `fl.share_parameters` stay tied.

    **Arguments:**

    - `f`: a function `f(layer, ps, st, path) -> (layer, ps, st)`. `path` is the dotted path of the leaf, `""`
        for a model that is one; `ps` and `st` are `Record`s, `ps` with the values that the leaf sees. It
        may return any layer or function, parameters as a `Record`, a mapping or a `ComponentVector`, of other
        names and shapes too, and such a state.
    - `model`: a layer, or a mapping as `fl.setup` takes it.
    - `ps`: its parameters, a `ComponentVector` or a mapping.
    - `st`: its state.

    **Returns:** `(model, ps, st)`: the new model; its parameters, a vector of the same dtype with the new
    model's layout if `ps` is a vector, else a `Record`; its state. Parameters and states that containers have
    of their own are kept.

    **Raises:** `ValueError`, naming the path, for parameters that do not have the shapes that the new layer
    declares, and for tied parameters that get different values; `KeyError` for other names than it declares;
    `TypeError` if `f` returns anything else.

    >>> import jax
    >>> import flatlayers as fl
    >>> model = fl.Chain(fl.Dense(2, 16), fl.Dense(16, 1))
    >>> ps, st = fl.setup(jax.random.key(0), model)
    >>> def without_bias(layer, ps, st, path):
    ...     smaller = fl.Dense(layer.in_dims, layer.out_dims, use_bias=False)
    ...     return smaller, {"weight": ps.weight}, st
    >>> model, ps, st = fl.layer_map(without_bias, model, ps, st)
    >>> ps
    ComponentVector(float32[48], layer_0=(weight=(16, 2)), layer_1=(weight=(1, 16)))
    """
    vector = ps if isinstance(ps, ComponentVector) else unconstrained(model, ps)
    seen = constrain(as_declared(model).declared_transforms(), _layout_of(model).unpack(vector))
    new, values, st = _mapped(f, model, seen, as_record(st), "")
    packed = _packed(new, values, vector, _free_numbers_of(model, seen, vector))
    return new, packed if vector is ps else constrained(new, packed), st


def select(model: Model, pattern: str) -> list[tuple[str, Layer]]:
    """Find the layers of a model whose paths match a pattern.

    Layers made of layers are listed too, before those inside them, and so are layers that another makes
    itself. A wrapper and the layer inside it have one path and are listed both, the wrapper first. The model
    itself has no path and is not listed.

    **Arguments:**

    - `model`: a layer, or a mapping as `fl.setup` takes it.
    - `pattern`: a shell-style pattern (`fnmatch`) over dotted paths, where `*` crosses dots.

    **Returns:** a list of `(path, layer)`, depth-first.

    **Raises:** `KeyError` (also a `ValueError`) for a pattern that matches nothing.

    >>> import flatlayers as fl
    >>> model = fl.Chain(encoder=fl.Chain(fl.Dense(4, 3), fl.Dense(3, 2)), head=fl.Dense(2, 1))
    >>> fl.select(model, "encoder.*")
    [('encoder.layer_0', Dense(4, 3)), ('encoder.layer_1', Dense(3, 2))]
    """
    layers = list(_all_layers(model, ""))
    found = [(path, layer) for path, layer in layers if path and fnmatch.fnmatchcase(path, pattern)]
    if not found:
        known = dict.fromkeys(path for path, _ in layers if path)
        raise UnknownPatternError(f"the pattern {pattern!r} matches nothing: {unknown_name(pattern, known)}")
    return found


def replace_layer(model: Kind, path: str | tuple[str, ...], new: object) -> Kind:
    """Return the same model with another layer at a path.

    `fl.setup` gives the layers around it the values that they had, for the same key. A layer that its
    container uses under two names is replaced under both. The path of a wrapper means the wrapper.

    **Arguments:**

    - `model`: a layer, or a mapping as `fl.setup` takes it.
    - `path`: the dotted path of a layer inside.
    - `new`: the layer to put there, or a function.

    **Returns:** the new model.

    **Raises:** `KeyError` with the nearest names for a path that leads to no layer, or to one that the layer
    around it makes itself.

    >>> import jax.numpy as jnp
    >>> import flatlayers as fl
    >>> model = fl.Chain(fl.Dense(2, 16), jnp.tanh, fl.Dense(16, 1))
    >>> fl.replace_layer(model, "layer_1", jnp.sin)
    Chain(Dense(2, 16), WrappedFunction(sin), Dense(16, 1))
    """
    path = as_path(path)
    replaced = _with_layer(model, path, as_layer(new)) if path else None
    if replaced is None:
        raise UnknownNameError(f"{path!r}: {_why_unknown(model, path)}")
    return replaced


def _layout_of(model: Part) -> Layout:
    layout = as_declared(model).layout
    if not isinstance(layout, Layout):
        raise TypeError(f"expected a layer or a mapping of layers, found {model!r}")
    return layout


# A model as a tree: layers, mappings of layers, and stacked ones


def replaceable_parts(model: Part) -> dict[str, Any]:
    """Return the parts that hold layers and can be replaced, by path; that of a wrapper's child is empty."""
    return replaceable(model) if isinstance(model, Layer) else _with_layers(model)


def rebuilt(model: Part, new: Mapping[str, Any]) -> Any:
    """Return the model with other parts in the place of those that `replaceable_parts` gives."""
    if isinstance(model, Layer):
        return with_children(model, new)
    return dataclasses.replace(model, declared=new[""]) if isinstance(model, Stacked) else {**model, **new}


def _with_layers(model: Part) -> dict[str, Any]:
    return {name: part for name, part in as_declared(model).declared_parts().items() if contains_layer(part)}


def _all_layers(model: Part, path: str) -> Iterator[tuple[str, Layer]]:
    for name, child in _with_layers(model).items():
        where = join_path(path, name)
        if isinstance(child, Layer):
            yield where, child
        yield from _all_layers(child, where)


def _with_layer(model: Part, path: str, new: Layer) -> Any:
    """Return the model with a layer replaced, `None` if there is none at that path."""
    if not path and isinstance(model, Layer):
        return new
    for name, child in replaceable_parts(model).items():
        below = path if not name else path[len(name) + 1 :]
        if join_path(name, below) == path:
            found = _with_layer(child, below, new)
            if found is not None:
                return rebuilt(model, {name: found})
    return None


def _why_unknown(model: Model, path: str) -> str:
    known = dict.fromkeys(name for name, _ in _all_layers(model, "") if name)
    if path in known:
        return "the layer around it makes this layer itself, and is to be replaced as a whole"
    return unknown_name(path, known)


# Parameters and states


def _mapped(f: Change, model: Part, ps: Record, st: Record, path: str) -> tuple[Any, Record, Record]:
    """Apply `layer_map` to the part of a model at a path, with its part of `ps` and `st`."""
    children = replaceable_parts(model)
    if isinstance(model, Layer) and not _holds_parameters_of(model, children):
        return _called(f, model, ps, st, path)
    new, states = {}, {}
    for name, child in children.items():
        own = ps[name] if name else ps
        state = st[name] if name else _state_inside(model, st)
        new[name], own, states[name] = _mapped(f, child, own, state, join_path(path, name))
        ps = _with_part(ps, name, own)
    whole = rebuilt(model, new)
    for name, state in states.items():
        st = _with_part(st, name, state) if name else _with_state_inside(model, whole, st, state, path)
    return whole, ps, st


def _called(f: Change, layer: Layer, ps: Record, st: Record, path: str) -> tuple[Layer, Any, Record]:
    result = f(layer, ps, st, path)
    if not isinstance(result, tuple) or len(result) != 3:
        raise TypeError(
            f"layer_map: expected a function that returns (layer, ps, st), found {describe(result)} "
            f"for {path!r}"
        )
    if not isinstance(result[2], Mapping):
        raise TypeError(f"layer_map: expected a state for {path!r}, found {describe(result[2])}")
    new, ps, st = as_layer(result[0]), result[1], as_record(result[2])
    missing = [name for name in _initial_state(new) if name not in st]
    if missing:
        raise UnknownNameError(
            f"layer_map: expected a state with {listing(missing)} for {new!r} at {path!r}, "
            f"found {describe(st)}"
        )
    return new, constrained(new, ps) if isinstance(ps, ComponentVector) else as_record(ps), st


def _holds_parameters_of(layer: Layer, children: Mapping[str, Layer]) -> bool:
    """Tell whether the parameters of all children lie under their names: as they are, stacked or tied."""
    return bool(children) and all(_holds(layer.layout, name, child) for name, child in children.items())


def _holds(layout: Layout, name: str, child: Layer) -> bool:
    if name and name not in layout:
        return False
    part = layout[name] if name else layout
    if not isinstance(part, Layout):
        return False
    found, own = part.view_shapes, child.layout.view_shapes
    return found.keys() == own.keys() and all(
        found[leaf][len(found[leaf]) - len(shape) :] == shape for leaf, shape in own.items()
    )


def _with_part(record: Record, path: str, value: Record) -> Record:
    if not path:
        return value
    name, _, below = path.partition(".")
    return record.replace(**{name: _with_part(record[name], below, value)})


def _free_numbers_of(model: Part, seen: Record, ps: ComponentVector) -> dict[int, tuple[Transform, Any]]:
    """Return the free numbers of the values that have bounds, with their transform, by the value's `id`."""
    leaves, free = leaves_of(_layout_of(model), seen), leaves_of(ps.layout, ps)
    transforms = as_declared(model).declared_transforms()
    return {id(leaves[path]): (transform, free[path]) for path, transform in transforms.items()}


def _packed(
    model: Part, values: Record, like: ComponentVector, known: Mapping[int, tuple[Transform, Any]]
) -> ComponentVector:
    """Return the vector of values. A value that is as it was has the free numbers that it had, exactly."""
    layout, leaves = _layout_of(model), leaves_of(_layout_of(model), values)
    for path, value in leaves.items():
        expected = like.shape[:-1] + layout.view_shapes[path]
        if jnp.shape(value) != expected:
            raise ValueError(
                f"layer_map: expected shape {expected} for {path!r}, as the new layer declares it, "
                f"found shape {jnp.shape(value)}"
            )
    if not layout.length:  # no leaf tells the leading axes
        return ComponentVector(like.data[..., :0], layout)
    transforms = as_declared(model).declared_transforms()
    kept = {path: known.get(id(leaves[path]), (None, None)) for path in transforms}
    changed = {path: new for path, new in transforms.items() if kept[path][0] != new}
    leaves = free_leaves(changed, leaves, like.dtype)
    leaves |= {path: free for path, (_, free) in kept.items() if path not in changed}
    return ComponentVector(pack(layout, leaves, like.dtype), layout)


# The state of a wrapper, and that of the layer inside


def _initial_state(model: Part) -> Record:
    return Record(as_declared(model).declared_states(jax.random.key(0)) or {})


def _state_place(wrapper: Part) -> tuple[str | None, Record, Record]:
    """Find the field under whose name a wrapper keeps its child's state; return the initial states, too.

    The field is empty if that state lies among the wrapper's own, `None` if the wrapper keeps none of it.
    """
    child = replaceable_parts(wrapper)[""]
    whole, inner = _initial_state(wrapper), _initial_state(child)
    names = [field.name for field in dataclasses.fields(wrapper)]  # pyright: ignore[reportArgumentType]
    fields = [name for name in names if getattr(wrapper, name) is child]
    for field in fields:
        if field in whole and jax.tree.structure(whole[field]) == jax.tree.structure(inner):
            return field, whole, inner
    return "" if inner.keys() <= whole.keys() else None, whole, inner


def _state_inside(wrapper: Part, st: Record) -> Record:
    field, whole, inner = _state_place(wrapper)
    if field is None:
        return inner
    beside = whole.keys() - inner.keys()
    return st[field] if field else Record({name: part for name, part in st.items() if name not in beside})


def _with_state_inside(old: Part, new: Part, st: Record, state: Record, path: str) -> Record:
    """Return the state of a wrapper around a new layer: the wrapper keeps its own part."""
    field, whole, _ = _state_place(new)
    inside = {} if field is None else {field: state} if field else dict(state)
    own = {name: part for name, part in st.items() if name in whole and name not in inside}
    before, after = (_shapes(part, own) for part in (_initial_state(old), whole))
    if before != after:
        raise ValueError(
            f"layer_map: expected {type(new).__name__} at {path!r} to keep a state with "
            f"{listing(before.items())}, found {listing(after.items())}; change the layer "
            "before it is wrapped"
        )
    found = own | inside
    return Record({name: found[name] for name in [*(name for name in whole if name in found), *inside]})


def _shapes(st: Record, names: Iterable[str]) -> dict[str, Any]:
    return {
        name: jax.tree.map(lambda leaf: getattr(leaf, "shape", ()), st[name]) for name in names if name in st
    }
