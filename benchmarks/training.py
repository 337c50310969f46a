"""Training a neural ODE: flatlayers against scripts with Equinox, and with `ravel_pytree`.

All fit the same thing from the same weights: the mean square of the state at the end of a solve, by Adam
with a learning rate so small that every step of the training does the same work.
"""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.flatten_util import ravel_pytree
from models import equinox_mlp, flat_mlp
from timing import Contestant, Result, race

import flatlayers as fl


OPTIMIZER = optax.adam(1e-9)


@dataclasses.dataclass(frozen=True)
class Problem:
    """A state of `size` numbers, a perceptron of `depth` hidden layers, and about `steps` steps of a solver.

    The controller may not take longer steps than `t1 / steps`, which is what it wants for five or fewer.
    With `steps=1` the tolerance alone sets them.
    """

    width: int
    depth: int
    batch: int
    steps: int = 20
    size: int = 4
    t1: float = 4.0
    tolerance: float = 1e-6
    solver: diffrax.AbstractERK = diffrax.Tsit5()
    max_steps: int = 4096

    @property
    def controller(self) -> diffrax.PIDController:
        return diffrax.PIDController(self.tolerance, self.tolerance, dtmax=self.t1 / self.steps)

    @property
    def scanned(self) -> int:
        """How many training steps to put in one call: few where they take long."""
        return 20 if self.width**2 * self.depth * self.batch < 6e7 else 2

    def start(self) -> jax.Array:
        shape = (self.size,) if self.batch == 1 else (self.batch, self.size)
        return jax.random.normal(jax.random.key(1), shape)

    def call(self, model: Callable[[Any], Any], y: Any) -> Any:
        """A model of one sample."""
        return model(y) if self.batch == 1 else jax.vmap(model)(y)

    def loss(self, field: Any, args: Any, y0: jax.Array, **options: Any) -> jax.Array:
        """By plain `diffeqsolve`, with diffrax's default adjoint unless `options` have another."""
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(field),
            self.solver,
            0.0,
            self.t1,
            None,
            y0,
            args,
            stepsize_controller=self.controller,
            max_steps=self.max_steps,
            **options,
        )
        assert solution.ys is not None
        return jnp.mean(solution.ys**2)

    def layer(self, **options: Any) -> tuple[fl.NeuralODE, fl.ComponentVector, fl.Record]:
        model, ps, _ = flat_mlp(self.size, self.width, self.depth)
        node = fl.NeuralODE(
            model,
            t1=self.t1,
            solver=self.solver,
            stepsize_controller=self.controller,
            max_steps=self.max_steps,
            **options,
        )
        return node, ps, fl.initial_states(jax.random.key(0), node)

    def counts(self) -> tuple[int, int]:
        """Accepted steps, and all steps."""
        node, ps, st = self.layer()
        stats = node(self.start(), ps, st)[1].stats
        return int(stats.num_accepted_steps), int(stats.num_steps)


@dataclasses.dataclass(frozen=True)
class Trajectories(Problem):
    """The same, but each state of the batch is a solve of its own, with its own steps."""

    def loss(self, field: Any, args: Any, y0: jax.Array, **options: Any) -> jax.Array:
        alone = super().loss
        return jnp.mean(jax.vmap(lambda y: alone(field, args, y, **options))(y0))

    def call(self, model: Callable[[Any], Any], y: Any) -> Any:
        return model(y)

    def layer(self, **options: Any) -> tuple[fl.NeuralODE, fl.ComponentVector, fl.Record]:
        return super().layer(batching="each", **options)


# Losses: a function of trainable arrays and `y0`, and these arrays


def equinox_loss(problem: Problem) -> tuple[Callable[..., Any], Any]:
    arrays, rest = equinox_mlp(problem.size, problem.width, problem.depth)
    return lambda model, y0: problem.loss(lambda t, y, model: problem.call(model, y), model, y0), eqx.combine(
        arrays, rest
    )


def tree_loss(problem: Problem) -> tuple[Callable[..., Any], Any]:
    arrays, rest = equinox_mlp(problem.size, problem.width, problem.depth)
    return lambda arrays, y0: problem.loss(
        lambda t, y, p: problem.call(eqx.combine(p, rest), y), arrays, y0
    ), arrays


def ravel_loss(problem: Problem) -> tuple[Callable[..., Any], Any]:
    arrays, rest = equinox_mlp(problem.size, problem.width, problem.depth)
    data, unravel = ravel_pytree(arrays)
    return lambda data, y0: problem.loss(
        lambda t, y, d: problem.call(eqx.combine(unravel(d), rest), y), data, y0
    ), data


def flat_loss(problem: Problem, **options: Any) -> tuple[Callable[..., Any], Any]:
    node, ps, st = problem.layer(**options)
    return lambda ps, y0: jnp.mean(node(y0, ps, st)[0] ** 2), ps


# Gradients


def gradient(problem: Problem, make: Callable[..., Any], **options: Any) -> Contestant:
    def contestant() -> Any:
        loss, params = make(problem, **options)
        return jax.value_and_grad(loss), (params, problem.start())

    return contestant


# Whole training steps, as they are written with each library


@dataclasses.dataclass
class Steps:
    """A call that goes on with the training by one step or several, and gives the last loss."""

    run: Any  # compiled, from `(params, state, y0)` to `(params, state, loss)`
    params: Any
    state: Any
    y0: jax.Array

    def __call__(self) -> Any:
        self.params, self.state, value = self.run(self.params, self.state, self.y0)
        return value

    def lower(self) -> Any:
        return self.run.lower(self.params, self.state, self.y0)


def equinox_step(problem: Problem) -> Steps:
    loss, model = equinox_loss(problem)

    @eqx.filter_jit
    def step(model: Any, state: Any, y0: Any) -> Any:
        value, gradient = eqx.filter_value_and_grad(loss)(model, y0)
        updates, state = OPTIMIZER.update(gradient, state, eqx.filter(model, eqx.is_inexact_array))
        return eqx.apply_updates(model, updates), state, value

    state = OPTIMIZER.init(eqx.filter(model, eqx.is_inexact_array))
    return Steps(step, model, state, problem.start())


def jitted_step(problem: Problem, make: Callable[..., Any] = flat_loss, scanned: int = 0) -> Steps:
    """One `jit` with donated parameters and optimiser state; `scanned` such steps in one, as `train_loop`."""
    loss, params = make(problem)
    params = jax.tree.map(jnp.copy, params)

    def step(params: Any, state: Any, y0: Any) -> Any:
        value, gradient = jax.value_and_grad(loss)(params, y0)
        updates, state = OPTIMIZER.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    def steps(params: Any, state: Any, y0: Any) -> Any:
        def body(carry: Any, _: Any) -> Any:
            params, state, value = step(carry[0], carry[1], y0)
            return (params, state), value

        (params, state), values = lax.scan(body, (params, state), length=scanned)
        return params, state, values[-1]

    run = jax.jit(steps if scanned else step, donate_argnums=(0, 1))
    return Steps(run, params, OPTIMIZER.init(params), problem.start())


# The limit


def bare_products(problem: Problem) -> Contestant:
    """The matrix products that the gradient cannot do without, back to back, and nothing else.

    Of each evaluation in the forward solve the products with all weights; of each stage of an accepted step
    those of the cotangents with all weights; and of each weight's gradient one product for a thousand rows.
    """
    accepted, steps = problem.counts()
    tableau: Any = problem.solver.tableau
    stages = tableau.num_stages - 1
    sizes = [problem.size, *[problem.width] * problem.depth, problem.size]
    pairs = list(itertools.pairwise(sizes))
    at_once = max(1, min(accepted * stages, 1024 // problem.batch))

    def run(weights: list[jax.Array], x: jax.Array, columns: list[jax.Array]) -> Any:
        def forward(_: Any, x: jax.Array) -> jax.Array:
            for weight in weights:
                x = weight @ x if x.ndim == 1 else lax.dot_general(x, weight, (((1,), (1,)), ((), ())))
            return x

        def backward(_: Any, x: jax.Array) -> jax.Array:
            for weight in weights[::-1]:
                x = x @ weight
            return x

        def gradients(i: Any, totals: list[jax.Array]) -> list[jax.Array]:
            return [
                total + lax.dot_general(right + i, left, (((0,), (0,)), ((), ())))
                for total, left, right in zip(totals, columns[:-1], columns[1:], strict=True)
            ]

        y = lax.fori_loop(0, steps * stages, forward, x)
        y = lax.fori_loop(0, accepted * stages, backward, y)
        rounds = -(-accepted * stages // at_once)
        zeros = [jnp.zeros_like(weight) for weight in weights]
        return y, lax.fori_loop(0, rounds, gradients, zeros)

    def contestant() -> Any:
        key = jax.random.key(0)
        weights = [jax.random.normal(key, (b, a)) / np.sqrt(a) for a, b in pairs]
        columns = [jax.random.normal(key, (at_once * problem.batch, n)) for n in sizes]
        return run, (weights, problem.start(), columns)

    return contestant


# Races


def grid_row(problem: Problem, **options: Any) -> Result:
    """Equinox against flatlayers, gradient and training step, and the bare products."""
    return race(
        {
            "Equinox": gradient(problem, tree_loss),
            "flat": gradient(problem, flat_loss),
            "products": bare_products(problem),
            "Equinox step": lambda: equinox_step(problem),
            "flat step": lambda: jitted_step(problem),
            "flat steps in a scan": lambda: jitted_step(problem, scanned=problem.scanned),
        },
        same=("Equinox", "flat", "Equinox step", "flat step", "flat steps in a scan"),
        per_call={"flat steps in a scan": problem.scanned},
        **options,
    )
