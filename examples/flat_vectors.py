"""Flat vectors: an epidemic, whose parameters are one vector with names.

An epidemic of susceptible, infected and recovered has three parameters and a state of three numbers. Both are
a `ComponentVector`, which diffrax takes as it is. The rates are found again from noisy daily counts by Adam,
while a mask holds the third parameter where it is. Then come the Jacobian of the state on day 40 with names
for its rows and columns, compared with finite differences, and how the infected of each day depend on each
parameter.

The script prints the layout, the rates and the Jacobian, and draws a picture. If a rate is off by more than
3 %, or the Jacobian by more than 1 % of its largest number, the exit code is 1. It takes about 20 seconds on
two cores.
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


DAYS = np.linspace(0.0, 120.0, 121)
DAY = 40
TRUE = {"infection": 0.4, "recovery": 0.1, "patients": 0.001}  # per day, per day, a share of the population
GUESS = {"infection": 0.6, "recovery": 0.2, "patients": 0.001}
NOISE = 0.01
STATE = fl.Layout({"susceptible": (), "infected": (), "recovered": ()})
REQUIRED, REQUIRED_JACOBIAN = 0.03, 0.01


def epidemic(rates: Any) -> Any:
    """The shares of the population on each day: a vector whose views have the days as leading axis."""

    def field(t: Any, y: Any, rates: Any) -> Any:
        new, healed = rates.infection * y.susceptible * y.infected, rates.recovery * y.infected
        return y.replace(susceptible=-new, infected=new - healed, recovered=healed)

    patients = rates.patients
    y0 = fl.ComponentVector.of(
        {"susceptible": 1 - patients, "infected": patients, "recovered": 0 * patients}, STATE
    )
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(field),
        diffrax.Tsit5(),
        t0=DAYS[0],
        t1=DAYS[-1],
        dt0=None,
        y0=y0,
        args=rates,
        saveat=diffrax.SaveAt(ts=jnp.asarray(DAYS)),
        stepsize_controller=diffrax.PIDController(rtol=1e-6, atol=1e-8),
        max_steps=512,
        throw=False,
    )
    return solution.ys


def fit(counts: Any, steps: int) -> fl.TrainResult:
    """The rates after Adam on the log of the vector; the patients at the start are known."""
    log_rates = fl.ComponentVector.of(GUESS).map(jnp.log)
    free = log_rates.layout.mask("infection", "recovery")

    def loss(log_rates: Any, st: Any, batch: Any) -> tuple[Any, Any]:
        held = fl.ComponentVector(
            jnp.where(free, log_rates.data, jax.lax.stop_gradient(log_rates.data)), log_rates.layout
        )
        return jnp.mean((epidemic(held.map(jnp.exp)).infected - counts) ** 2), st

    optimizer = optax.adam(optax.cosine_decay_schedule(0.05, steps))
    return fl.train_loop(loss, log_rates, {}, optimizer, steps=steps, chunk=50)


def differences(rates: fl.ComponentVector, h: float = 1e-2) -> np.ndarray:
    """The Jacobian of the state on a day by finite differences, each parameter by a share of `h`."""
    columns, solve = [], jax.jit(epidemic)
    for i, size in enumerate(np.asarray(rates) * h):
        up, down = (solve(rates.at[i].add(sign * size)).data[DAY] for sign in (1, -1))
        columns.append((up - down) / (2 * size))
    return np.stack(columns, axis=-1)


def plot(rates: Any, counts: np.ndarray, sensitivity: Any, jacobian: Any, out: Path) -> None:
    figure = Figure(figsize=(13, 4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    ys = epidemic(rates)
    for name in ys.layout.names:
        left.plot(DAYS, ys[name], label=name)
    left.plot(DAYS, counts, "k.", ms=3, label="infected, counted")
    left.set(title="An epidemic", xlabel="time (days)", ylabel="share of the population")
    for name in rates.layout.names:
        middle.plot(DAYS, rates[name] * sensitivity[name], label=name)
    middle.set(title="What the infected depend on", xlabel="time (days)")
    middle.set_ylabel("d infected / d log parameter")
    left.legend(fontsize="small")
    middle.legend(fontsize="small")
    scaled = np.asarray(jacobian.data * rates.data)
    most = np.abs(scaled).max()
    image = right.imshow(scaled, cmap="RdBu_r", vmin=-most, vmax=most)
    right.set_xticks(range(3), jacobian.cols.labels())
    right.set_yticks(range(3), jacobian.rows.labels())
    right.set(title=f"Jacobian of day {DAY}", xlabel="parameter", ylabel="share")
    figure.colorbar(image, label="d share / d log parameter")
    figure.savefig(out, format="png", dpi=110)


def main() -> None:
    options = command_line.parse(
        "Fit the rates of an epidemic, which are one vector with names; print and draw what depends on them.",
        out="flat_vectors.png",
        seed="of the noise",
        steps=300,
    )
    start = time.perf_counter()
    true = fl.ComponentVector.of(TRUE)
    for path, slot in true.layout.slots():
        print(f"{path:10} at {slot.offset}, shape {slot.shape}")
    rng = np.random.default_rng(options.seed)
    exact = np.asarray(epidemic(true).infected)
    counts = exact + NOISE * rng.normal(size=len(DAYS)).astype(np.float32)
    rates = fit(jnp.asarray(counts), options.steps).ps.map(jnp.exp)
    print(f"\n{rates}")
    jacobian: Any = fl.jacobian(lambda rates: fl.ComponentVector(epidemic(rates).data[DAY], STATE))(rates)
    for name in STATE.names:
        row = "  ".join(f"{other} {jacobian[name, other]:8.3f}" for other in TRUE)
        print(f"d {name:11} / d  {row}")
    sensitivity = fl.jacobian(lambda rates: epidemic(rates).infected)(rates)
    plot(rates, counts, sensitivity, jacobian, options.out)
    expected = differences(rates)
    off = float(np.abs(jacobian.data - expected).max() / np.abs(expected).max())
    errors = {name: abs(float(rates[name]) / value - 1) for name, value in TRUE.items()}
    worst = max(errors.values())
    print(
        f"\nRates off by {worst:.2%}, the Jacobian by {off:.2%} of its largest number, "
        f"after {time.perf_counter() - start:.1f} s\nThe picture is in {options.out}"
    )
    if not (worst <= REQUIRED and off <= REQUIRED_JACOBIAN):
        sys.exit(
            f"expected rates off by at most {REQUIRED:.0%} and a Jacobian by {REQUIRED_JACOBIAN:.0%}, found "
            f"{worst:.2%} and {off:.2%}"
        )


if __name__ == "__main__":
    main()
