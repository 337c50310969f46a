"""Modules of PyTorch with the layers that compute the same, drawn at random."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flatlayers as fl


torch = pytest.importorskip("torch", reason="PyTorch is an optional package")
nn = torch.nn


def as_it_is(y):
    return y


def first(y):
    return y[0]


def channels_last(y):
    return torch.movedim(y, 1, -1)


@dataclasses.dataclass
class Case:
    """A module and a layer, the names of its parts there, and an input for each."""

    module: nn.Module
    layer: fl.Layer
    names: dict[str, str]
    x: Any
    theirs: tuple[Any, ...]
    output: Callable[[Any], Any] = as_it_is


def numbers(rng, *shape):
    return rng.normal(size=shape).astype(np.float32)


def integer(rng, low, high):
    return int(rng.integers(low, high + 1))


def flag(rng):
    return bool(rng.integers(2))


def one_of(rng, *values):
    return values[rng.integers(len(values))]


def with_statistics(rng, module):
    """The module with running values and weights that are not those it starts with."""
    with torch.no_grad():
        for name, value in module.state_dict().items():
            if value.is_floating_point():
                drawn = torch.from_numpy(np.asarray(rng.uniform(0.5, 1.5, value.shape), np.float32))
                value.copy_(drawn if "running" in name or "norm" in type(module).__name__.lower() else value)
    return module


def linear(rng):
    a, b, bias, x = integer(rng, 1, 9), integer(rng, 1, 9), flag(rng), numbers(rng, 4, 9)
    module, layer = nn.Linear(a, b, bias=bias), fl.Dense(a, b, use_bias=bias)
    return Case(module, layer, {}, x[:, :a], (torch.from_numpy(x[:, :a]),))


def bilinear(rng):
    a, b, c, bias = integer(rng, 1, 5), integer(rng, 1, 5), integer(rng, 1, 5), flag(rng)
    x = (numbers(rng, 3, a), numbers(rng, 3, b))
    module, layer = nn.Bilinear(a, b, c, bias=bias), fl.Bilinear(a, b, c, use_bias=bias)
    return Case(module, layer, {}, x, tuple(map(torch.from_numpy, x)))


def image(rng, rank, channels):
    x = numbers(rng, 2, *(integer(rng, 6, 8) for _ in range(rank)), channels)
    return x, (torch.movedim(torch.from_numpy(x), -1, 1).contiguous(),)


def convolution(rng):
    rank, groups, bias = integer(rng, 1, 3), integer(rng, 1, 2), flag(rng)
    a, b = groups * integer(rng, 1, 3), groups * integer(rng, 1, 3)
    kernel = tuple(integer(rng, 1, 3) for _ in range(rank))
    stride, pad, dilation = integer(rng, 1, 2), integer(rng, 0, 2), integer(rng, 1, 2)
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1]
    module = kind(a, b, kernel, stride, pad, dilation, groups, bias)
    options = {"stride": stride, "pad": pad, "dilation": dilation, "groups": groups, "use_bias": bias}
    if flag(rng):
        layer = fl.CrossCor(kernel, a, b, **options)
    else:
        layer = fl.Conv(kernel, a, b, **options, cross_correlation=flag(rng))
    return Case(module, layer, {}, *image(rng, rank, a), channels_last)


def transposed(rng):
    rank, groups, bias = integer(rng, 1, 3), integer(rng, 1, 2), flag(rng)
    a, b = groups * integer(rng, 1, 3), groups * integer(rng, 1, 3)
    kernel = tuple(integer(rng, 1, 3) for _ in range(rank))
    stride, pad, dilation = integer(rng, 1, 2), integer(rng, 0, 1), integer(rng, 1, 2)
    extra = integer(rng, 0, stride - 1)
    kind = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[rank - 1]
    if extra >= max(stride, dilation):
        extra = 0
    module = kind(a, b, kernel, stride, pad, extra, groups, bias, dilation)
    options = {"stride": stride, "pad": pad, "dilation": dilation, "groups": groups, "use_bias": bias}
    layer = fl.ConvTranspose(kernel, a, b, **options, output_pad=extra, cross_correlation=flag(rng))
    return Case(module, layer, {}, *image(rng, rank, a), channels_last)


def patches(rng):
    patch, a, b = (integer(rng, 1, 3), integer(rng, 1, 3)), integer(rng, 1, 3), integer(rng, 1, 6)
    module, layer = nn.Conv2d(a, b, patch, patch), fl.PatchEmbedding(patch, a, b)
    x = numbers(rng, 2, 6, 6, a)
    theirs = (torch.movedim(torch.from_numpy(x), -1, 1).contiguous(),)
    return Case(module, layer, {}, x, theirs, lambda y: y.flatten(2).transpose(1, 2))


def batch_norm(rng):
    rank, n, affine, follow = integer(rng, 1, 3), integer(rng, 1, 6), flag(rng), flag(rng)
    kind = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[rank - 1]
    module = with_statistics(rng, kind(n, affine=affine, track_running_stats=follow))
    layer = fl.BatchNorm(n, affine=affine, track_stats=follow)
    return Case(module, layer, {}, *image(rng, rank, n), channels_last)


def instance_norm(rng):
    rank, n, affine, follow = integer(rng, 1, 3), integer(rng, 1, 6), flag(rng), flag(rng)
    kind = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)[rank - 1]
    module = with_statistics(rng, kind(n, affine=affine, track_running_stats=follow))
    layer = fl.InstanceNorm(n, affine=affine, track_stats=follow)
    return Case(module, layer, {}, *image(rng, rank, n), channels_last)


def group_norm(rng):
    groups, affine = integer(rng, 1, 3), flag(rng)
    n = groups * integer(rng, 1, 3)
    module = with_statistics(rng, nn.GroupNorm(groups, n, affine=affine))
    layer = fl.GroupNorm(n, groups, affine=affine)
    return Case(module, layer, {}, *image(rng, 2, n), channels_last)


def layer_norm(rng):
    shape, affine = tuple(integer(rng, 2, 5) for _ in range(integer(rng, 1, 2))), flag(rng)
    root = flag(rng)
    kind, ours = (nn.RMSNorm, fl.RMSNorm) if root else (nn.LayerNorm, fl.LayerNorm)
    options = {"eps": 1e-5} if root else {}
    module = with_statistics(rng, kind(shape, elementwise_affine=affine, **options))
    x = numbers(rng, 3, *shape)
    return Case(module, ours(shape, affine=affine), {}, x, (torch.from_numpy(x),))


def recurrent(rng):
    """One to three layers, in one module there: one way or both ways."""
    kind, cell = one_of(rng, (nn.LSTM, fl.LSTMCell), (nn.GRU, fl.GRUCell), (nn.RNN, fl.RNNCell))
    a, b, depth, both, bias = integer(rng, 1, 4), integer(rng, 1, 4), integer(rng, 1, 3), flag(rng), flag(rng)
    module = kind(a, b, depth, bias=bias, batch_first=True, bidirectional=both)
    cells = [cell(a if i == 0 else b * (1 + both), b, use_bias=bias) for i in range(depth)]
    layers = [fl.BidirectionalRNN(c) if both else fl.Recurrence(c, return_sequence=True) for c in cells]
    names = {}
    for i in range(depth):
        names |= (
            {f"layer_{i}.forward": f"*_l{i}", f"layer_{i}.backward": f"*_l{i}_reverse"}
            if both
            else {f"layer_{i}": f"*_l{i}"}
        )
    x = numbers(rng, 2, 5, a)
    return Case(module, fl.Chain(*layers), names, x, (torch.from_numpy(x),), first)


def cells(rng):
    kind, cell = one_of(rng, (nn.LSTMCell, fl.LSTMCell), (nn.GRUCell, fl.GRUCell), (nn.RNNCell, fl.RNNCell))
    a, b, bias = integer(rng, 1, 4), integer(rng, 1, 4), flag(rng)
    x = numbers(rng, 3, a)
    layer = fl.Chain(fl.StatefulRecurrentCell(cell(a, b, use_bias=bias)))
    output = first if kind is nn.LSTMCell else as_it_is
    return Case(kind(a, b, bias=bias), layer, {"layer_0": ""}, x, (torch.from_numpy(x),), output)


def embedding(rng):
    a, b = integer(rng, 1, 9), integer(rng, 1, 5)
    x = rng.integers(a, size=(3, 4))
    return Case(nn.Embedding(a, b), fl.Embedding(a, b), {}, x, (torch.from_numpy(x),))


def attention(rng):
    heads, bias = integer(rng, 1, 3), flag(rng)
    n = heads * integer(rng, 1, 3)
    k, v = (n, n) if flag(rng) else (integer(rng, 1, 5), integer(rng, 1, 5))
    module = nn.MultiheadAttention(n, heads, bias=bias, kdim=k, vdim=v, batch_first=True)
    with torch.no_grad():
        for name, value in module.named_parameters():
            if "bias" in name:
                value.copy_(torch.from_numpy(numbers(rng, *value.shape)))
    layer = fl.MultiHeadAttention((n, k, v), heads=heads, use_bias=bias)
    x = (numbers(rng, 2, 4, n), numbers(rng, 2, 5, k), numbers(rng, 2, 5, v))
    return Case(module, layer, {}, x, tuple(map(torch.from_numpy, x)), first)


def perceptron(rng):
    """A `Sequential` with numbers, where activations are modules of their own."""
    n, modules, layers, names = integer(rng, 1, 5), [], [], {}
    width = n
    for i in range(integer(rng, 1, 4)):
        names[f"layer_{i}"] = str(len(modules))
        kind = one_of(rng, "dense", "norm", "batch") if i else "dense"
        if kind == "dense":
            new = integer(rng, 1, 5)
            module, layer = nn.Linear(width, new), fl.Dense(width, new, jnp.tanh)
            width = new
        elif kind == "norm":
            module, layer = nn.LayerNorm(width), fl.LayerNorm(width, jnp.tanh)
        else:
            module, layer = nn.BatchNorm1d(width), fl.BatchNorm(width, jnp.tanh)
        modules += [with_statistics(rng, module), nn.Tanh()]
        layers.append(layer)
    x = numbers(rng, 3, n)
    return Case(nn.Sequential(*modules), fl.Chain(*layers), names, x, (torch.from_numpy(x),))


class Residual(nn.Module):
    """Blocks in a list, each with a way around it, between two layers with names."""

    def __init__(self, a, n, depth):
        super().__init__()
        self.start = nn.Linear(a, n)
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(n), nn.Linear(n, n)) for _ in range(depth))
        self.end = nn.Linear(n, 1, bias=False)

    def forward(self, x):
        x = self.start(x)
        for block in self.blocks:
            x = x + torch.relu(block(x))
        return self.end(x)


def stacked(rng):
    """Blocks that are one `Repeated`, or a `Chain`, inside of containers."""
    a, n, depth = integer(rng, 1, 4), integer(rng, 2, 5), integer(rng, 1, 4)
    module = Residual(a, n, depth)
    block = fl.SkipConnection(fl.Chain(fl.LayerNorm(n), fl.Dense(n, n, jax.nn.relu)), jnp.add)
    blocks = fl.Repeated(block, depth) if flag(rng) else fl.Chain(*[block] * depth)
    layer = fl.Chain(start=fl.Dense(a, n), blocks=blocks, end=fl.Dense(n, 1, use_bias=False))
    if isinstance(blocks, fl.Repeated):
        names = {"blocks.layer": "blocks.{}", "blocks.layer.layer": "blocks.{}"}
    else:
        names = {f"blocks.layer_{i}.layer": f"blocks.{i}" for i in range(depth)}
    x = numbers(rng, 3, a)
    return Case(module, layer, names, x, (torch.from_numpy(x),))


FAMILIES = [
    *(linear, bilinear, convolution, transposed, patches, batch_norm, instance_norm, group_norm, layer_norm),
    *(recurrent, cells, embedding, attention, perceptron, stacked),
]
