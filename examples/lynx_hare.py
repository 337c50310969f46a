"""Hare and lynx: one table of pelts, three models, the parameters of each in one flat vector.

The hare and lynx pelts of the Hudson's Bay Company, 1900 to 1920, are fitted in log space by

- Lotka-Volterra: growth, predation, decay and conversion are four constants;
- a neural ODE: the whole right-hand side is a network;
- a universal differential equation (UDE): growth and decay as in Lotka-Volterra, while predation and
  conversion come from a network that sees both populations. Its rates and its weights are one vector.

All three are treated alike. The populations of 1900 are parameters too. Adam steps while the fitted horizon
grows year by year, which keeps it from settling on a flat line; L-BFGS finishes, by the same training loop.
A ridge on the weights keeps the networks smooth; with all weights zero the UDE is Lotka-Volterra. The
years from 1915 on are held out: nothing that is fitted or scaled sees them.

The closer fit is not the better forecast. The networks follow the fitted years far more closely than
Lotka-Volterra, and forecast the next ones less well. Those years have one trough of the hares, and the
networks repeat it; the next trough was deeper. Lotka-Volterra cannot follow the shallow one, and so comes
nearer to the deep one. A part of the fitted years, kept for validation, would not have warned: there the
networks with a weak ridge forecast better than Lotka-Volterra, and better than with a strong one. One cycle
does not say how the next will differ; that takes more cycles, or more knowledge in the equations.

The script prints the models and a table (parameters, error on the fitted and on the held-out years, time),
and draws a figure.
An error is a root mean square in log space: 0.1 is about 10 % of the pelts. It takes 30 to 40 seconds
on two cores.
"""

import dataclasses
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import command_line
import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

import flatlayers as fl


DATA = Path(__file__).parent / "data" / "lynx_hare.csv"
FIRST_HELD_OUT = 1915
FINISH = 300  # steps of L-BFGS
RIDGE = 1e-3
CONTROLLER = diffrax.PIDController(rtol=1e-5, atol=1e-6)
MAX_STEPS = 1000  # of a solve
LOG_RATE = -0.5  # the start of every rate, per year


class Pelts(NamedTuple):
    """`log_pelts` has a row per year, hare and lynx, relative to the `typical` pelts of a fitted year."""

    year: np.ndarray
    log_pelts: np.ndarray
    typical: np.ndarray
    fitted: int

    @staticmethod
    def load() -> "Pelts":
        year, *pelts = np.loadtxt(DATA, delimiter=",", skiprows=1, unpack=True)
        log_pelts = np.log(np.stack(pelts, axis=-1))
        fitted = int(np.sum(year < FIRST_HELD_OUT))
        # In these units populations and rates are of order one.
        center = log_pelts[:fitted].mean(axis=0)
        return Pelts(year, (log_pelts - center).astype(np.float32), np.exp(center), fitted)

    @property
    def time(self) -> np.ndarray:
        return self.year - self.year[0]


class Model(NamedTuple):
    """A vector to fit, and `predict(ps, times)`: the log populations at `times`."""

    name: str
    ps: fl.ComponentVector
    predict: Callable[[fl.ComponentVector, np.ndarray], jax.Array]
    ridge: np.ndarray  # the places in the vector that are kept small
    text: str = ""


def solve(field: Callable[..., Any], z0: Any, args: Any, times: np.ndarray) -> Any:
    """`dz/dt = field(t, z, args)` from `z0`, at `times`."""
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(field),
        diffrax.Tsit5(),
        t0=times[0],
        t1=times[-1],
        dt0=None,
        y0=z0,
        args=args,
        saveat=diffrax.SaveAt(ts=jnp.asarray(times, z0.dtype)),
        stepsize_controller=CONTROLLER,
        max_steps=MAX_STEPS,
        throw=False,  # a failed solve gives infinite populations, which are found at the end
    )
    return solution.ys


def lotka_volterra(z0: np.ndarray) -> Model:
    log_rates = dict.fromkeys(("growth", "predation", "decay", "conversion"), LOG_RATE)
    ps = fl.ComponentVector.of({"initial": z0, "log_rates": log_rates})

    def field(t: Any, z: Any, rates: Any) -> Any:
        hare, lynx = jnp.exp(z)
        return jnp.stack([rates.growth - rates.predation * lynx, rates.conversion * hare - rates.decay])

    def predict(ps: fl.ComponentVector, times: np.ndarray) -> Any:
        return solve(field, ps.initial, ps.log_rates.map(jnp.exp).unpack(), times)

    return Model("Lotka-Volterra", ps, predict, np.zeros(len(ps), bool))


def neural_ode(z0: np.ndarray, key: jax.Array) -> Model:
    network = fl.Chain(fl.Dense(2, 16, jnp.tanh), fl.Dense(16, 2))
    ode = fl.NeuralODE(network, stepsize_controller=CONTROLLER, max_steps=MAX_STEPS, throw=False)
    model = {"initial": fl.Param((2,), fl.initializers.from_array(z0)), "ode": ode}
    ps, st = fl.setup(key, model)

    def predict(ps: fl.ComponentVector, times: np.ndarray) -> Any:
        saving = dataclasses.replace(ode, t0=times[0], t1=times[-1], saveat=times)
        return saving(ps.initial, ps.ode, st.ode)[0]

    return Model("neural ODE", ps, predict, ps.layout.mask("*.weight"), fl.pformat(model))


def universal(z0: np.ndarray, key: jax.Array) -> Model:
    log_rate = fl.Param((), fl.initializers.constant(LOG_RATE))
    network = fl.Chain(fl.Dense(2, 16, jnp.tanh), fl.Dense(16, 2, jax.nn.softplus))
    model = {
        "initial": fl.Param((2,), fl.initializers.from_array(z0)),
        "log_rates": {"growth": log_rate, "decay": log_rate},
        "interaction": network,
    }
    ps, st = fl.setup(key, model)

    def field(t: Any, z: Any, ps: Any) -> Any:
        hare, lynx = jnp.exp(z)
        growth, decay = jnp.exp(ps.log_rates.growth), jnp.exp(ps.log_rates.decay)
        (predation, conversion), _ = network(z, ps.interaction, st.interaction)
        return jnp.stack([growth - predation * lynx, conversion * hare - decay])

    def predict(ps: fl.ComponentVector, times: np.ndarray) -> Any:
        parts = ps.unpack()
        return solve(field, parts.initial, parts, times)

    return Model("UDE", ps, predict, ps.layout.mask("*.weight"), fl.pformat(model))


def fit(model: Model, pelts: Pelts, steps: int) -> fl.ComponentVector:
    """Adam on a growing horizon, then L-BFGS on all years that are fitted. Both step the flat vector."""
    years, observed = pelts.time[: pelts.fitted], pelts.log_pelts[: pelts.fitted]

    def loss(ps: Any, st: Any, horizon: Any) -> tuple[Any, Any]:
        weight = jnp.clip(horizon - years, 0.0, 1.0)
        error = jnp.mean((model.predict(ps, years) - observed) ** 2, axis=-1)
        return jnp.sum(weight * error) / jnp.sum(weight) + RIDGE * jnp.sum(ps[model.ridge] ** 2), st

    last = years[-1] + 1
    growing = np.clip(np.linspace(3, 2 * last - 3, steps), 3, last)
    adam, lbfgs = optax.adam(optax.cosine_decay_schedule(1e-2, steps)), optax.lbfgs(memory_size=20)
    first = fl.train_loop(loss, model.ps, {}, adam, iter(growing), steps=steps)
    return fl.train_loop(loss, first.ps, first.st, lbfgs, last, steps=FINISH).ps


class Fit(NamedTuple):
    """Result for a model: log populations along a `curve`, errors on the fitted and held-out years."""

    name: str
    ps: fl.ComponentVector
    curve: np.ndarray  # a row for every tenth of a year
    errors: tuple[float, float]
    seconds: float


def fit_and_compare(model: Model, pelts: Pelts, steps: int) -> Fit:
    start = time.perf_counter()
    try:
        ps = fit(model, pelts, steps)
    except fl.NonFiniteLossError:
        sys.exit(f"{model.name}: the fit failed, its loss is not finite; try another --seed")
    times = np.linspace(0.0, pelts.time[-1], 10 * (len(pelts.year) - 1) + 1)
    curve = np.asarray(jax.jit(lambda ps: model.predict(ps, times))(ps))
    if not np.isfinite(curve).all():
        sys.exit(f"{model.name}: the fit failed, its populations are not finite; try another --seed")
    squares = (curve[::10] - pelts.log_pelts) ** 2
    errors = squares[: pelts.fitted].mean() ** 0.5, squares[pelts.fitted :].mean() ** 0.5
    return Fit(model.name, ps, curve, errors, time.perf_counter() - start)


def report(fits: list[Fit], pelts: Pelts) -> str:
    hare, lynx = pelts.typical
    first, last, end = pelts.year[[0, pelts.fitted - 1, -1]].astype(int)
    lines = [f"Rates per year, at {hare:.1f} thousand hares and {lynx:.1f} thousand lynx:"]
    for fit in fits:
        if "log_rates" in fit.ps:
            rates = fit.ps.log_rates.map(jnp.exp).to_dict().items()
            lines += [f"{fit.name:14}  " + ", ".join(f"{name} {rate:.2f}" for name, rate in rates)]
    lines += [
        "",
        f"Errors of fit ({first}-{last}) and held out ({last + 1}-{end}) are root mean squares in log space,",
        "times are seconds and include compiling:",
        f"{'model':14}  parameters  fit error  held-out error   time",
    ]
    for fit in fits:
        fitted, held_out = fit.errors
        lines += [f"{fit.name:14}  {len(fit.ps):10}  {fitted:9.3f}  {held_out:14.3f}  {fit.seconds:5.1f}"]
    return "\n".join(lines)


def plot(fits: list[Fit], pelts: Pelts, out: Path) -> None:
    year, n = pelts.year, pelts.fitted
    figure = Figure(figsize=(9, 7), layout="constrained")
    axes = figure.subplots(2, 1, sharex=True)
    for i, (axis, species) in enumerate(zip(axes, ("hare", "lynx"), strict=True)):
        observed = np.exp(pelts.log_pelts[:, i]) * pelts.typical[i]
        axis.axvspan(FIRST_HELD_OUT - 0.5, year[-1] + 0.5, color="0.93")
        for fit, style in zip(fits, ("--", "-.", "-"), strict=True):
            curve = np.exp(fit.curve[:, i]) * pelts.typical[i]
            axis.plot(np.linspace(year[0], year[-1], len(curve)), curve, style, label=fit.name)
        axis.plot(year[:n], observed[:n], "ko", label="pelts, fitted")
        axis.plot(year[n:], observed[n:], "ko", mfc="white", label="pelts, held out")
        axis.set(ylabel=f"{species} (thousands of pelts per year)", ylim=(0, 1.4 * observed.max()))
    axes[0].set_title(f"Hare and lynx, fitted from {year[0]:.0f} to {year[n - 1]:.0f}; held out: shaded")
    axes[0].legend(ncols=5, loc="upper center")
    axes[1].set(xlabel="year", xlim=(year[0] - 0.5, year[-1] + 0.5), xticks=year[::2])
    figure.align_ylabels()
    figure.savefig(out, format="png", dpi=150)


def main() -> None:
    options = command_line.parse(
        "Fit hare and lynx pelts with Lotka-Volterra, a neural ODE and a universal differential "
        "equation; print a table of errors and draw the fits.",
        out="lynx_hare.png",
        seed="of the networks' first weights",
    )
    pelts = Pelts.load()
    z0, key = pelts.log_pelts[0], jax.random.key(options.seed)
    fits = []
    for model in (lotka_volterra(z0), neural_ode(z0, key), universal(z0, key)):
        print(f"{model.name}: {model.ps!r}\n{model.text}", flush=True)
        fits.append(fit_and_compare(model, pelts, options.steps))
    print(f"\n{report(fits, pelts)}")
    plot(fits, pelts, options.out)
    print(f"\nThe figure is in {options.out}")


if __name__ == "__main__":
    main()
