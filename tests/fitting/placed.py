"""Models, data and short runs that are placed on devices."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flatlayers as fl


RNG = np.random.default_rng(0)
X = RNG.normal(size=(64, 3))
Y = np.sin(X[:, :1]) + X[:, 1:2] * X[:, 2:]
WHOLE = (X, Y)

SMALL = fl.MLP(3, (5,), 1, jnp.tanh)
MODELS = {
    "small": SMALL,
    "MLP": fl.MLP(3, (16, 16), 1, jnp.tanh),
    "BatchNorm": fl.Chain(fl.Dense(3, 16, use_bias=False), fl.BatchNorm(16), fl.Dense(16, 1, jnp.tanh)),
    "Dropout": fl.Chain(fl.Dense(3, 16, jnp.tanh), fl.Dropout(0.3), fl.Dense(16, 1)),
    "BatchNorm over the axis": fl.Chain(
        fl.Dense(3, 16, use_bias=False), fl.BatchNorm(16, axis_name="data"), fl.Dense(16, 1, jnp.tanh)
    ),
}


def loss_of(model):
    def loss(ps, st, batch):
        x, y = batch
        found, st = model(x, ps, st)
        return jnp.mean((found - y) ** 2), (st, {"largest": jnp.abs(found).mean()})

    return loss


LOSSES = {name: loss_of(model) for name, model in MODELS.items()}
OPTIMIZER = optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(1e-2, weight_decay=1e-3))


def few(names, *fast):
    """All names, those that are not among the fast ones marked slow."""
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in names]


def train(loss, ps, st, data=WHOLE, optimizer=OPTIMIZER, steps=50, **options):
    return fl.train_loop(
        loss, ps, st, optimizer, data, steps=steps, **{"chunk": 20, "progress": False, **options}
    )
