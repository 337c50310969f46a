"""Training a neural ODE: the peers besides Equinox, Flax NNX and PyTorch, and the races of all."""

import dataclasses
from collections.abc import Callable
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from models import equinox_mlp
from timing import Call, Result, race
from training import (
    OPTIMIZER,
    Problem,
    equinox_step,
    flat_loss,
    gradient,
    jitted_step,
    ravel_loss,
    tree_loss,
)


class Perceptron(nnx.Module):
    """The perceptron of Flax, with the weights of Equinox."""

    def __init__(self, problem: Problem):
        arrays, _ = equinox_mlp(problem.size, problem.width, problem.depth)
        self.layers = nnx.List([self._linear(layer) for layer in arrays.layers])

    @staticmethod
    def _linear(layer: Any) -> nnx.Linear:
        linear = nnx.Linear(*layer.weight.shape[::-1], rngs=nnx.Rngs(0))
        linear.kernel[...] = layer.weight.T
        if linear.bias is not None:
            linear.bias[...] = layer.bias
        return linear

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.layers[:-1]:
            x = jnp.tanh(layer(x))
        return self.layers[-1](x)


def nnx_loss(problem: Problem) -> tuple[Callable[..., Any], Any]:
    definition, arrays = nnx.split(Perceptron(problem))
    return lambda arrays, y0: problem.loss(lambda t, y, p: nnx.merge(definition, p)(y), arrays, y0), arrays


def nnx_step(problem: Problem) -> Call:
    model = Perceptron(problem)
    optimizer: Any = nnx.Optimizer(model, OPTIMIZER, wrt=nnx.Param)
    y0 = problem.start()

    def loss(model: Any, y0: Any) -> Any:
        definition, arrays = nnx.split(model)
        return problem.loss(lambda t, y, p: nnx.merge(definition, p)(y), arrays, y0)

    @nnx.jit
    def step(model: Any, optimizer: Any, y0: Any) -> Any:
        value, gradient = nnx.value_and_grad(loss)(model, y0)
        optimizer.update(model, gradient)
        return value

    return lambda: step(model, optimizer, y0)


def torch_step(problem: Problem) -> Call:
    """PyTorch with torchdiffeq's `dopri5`, differentiated through its steps, its fastest way."""
    import torch  # pyright: ignore[reportMissingImports]
    import torchdiffeq  # pyright: ignore[reportMissingImports]

    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    arrays, _ = equinox_mlp(problem.size, problem.width, problem.depth)
    layers = []
    for layer in arrays.layers:
        linear = torch.nn.Linear(*layer.weight.shape[::-1])
        linear.weight.data = torch.from_numpy(np.array(layer.weight))
        linear.bias.data = torch.from_numpy(np.array(layer.bias))
        layers += [linear, torch.nn.Tanh()]
    net = torch.nn.Sequential(*layers[:-1]).to(device)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-9)
    y0 = torch.from_numpy(np.array(problem.start())).to(device)
    times = torch.tensor([0.0, problem.t1], device=device)
    options = {"max_step": problem.t1 / problem.steps}

    def call() -> float:
        optimizer.zero_grad()
        ys: Any = torchdiffeq.odeint(
            lambda t, y: net(y),
            y0,
            times,
            rtol=problem.tolerance,
            atol=problem.tolerance,
            method="dopri5",
            options=options,
        )
        loss = ys[-1].square().mean()
        loss.backward()
        optimizer.step()
        return loss.item()

    return call


# Races


def peers(problem: Problem, **options: Any) -> Result:
    """All of them, with the method of Dormand and Prince, which torchdiffeq has too."""
    problem = dataclasses.replace(problem, solver=diffrax.Dopri5())
    contestants = {
        "Equinox": lambda: equinox_step(problem),
        "Flax NNX": lambda: nnx_step(problem),
        "ravel_pytree": lambda: jitted_step(problem, ravel_loss),
        "PyTorch": lambda: torch_step(problem),
        "flat": lambda: jitted_step(problem),
        "flat, scan": lambda: jitted_step(problem, scanned=problem.scanned),
    }
    return race(contestants, same=tuple(contestants), per_call={"flat, scan": problem.scanned}, **options)


def gradient_peers(problem: Problem, **options: Any) -> Result:
    """The gradient alone."""
    contestants = {
        "Equinox": gradient(problem, tree_loss),
        "Flax NNX": gradient(problem, nnx_loss),
        "ravel_pytree": gradient(problem, ravel_loss),
        "flat": gradient(problem, flat_loss),
    }
    return race(contestants, same=tuple(contestants), **options)
