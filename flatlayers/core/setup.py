"""From a declaration to vectors and states: `setup` and what asks about a layer without running it."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..dtypes import float_dtype, is_traced
from ..transforms import Transform
from ..types import Array, DType, Input, Key, Output, Params, State
from ..vectors.layout import Layout
from ..vectors.names import UnknownNameError, describe, unknown_name
from ..vectors.packing import pack, write_rows
from ..vectors.record import Record, as_record, is_static
from ..vectors.vector import ComponentVector
from .constraints import free_leaves
from .declaration import Declared, Param, as_declared
from .drawing import LARGE, Drawing, Keys, fold_in_name, for_each_key
from .layer import Layer, apply, display_name, keeps_state_type


# A layer, or a mapping of layers, `Param`s, `Stacked` and mappings.
Model = Declared | Mapping[str, Any]


def setup(key: Key, layer: Model, dtype: DType = jnp.float32) -> tuple[ComponentVector, Record]:
    """Make the initial parameters and states of a layer.

    **Arguments:**

    - `key`: a PRNG key. Each parameter's key is this one folded with its path: the same key gives
        the same parameters, and adding a layer does not change the others' values. An array of keys,
        `jax.random.split(key, m)`, gives the vectors of an ensemble, each as its own key gives it
        (not with keys of `rbg`, with which `jax.vmap` draws otherwise).
    - `layer`: a layer, or a mapping of layers, `Param`s, `Stacked` and mappings: a mechanism and its
        networks in one vector.
    - `dtype`: the dtype of the vector and of floating states.

    **Returns:** `(ps, st)`, a `ComponentVector` and a `Record`. The axes of an array of keys lead: `(m, n)`
    for the vector, and `(m, ...)` for each array of the state; its flags are those of all.

    A vector of more than 4 million numbers is drawn in pieces, so that beside it there is no more than a leaf
    that cannot be cut: one whose initializer is not of `fl.initializers`, or is `orthogonal` or `sparse`.

    **Raises:** `TypeError` for what is no PRNG key, an array of raw keys (`uint32`) among them, and for what
    is no layer and no mapping of layers.

    >>> import jax
    >>> import flatlayers as fl
    >>> model = {"alpha": fl.Param((), fl.initializers.ones), "net": fl.Dense(2, 1)}
    >>> ps, st = fl.setup(jax.random.key(0), model)
    >>> ps
    ComponentVector(float32[4], alpha=(), net=(weight=(1, 2), bias=(1,)))
    >>> st
    Record(net=Record())
    >>> ensemble, _ = fl.setup(jax.random.split(jax.random.key(0), 5), model)
    >>> ensemble.shape, ensemble.net.weight.shape
    ((5, 4), (5, 1, 2))
    """
    return initial_parameters(key, layer, dtype), initial_states(key, layer, dtype)


def initial_parameters(key: Key, layer: Model, dtype: DType = jnp.float32) -> ComponentVector:
    """Make the initial parameters alone: the same as those of `setup` with the same key, or keys.

    >>> import jax
    >>> import flatlayers as fl
    >>> fl.initial_parameters(jax.random.key(0), fl.Dense(2, 3)).shape
    (9,)
    """
    layout, draws = drawings_of(layer, dtype)
    keys = Keys(own_key(key))
    if is_traced(key) or layout.length * key.size <= LARGE:
        leaves = {draw.path: draw.whole(keys, dtype) for draw in draws}
        leaves |= {path: leaves[place] for path, place in layout.ties.items()}
        return ComponentVector(pack(layout, leaves, dtype), layout)
    lead = keys.of(()).shape
    data = jnp.zeros((*lead, layout.length), dtype)
    for draw in draws:
        for piece in draw.pieces(layout, keys, dtype):
            data = write_rows(data, piece.rows(dtype), piece.starts)
    return ComponentVector(data, layout)


def drawings_of(layer: Model, dtype: DType) -> tuple[Layout, list[Drawing]]:
    """Return the layout of a model, and how each leaf with a place of its own is drawn: as free numbers.

    Of names that are tied, the one that has the place is drawn.
    """
    declared = as_declared(layer)
    layout = declared.layout
    if not isinstance(layout, Layout):
        raise TypeError(f"expected a layer or a mapping, found {layer!r}; give it a name: {{'name': ...}}")
    transforms = declared.declared_transforms()
    draws = [draw for draw in declared.drawings() if draw.path not in layout.ties]
    return layout, [_free(draw, transforms.get(draw.path), dtype) for draw in draws]


def _free(draw: Drawing, transform: Transform | None, dtype: DType) -> Drawing:
    """Return how the free numbers of a leaf are drawn."""
    if transform is None:
        return draw

    def free(values: Array) -> Array:
        return free_leaves({draw.path: transform}, {draw.path: values}, dtype)[draw.path]

    return dataclasses.replace(draw, free=free)


def initial_states(key: Key, layer: Model, dtype: DType = jnp.float32) -> Record:
    """Make the initial states alone: the same as those of `setup` with the same key, or keys.

    Numbers become arrays, and floating arrays have the given dtype (float32 for half precisions).

    >>> import jax
    >>> import flatlayers as fl
    >>> fl.initial_states(jax.random.key(0), fl.Dropout(0.5)).training
    True
    """
    declared = as_declared(layer)

    def states(key: Key) -> Record:
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: _as_state(leaf, dtype, fold_in_name(key, jax.tree_util.keystr(path))),
            Record(declared.declared_states(key) or {}),
        )

    return for_each_key(states, own_key(key))


def parameter_length(layer: Model) -> int:
    """Return the number of parameters: the length of the vector.

    >>> import flatlayers as fl
    >>> fl.parameter_length(fl.Dense(3, 2))
    8
    """
    layout = as_declared(layer).layout
    return layout.length if isinstance(layout, Layout) else math.prod(layout)


def state_length(layer: Model) -> int:
    """Return how much state a layer has: the numbers in arrays, 1 for a key, 1 for a static flag.

    >>> import flatlayers as fl
    >>> fl.state_length(fl.Dropout(0.5))
    2
    """
    return count_states(jax.eval_shape(lambda key: initial_states(key, layer), jax.random.key(0)))


def frozen_length(layer: Model) -> int:
    """Return the number of parameters that are not trained: those among the states."""
    frozen: list[int] = []

    def states(key: Key) -> None:
        leaves = jax.tree.leaves(Record(as_declared(layer).declared_states(key) or {}))
        frozen.extend(math.prod(leaf.shape) for leaf in leaves if isinstance(leaf, Param))

    jax.eval_shape(states, jax.random.key(0))
    return sum(frozen)


def count_states(st: State) -> int:
    """Count the numbers in a state: array entries, keys and static flags."""
    if isinstance(st, Record):
        children, _ = jax.tree.flatten(st, is_leaf=lambda part: part is not st)
        return sum(map(is_static, st.values())) + sum(map(count_states, children))
    return sum(math.prod(getattr(leaf, "shape", ())) for leaf in jax.tree.leaves(st))


def output_shape(layer: Layer, x: Input) -> Any:
    """Return the shape of a layer's output. Nothing is computed.

    **Arguments:**

    - `layer`: the layer.
    - `x`: its input: arrays or `jax.ShapeDtypeStruct`s.

    **Returns:** the full shape, batch axes included, as a tuple; a pytree of tuples if the output is a
    pytree.

    >>> import jax.numpy as jnp
    >>> import flatlayers as fl
    >>> fl.output_shape(fl.Dense(3, 2), jnp.ones((5, 3)))
    (5, 2)
    """
    return jax.tree.map(lambda leaf: tuple(leaf.shape), traced_output(layer, x))


def traced_output(layer: Layer, x: Input) -> Any:
    """Return the output of a layer as `jax.ShapeDtypeStruct`s, with parameters in the dtype of its input."""

    def output(key: Key, x: Input) -> Output:
        ps, st = setup(key, layer, float_dtype(x, jnp.float32))
        return apply(layer, x, ps, st)[0]

    return jax.eval_shape(output, jax.random.key(0), x)


def stateless_apply(layer: Layer, x: Input, ps: Params) -> Output:
    """Call a layer that has no state: `y` alone.

    **Raises:** `ValueError` if the layer has state.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import flatlayers as fl
    >>> layer = fl.Dense(3, 2)
    >>> fl.stateless_apply(layer, jnp.ones(3), fl.initial_parameters(jax.random.key(0), layer)).shape
    (2,)
    """
    if length := state_length(layer):
        raise ValueError(
            f"expected a layer without state, found {display_name(layer)} with a state of length {length}; "
            "use `y, st = layer(x, ps, st)`"
        )
    return apply(layer, x, ps, initial_states(jax.random.key(0), layer))[0]


def preserves_state_type(layer: object) -> bool:
    """Tell whether calling the layer keeps the structure, shapes and dtypes of its state.

    >>> import flatlayers as fl
    >>> fl.preserves_state_type(fl.Dropout(0.5))
    True
    """
    if isinstance(layer, Mapping):
        return all(map(preserves_state_type, layer.values()))
    return keeps_state_type(layer) if isinstance(layer, Layer) else True


def trainmode(st: State) -> Record:
    """Return the state with every `training` flag on.

    >>> import flatlayers as fl
    >>> fl.trainmode(fl.Record(a={"training": False})).a.training
    True
    """
    return _update(as_record(st), "training", True)[0]


def testmode(st: State) -> Record:
    """Return the state with every `training` flag off.

    >>> import flatlayers as fl
    >>> fl.testmode(fl.Record(a={"training": True})).a.training
    False
    """
    return _update(as_record(st), "training", False)[0]


# So that pytest does not take it for a test where it is imported by name.
testmode.__test__ = False  # pyright: ignore[reportFunctionMemberAccess]


def update_state(st: State, name: str, value: object) -> Record:
    """Return the state with a new value for every field of that name, at any depth.

    **Raises:** `KeyError` with the nearest names if there is no such field.

    >>> import flatlayers as fl
    >>> fl.update_state(fl.Record(a={"count": 3}, count=4), "count", 0).to_dict()
    {'a': {'count': 0}, 'count': 0}
    """
    new, found = _update(as_record(st), name, value)
    if not found:
        raise UnknownNameError(f"update_state: {unknown_name(name, _all_names(as_record(st)))}")
    return new


def _update(st: Record, name: str, value: object) -> tuple[Record, bool]:
    changes, found = {}, False
    for key, part in st.items():
        if key == name:
            changes[key], found = value, True
        elif isinstance(part, Record):
            changes[key], below = _update(part, name, value)
            found = found or below
        elif isinstance(part, tuple) and any(isinstance(inner, Record) for inner in part):
            inner = [_update(r, name, value) if isinstance(r, Record) else (r, False) for r in part]
            changes[key] = tuple(new for new, _ in inner)
            found = found or any(below for _, below in inner)
    return st.replace(**changes), found


def _all_names(st: Record) -> set[str]:
    below = [_all_names(part) for part in st.values() if isinstance(part, Record)]
    return set(st).union(*below)


def _as_state(leaf: Any, dtype: DType, key: Key) -> Array:
    if isinstance(leaf, Param):
        return jnp.asarray(leaf.initial(key, dtype), dtype)
    array = jnp.asarray(leaf)
    floating = jax.dtypes.canonicalize_dtype(f"float{max(jnp.finfo(dtype).bits, 32)}")
    # With a dtype given explicitly, so that a number is as any other array: not weakly typed.
    return jnp.asarray(array, floating if jnp.issubdtype(array.dtype, jnp.floating) else array.dtype)


def own_key(key: Any) -> Key:
    """Return the key of a model: not the one it is made from, which the user may split for other things.

    Of several keys, those of as many models.
    """
    if isinstance(key, jax.Array | np.ndarray) and key.dtype == jnp.uint32:
        if key.ndim > 1:
            raise TypeError(
                f"expected PRNG keys such as jax.random.split(jax.random.key(0), {key.shape[0]}), found "
                f"{describe(key)}; `jax.random.wrap_key_data` makes keys of it"
            )
        key = jax.random.wrap_key_data(jnp.asarray(key))
    if not (isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)):
        raise TypeError(f"expected a PRNG key such as jax.random.key(0), found {describe(key)}")
    return for_each_key(lambda key: fold_in_name(key, "flatlayers"), key)
