"""Fourier neural operators: value and gradient, against PyTorch's neuraloperator."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from timing import Call, Result, race

import flatlayers as fl


def fno(modes: tuple[int, ...], size: int, width: int, batch: int, activation: str, **options: Any) -> Result:
    """The mean square of what an operator of four layers gives, and its gradient with respect to all weights.

    neuraloperator applies the activation of a block twice where there is no perceptron between, which
    changes nothing with `relu`: there both have the same weights and have to return the same loss. Its
    `gelu` is the exact one, that of JAX is the approximation by `tanh`: there each is taken as it is.
    """
    x = np.random.default_rng(0).normal(size=(batch, *[size] * len(modes), 1)).astype(np.float32)
    contestants = {
        "flatlayers": lambda: _flat(modes, width, x, activation),
        "neuraloperator": lambda: _torch_call(modes, width, x, activation),
    }
    return race(contestants, same=tuple(contestants) if activation == "relu" else (), **options)


def _flat(modes: tuple[int, ...], width: int, x: np.ndarray, name: str) -> Any:
    model = fl.FourierNeuralOperator(modes, 1, width, 1, activation=getattr(jax.nn, name))
    ps, st = fl.setup(jax.random.key(0), model)
    weights = _weights(_torch_model(modes, width, name))
    assert sum(map(np.size, jax.tree.leaves(weights))) == len(ps)
    ps = ps.replace(**weights)

    def loss(ps: Any, x: Any) -> jax.Array:
        y, _ = model(x, ps, st)
        return jnp.mean(y**2)

    return jax.value_and_grad(loss), (ps, jnp.asarray(x))


def _torch_call(modes: tuple[int, ...], width: int, x: np.ndarray, name: str) -> Call:
    import torch  # pyright: ignore[reportMissingImports]

    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    model = _torch_model(modes, width, name).to(device)
    given = torch.from_numpy(np.moveaxis(x, -1, 1).copy()).to(device)

    def call() -> float:
        model.zero_grad()
        loss = model(given).square().mean()
        loss.backward()
        return loss.item()

    return call


def _torch_model(modes: tuple[int, ...], width: int, name: str) -> Any:
    import torch  # pyright: ignore[reportMissingImports]
    from neuralop.models import FNO  # pyright: ignore[reportMissingImports]

    torch.manual_seed(0)
    activation = getattr(torch.nn.functional, name)
    return FNO(modes, 1, 1, width, use_channel_mlp=False, non_linearity=activation)


def _weights(model: Any) -> Mapping[str, Any]:
    """The weights of neuraloperator by the names of flatlayers, with the channels last."""

    def perceptron(layers: Any) -> Mapping[str, Any]:
        return {
            f"layer_{i}": {"weight": _array(layer.weight)[..., 0], "bias": _array(layer.bias)}
            for i, layer in enumerate(layers.fcs)
        }

    def fourier(convolution: Any, skip: Any) -> Mapping[str, Any]:
        weight = np.moveaxis(_array(convolution.weight.to_tensor()), (0, 1), (-2, -1))
        spectral = {
            "weight": np.stack([np.real(weight), np.imag(weight)]),
            "bias": _array(convolution.bias).ravel(),
        }
        return {"spectral": spectral, "pointwise": {"weight": _array(skip.conv.weight)[..., 0]}}

    blocks = zip(model.fno_blocks.convs, model.fno_blocks.fno_skips, strict=True)
    return {
        "lifting": perceptron(model.lifting),
        **{f"layer_{i}": fourier(*block) for i, block in enumerate(blocks)},
        "projection": perceptron(model.projection),
    }


def _array(tensor: Any) -> np.ndarray:
    return tensor.detach().numpy()
