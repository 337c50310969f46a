"""Neural SDE: the law of an Ornstein-Uhlenbeck process, learned from its paths.

A spring in a bath: `dX = rate (level - X) dt + noise dW`. Paths of it, drawn exactly and seen every quarter of
a second, are all there is to learn from. In the `NeuralSDE` both the drift and the diffusion are networks,
which see neither the law nor the Brownian motion. From each value that was seen the model draws a few of
what may come next, `Y`, and what is minimised is their energy score (Gneiting and Raftery, 2007) with what came,
`x`:

    E |Y - x| - 1/2 E |Y - Y'|,

which is least, in the mean, if and only if both have the same distribution. Its gradient goes through the
solver, with new noise in each step, whose key is in the state.

Then the model runs freely. Out come its mean and variance next to those of the closed form,

    mean = level + (start - level) exp(-rate t),    variance = noise^2 (1 - exp(-2 rate t)) / (2 rate),

and a picture. With an error above 5 % in either, at any of the times, the exit code is 1. It takes
20 to 30 seconds on two cores.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import flatlayers as fl


START, LEVEL = 3.0, 1.0
RATE, NOISE = 1.0, 0.8
TIMES = np.linspace(0.25, 3.0, 12)
PATHS = 256  # in a batch
DRAWS = 8  # of the model from each value
SAMPLES = 20_000  # for the moments in the end
REQUIRED = 0.05  # relative error of mean and variance


def draw(rng: np.random.Generator) -> np.ndarray:
    """Paths of the process at 0 and `TIMES`, exactly distributed, of shape `(PATHS, 1 + time)`."""
    paths = [np.full(PATHS, START)]
    for dt in np.diff(TIMES, prepend=0.0):
        mean, variance = moments(paths[-1], dt)
        paths.append(mean + np.sqrt(variance) * rng.normal(size=PATHS))
    return np.stack(paths, axis=-1).astype(np.float32)


def moments(start: Any, t: Any) -> tuple[Any, Any]:
    """The mean and the variance after the time `t`: the closed form."""
    decay = np.exp(-RATE * t)
    return LEVEL + (start - LEVEL) * decay, NOISE**2 * (1 - decay**2) / (2 * RATE)


def neural_sde(times: np.ndarray) -> fl.NeuralSDE:
    """The model, which saves its state at the given times."""
    drift = fl.MLP(1, (16, 16), 1)
    diffusion = fl.MLP(1, (16, 16), 1, final_activation=jax.nn.softplus)
    return fl.NeuralSDE(drift, diffusion, t1=times[-1], dt0=0.05, saveat=times.tolist())


def energy_score(draws: Any, observed: Any) -> jax.Array:
    """`E |Y - x| - 1/2 E |Y - Y'|` for `draws (n, ...)` of each `observed (...)`, in the mean."""
    n = len(draws)
    among = jnp.sum(jnp.abs(draws[:, None] - draws[None])) / (n * (n - 1) * observed.size)
    return jnp.mean(jnp.abs(draws - observed)) - among / 2


def data(seed: int) -> Iterator[np.ndarray]:
    rng = np.random.default_rng(seed)
    while True:
        yield draw(rng)


def train(steps: int, seed: int) -> fl.TrainResult:
    sde = neural_sde(TIMES[:1])
    ps, st = fl.setup(jax.random.key(seed), sde)

    def loss(ps: Any, st: Any, paths: Any) -> tuple[Any, Any]:
        before = jnp.broadcast_to(paths[:, :-1], (DRAWS, PATHS, len(TIMES)))
        (after,), st = sde(before[..., None], ps, st)
        return energy_score(after[..., 0], paths[:, 1:]), st

    optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, steps, 0.01))
    return fl.train_loop(loss, ps, st, optimizer, data(seed), steps=steps)
