"""An ensemble: ten neural ODEs for hare and lynx, over all devices, and a band where they disagree.

The pelts of the Hudson's Bay Company, 1900 to 1914, are fitted in log space by ten networks that differ in
their first weights alone; the populations of 1900 are parameters too. `fl.setup` with ten keys makes one
vector of shape `(10, n)`, `jax.vmap` a function that trains all ten out of one that trains a model, and
`jax.shard_map` gives each device its share of them. So there is one compiled program for all, in which no
device waits for another: each takes its own steps of the solver, and none sends anything.

The script prints the errors of the mean of the ensemble on the fitted years and on the six that are held out,
and the spread of its members there and in the years until 1935, and draws a picture: the mean, the band from
the lowest but one to the highest but one, and the members. If the spread after 1920 is not at least three
times that on the fitted years, the exit code is 1. It says how much of the forecast comes from the first
weights. It does not know of noise in the pelts, nor of what all networks have in common: the six years that
are held out are further from the mean than the members are.

On a CPU, `XLA_FLAGS=--xla_force_host_platform_device_count=2` makes two devices of its cores.
"""

import dataclasses
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import command_line
import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, PartitionSpec
from matplotlib.figure import Figure

import flatlayers as fl


YEAR, *PELTS = np.loadtxt(Path(__file__).parent / "data" / "lynx_hare.csv", delimiter=",", skiprows=1).T
TIME, LOG = YEAR - YEAR[0], np.log(np.stack(PELTS, axis=-1))
FITTED = YEAR < 1915
TYPICAL = LOG[FITTED].mean(axis=0)
DATA = (LOG - TYPICAL).astype(np.float32)
MEMBERS = 10
FORECAST = 35.0  # years after 1900
RIDGE = 1e-5
REQUIRED = 3.0  # times as large is the spread after 1920

ODE = fl.NeuralODE(
    fl.Chain(
        # First weights that are far apart: small ones all learn much the same.
        fl.Dense(2, 16, jnp.tanh, init_weight=fl.initializers.glorot_uniform(gain=3.0)),
        fl.Dense(16, 2),
    ),
    solver=diffrax.Tsit5(),
    stepsize_controller=diffrax.PIDController(rtol=1e-4, atol=1e-5),
    max_steps=400,
    throw=False,  # a failed solve gives infinite populations, which are found at the end
)
MODEL = {"initial": fl.Param((2,), fl.initializers.from_array(DATA[0])), "ode": ODE}


def predict(ps: Any, st: Any, times: np.ndarray) -> jax.Array:
    """The log populations of one model at `times`."""
    ode = dataclasses.replace(ODE, t1=float(times[-1]), saveat=times)
    return ode(ps.initial, ps.ode, st.ode)[0]


def train(ps: Any, st: Any, steps: int) -> Any:
    """One model, by Adam: a horizon that grows year by year keeps it from settling on a flat line."""
    years, weights = TIME[FITTED], ps.layout.mask("*.weight")

    def loss(ps: Any, horizon: Any) -> jax.Array:
        weight = jnp.clip(horizon - years, 0.0, 1.0)
        error = jnp.mean((predict(ps, st, years) - DATA[FITTED]) ** 2, axis=-1)
        return jnp.sum(weight * error) / jnp.sum(weight) + RIDGE * jnp.sum(
            jnp.where(weights, ps.data, 0) ** 2
        )

    adam = optax.adam(optax.cosine_decay_schedule(2e-2, steps))

    def step(carry: Any, horizon: Any) -> Any:
        ps, state = carry
        value, gradient = jax.value_and_grad(loss)(ps, horizon)
        updates, state = adam.update(gradient, state)
        return (optax.apply_updates(ps, updates), state), value

    last = years[-1] + 1
    horizons = jnp.asarray(np.clip(np.linspace(3, 2 * last - 3, steps), 3, last), jnp.float32)
    (ps, _), losses = jax.lax.scan(step, (ps, adam.init(ps)), horizons)
    return ps, losses[-1]


def over_devices(function: Any, members: int) -> Any:
    """Map a function of one member over all of them, with as many on each device."""
    count = max(k for k in range(1, len(jax.devices()) + 1) if members % k == 0)
    mesh = Mesh(jax.devices()[:count], ("member",))
    spec = PartitionSpec("member")
    # Solves are not checked for what varies over devices: JAX does not know it of their loops.
    each = jax.shard_map(jax.vmap(function), mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    return jax.jit(each)


def spread(paths: np.ndarray) -> float:
    """The standard deviation over the members, as a root mean square over years and species."""
    return float(np.sqrt(paths.var(axis=0).mean()))


def plot(times: np.ndarray, paths: np.ndarray, out: Path) -> None:
    figure = Figure(figsize=(9, 7), layout="constrained")
    axes = figure.subplots(2, 1, sharex=True)
    _, low, *_, high, _ = np.sort(paths, axis=0)
    for i, (axis, species) in enumerate(zip(axes, ("hare", "lynx"), strict=True)):
        curves, year = (
            [np.exp(x[..., i] + TYPICAL[i]) for x in (paths, paths.mean(0), low, high)],
            YEAR[0] + times,
        )
        axis.axvspan(YEAR[FITTED][-1] + 0.5, YEAR[0] + FORECAST, color="0.93")
        axis.fill_between(year, *curves[2:], color="C0", alpha=0.3, lw=0, label="8 of 10 members")
        axis.plot(year, curves[0].T, "C0", lw=0.5, alpha=0.6)
        axis.plot(year, curves[1], "C0", lw=2.5, label="mean")
        axis.plot(YEAR[FITTED], PELTS[i][FITTED], "ko", label="pelts, fitted")
        axis.plot(YEAR[~FITTED], PELTS[i][~FITTED], "ko", mfc="white", label="pelts, held out")
        axis.set(ylabel=f"{species} (thousands of pelts per year)", ylim=(0, 1.6 * PELTS[i].max()))
    axes[0].set_title("Ten neural ODEs, fitted from 1900 to 1914; shaded: not seen")
    axes[0].legend(ncols=4, loc="upper center")
    axes[1].set(xlabel="year", xlim=(YEAR[0] - 0.5, YEAR[0] + FORECAST))
    figure.savefig(out, format="png", dpi=150)


def main() -> None:
    options = command_line.parse(
        "Train ten neural ODEs at once.", out="ensemble.png", seed="of the networks' first weights"
    )
    ps, st = fl.setup(jax.random.split(jax.random.key(options.seed), MEMBERS), MODEL)
    print(f"{ps!r}")
    start = time.perf_counter()
    ps, losses = over_devices(partial(train, steps=options.steps), MEMBERS)(ps, st)
    print(f"Losses {np.round(np.asarray(losses), 4)} in {time.perf_counter() - start:.0f} s")
    print(f"Each device has {ps.data.addressable_shards[0].data.shape[0]} of {MEMBERS} members")
    times = np.linspace(0.0, FORECAST, 10 * int(FORECAST) + 1)
    paths = np.asarray(over_devices(partial(predict, times=times), MEMBERS)(ps, st))
    if not np.isfinite(paths).all():
        sys.exit("a fit failed, its populations are not finite; try another --seed")
    yearly = paths[:, ::10]
    known, count = len(YEAR), int(FITTED.sum())
    error = yearly.mean(axis=0)[:known] - DATA
    errors = [np.sqrt(np.mean(error[years] ** 2)) for years in (FITTED, ~FITTED)]
    parts = (slice(count), slice(count, known), slice(known, None))
    inside, held_out, beyond = (spread(yearly[:, part]) for part in parts)
    print("Root mean squares in log space:    fitted  held out  until 1935")
    print(f"error of the mean of the ensemble  {errors[0]:6.3f}  {errors[1]:8.3f}")
    print(f"spread of its members              {inside:6.3f}  {held_out:8.3f}  {beyond:10.3f}")
    plot(times, paths, options.out)
    print(f"The picture is in {options.out}")
    if beyond < REQUIRED * inside:
        sys.exit(f"expected a spread {REQUIRED:g} times as large after 1920, found {beyond / inside:.1f}")


if __name__ == "__main__":
    main()
