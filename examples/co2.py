"""Carbon dioxide at Mauna Loa: rates between bounds and a network for the season, in one vector.

Monthly means since 1958 are fitted by a universal differential equation for what is above 280 ppm, the level
before industry: emissions that grow from year to year and an uptake in proportion, with three rates that are
declared with bounds, and a network that sees the time of the year. The network has a learning rate of its
own, and its weights alone decay, both by name. The years from 1992 on are held out.

The script prints the rates and the errors of the fit and of the forecast in ppm (root mean squares), beside
that of a line with two harmonics through the same years, and draws a picture. If the forecast is not better
than the line's, the exit code is 1. It is off by 2.3 ppm, the line by 3.8: emissions grew less from 1990 on.
A line through the last ten of the fitted years alone is off by 1.5. With the years from 1988, 1994 or 1996 on
held out (set `FITTED`), the equation is off by 1.5, 1.7 and 0.9. It takes about 12 seconds on two cores.
"""

from pathlib import Path

import command_line
import numpy as np
import optax
from jax import numpy as jnp, random
from matplotlib.figure import Figure

import flatlayers as fl


YEAR, MONTH, CO2 = np.loadtxt(Path(__file__).parent / "data" / "co2.csv", delimiter=",", skiprows=1).T
TIME, ABOVE, FITTED = YEAR + (MONTH - 0.5) / 12, CO2.astype("float32") - 280, YEAR < 1992


def rate(high):
    return fl.Param((1,), fl.initializers.constant(high / 5), bounds=(0, high))


@fl.compact(emission=rate(5), growth=rate(0.1), uptake=rate(0.1), season=fl.MLP(2, (16,), 1, jnp.tanh))
def change(m, x):
    wave = jnp.cos(2 * jnp.pi * (x[0] - jnp.array([0, 0.25])))
    return m.emission + m.growth * x[0] - m.uptake * x[1] + 10 * m.season(wave)


def main() -> None:
    options = command_line.parse("Fit CO2 at Mauna Loa.", out="co2.png", seed="of the network")
    ode = fl.NeuralODE(change, t0=0.2, t1=44, saveat=(TIME - 1958).tolist(), with_time=True)
    ps, st = fl.setup(random.key(options.seed), ode)

    def loss(ps, st, above):
        found, st = ode(ABOVE[:1], ps, st)
        return jnp.mean((found[:, 0] - above)[FITTED] ** 2), st

    by_name = ps.layout.values({"season": 0.01}, default=0.05)
    decay = ps.layout.values({"season.*.weight": 1e-3}, default=0)
    optimizer = optax.adamw(optax.cosine_decay_schedule(by_name, options.steps), weight_decay=decay)  # pyright: ignore[reportArgumentType]
    fit = fl.train_loop(loss, ps, st, optimizer, ABOVE, steps=options.steps)
    curve = np.asarray(ode(ABOVE[:1], fit.ps, fit.st)[0])[:, 0]
    terms = np.stack([TIME, *(f(k * np.pi * TIME) for k in (0, 2, 4) for f in (np.cos, np.sin))], axis=-1)
    line = terms @ np.linalg.lstsq(terms[FITTED], ABOVE[FITTED])[0]
    forecast, of_line = (np.mean((y - ABOVE)[~FITTED] ** 2) ** 0.5 for y in (curve, line))
    print({name: float(fl.constrained(ode, fit.ps)[name][0]) for name in ("emission", "growth", "uptake")})
    print(f"Fit {fit.losses[-1] ** 0.5:.2f} ppm, forecast {forecast:.2f} ppm, by the line {of_line:.2f} ppm")
    axis = Figure(figsize=(10, 5), layout="constrained").add_subplot(xlabel="year", ylabel="CO2 (ppm)")
    axis.plot(TIME, CO2, "k.", TIME, line + 280, "C1", TIME, curve + 280, "C0", ms=3, lw=1)
    axis.axvspan(1992, 2002, color="0.93")
    axis.legend(["observed", "line and two harmonics", "differential equation", "held out"])
    axis.figure.savefig(options.out, format="png", dpi=110)  # pyright: ignore[reportAttributeAccessIssue]
    raise SystemExit(None if forecast < of_line else "expected a better forecast than that of the line")


if __name__ == "__main__":
    main()
