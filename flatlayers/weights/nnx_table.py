"""The names of our layers in Flax NNX."""

import functools
from dataclasses import replace

import numpy as np

from ..layers.attention import MultiHeadAttention
from ..layers.cells import GRUCell, LSTMCell, RecurrentCell, RNNCell
from ..layers.convolution import AbstractConv, ConvTranspose
from ..layers.dense import Dense
from ..layers.embedding import Embedding, PatchEmbedding
from ..layers.normalization import BatchNorm, GroupNorm, LayerNorm, RMSNorm
from ..layers.recurrence import Recurrence
from .entries import Has, Library
from .equinox_table import child_in_layers
from .foreign import Foreign, Names, Numbers
from .torch_table import is_flipped


GATES = "ifgo"


def transposed(name: str) -> Foreign:
    """Their `(in, out)`, our `(out, in)`."""
    return Foreign(name, np.transpose, np.transpose)


def _dense(layer: Dense, has: Has) -> Names:
    return {"weight": transposed("kernel"), "bias": "bias"}


def _convolution(layer: AbstractConv | PatchEmbedding, has: Has) -> Names:
    if isinstance(layer, ConvTranspose):
        return {}  # An option there, which is in no array, says whether its kernel is that of a transpose.
    turn = functools.partial(np.flip, axis=_spatial(layer)) if is_flipped(layer) else None
    weight = "kernel" if turn is None else Foreign("kernel", turn, turn)
    return {"weight": weight, "bias": "bias"}


def _spatial(layer: AbstractConv | PatchEmbedding) -> tuple[int, ...]:
    return tuple(range(len(layer.layout.view_shapes["weight"]) - 2))


def _embedding(layer: Embedding, has: Has) -> Names:
    return {"weight": "embedding"}


def _norm(layer: object, has: Has) -> Names:
    return {"scale": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}


def _one_bias(layer: RNNCell | GRUCell, has: Has) -> Names:
    return {
        "weight_ih": transposed("dense_i.kernel"),
        "weight_hh": transposed("dense_h.kernel"),
        "bias_ih": "dense_i.bias",
        "bias_hh": Foreign("dense_i.bias", np.zeros_like),
    }


def _lstm(layer: LSTMCell, has: Has) -> Names:
    """`LSTMCell` has a kernel for each gate, `OptimizedLSTMCell` one for all."""
    if has("dense_i.kernel"):
        return {
            "weight_ih": transposed("dense_i.kernel"),
            "weight_hh": transposed("dense_h.kernel"),
            "bias_ih": Foreign("dense_h.bias", np.zeros_like),
            "bias_hh": "dense_h.bias",
        }
    from_x = ("ii", "if_", "ig", "io")
    from_h = tuple(f"h{gate}" for gate in GATES)
    biases = tuple(f"{name}.bias" for name in from_h)
    return {
        "weight_ih": Foreign(tuple(f"{name}.kernel" for name in from_x), _transposed_side_by_side),
        "weight_hh": Foreign(tuple(f"{name}.kernel" for name in from_h), _transposed_side_by_side),
        "bias_ih": Foreign(biases, lambda *parts: np.zeros_like(np.concatenate(parts))),
        "bias_hh": Foreign(biases, lambda *parts: np.concatenate(parts)),
    }


def _transposed_side_by_side(*kernels: Numbers) -> Numbers:
    return np.concatenate([kernel.T for kernel in kernels])


def _recurrence(layer: Recurrence, has: Has) -> Names:
    """`nnx.RNN` has its cell below `cell`."""
    if not isinstance(layer.cell, RecurrentCell):
        return {}
    rules = NNX.names_of(layer.cell, lambda name: has(f"cell.{name}"))
    return {
        path: Foreign(tuple(f"cell.{name}" for name in foreign.names), foreign.read, foreign.write)
        for path, foreign in rules.items()
    }


def _attention(layer: MultiHeadAttention, has: Has) -> Names:
    """Features of heads have an axis for the heads there."""

    def heads_apart(features: Numbers, axis: int) -> Numbers:
        return np.stack(np.split(features, layer.heads, axis), axis - 1 if axis < 0 else axis)

    theirs = {"q_proj": "query", "k_proj": "key", "v_proj": "value"}
    into = Foreign("kernel", lambda w: w.reshape(len(w), -1).T, lambda w: heads_apart(w.T, -1))
    bias = Foreign("bias", np.ravel, lambda b: heads_apart(b, -1))
    out = Foreign("out.kernel", lambda w: w.reshape(-1, w.shape[-1]).T, lambda w: heads_apart(w.T, 0))
    return {
        **{f"{ours}.weight": replace(into, name=f"{name}.kernel") for ours, name in theirs.items()},
        **{f"{ours}.bias": replace(bias, name=f"{name}.bias") for ours, name in theirs.items()},
        "out_proj.weight": out,
        "out_proj.bias": "out.bias",
    }


NNX = Library(
    "Flax NNX",
    "nnx_names",
    {
        Dense: _dense,
        Embedding: _embedding,
        **dict.fromkeys((BatchNorm, GroupNorm, LayerNorm, RMSNorm), _norm),
        **dict.fromkeys((AbstractConv, PatchEmbedding), _convolution),
        **dict.fromkeys((RNNCell, GRUCell), _one_bias),
        LSTMCell: _lstm,
        Recurrence: _recurrence,
        MultiHeadAttention: _attention,
    },
    child_in_layers,
)
