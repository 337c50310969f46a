"""The same multilayer perceptron for every contestant: equal weights, equal arithmetic."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import flatlayers as fl


def equinox_mlp(size: int, width: int, depth: int) -> Any:
    """An Equinox `MLP` of `depth` hidden layers, as the pair of its arrays and the rest."""
    model = eqx.nn.MLP(size, size, width, depth, activation=jnp.tanh, key=jax.random.key(0))
    return eqx.partition(model, eqx.is_array)


def flat_mlp(size: int, width: int, depth: int) -> tuple[fl.Chain, fl.ComponentVector, fl.Record]:
    """The flatlayers `Chain` with the weights of `equinox_mlp`."""
    sizes = [size, *[width] * depth, size]
    activations = [jnp.tanh] * depth + [None]
    layers = [fl.Dense(a, b, f) for a, b, f in zip(sizes[:-1], sizes[1:], activations, strict=True)]
    chain = fl.Chain(*layers)
    arrays, _ = equinox_mlp(size, width, depth)
    tree = {
        f"layer_{i}": {"weight": layer.weight, "bias": layer.bias} for i, layer in enumerate(arrays.layers)
    }
    return chain, fl.ComponentVector.of(tree, chain.layout), fl.initial_states(jax.random.key(0), chain)


def sliced(layout: fl.Layout, data: jax.Array) -> fl.Record:
    """The leaves of a vector by one `lax.slice` each: what `unpack` is measured against."""

    def part(names: Any, prefix: str = "") -> dict[str, Any]:
        leaves = {}
        for name in names:
            path = f"{prefix}{name}"
            slot = layout[path]
            if isinstance(slot, fl.Slot):
                piece = jax.lax.slice(data, (slot.offset,), (slot.offset + slot.size,))
                leaves[name] = piece.reshape(slot.shape)
            else:
                leaves[name] = part(slot.names, f"{path}.")
        return leaves

    return fl.Record(part(layout.names))


def numbers(gradient: Any, layers: int) -> list[np.ndarray]:
    """The weight and the bias of each layer, of a vector of `flat_mlp` or of the arrays of `equinox_mlp`."""
    flat = isinstance(gradient, fl.ComponentVector)
    parts = [gradient[f"layer_{i}"] if flat else gradient.layers[i] for i in range(layers)]
    return [np.asarray(array) for part in parts for array in (part.weight, part.bias)]
