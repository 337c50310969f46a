"""The states of the models inside a layer that solves: those that have any, frozen during the solve."""

from collections.abc import Mapping

import jax

from ..core.declaration import as_declared
from ..core.layer import Layer
from ..core.setup import count_states
from ..types import State
from ..vectors.record import Record


# The models inside, as `Layer.children` gives them.
Models = Mapping[str, Layer | Mapping[str, Layer]]


def with_any(states: Mapping[str, State]) -> dict[str, State]:
    """Return the states by the names of the models that have any."""
    return {name: state for name, state in states.items() if count_states(state)}


def stateless(model: Layer | Mapping[str, Layer]) -> State:
    """Return the state of a model that has none: a record of empty records."""
    return Record(as_declared(model).declared_states(jax.random.key(0)) or {})


def frozen(models: Models, st: State) -> State:
    """Return the states of all models during a solve, those included that have none."""
    return Record({name: st[name] if name in st else stateless(model) for name, model in models.items()})


def replaced(st: State, new: State) -> State:
    """Return the state of a layer with the new states of those models that have any."""
    return st.replace(**{name: state for name, state in new.items() if name in st})
