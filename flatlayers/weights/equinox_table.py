"""The names of our layers in Equinox."""

import re

import numpy as np

from ..core.layer import Layer
from ..layers.attention import MultiHeadAttention
from ..layers.cells import GRUCell, LSTMCell
from ..layers.containers import NamedLayers
from ..layers.convolution import AbstractConv, ConvTranspose
from ..layers.dense import Dense
from ..layers.embedding import Embedding, PatchEmbedding
from ..layers.mlp import MLP
from ..layers.normalization import GroupNorm, LayerNorm, RMSNorm
from .entries import Has, Library, numbers_for_names
from .foreign import Foreign, Names, Numbers
from .torch_table import channels_first, channels_last, is_flipped, kernel


def _weight_and_bias(layer: object, has: Has) -> Names:
    return {"weight": "weight", "bias": "bias"}


def _norm(layer: object, has: Has) -> Names:
    return {"scale": "weight", "bias": "bias"}


def _convolution(layer: AbstractConv | PatchEmbedding, has: Has) -> Names:
    """The bias has an axis of size 1 for each of the kernel."""
    flip = is_flipped(layer)
    weight = kernel("weight", flip)
    if isinstance(layer, ConvTranspose):
        if layer.groups > 1:
            return {}
        # There the weight is that of a cross-correlation, of the input with zeros between its entries.
        weight = Foreign(
            "weight",
            lambda w: channels_last(np.swapaxes(w, 0, 1), flip=not flip),
            lambda w: np.swapaxes(channels_first(w, flip=not flip), 0, 1),
        )
    rank = len(layer.layout.view_shapes["weight"]) - 2
    bias = Foreign("bias", lambda b: b.reshape(b.shape[:1]), lambda b: b.reshape(-1, *[1] * rank))
    return {"weight": weight, "bias": bias}


def _lstm(layer: LSTMCell, has: Has) -> Names:
    """There is one bias: ours of the carry is 0."""
    return {**_kernels(), "bias_ih": "bias", "bias_hh": Foreign("bias", np.zeros_like)}


def _gru(layer: GRUCell, has: Has) -> Names:
    """Only the last gate has a bias of the carry."""
    hidden = layer.hidden_dims

    def bias_hh(bias_n: Numbers) -> Numbers:
        return np.concatenate([np.zeros(2 * hidden, bias_n.dtype), bias_n])

    return {**_kernels(), "bias_ih": "bias", "bias_hh": Foreign("bias_n", bias_hh)}


def _kernels() -> Names:
    return {"weight_ih": "weight_ih", "weight_hh": "weight_hh"}


def _attention(layer: MultiHeadAttention, has: Has) -> Names:
    theirs = {"q_proj": "query_proj", "k_proj": "key_proj", "v_proj": "value_proj", "out_proj": "output_proj"}
    return {
        f"{ours}.{name}": f"{there}.{name}" for ours, there in theirs.items() for name in ("weight", "bias")
    }


def child_in_layers(layer: Layer, name: str) -> str:
    """Return their name of a child: `layers.0` for `layer_0` of a container of layers one after another."""
    found = re.fullmatch(r"layer_(\d+)", name)
    if found and isinstance(layer, NamedLayers | MLP):
        return f"layers.{found.group(1)}"
    return numbers_for_names(name)


EQUINOX = Library(
    "Equinox",
    "equinox_names",
    {
        **dict.fromkeys((Dense, Embedding), _weight_and_bias),
        **dict.fromkeys((GroupNorm, LayerNorm, RMSNorm), _norm),
        **dict.fromkeys((AbstractConv, PatchEmbedding), _convolution),
        LSTMCell: _lstm,
        GRUCell: _gru,
        MultiHeadAttention: _attention,
    },
    child_in_layers,
)
