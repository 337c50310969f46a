"""Universal differential equation: a mechanism and a network in one vector, and what the network learned.

Prey and predators follow the equations of Rosenzweig and MacArthur (1963). Four rates are not known, and
neither is how much a predator eats of so many prey: a network takes that place. The data are 31 noisy
counts of three populations, made with the formula of Holling (1959), `a x / (1 + a h x)`. Rates and weights
are fitted together, by Adam through the solve. Then `x / g(x)` of the network is held against a straight
line, which it is if Holling was right: its intercept and slope give the two constants.

The script prints the model, the rates and the constants beside the true ones, and draws a picture. If one of
the six is off by more than 15 % the exit code is 1. It takes about 10 seconds on two cores.
"""

import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import command_line
import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

import flatlayers as fl


ATTACK, HANDLING = 1.5, 0.6  # 1 / year / thousands, years
RATES = {"growth": 1.0, "capacity": 3.0, "efficiency": 0.8, "death": 0.4}
TIMES = np.linspace(0.0, 15.0, 31)
STARTS = np.log([[2.5, 0.5], [0.5, 1.5], [0.3, 0.3]]).astype(np.float32)
NOISE = 0.05  # of a count, relative
REQUIRED = 0.15


class PredatorPrey(fl.Container):
    """The change of `(log prey, log predators)`, where a layer gives the attacks of a predator on a prey."""

    attack: fl.Layer

    def parameters(self) -> Mapping[str, Any]:
        log_rates = dict.fromkeys(RATES, fl.Param((), fl.initializers.zeros))
        return {**super().parameters(), "log_rates": log_rates}

    def forward(self, x: Any, ps: Any, st: Any) -> tuple[Any, Any]:
        prey, predators = jnp.exp(x[..., :1]), jnp.exp(x[..., 1:])
        attack, new = self.attack(prey, ps.attack, st.attack)
        growth, capacity, efficiency, death = (jnp.exp(ps.log_rates[name]) for name in RATES)
        dx = (growth * (1 - prey / capacity) - attack * predators, efficiency * attack * prey - death)
        return jnp.concatenate(dx, axis=-1), st.replace(attack=new)


def network() -> fl.Chain:
    return fl.Chain(fl.Dense(1, 16, jnp.tanh), fl.Dense(16, 1, jax.nn.softplus))


def observe(rng: np.random.Generator) -> np.ndarray:
    """The logarithms of the counts, of shape `(time, population, 2)`."""
    holling = fl.WrappedFunction(lambda x: ATTACK / (1 + ATTACK * HANDLING * x))
    node = fl.NeuralODE(PredatorPrey(holling), t1=TIMES[-1], saveat=TIMES.tolist())
    ps, st = fl.setup(jax.random.key(0), node)
    ps = ps.replace(log_rates={name: np.log(rate) for name, rate in RATES.items()})
    exact = np.asarray(node(STARTS, ps, st)[0])
    return exact + NOISE * rng.normal(size=exact.shape).astype(np.float32)


def horizons(steps: int) -> Iterator[np.float32]:
    """The horizon that counts in each step."""
    yield from np.clip(np.linspace(3.0, 29.0, steps), 3.0, 16.0).astype(np.float32)


def train(node: fl.NeuralODE, data: Any, steps: int, seed: int) -> fl.TrainResult:
    ps, st = fl.setup(jax.random.key(seed), node)

    def loss(ps: Any, st: Any, horizon: Any) -> tuple[Any, Any]:
        found, st = node(STARTS, ps, st)
        weight = jnp.clip(horizon - TIMES, 0.0, 1.0)[:, None, None]
        return jnp.sum(weight * (found - data) ** 2) / (6 * jnp.sum(weight)), st

    optimizer = optax.adam(optax.cosine_decay_schedule(2e-2, steps))
    return fl.train_loop(loss, ps, st, optimizer, horizons(steps), steps=steps)


def eaten(ps: Any, prey: Any) -> np.ndarray:
    """Prey that a predator eats per year, by the network."""
    attack, _ = network()(
        jnp.asarray(prey)[:, None], ps.attack, fl.initial_states(jax.random.key(0), network())
    )
    return np.asarray(prey * attack[:, 0])


def plot(data: np.ndarray, ps: Any, curve: np.ndarray, line: tuple[float, float], out: Path) -> None:
    figure = Figure(figsize=(13, 4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    grid = np.linspace(TIMES[0], TIMES[-1], len(curve))
    for i, (species, color) in enumerate((("prey", "tab:blue"), ("predators", "tab:orange"))):
        left.plot(grid, np.exp(curve[:, 0, i]), color=color, label=f"{species}, fit")
        left.plot(TIMES, np.exp(data[:, 0, i]), ".", color=color, label=f"{species}, counts")
    left.set(title="One of three populations", xlabel="time (years)", ylabel="thousands")
    prey = np.linspace(0.02, 4.0, 200, dtype=np.float32)
    seen = np.exp(data[..., 0]).ravel()
    inside = prey < seen.max()
    middle.plot(prey, ATTACK * prey / (1 + ATTACK * HANDLING * prey), color="0.8", lw=5, label="truth")
    middle.plot(prey, eaten(ps, prey), label="network")
    middle.plot(seen, 0 * seen, "k|", ms=10, label="prey in the data")
    middle.set(title="The unknown term", xlabel="prey x (thousands)", ylabel="g(x), eaten per year")
    right.plot(prey, 1 / ATTACK + HANDLING * prey, color="0.8", lw=5, label="truth")
    right.plot(prey[inside], (prey / eaten(ps, prey))[inside], label="network")
    right.plot(prey, 1 / line[0] + line[1] * prey, "k--", lw=1, label="straight line")
    right.set(title="The same as a line", xlabel="prey x (thousands)", ylabel="x / g(x) (years)")
    for axis in (left, middle, right):
        axis.legend(fontsize="small")
    figure.savefig(out, format="png", dpi=110)


def main() -> None:
    options = command_line.parse(
        "Fit the rates of prey and predators together with a network for what is eaten; print and draw what "
        "was learned.",
        out="universal_ode.png",
        seed="of the noise and of the first weights",
        steps=1500,
    )
    start = time.perf_counter()
    data = observe(np.random.default_rng(options.seed))
    node = fl.NeuralODE(PredatorPrey(network()), t1=TIMES[-1], saveat=TIMES.tolist(), throw=False)
    print(fl.pformat(node), flush=True)
    result = train(node, jnp.asarray(data), options.steps, options.seed)
    ps = result.ps
    prey = np.linspace(0.02, np.exp(data[..., 0]).max(), 200, dtype=np.float32)
    slope, intercept = np.polyfit(prey, prey / eaten(ps, prey), 1)
    line = (1 / float(intercept), float(slope))
    found = {name: float(jnp.exp(ps.log_rates[name])) for name in RATES}
    found |= {"attack": line[0], "handling": line[1]}
    true = {**RATES, "attack": ATTACK, "handling": HANDLING}
    fine = np.linspace(TIMES[0], TIMES[-1], 151)
    smooth = fl.NeuralODE(node.model, t1=fine[-1], saveat=fine.tolist(), throw=False)
    plot(data, ps, np.asarray(smooth(STARTS, ps, result.st)[0]), line, options.out)
    print()
    for name, value in true.items():
        print(f"{name:10}  true {value:.2f}  found {found[name]:.2f}")
    worst = max(abs(found[name] / value - 1) for name, value in true.items())
    print(
        f"Off by {worst:.0%} at most, with {len(ps)} parameters in one vector, "
        f"after {time.perf_counter() - start:.1f} s\nThe picture is in {options.out}"
    )
    if not worst <= REQUIRED:
        sys.exit(f"expected all to be within {REQUIRED:.0%}, found {worst:.0%}")


if __name__ == "__main__":
    main()
