"""Neural ODE: the law of a spiral, from one noisy path.

The law is `dy/dt = A y^3`, the example of Chen et al. (2018). A network of one hidden layer, which is given
the cubes, is fitted to 61 noisy points on the first third of a path, by Adam through the solve. The fitted
horizon grows during the first half of the training, which keeps it from settling on a flat line.

The script prints the model and its error (root mean square) against the law in the fitted time and in twice
as long after it, and draws a picture. With an error above 0.1 in either the exit code is 1. It takes 10 to 15
seconds on two cores.
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


MATRIX = np.array([[-0.1, 2.0], [-2.0, -0.1]])
START = np.array([2.0, 0.0], np.float32)
FITTED = np.linspace(0.0, 6.0, 61)
SHOWN = np.linspace(0.0, 18.0, 361)
NOISE = 0.03
REQUIRED = 0.1


def law(times: np.ndarray) -> np.ndarray:
    """The path without noise, of shape `(time, 2)`."""
    field = fl.WrappedFunction(lambda y: y**3 @ MATRIX.T)
    node = fl.NeuralODE(field, t1=times[-1], saveat=times.tolist())
    return np.asarray(node(START, *fl.setup(jax.random.key(0), node))[0])


def network() -> fl.Chain:
    return fl.Chain(lambda y: y**3 / 8, fl.Dense(2, 64, jnp.tanh), fl.Dense(64, 2))


def horizons(steps: int) -> Iterator[np.float32]:
    """The horizon that counts in each step."""
    yield from np.clip(np.linspace(0.5, 13.5, steps), 0.5, 7.0).astype(np.float32)


def train(data: Any, steps: int, seed: int) -> fl.TrainResult:
    node = fl.NeuralODE(network(), t1=FITTED[-1], saveat=FITTED.tolist())
    ps, st = fl.setup(jax.random.key(seed), node)

    def loss(ps: Any, st: Any, horizon: Any) -> tuple[Any, Any]:
        found, st = node(START, ps, st)
        weight = jnp.clip((horizon - FITTED) / 0.2, 0.0, 1.0)[:, None]
        return jnp.sum(weight * (found - data) ** 2) / jnp.sum(2 * weight), st

    optimizer = optax.adam(optax.cosine_decay_schedule(2e-2, steps))
    return fl.train_loop(loss, ps, st, optimizer, horizons(steps), steps=steps)


def plot(data: np.ndarray, true: np.ndarray, found: np.ndarray, losses: np.ndarray, out: Path) -> None:
    figure = Figure(figsize=(11, 6), layout="constrained")
    axes = figure.subplot_mosaic([["time", "plane"], ["loss", "plane"]], width_ratios=(1.5, 1))
    axes["time"].axvspan(FITTED[-1], SHOWN[-1], color="0.93", label="not fitted")
    for i, color in enumerate(("tab:blue", "tab:orange")):
        name = f"$y_{i + 1}$"
        axes["time"].plot(SHOWN, true[:, i], color=color, lw=5, alpha=0.3, label=f"{name}, law")
        axes["time"].plot(SHOWN, found[:, i], "--", color=color, label=f"{name}, neural ODE")
        axes["time"].plot(FITTED, data[:, i], ".", color=color, ms=4, label=f"{name}, data")
    axes["time"].set(xlabel="time (s)", ylabel="y")
    axes["time"].legend(ncols=2, fontsize="small")
    fitted = FITTED[-1] >= SHOWN
    axes["plane"].plot(*true.T, color="0.8", lw=5, label="law")
    axes["plane"].plot(*found[fitted].T, "tab:green", label="neural ODE, fitted")
    axes["plane"].plot(*found[~fitted].T, "--", color="tab:red", label="neural ODE, later")
    axes["plane"].set(xlabel="$y_1$", ylabel="$y_2$", aspect="equal")
    axes["plane"].legend(fontsize="small", loc="lower center", bbox_to_anchor=(0.5, 1.0))
    axes["loss"].semilogy(1 + np.arange(len(losses)), losses, "k", lw=0.8, label="of the fitted horizon")
    axes["loss"].set(xlabel="step", ylabel="mean square of the error")
    axes["loss"].legend(fontsize="small")
    figure.savefig(out, format="png", dpi=120)


def main() -> None:
    options = command_line.parse(
        "Learn the law of a spiral with a neural ODE; print its error and draw the path.",
        out="spiral.png",
        seed="of the noise and of the first weights",
        steps=3000,
    )
    start = time.perf_counter()
    true = law(SHOWN)
    rng = np.random.default_rng(options.seed)
    data = law(FITTED) + NOISE * rng.normal(size=(len(FITTED), 2)).astype(np.float32)
    print(fl.pformat(network()), flush=True)
    result = train(jnp.asarray(data), options.steps, options.seed)
    later = fl.NeuralODE(network(), t1=SHOWN[-1], saveat=SHOWN.tolist())
    found = np.asarray(later(START, result.ps, fl.initial_states(jax.random.key(0), later))[0])
    plot(data, true, found, result.losses, options.out)
    fitted = FITTED[-1] >= SHOWN
    errors = [float(np.sqrt(np.mean((found - true)[part] ** 2))) for part in (fitted, ~fitted)]
    text = f"{errors[0]:.3f} in the fitted time and {errors[1]:.3f} later"
    print(
        f"\nErrors of {text} with {len(result.ps)} parameters in one vector, "
        f"after {time.perf_counter() - start:.1f} s\nThe picture is in {options.out}"
    )
    if not max(errors) <= REQUIRED:
        sys.exit(f"expected errors of at most {REQUIRED}, found {text}")


if __name__ == "__main__":
    main()
