"""Gradients and optimiser steps: the flat vector against a tree of arrays, `ravel_pytree` and slices."""

from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree
from models import equinox_mlp, flat_mlp, sliced
from timing import Result, race

import flatlayers as fl


Contestants = dict[str, Callable[[], tuple[Callable[..., Any], tuple[Any, ...]]]]


def _mean_square(y: Any) -> jax.Array:
    return jnp.mean(y**2)


def mlp(width: int, depth: int, *, slices: bool = True, **options: Any) -> Result:
    """The gradient of a perceptron of square layers on a batch of 32."""
    x = jax.random.normal(jax.random.key(1), (32, width))

    def tree():
        arrays, rest = equinox_mlp(width, width, depth)
        return jax.grad(lambda p, x: _mean_square(jax.vmap(eqx.combine(p, rest))(x))), (arrays, x)

    def flat():
        model, ps, st = flat_mlp(width, width, depth)
        return jax.grad(lambda ps, x: _mean_square(model(x, ps, st)[0])), (ps, x)

    def ravel():
        arrays, rest = equinox_mlp(width, width, depth)
        data, unravel = ravel_pytree(arrays)
        return jax.grad(lambda d, x: _mean_square(jax.vmap(eqx.combine(unravel(d), rest))(x))), (data, x)

    def slice_a_leaf():
        model, ps, st = flat_mlp(width, width, depth)
        layout = ps.layout
        return jax.grad(lambda d, x: _mean_square(model(x, sliced(layout, d), st)[0])), (ps.data, x)

    contestants: Contestants = {"tree": tree, "flat": flat, "ravel_pytree": ravel}
    return race(contestants | ({"slice a leaf": slice_a_leaf} if slices else {}), **options)


def neural_ode(
    size: int, width: int, depth: int, batch: int, *, all_peers: bool = True, **options: Any
) -> Result:
    """The gradient of a neural ODE with diffrax's default adjoint, tolerances 1e-4 and 1e-6."""
    shape = (size,) if batch == 1 else (batch, size)
    y0 = jax.random.normal(jax.random.key(1), shape)

    def solve(field: Any, y0: jax.Array, args: Any) -> jax.Array:
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(field),
            diffrax.Tsit5(),
            0.0,
            1.0,
            None,
            y0,
            args,
            stepsize_controller=diffrax.PIDController(rtol=1e-4, atol=1e-6),
        )
        return _mean_square(solution.ys)

    def tree():
        arrays, rest = equinox_mlp(size, width, depth)

        def field(t, y, p):
            model = eqx.combine(p, rest)
            return model(y) if batch == 1 else jax.vmap(model)(y)

        return jax.grad(lambda p, y0: solve(field, y0, p)), (arrays, y0)

    def ravel():
        arrays, rest = equinox_mlp(size, width, depth)
        data, unravel = ravel_pytree(arrays)

        def field(t, y, d):
            model = eqx.combine(unravel(d), rest)
            return model(y) if batch == 1 else jax.vmap(model)(y)

        return jax.grad(lambda d, y0: solve(field, y0, d)), (data, y0)

    def layer():
        model, ps, st = flat_mlp(size, width, depth)
        node = fl.NeuralODE(model, adjoint=diffrax.RecursiveCheckpointAdjoint())
        st = fl.initial_states(jax.random.key(0), node)
        return jax.grad(lambda ps, y0: _mean_square(node(y0, ps, st)[0])), (ps, y0)

    def args_ps():
        model, ps, st = flat_mlp(size, width, depth)
        return jax.grad(lambda ps, y0: solve(lambda t, y, ps: model(y, ps, st)[0], y0, ps)), (ps, y0)

    contestants: Contestants = {"tree": tree, "NeuralODE": layer, "args=ps": args_ps}
    return race(contestants | ({"ravel_pytree": ravel} if all_peers else {}), **options)


def adam(width: int, depth: int, **options: Any) -> Result:
    """One Adam step with given gradients, the arguments donated."""
    optimizer = optax.adam(1e-3)

    def step(params: Any, state: Any, gradient: Any) -> Any:
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, gradient

    def tree():
        arrays, _ = equinox_mlp(width, width, depth)
        params = jax.tree.map(jnp.copy, arrays)
        return step, (params, optimizer.init(params), jax.tree.map(jnp.ones_like, params))

    def flat():
        ps: Any = flat_mlp(width, width, depth)[1].map(jnp.copy)
        return step, (ps, optimizer.init(ps), jax.tree.map(jnp.ones_like, ps))

    return race({"tree": tree, "flat": flat}, carry=True, **options)
