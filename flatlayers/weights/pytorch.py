"""`from_torch` and `to_torch`: a `state_dict` of PyTorch."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..core.constraints import constrained
from ..core.layer import Layer
from ..dtypes import is_traced
from ..types import ArrayLike, State
from ..vectors.names import describe
from ..vectors.record import Record
from ..vectors.vector import ComponentVector
from .arrays import Target, state_at
from .entries import Unit, units_of
from .foreign import Numbers
from .order import by_order
from .torch_table import TORCH


# A counter of `BatchNorm` that PyTorch itself needs for `momentum=None` alone.
_COUNTER = "num_batches_tracked"


def from_torch(
    state_dict: Mapping[str, Any],
    layer: Layer,
    ps: ComponentVector,
    st: State,
    names: Mapping[str, str] | None = None,
) -> tuple[ComponentVector, Record]:
    """Take the numbers of a PyTorch module over.

    Known are `Dense` (`Linear`), `Bilinear`, the convolutions, `PatchEmbedding` (`Conv2d`), the norms, the
    recurrent cells and what runs them, `Embedding` and `MultiHeadAttention`, inside of any containers and
    wrappers; other layers say their names in `torch_names`, see `fl.Foreign`. Activations, `epsilon` and
    other options are not in a `state_dict`: those of the layer count.

    **Arguments:**

    - `state_dict`: PyTorch's names with tensors, or with NumPy's arrays. Nothing in it is needed of PyTorch.
    - `layer`, `ps`, `st`: the layer with its parameters and state, as from `fl.setup`. Their numbers do not
        count, their dtypes do.
    - `names`: for the path of a layer of ours, the name of its module there: `{"layer_1": "2"}`. It counts
        for what is inside, too. A name that is not given is our own, with `0` for `layer_0`. In `"h.{}"`,
        `{}` is the number of a copy in a stack such as `fl.Repeated`. In `"lstm.*_l1"`, `*` is the name of
        an array. The path of a parameter has the whole name of its array.

    Without `names`, our own are tried. If they are not those of `state_dict`, the layers are matched in the
    order of both, each by the names and shapes of all of its arrays. Layers of equal shapes have to be told
    apart by numbers in their names, as in `fc1` and `fc2`.

    **Returns:** `(ps, st)`, with all numbers from `state_dict`. Parameters with bounds become free numbers.

    **Raises:** `fl.LayoutMismatchError`, a `ValueError`, with a line for each name that is missing, left over
    or of another shape, or of a dtype that `ps` does not hold; and for an order that is not certain.
    `KeyError` for a path in `names` that the layer does not have. `TypeError` for the vector of another layer
    and for what is no array.

    >>> import jax
    >>> import numpy as np
    >>> import flatlayers as fl
    >>> layer = fl.Chain(fl.Dense(3, 2, jax.numpy.tanh), fl.Dense(2, 1))
    >>> ps, st = fl.setup(jax.random.key(0), layer)
    >>> shapes = {"0.weight": (2, 3), "0.bias": (2,), "2.weight": (1, 2), "2.bias": (1,)}
    >>> state_dict = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    >>> ps, st = fl.from_torch(state_dict, layer, ps, st)
    >>> ps, st = fl.from_torch(state_dict, layer, ps, st, {"layer_0": "0", "layer_1": "2"})
    >>> try:
    ...     fl.from_torch(state_dict, layer, ps, st, {"layer_1": "3"})
    ... except fl.LayoutMismatchError as error:
    ...     print(error.lines[0])
    3.weight: expected (1, 2) for layer_1.weight, found none
    """
    target = Target(TORCH, layer, ps, st)
    arrays = _arrays_of(state_dict)
    units = units_of(TORCH, layer, names, arrays)
    return target.filled(units if names is not None else _matched(target, units, arrays), arrays)


def to_torch(
    layer: Layer, ps: ComponentVector, st: State, names: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Return the numbers of a layer as a `state_dict` of PyTorch: the inverse of `fl.from_torch`.

    **Arguments:** those of `fl.from_torch`. Without `names`, the names are our own, with `0` for `layer_0`:
    a `Chain` with functions among its layers has those of a `torch.nn.Sequential` with modules there.

    **Returns:** a dictionary of tensors for `module.load_state_dict`, bit for bit what `from_torch` took
    over; parameters with bounds, which were free numbers, are rounded. The counter `num_batches_tracked` of a
    `BatchNorm` is not in it.

    **Raises:** `ImportError` without PyTorch, `fl.LayoutMismatchError` for parameters without a name there,
    and as `fl.from_torch`. `ValueError` for two different parameters under one name, and for a `fl.Foreign`
    without `write`.

    >>> import jax
    >>> import flatlayers as fl
    >>> layer = fl.Dense(3, 2)
    >>> ps, st = fl.setup(jax.random.key(0), layer)
    >>> try:
    ...     state_dict = fl.to_torch(layer, ps, st, {"": "fc"})
    ... except ImportError:  # There is no PyTorch.
    ...     state_dict = {"fc.weight": ps.weight, "fc.bias": ps.bias}
    >>> sorted(state_dict)
    ['fc.bias', 'fc.weight']
    """
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ImportError("to_torch: expected PyTorch, found none; `pip install torch`") from None
    arrays = their_arrays(Target(TORCH, layer, ps, st), units_of(TORCH, layer, names))

    def tensor(array: Numbers) -> Any:
        if array.dtype == jnp.bfloat16:
            return torch.from_numpy(array.astype(np.float32)).to(torch.bfloat16)
        return torch.from_numpy(array)

    return {key: tensor(array) for key, array in arrays.items()}


def their_arrays(target: Target, units: list[Unit]) -> dict[str, Numbers]:
    """Return their arrays by name, in memory of their own."""
    if is_traced(target.ps.data) or not isinstance(target.ps.data, jax.Array | np.ndarray):
        raise TypeError(f"expected parameters whose numbers are known, found {describe(target.ps)}")
    values, parts = constrained(target.model, target.ps), dict[str, dict[int, Numbers]]()
    for entry in (entry for unit in units for entry in unit.entries):
        value = values[entry.place] if target.is_parameter(entry) else state_at(target.st, entry.place)
        foreign, (key, *more) = entry.foreign, entry.keys
        if foreign.write is None or more:
            raise ValueError(f"{entry.text}: expected a Foreign with one name and `write`, found {foreign}")
        part, known = foreign.write(np.asarray(value)[entry.index]), parts.setdefault(key, {})
        if not np.array_equal(known.setdefault(foreign.part[0], part), part, equal_nan=True):
            raise ValueError(f"{key}: expected one parameter, or equal ones, found {entry.text} with another")
    return {key: _joined([known[i] for i in sorted(known)]) for key, known in parts.items()}


def _joined(parts: list[Numbers]) -> Numbers:
    # A copy in any case: the memory of JAX's arrays is not to be written to.
    return np.concatenate(parts) if len(parts) > 1 else np.array(parts[0], order="C")


def _matched(target: Target, units: list[Unit], arrays: Mapping[str, Numbers]) -> list[Unit]:
    """Return the units by their own names, if these are all there are; else by order."""
    entries = [entry for unit in units for entry in unit.entries]
    own = {key for entry in entries for key in entry.keys}
    tied = {key for entry in target.read_as(entries, arrays) for key in entry.keys}
    if own - tied <= arrays.keys() <= own:
        return units
    expected = {entry: target.their_shape(entry) for unit in units for entry in unit.entries}
    return by_order(units, {key: array.shape for key, array in arrays.items()}, expected)


def as_numpy(key: str, value: ArrayLike) -> Numbers:
    """Return a tensor of PyTorch, or another array, as an array of NumPy."""
    if hasattr(value, "detach"):
        return _of_tensor(key, value)
    if not hasattr(value, "__array__") or is_traced(value):
        known = "" if not is_traced(value) else ", which is known only when it runs"
        raise TypeError(f"{key}: expected a tensor or an array, found {describe(value)}{known}")
    return np.asarray(value)


def _of_tensor(key: str, value: Any) -> Numbers:
    try:
        tensor = value.detach().cpu().resolve_conj().resolve_neg()
        if str(tensor.dtype) == "torch.bfloat16":  # NumPy has none of its own.
            return tensor.float().numpy().astype(jnp.bfloat16)
        return tensor.numpy()
    except (TypeError, RuntimeError) as error:  # Such as for one that is sparse, quantised or has no data.
        raise TypeError(f"{key}: expected a tensor that NumPy can hold, found another: {error}") from error


def _arrays_of(state_dict: Mapping[str, Any]) -> dict[str, Numbers]:
    if not isinstance(state_dict, Mapping):
        hint = ", whose method `state_dict()` gives one" if hasattr(state_dict, "state_dict") else ""
        raise TypeError(f"expected a mapping of names to arrays, found {describe(state_dict)}{hint}")
    return {key: as_numpy(key, value) for key, value in state_dict.items() if not _is_counter(key)}


def _is_counter(key: str) -> bool:
    if not isinstance(key, str):
        raise TypeError(f"expected names of arrays, found {key!r}")
    return key.rpartition(".")[2] == _COUNTER
