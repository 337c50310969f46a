"""Neural ODE: the law of 256 nonlinear oscillators, learned from their paths alone.

The paths follow `x' = y / (1 + y)`, `y' = -x / (1 + x)` from random starts: deformed circles. A network with
two hidden layers of 64, in a `NeuralODE`, is fitted to them as in the example "Neural ODE" of diffrax: in a
first phase to the first tenth of the time alone, which keeps it from settling on a flat line, and in a second
one to all of it, by AdaBelief on batches of 32. A batch is solved as one system, and 100 steps on the flat
vector are one compiled scan.

The script prints the model and the loss of both phases (the mean square of the error, on all 256 oscillators
and on 256 others), and draws a picture. With a loss above 0.004 after the second phase the exit code is 1. It
takes 15 to 25 seconds on two cores.
"""

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import command_line
import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

import flatlayers as fl


OSCILLATORS = 256
TIMES = np.linspace(0.0, 10.0, 100)
PHASES = {0.1: 1e-2, 1.0: 5e-3}  # how much of the time is fitted, and the learning rate
BATCH = 32
REQUIRED = 0.004  # mean square of the error


def law(y: Any) -> Any:
    """The law to be learned."""
    x = y / (1 + y)
    return jnp.stack([x[..., 1], -x[..., 0]], axis=-1)


def draw(key: jax.Array) -> jax.Array:
    """Paths from random starts, of shape `(time, oscillator, 2)`."""
    start = jax.random.uniform(key, (OSCILLATORS, 2), minval=-0.6, maxval=1.0)
    solve = fl.NeuralODE(
        fl.WrappedFunction(law),
        t1=TIMES[-1],
        saveat=TIMES.tolist(),
        dt0=0.02,
        stepsize_controller=diffrax.ConstantStepSize(),
    )
    return solve(start, *fl.setup(key, solve))[0]


def neural_ode(part: float = 1.0) -> fl.NeuralODE:
    """The model, solved for the first part of the time."""
    times = TIMES[: int(part * len(TIMES))]
    return fl.NeuralODE(
        fl.MLP(2, (64, 64), 2),
        t1=times[-1],
        saveat=times.tolist(),
        stepsize_controller=diffrax.PIDController(rtol=1e-3, atol=1e-6),
    )


def error(ode: fl.NeuralODE, ps: Any, st: Any, paths: Any) -> tuple[Any, Any]:
    """The mean square of the error for paths of shape `(time, oscillator, 2)`, and the new state."""
    predicted, st = ode(paths[0], ps, st)
    return jnp.mean((predicted - paths[: len(predicted)]) ** 2), st


def batches(seed: int) -> Iterator[np.ndarray]:
    """The oscillators of a batch, without end: each once in `OSCILLATORS / BATCH` batches."""
    rng = np.random.default_rng(seed)
    while True:
        yield from rng.permutation(OSCILLATORS).reshape(-1, BATCH)


def train(paths: jax.Array, steps: int, seed: int) -> tuple[Any, Any, list[np.ndarray]]:
    """The vector and the state after `steps` in each phase, and the losses of the batches."""
    ps, st = fl.setup(jax.random.key(seed), neural_ode())
    losses = []
    for phase, (part, rate) in enumerate(PHASES.items()):
        ode = neural_ode(part)

        def loss(ps: Any, st: Any, batch: Any, ode: fl.NeuralODE = ode) -> tuple[Any, Any]:
            return error(ode, ps, st, paths[:, batch])

        # Without a warm-up, the first steps of AdaBelief undo what the phase before has learned.
        schedule = optax.warmup_cosine_decay_schedule(0.0, rate, steps // 10, steps, rate / 10)
        optimizer = optax.adabelief(schedule)
        result = fl.train_loop(loss, ps, st, optimizer, batches(seed + phase), steps=steps)
        ps, st = result.ps, result.st
        losses.append(result.losses)
    return ps, st, losses


def plot(paths: np.ndarray, predicted: np.ndarray, losses: list[np.ndarray], out: Path) -> None:
    figure = Figure(figsize=(10, 6.5), layout="constrained")
    axes = figure.subplot_mosaic([["x", "x", "plane"], ["y", "y", "loss"]])
    colors = ("tab:blue", "tab:orange", "tab:green")
    for i, color in enumerate(colors):
        for name, path, model in zip("xy", paths[:, i].T, predicted[:, i].T, strict=True):
            axes[name].plot(TIMES, path, color=color, lw=4, alpha=0.35, label=f"path {i + 1}")
            axes[name].plot(TIMES, model, "--", color=color, label=f"neural ODE {i + 1}")
        axes["plane"].plot(*paths[:, i].T, color=color, lw=4, alpha=0.35)
        axes["plane"].plot(*predicted[:, i].T, "--", color=color)
    axes["x"].set(title="Three oscillators that were not fitted", ylabel="x")
    low, high = axes["x"].get_ylim()
    axes["x"].set_ylim(low - 0.3 * (high - low), high)
    axes["x"].legend(ncols=3, fontsize="small", loc="lower center")
    axes["y"].set(xlabel="time", ylabel="y")
    axes["plane"].set(title="The same in the plane", xlabel="x", ylabel="y", aspect="equal")
    start = 0
    for values, part in zip(losses, PHASES, strict=True):
        label = f"{part:.0%} of the time"
        axes["loss"].semilogy(start + np.arange(len(values)), values, lw=0.8, label=label)
        start += len(values)
    axes["loss"].axhline(REQUIRED, color="0.5", ls=":", label="required in the end")
    axes["loss"].set(title="Training", xlabel="step", ylabel="mean square of the error")
    axes["loss"].legend(fontsize="x-small", loc="upper right")
    figure.savefig(out, format="png", dpi=150)


def main() -> None:
    options = command_line.parse(
        "Learn the law of oscillators with a neural ODE; print the error and draw the paths.",
        out="oscillators.png",
        seed="of oscillators, weights and batches",
        steps=500,
        steps_of="steps of AdaBelief in each of two phases",
    )
    start = time.perf_counter()
    model = neural_ode()
    print(fl.pformat(model), flush=True)
    paths, others = (draw(key) for key in jax.random.split(jax.random.key(options.seed)))
    ps, st, losses = train(paths, options.steps, options.seed)
    final, unseen = (float(error(model, ps, st, each)[0]) for each in (paths, others))
    plot(np.asarray(others), np.asarray(model(others[0], ps, st)[0]), losses, options.out)
    print(
        f"\nThe loss is {np.mean(losses[0][-OSCILLATORS // BATCH :]):.1e} after the first phase, {final:.1e} "
        f"after the second, and {unseen:.1e} on other oscillators,\n"
        f"with {len(ps)} parameters in one vector, after {time.perf_counter() - start:.1f} s\n"
        f"The picture is in {options.out}"
    )
    if not final <= REQUIRED:
        sys.exit(f"expected a loss of at most {REQUIRED} after the second phase, found {final:.2g}")


if __name__ == "__main__":
    main()
