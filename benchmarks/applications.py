"""Whole applications: the perceptron that SimpleChains.jl publishes, and a deep equilibrium network."""

import itertools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optax
import optimistix as optx
from jax import lax
from timing import Call, Contestant, Result, compiled, race

import flatlayers as fl


KEY = jax.random.key(0)
SIZES = (4, 32, 16, 4)
POINTS = 10_000
EPOCHS = 20


def simple_chains(**options: Any) -> Result:
    """An epoch of a 4-32-16-4 perceptron on 10 000 points, which is one step of Adam on all of them.

    The points are 2 by 2 matrices and their exponentials, as in the example of SimpleChains.jl.
    """
    pairs = list(itertools.pairwise(SIZES))
    x = jax.random.normal(KEY, (POINTS, 4))
    y = jax.vmap(lambda m: jax.scipy.linalg.expm(m.reshape(2, 2)).ravel())(x)
    activations = [jnp.tanh, jnp.tanh, None]
    model = fl.Chain(*[fl.Dense(a, b, f) for (a, b), f in zip(pairs, activations, strict=True)])

    def flat() -> Call:
        ps, st = fl.setup(KEY, model)
        params: Any = ps
        optimizer = optax.adam(1e-3)

        def epochs(ps: Any, state: Any) -> Any:
            def epoch(carry: Any, _: Any) -> Any:
                ps, state = carry
                gradient = jax.grad(lambda ps: jnp.mean((model(x, ps, st)[0] - y) ** 2))(ps)
                updates, state = optimizer.update(gradient, state, ps)
                return (optax.apply_updates(ps, updates), state), None

            return lax.scan(epoch, (ps, state), length=EPOCHS)[0]

        return compiled(epochs, (params, optimizer.init(params)), carry=True)

    def torch() -> Call:
        import torch  # pyright: ignore[reportMissingImports]

        device = "cuda" if jax.default_backend() == "gpu" else "cpu"
        layers = [layer for a, b in pairs for layer in (torch.nn.Linear(a, b), torch.nn.Tanh())]
        net = torch.nn.Sequential(*layers[:-1]).to(device)
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
        inputs, outputs = (torch.from_numpy(np.array(a)).to(device) for a in (x, y))

        def epoch() -> float:
            optimizer.zero_grad()
            loss = ((net(inputs) - outputs) ** 2).mean()
            loss.backward()
            optimizer.step()
            return loss.item()

        def call() -> list[float]:
            return [epoch() for _ in range(EPOCHS)]

        return call

    def products() -> Any:
        """Forward, and backward but for the cotangent of the input: of each layer three products, or two."""
        weights = [jax.random.normal(KEY, (b, a)) for a, b in pairs]
        columns = [jax.random.normal(KEY, (POINTS, n)) for n in SIZES]

        def run(weights: Any, columns: Any) -> Any:
            def epoch(_: Any, carry: Any) -> Any:
                weights, columns = carry
                outs = [
                    lax.dot_general(c, w, (((1,), (1,)), ((), ())))
                    for c, w in zip(columns[:-1], weights, strict=True)
                ]
                backs = [c @ w for c, w in zip(columns[2:], weights[1:], strict=True)]
                totals = [
                    lax.dot_general(right, left, (((0,), (0,)), ((), ())))
                    for left, right in itertools.pairwise(columns)
                ]
                # Each product is used, by a number that cannot be known beforehand.
                columns = [c + 1e-30 * (outs[-1][0, 0] + backs[0][0, 0] + backs[1][0, 0]) for c in columns]
                return [w + 1e-30 * t for w, t in zip(weights, totals, strict=True)], columns

            return lax.fori_loop(0, EPOCHS, epoch, (weights, columns))

        return run, (weights, columns)

    contestants: dict[str, Contestant] = {"PyTorch": torch, "flat": flat, "products": products}
    return race(contestants, per_call=dict.fromkeys(contestants, EPOCHS), **options)


def deep_equilibrium(batch: int, width: int, gradient: bool, **options: Any) -> Result:
    """`z = tanh(W z + U x + b)`, solved and differentiated implicitly, against optimistix called by hand."""
    x = jax.random.normal(jax.random.key(1), (batch, width))
    solver = optx.FixedPointIteration(rtol=1e-5, atol=1e-5)

    class Cell(eqx.Module):
        inner: eqx.nn.Linear
        outer: eqx.nn.Linear

        def __call__(self, z: jax.Array, x: jax.Array) -> jax.Array:
            return jnp.tanh(self.inner(z) + self.outer(x))

    def start() -> Cell:
        keys = jax.random.split(KEY)
        inner = eqx.nn.Linear(width, width, use_bias=False, key=keys[0])
        cell = Cell(inner, eqx.nn.Linear(width, width, key=keys[1]))
        return eqx.tree_at(lambda c: c.inner.weight, cell, 0.5 * cell.inner.weight)

    def by_hand(adjoint: optx.AbstractAdjoint) -> Any:
        arrays, rest = eqx.partition(start(), eqx.is_array)

        def loss(arrays: Any, x: Any) -> Any:
            def fn(z: Any, args: Any) -> Any:
                return jax.vmap(eqx.combine(args[0], rest))(z, args[1])

            solution = optx.fixed_point(
                fn, solver, jnp.zeros_like(x), (arrays, x), adjoint=adjoint, throw=False
            )
            return jnp.sum(solution.value**2)

        return (jax.value_and_grad(loss) if gradient else loss), (arrays, x)

    def layer() -> Any:
        cell = start()
        model = fl.Chain(
            fl.Parallel(jnp.add, fl.Dense(width, width, use_bias=False), fl.Dense(width, width)),
            fl.WrappedFunction(jnp.tanh),
        )
        deq = fl.DeepEquilibriumNetwork(model, solver=solver)
        st = fl.initial_states(KEY, deq)
        ps = fl.ComponentVector.of(
            {
                "model": {
                    "layer_0": {
                        "layer_0": {"weight": cell.inner.weight},
                        "layer_1": {"weight": cell.outer.weight, "bias": cell.outer.bias},
                    },
                    "layer_1": {},
                }
            },
            deq.layout,
        )

        def loss(ps: Any, x: Any) -> Any:
            return jnp.sum(deq(x, ps, st)[0] ** 2)

        return (jax.value_and_grad(loss) if gradient else loss), (ps, x)

    # The loss is a sum, so that its cotangent is about one and the tolerance means the same for all.
    gmres = optx.ImplicitAdjoint(lx.GMRES(rtol=1e-5, atol=1e-5))
    contestants: dict[str, Contestant] = {
        "by hand, GMRES": lambda: by_hand(gmres),
        "by hand, default": lambda: by_hand(optx.ImplicitAdjoint()),
        "layer": layer,
    }
    return race(contestants, same=tuple(contestants), **options)
