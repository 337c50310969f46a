"""`share_parameters`: two names in a model, one place in the vector."""

from collections.abc import Mapping
from typing import Annotated, Any

from ..core.composite import Wrapper
from ..core.declaration import Tied
from ..core.fields import Check
from ..core.layer import Layer
from ..core.values import FrozenDict
from ..layers.fields import AnyLayer
from ..vectors.names import as_path


def _ties(value: object) -> FrozenDict:
    if not isinstance(value, Mapping):
        raise TypeError
    return FrozenDict({as_path(a): as_path(b) for a, b in value.items()})


Ties = Annotated[Mapping[str, str], Check("a mapping {name: the one that stays} of dotted paths", _ties)]


class SharedParameters(Wrapper):
    """A layer with names that have one place in the vector, made by `fl.share_parameters`.

    **Arguments:**

    - `layer`: the layer.
    - `ties`: which name goes to the place of which other.

    **Inputs:** those of `layer`. **Returns:** what it returns.

    **Parameters:** those of `layer`, tied ones once. **States:** those of `layer`.

    **Raises:** as `fl.share_parameters`.

    >>> import flatlayers as fl
    >>> fl.SharedParameters(fl.Chain(fl.Dense(3, 3), fl.Dense(3, 3)), {"layer_1": "layer_0"}).layout.length
    12
    """

    layer: AnyLayer
    ties: Ties

    def check_fields(self) -> None:
        # A wrong tie is an error where the layer is made.
        _ = self.layout, self._transforms

    def parameters(self) -> Mapping[str, Any]:
        return Tied(self.layer.parameters(), self.ties)


def share_parameters(model: Layer, ties: Mapping[str, str]) -> SharedParameters:
    """Tie parameters: the vector holds them once, and their gradients add.

    Everything that reads the layout counts a tied parameter once: `fl.parameter_length`, displays, the
    state of an optimiser. The initial values are those of the name that stays, at its own path.

    **Arguments:**

    - `model`: a layer.
    - `ties`: `{name: the one that stays}` as dotted paths, for parameters or whole groups of the same
        shapes.

    **Returns:** a layer with the same names. `ps.decoder.weight` and `ps.encoder.weight` are one.

    **Raises:** `KeyError` for an unknown name, `ValueError` for shapes or bounds that differ or a cycle.

    >>> import jax
    >>> import flatlayers as fl
    >>> model = fl.Chain(encoder=fl.Dense(4, 4), decoder=fl.Dense(4, 4))
    >>> model = fl.share_parameters(model, {"decoder.weight": "encoder.weight"})
    >>> ps, st = fl.setup(jax.random.key(0), model)
    >>> ps.size, bool((ps.decoder.weight == ps.encoder.weight).all())
    (24, True)
    """
    return SharedParameters(model, ties)
