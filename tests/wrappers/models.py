"""Models that the tests of maps over layers and of their paths share."""

import jax
import jax.numpy as jnp

import flatlayers as fl


class Body(fl.Container):
    """Children in a dict and a tuple, a parameter and a state of its own."""

    parts: dict
    steps: tuple

    def parameters(self):
        return {**super().parameters(), "gain": fl.Param((), fl.initializers.constant(2.0))}

    def states(self, key):
        return {**super().states(key), "count": 0}

    def forward(self, x, ps, st):
        for name, layer in self.parts.items():
            x, _ = layer(x, ps.parts[name], st.parts[name])
        for i, layer in enumerate(self.steps):
            x, _ = layer(x, ps.steps[f"layer_{i}"], st.steps[f"layer_{i}"])
        return ps.gain * x, st.replace(count=st.count + 1)


class Residual(fl.Wrapper):
    layer: fl.Layer

    def forward(self, x, ps, st):
        y, st = self.layer(x, ps, st)
        return x + y, st


def body():
    return Body(
        {"a": fl.Dense(2, 3), "b": fl.Chain(jnp.tanh, fl.Dense(3, 2))}, (fl.Dense(2, 2), fl.Dense(2, 2))
    )


def setup(model, dtype=float):
    return fl.setup(jax.random.key(0), model, dtype)
