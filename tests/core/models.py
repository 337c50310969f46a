"""Layers that the tests of the core share."""

import jax.numpy as jnp

import flatlayers as fl


class Linear(fl.Layer):
    in_dims: int
    out_dims: int

    def parameters(self):
        return {
            "weight": fl.Param((self.out_dims, self.in_dims), fl.initializers.glorot_uniform),
            "bias": fl.Param((self.out_dims,), fl.initializers.zeros),
        }

    def forward(self, x, ps, st):
        return x @ ps.weight.T + ps.bias[None], st


class Counter(fl.Layer):
    """Counts its calls, in a state that it returns as a dict."""

    def states(self, key):
        return {"count": 0, "inner": {"rate": 0.5}, "training": True, "key": key}

    def forward(self, x, ps, st):
        return x, {**st, "count": st.count + 1}


class Net(fl.Container):
    encoder: fl.Layer
    hidden: tuple
    heads: dict
    scale: float = 2.0

    def parameters(self):
        return {**super().parameters(), "gain": fl.Param((), fl.initializers.ones)}

    def forward(self, x, ps, st):
        x, encoder = self.encoder(x, ps.encoder, st.encoder)
        for i, layer in enumerate(self.hidden):
            x, _ = layer(x, ps.hidden[f"layer_{i}"], st.hidden[f"layer_{i}"])
        y, _ = self.heads["mean"](x, ps.heads.mean, st.heads.mean)
        return self.scale * ps.gain * y, st.replace(encoder=encoder)


def net():
    return Net(Linear(3, 4), [Linear(4, 4), jnp.tanh], {"mean": Linear(4, 1), "spread": Linear(4, 1)})
