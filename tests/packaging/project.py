"""A project of a user, in which a type checker finds nothing wrong with flatlayers as pip installs it."""

from typing import assert_type

import diffrax
import jax
import jax.numpy as jnp
import optax

import flatlayers as fl
from flatlayers.types import Array, Params, State


class Damping(fl.Layer):
    """Multiply by a learned factor below 1."""

    dims: int

    def parameters(self) -> dict[str, fl.Param]:
        return {"rate": fl.Param((self.dims,), fl.initializers.zeros)}

    def forward(self, x: Array, ps: Params, st: State) -> tuple[Array, State]:
        return x * jnp.exp(-jax.nn.softplus(ps.rate)), st


class Residual(fl.Container):
    """Add a layer's output to its input."""

    inner: fl.Layer

    def forward(self, x: Array, ps: Params, st: State) -> tuple[Array, State]:
        y, inner_state = self.inner(x, ps.inner, st.inner)
        return x + y, st.replace(inner=inner_state)


times = jnp.linspace(0.0, 1.0, 5)
model = fl.Chain(hidden=fl.Dense(2, 8, jnp.tanh), inner=Residual(Damping(8)), readout=fl.Dense(8, 2))
states = fl.setup(jax.random.key(0), model)[1]
ode = fl.NeuralODE(model, t0=0.0, t1=1.0, solver=diffrax.Tsit5(), saveat=diffrax.SaveAt(ts=times))
ps, st = fl.setup(jax.random.key(0), ode)
assert_type(ps, fl.ComponentVector)


def loss(ps: fl.ComponentVector, st: State, batch: Array) -> tuple[Array, State]:
    y, st = ode(batch, ps, st)
    return jnp.mean(y**2), st


# A step by hand.
optimizer = optax.adam(1e-2)
opt_state = optimizer.init(ps)
(value, st), gradient = jax.value_and_grad(loss, has_aux=True)(ps, st, jnp.ones(2))
updates, opt_state = optimizer.update(gradient, opt_state, ps)
optax.apply_updates(ps, updates)

# The loop.
result = fl.train_loop(loss, ps, st, optimizer, jnp.ones(2), steps=3, progress=False)
assert_type(result.ps, fl.ComponentVector)
difference: fl.ComponentVector = 2.0 * result.ps - ps
numbers: Array = difference.data
weights: Array = result.ps["hidden.weight"]

# A solve by hand, whose arguments are the vector.
term = diffrax.ODETerm(lambda t, y, args: model(y, args, states)[0])
solution = diffrax.diffeqsolve(term, diffrax.Tsit5(), t0=0.0, t1=1.0, dt0=0.1, y0=jnp.ones(2), args=result.ps)
