"""The names of our layers in PyTorch."""

import functools

import numpy as np

from ..layers.attention import MultiHeadAttention
from ..layers.cells import RecurrentCell
from ..layers.convolution import AbstractConv, CrossCor
from ..layers.dense import Bilinear, Dense
from ..layers.embedding import Embedding, PatchEmbedding
from ..layers.normalization import AbstractTrackedNorm, GroupNorm, LayerNorm, RMSNorm
from ..layers.recurrence import BidirectionalRNN, Recurrence
from .entries import Has, Library, numbers_for_names
from .foreign import Foreign, Names, Numbers


CELL = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


def _weight_and_bias(layer: object, has: Has) -> Names:
    return {"weight": "weight", "bias": "bias"}


def _norm(layer: object, has: Has) -> Names:
    running = {name: name for name in ("running_mean", "running_var")}
    return {"scale": "weight", "bias": "bias", **running}


def _convolution(layer: AbstractConv | PatchEmbedding, has: Has) -> Names:
    return {"weight": kernel("weight", is_flipped(layer)), "bias": "bias"}


def kernel(name: str, flip: bool) -> Foreign:
    """Their `(out, in, *kernel)`, our `(*kernel, in, out)`."""
    read, write = (functools.partial(turn, flip=flip) for turn in (channels_last, channels_first))
    return Foreign(name, read, write)


def is_flipped(layer: AbstractConv | PatchEmbedding) -> bool:
    """Tell whether a layer is a true convolution; in other libraries all are cross-correlations."""
    if isinstance(layer, CrossCor | PatchEmbedding):
        return False
    return not getattr(layer, "cross_correlation", False)


def channels_last(w: Numbers, *, flip: bool) -> Numbers:
    w = np.moveaxis(w, (0, 1), (-1, -2))
    return np.flip(w, tuple(range(w.ndim - 2))) if flip else w


def channels_first(w: Numbers, *, flip: bool) -> Numbers:
    w = np.flip(w, tuple(range(w.ndim - 2))) if flip else w
    return np.moveaxis(w, (-1, -2), (0, 1))


def _cell(layer: object, has: Has) -> Names:
    return {name: name for name in CELL}


def _recurrence(layer: Recurrence, has: Has) -> Names:
    return {name: f"{name}_l0" for name in CELL} if isinstance(layer.cell, RecurrentCell) else {}


def _bidirectional(layer: BidirectionalRNN, has: Has) -> Names:
    ends = {"forward": "_l0", "backward": "_l0_reverse"}
    children = layer.children()
    if not all(isinstance(cell, RecurrentCell) for cell in children.values()):
        return {}
    return {f"{child}.{name}": name + end for child, end in ends.items() for name in CELL}


def _attention(layer: MultiHeadAttention, has: Has) -> Names:
    """The three projections are one array in PyTorch if all have the same number of features."""
    q, k, v = (layer.layout.view_shapes[f"{name}_proj.weight"] for name in "qkv")
    (out, inner), width = layer.layout.view_shapes["out_proj.weight"], q[1]
    if not q[0] == v[0] == inner == out == width:
        return {}
    projections = ("q_proj", "k_proj", "v_proj")
    together = k[1] == v[1] == width
    return {
        **{
            f"{name}.weight": Foreign("in_proj_weight", part=(i, 3)) if together else f"{name}_weight"
            for i, name in enumerate(projections)
        },
        **{f"{name}.bias": Foreign("in_proj_bias", part=(i, 3)) for i, name in enumerate(projections)},
        **{f"out_proj.{name}": f"out_proj.{name}" for name in ("weight", "bias")},
    }


TORCH = Library(
    "PyTorch",
    "torch_names",
    {
        **dict.fromkeys((Dense, Bilinear, Embedding), _weight_and_bias),
        **dict.fromkeys((AbstractTrackedNorm, GroupNorm, LayerNorm, RMSNorm), _norm),
        **dict.fromkeys((AbstractConv, PatchEmbedding), _convolution),
        RecurrentCell: _cell,
        Recurrence: _recurrence,
        BidirectionalRNN: _bidirectional,
        MultiHeadAttention: _attention,
    },
    lambda layer, name: numbers_for_names(name),
)
