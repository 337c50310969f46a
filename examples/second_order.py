"""Second order: Gauss-Newton for the hare and lynx, and a posterior from the Hessian with names.

The pelts of 1900 to 1920 are fitted by the equations of Lotka and Volterra, in logarithms, by the method of
Levenberg and Marquardt of optimistix, which takes the flat vector of two populations and four rates as it
is. With the noise as one more parameter, Newton's method finds the mode of the posterior and `fl.hessian`
its curvature: the Laplace approximation, with names. Random-walk Metropolis, 32 chains in one vector with a
leading axis, shows how good that is. All of it is in float64. There is no training loop: the fit is a few
steps of solvers of second order, and the sampler goes by no gradient.

The script prints the rates with their deviations by both, and draws a picture. If a deviation by Laplace is
off by more than 20 % of that of the sampler, the exit code is 1. It takes about 20 seconds on two cores.
"""

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import command_line
import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
from lynx_hare import DATA
from matplotlib.figure import Figure
from tqdm import tqdm

import flatlayers as fl


NAMES = ("growth", "predation", "conversion", "death")
CHAINS, CHUNK = 32, 250
FULL = fl.Layout({"initial": (2,), "log_rates": dict.fromkeys(NAMES, ()), "log_noise": ()})
REQUIRED = 0.2


class LotkaVolterra(fl.Layer):
    """The change of the log populations of hare and lynx."""

    def parameters(self) -> Mapping[str, Any]:
        return dict.fromkeys(NAMES, fl.Param((), fl.initializers.constant(np.log(0.5))))

    def forward(self, x: Any, ps: Any, st: Any) -> tuple[Any, Any]:
        hare, lynx = jnp.exp(x)
        growth, predation, conversion, death = (jnp.exp(ps[name]) for name in NAMES)
        return jnp.stack([growth - predation * lynx, conversion * hare - death]), st


def equation(times: np.ndarray) -> fl.NeuralODE:
    return fl.NeuralODE(
        LotkaVolterra(),
        t1=times[-1],
        saveat=times.tolist(),
        stepsize_controller=diffrax.PIDController(rtol=1e-6, atol=1e-6),
        max_steps=512,
        throw=False,
    )


def load() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The years since the first, the log pelts `(year, 2)` around their mean, and the mean."""
    year, *pelts = np.loadtxt(DATA, delimiter=",", skiprows=1, unpack=True)
    logs = np.log(np.stack(pelts, axis=1))
    return year - year[0], logs - logs.mean(axis=0), logs.mean(axis=0)


class Posterior:
    """Residuals of the fit and the energy, which is the negative logarithm of the posterior."""

    def __init__(self, times: np.ndarray, data: np.ndarray):
        self.data, self.ode = data, equation(times)
        model = {"initial": fl.Param((2,), fl.initializers.from_array(data[0])), "log_rates": self.ode}
        self.start, self.st = fl.setup(jax.random.key(0), model, float)

    def residuals(self, ps: Any, args: Any = None) -> Any:
        found, _ = self.ode(ps.initial, ps.log_rates, self.st.log_rates)
        return (found - self.data).ravel()

    def energy(self, ps: Any) -> Any:
        squares = 0.5 * jnp.sum(self.residuals(ps) ** 2)
        misfit = squares / jnp.exp(2 * ps.log_noise) + self.data.size * ps.log_noise
        rates = ps.log_rates.data - np.log(0.5)
        prior = jnp.sum(ps.initial**2) / 8 + jnp.sum(rates**2) / 2 + (ps.log_noise + 1) ** 2 / 2
        return jnp.where(jnp.isfinite(misfit), misfit + prior, jnp.inf)

    def mode(self) -> tuple[Any, Any]:
        """The minimum of the energy, and its Hessian there."""
        solver = optx.LevenbergMarquardt(rtol=1e-8, atol=1e-8)
        solution = optx.least_squares(
            self.residuals, solver, self.start, options={"jac": "bwd"}, max_steps=100
        )
        best: Any = solution.value
        print(f"Levenberg-Marquardt: {solution.stats['num_steps']} steps", flush=True)
        noise = 0.5 * jnp.log(jnp.mean(self.residuals(best) ** 2))
        tree = {"initial": best.initial, "log_rates": best.log_rates, "log_noise": noise}
        ps = fl.ComponentVector.of(tree, FULL, float)
        derivatives = jax.jit(lambda ps: (jax.grad(self.energy)(ps), fl.hessian(self.energy)(ps)))
        for _ in range(5):
            gradient, hessian = derivatives(ps)
            ps = ps - jnp.linalg.solve(hessian.data, gradient.data)
        return ps, derivatives(ps)[1]


def metropolis(posterior: Posterior, mode: Any, covariance: Any, steps: int, key: jax.Array) -> Any:
    """Samples of the posterior: a vector with the samples of all chains as leading axis."""
    factor = jnp.linalg.cholesky(covariance)
    energies = jax.vmap(lambda x: posterior.energy(fl.ComponentVector(x, FULL)))

    def step(carry: Any, key: jax.Array) -> Any:
        x, energy = carry
        walk, accept = jax.random.split(key)
        new = x + 2.4 / FULL.length**0.5 * jax.random.normal(walk, x.shape) @ factor.T
        new_energy = energies(new)
        take = jnp.log(jax.random.uniform(accept, energy.shape)) < energy - new_energy
        x = jnp.where(take[:, None], new, x)
        return (x, jnp.where(take, new_energy, energy)), x

    chunk = jax.jit(lambda carry, keys: jax.lax.scan(step, carry, keys))
    first, key = jax.random.split(key)
    x = mode.data + jax.random.normal(first, (CHAINS, FULL.length)) @ factor.T
    carry, rows = (x, energies(x)), []
    with tqdm(total=steps, desc="sampling", unit="step") as bar:
        for keys in jax.random.split(key, steps).reshape(-1, CHUNK):
            carry, found = chunk(carry, keys)
            rows.append(found)
            bar.update(CHUNK)
    kept = jnp.concatenate(rows)[steps // 4 :]
    return fl.ComponentVector(kept.reshape(-1, FULL.length), FULL)


def plot(mode: Any, covariance: Any, samples: Any, data: np.ndarray, centre: np.ndarray, out: Path) -> None:
    figure = Figure(figsize=(13, 6.5), layout="constrained")
    axes = figure.subplot_mosaic([["0", "1", "2", "3"], ["hare", "hare", "lynx", "lynx"]])
    deviation = fl.ComponentVector(jnp.sqrt(jnp.diagonal(covariance)), FULL)
    for i, name in enumerate(NAMES):
        middle, spread = float(mode.log_rates[name]), float(deviation.log_rates[name])
        grid = np.linspace(middle - 4 * spread, middle + 4 * spread, 100)
        density = np.exp(-0.5 * ((grid - middle) / spread) ** 2) / (spread * np.sqrt(2 * np.pi))
        axes[str(i)].hist(samples.log_rates[name], bins=60, density=True, color="0.8", label="Metropolis")
        axes[str(i)].plot(grid, density, label="Laplace")
        axes[str(i)].set(xlabel=f"log {name} (rate per year)", yticks=[])
    axes["0"].set_ylabel("density")
    axes["0"].legend(fontsize="small")
    times = np.linspace(0.0, 40.0, 201)
    later = equation(times)
    st = fl.initial_states(jax.random.key(0), later)
    some = samples.data[:: len(samples.data) // 200]
    paths = jax.jit(jax.vmap(lambda ps: later(ps.initial, ps.log_rates, st)[0]))(
        fl.ComponentVector(some, FULL)
    )
    low, middle, high = np.exp(np.nanquantile(paths, (0.05, 0.5, 0.95), axis=0) + centre)
    for i, name in enumerate(("hare", "lynx")):
        axes[name].fill_between(1900 + times, low[:, i], high[:, i], alpha=0.3, label="5 to 95 %")
        axes[name].plot(1900 + times, middle[:, i], label="median")
        axes[name].plot(1900 + np.arange(len(data)), np.exp(data + centre)[:, i], "ko", ms=4, label="pelts")
        axes[name].set(xlabel="year", ylabel=f"{name} (thousands of pelts per year)", ylim=(0, None))
        axes[name].legend(fontsize="small")
    figure.savefig(out, format="png", dpi=110)


def main(argv: list[str] | None = None) -> int:
    options = command_line.parse(
        "Fit hare and lynx by Gauss-Newton; print the rates with their deviations by the Laplace "
        "approximation and by a sampler, and draw both.",
        out="second_order.png",
        seed="of the sampler",
        steps=2000,
        steps_of="steps of each chain of the sampler",
        chunk=CHUNK,
        argv=argv,
    )
    start = time.perf_counter()
    with jax.enable_x64(True):
        times, data, centre = load()
        posterior = Posterior(times, data)
        mode, hessian = posterior.mode()
        covariance = jnp.linalg.inv(hessian.data)
        samples = metropolis(posterior, mode, covariance, options.steps, jax.random.key(options.seed))
        plot(mode, covariance, samples, data, centre, options.out)
        values = np.asarray(mode.data)
        laplace = np.sqrt(np.diagonal(covariance))
        sampled = np.std(np.asarray(samples.data), axis=0)
    print(f"\n{'':22}    mode  Laplace  Metropolis")
    for row in zip(FULL.labels(), values, laplace, sampled, strict=True):
        print("{:22}  {:6.3f}  {:7.3f}  {:10.3f}".format(*row))
    worst = float(np.abs(laplace / sampled - 1).max())
    print(
        f"The deviations differ by {worst:.0%} at most, after {time.perf_counter() - start:.1f} s\n"
        f"The picture is in {options.out}"
    )
    if worst <= REQUIRED:
        return 0
    print(f"expected deviations within {REQUIRED:.0%} of those of the sampler")
    return 1


if __name__ == "__main__":
    sys.exit(main())
