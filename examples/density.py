"""A density from samples: two moons, flowed from a normal distribution.

A continuous normalizing flow (Grathwohl et al., 2019) moves the points of a normal distribution along a
learned field, until they lie where the samples are. Along each path the change of the log density is the
integral of the trace of the field's Jacobian, exact here, so that the flow is trained by the likelihood of
the samples. The field depends on time; the kinetic and the Jacobian term of Finlay et al. (2020) in the loss
keep the paths simple, and the steps of the solver few. The data of the training loop are keys, one for each
step of Adam, with which the loss draws new samples.

The script prints the model, the integral of the density over a grid and the mean log density of new samples,
next to that of the normal distribution of their mean and covariance, and draws a picture. If the integral is
not 1 within 1 %, or the normal distribution is the better one, the exit code is 1. It takes less than a
minute on two cores.
"""

import sys
import time
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


BATCH = 256
KINETIC, JACOBIAN = 0.01, 0.001  # weights of the regularizers in the loss
EDGE, POINTS = 4.0, 161  # of the grid, -EDGE to EDGE with POINTS along a side
REQUIRED = 0.01  # of the integral
COARSE = diffrax.PIDController(rtol=1e-3, atol=1e-4)
FINE = diffrax.PIDController(rtol=1e-5, atol=1e-6)


class InTime(fl.Wrapper):
    """A network of `(t, z)` as one array: the time is a feature more."""

    network: fl.Layer

    def forward(self, x: Any, ps: Any, st: Any) -> tuple[Any, Any]:
        t, z = x
        return self.network(jnp.concatenate([z, jnp.broadcast_to(t, (*z.shape[:-1], 1))], -1), ps, st)


def two_moons(key: jax.Array, count: int) -> jax.Array:
    """Samples of two half circles, blurred, with mean 0 and about variance 1: of shape `(count, 2)`."""
    angle_key, side_key, noise_key = jax.random.split(key, 3)
    angle = jax.random.uniform(angle_key, (count,), maxval=jnp.pi)
    side = jax.random.rademacher(side_key, (count,), float)
    arcs = jnp.stack([jnp.cos(angle) - 0.5, jnp.sin(angle) - 0.25], -1) * side[:, None]
    return (arcs + 0.1 * jax.random.normal(noise_key, arcs.shape)) / jnp.array([0.87, 0.5])


def train(flow: fl.FFJORD, steps: int, key: jax.Array) -> fl.TrainResult:
    """Adam on the likelihood of new samples at each step."""
    setup_key, samples_key = jax.random.split(key)
    ps, st = fl.setup(setup_key, flow)

    def loss(ps: Any, st: Any, key: jax.Array) -> tuple[Any, Any]:
        log_density, st = flow(two_moons(key, BATCH), ps, st)
        mean, stats = jnp.mean(log_density), st.stats
        value = KINETIC * stats.kinetic + JACOBIAN * stats.jacobian - mean
        return value, (st, {"log_density": mean, "solver_steps": stats.num_steps})

    optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, steps))
    keys = iter(jax.random.split(samples_key, steps))
    return fl.train_loop(loss, ps, st, optimizer, keys, steps=steps)


def grid() -> tuple[np.ndarray, float]:
    """Points `(POINTS, POINTS, 2)`, and the area of each."""
    line, width = np.linspace(-EDGE, EDGE, POINTS, retstep=True)
    return np.stack(np.meshgrid(line, line), -1), float(width) ** 2


def normal_log_density(x: np.ndarray) -> float:
    """The mean log density of the normal distribution of the samples' own mean and covariance."""
    return float(-np.log(2 * np.pi * np.e) - np.linalg.slogdet(np.cov(x.T))[1] / 2)


def plot(samples: dict[str, np.ndarray], density: np.ndarray, out: Path) -> None:
    figure = Figure(figsize=(12, 4.3), layout="constrained")
    axes = figure.subplots(1, 3, sharex=True, sharey=True)
    for axis, (title, x) in zip(axes, samples.items(), strict=False):
        axis.scatter(*x.T, s=1, color="k")
        axis.set(title=title)
    points, _ = grid()
    image = axes[2].pcolormesh(points[..., 0], points[..., 1], density, cmap="magma")
    figure.colorbar(image, ax=axes[2], label="density")
    axes[2].set(title="density of the flow")
    for axis in axes:
        axis.set(xlabel="$x_1$", ylabel="$x_2$", xlim=(-2.5, 2.5), ylim=(-2.5, 2.5), aspect="equal")
        axis.label_outer()
    figure.savefig(out, format="png", dpi=150)


def main(argv: list[str] | None = None) -> int:
    options = command_line.parse(
        "Learn the density of two moons with a continuous normalizing flow; print its integral "
        "and the log density of new samples, and draw both.",
        out="density.png",
        seed="of the first weights and of the samples",
        argv=argv,
    )
    start = time.perf_counter()
    train_key, test_key, sample_key = jax.random.split(jax.random.key(options.seed), 3)
    model = InTime(fl.MLP(3, (48, 48), 2))
    flow = fl.FFJORD(model, with_time=True, regularize=True, stepsize_controller=COARSE)
    print(fl.pformat(flow), flush=True)
    ps = train(flow, options.steps, train_key).ps

    fine = fl.FFJORD(model, with_time=True, stepsize_controller=FINE)
    st = fl.initial_states(train_key, fine)
    points, area = grid()
    log_density = jax.jit(lambda x: fine(x, ps, st)[0])
    density = np.exp(log_density(jnp.asarray(points)))
    integral = float(density.sum() * area)
    moons = np.asarray(two_moons(test_key, 5000))
    found, normal = float(np.mean(log_density(moons))), normal_log_density(moons)
    samples, _ = fine.sample(sample_key, moons.shape, ps, st)
    plot(
        {"new samples of two moons": moons, "samples of the flow": np.asarray(samples)}, density, options.out
    )
    print(
        f"An integral of {integral:.4f} over the grid. The mean log density of new samples is {found:.3f} by "
        f"the flow, {normal:.3f} by a normal distribution.\n{len(ps)} parameters in one vector, after "
        f"{time.perf_counter() - start:.1f} s. The picture is in {options.out}"
    )
    if abs(integral - 1) <= REQUIRED and found > normal:
        return 0
    print(f"expected an integral of 1 within {REQUIRED:.0%}, and a log density above the normal's")
    return 1


if __name__ == "__main__":
    sys.exit(main())
