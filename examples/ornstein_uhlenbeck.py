"""Neural SDE: the law of an Ornstein-Uhlenbeck process, learned from its paths.

A spring in a bath: `dX = rate (level - X) dt + noise dW`. Paths of it, drawn exactly and seen every quarter
of a second, are all there is to learn from. In the `NeuralSDE` both the drift and the diffusion are networks,
which see neither the law nor the Brownian motion. From each value that was seen the model draws two of what
may come next, `Y` and `Y'`. The loss is their energy score (Gneiting and Raftery, 2007) with the value
`x` that came:

    E |Y - x| - 1/2 E |Y - Y'|,

which is least, in the mean, if and only if both have the same distribution. Its gradient goes through the
solver, with new noise in each step, whose key is in the state.

Then the model runs freely. The script prints its mean and variance next to those of the closed form,

    mean = level + (start - level) exp(-rate t),    variance = noise^2 (1 - exp(-2 rate t)) / (2 rate),

and draws a picture. With an error above 5 % in either, at any of the times, the exit code is 1. It takes
25 to 40 seconds on two cores.
"""

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import command_line
import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

import flatlayers as fl


START, LEVEL = 3.0, 1.0
RATE, NOISE = 1.0, 0.8
TIMES = np.linspace(0.25, 3.0, 12)
PATHS = 256  # in a batch
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
    """`E |Y - x| - 1/2 E |Y - Y'|` for `draws (2, ...)` of each `observed (...)`, in the mean."""
    return jnp.mean(jnp.abs(draws - observed)) - jnp.mean(jnp.abs(draws[0] - draws[1])) / 2


def data(seed: int) -> Iterator[np.ndarray]:
    rng = np.random.default_rng(seed)
    while True:
        yield draw(rng)


def train(steps: int, seed: int) -> fl.TrainResult:
    sde = neural_sde(TIMES[:1])
    ps, st = fl.setup(jax.random.key(seed), sde)

    def loss(ps: Any, st: Any, paths: Any) -> tuple[Any, Any]:
        before = jnp.stack([paths[:, :-1]] * 2)
        (after,), st = sde(before[..., None], ps, st)
        return energy_score(after[..., 0], paths[:, 1:]), st

    optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, steps, 0.01))
    return fl.train_loop(loss, ps, st, optimizer, data(seed), steps=steps)


def plot(ts: np.ndarray, paths: np.ndarray, learned: dict[str, Any], losses: np.ndarray, out: Path) -> None:
    """`paths (time, sample)` are those of the model at `ts`; `learned` are its functions of `X`."""
    mean, variance = moments(START, ts)
    figure = Figure(figsize=(11, 6.5), layout="constrained")
    axes = figure.subplot_mosaic([["paths", "moments"], ["fields", "loss"]])
    axes["paths"].plot(ts, paths[:, :15], color="tab:blue", lw=0.7)
    axes["paths"].lines[0].set_label("neural SDE")
    band = mean - 2 * variance**0.5, mean + 2 * variance**0.5
    axes["paths"].fill_between(ts, *band, color="0.9", label="closed form, two deviations")
    axes["paths"].set(title="15 paths of the model", xlabel="time (s)", ylabel="X")
    exact, found = (mean, variance), (paths.mean(axis=1), paths.var(axis=1))
    for name, color, a, b in zip(("mean", "variance"), ("tab:blue", "tab:orange"), exact, found, strict=True):
        axes["moments"].plot(ts, a, color=color, lw=5, alpha=0.3, label=f"{name}, closed form")
        axes["moments"].plot(ts, b, "--", color=color, label=f"{name}, neural SDE")
    axes["moments"].set(title=f"Moments of {SAMPLES:,} paths", xlabel="time (s)", ylabel="mean, variance")
    x = np.linspace(np.quantile(paths, 0.001), np.quantile(paths, 0.999), 100, dtype=np.float32)
    laws = {"drift": RATE * (LEVEL - x), "diffusion": np.full_like(x, NOISE)}
    for (name, law), color in zip(laws.items(), ("tab:blue", "tab:orange"), strict=True):
        axes["fields"].plot(x, law, color=color, lw=5, alpha=0.3, label=f"{name}, closed form")
        axes["fields"].plot(x, learned[name](x), "--", color=color, label=f"{name}, network")
    axes["fields"].set(title="What was learned, where the paths are", xlabel="X", ylabel="drift, diffusion")
    axes["loss"].plot(1 + np.arange(len(losses)), losses, "k", lw=0.8, label="of a batch")
    axes["loss"].set(title="Training", xlabel="step", ylabel="energy score")
    for axis in axes.values():
        axis.legend(fontsize="small")
    figure.savefig(out, format="png", dpi=150)


def main() -> None:
    options = command_line.parse(
        "Learn an Ornstein-Uhlenbeck process with a neural SDE; print the errors of its moments "
        "and draw them.",
        out="ornstein_uhlenbeck.png",
        seed="of the data, the first weights and the noise",
    )
    start = time.perf_counter()
    # Saved more often than the data were seen.
    ts = np.linspace(0.0, TIMES[-1], 5 * len(TIMES) + 1)
    sde = neural_sde(ts)
    print(fl.pformat(sde), flush=True)
    result = train(options.steps, options.seed)
    ps, st = result.ps, result.st
    ys, _ = jax.jit(sde)(jnp.full((SAMPLES, 1), START), ps, st)
    paths = np.asarray(ys[..., 0])
    # The claim is about the times at which the data were seen.
    errors = [
        np.max(np.abs(found / exact - 1))
        for found, exact in zip(
            (paths[5::5].mean(axis=1), paths[5::5].var(axis=1)), moments(START, TIMES), strict=True
        )
    ]
    learned = {
        name: lambda x, name=name: fl.stateless_apply(getattr(sde, name), x[:, None], ps[name])
        for name in ("drift", "diffusion")
    }
    plot(ts, paths, learned, result.losses, options.out)
    found = f"{errors[0]:.1%} of the mean and {errors[1]:.1%} of the variance"
    print(
        f"\nErrors of {found} against the closed form with {len(ps)} parameters in one vector, "
        f"after {time.perf_counter() - start:.1f} s\nThe picture is in {options.out}"
    )
    if not max(errors) <= REQUIRED:
        sys.exit(f"expected errors of at most {REQUIRED:.0%}, found {found}")


if __name__ == "__main__":
    main()
