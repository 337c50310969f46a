"""Burgers' equation: a network that obeys it, with every weight in one flat vector.

A fluid on a line, with `u(x, t)` its velocity, steepens into a front that viscosity holds up:

    u_t + u u_x = viscosity u_xx,    u(x, 0) = -sin(pi x),    u(-1, t) = u(1, t) = 0.

A physics-informed network (Raissi, Perdikaris and Karniadakis, 2019) learns `u` from the equation alone: its
loss is the mean square of what is left of the equation at points of space and time. The derivatives by `x`
and `t` in it are Jacobian-vector products of the network, one for the whole batch of points and nested for
`u_xx`, and the gradient by the weights goes back through them. The initial and the boundary values hold
by construction. Adam, on points that are drawn anew at each step, and then L-BFGS, on points that stay, step
the flat vector by the same training loop.

The closed form is that of Cole and Hopf. The script prints the model and its relative error (the root mean
square of the difference over that of the closed form), and draws a picture. With an error above 1 % the exit
code is 1. It takes 10 to 20 seconds on two cores.
"""

import sys
import time
from pathlib import Path
from typing import Any

import command_line
import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

import flatlayers as fl


VISCOSITY = 0.01  # m^2/s
POINTS = 1000  # of space and time in a batch
FINISH = 2000  # steps of L-BFGS
REQUIRED = 0.01  # relative error
SHOWN = (0.25, 0.5, 0.75)  # times of the picture, s


class Velocity(fl.Wrapper):
    """`u` at `(x, t)`: whatever the network, it is `-sin(pi x)` at time 0, and 0 at -1 and 1."""

    network: fl.Layer

    def forward(self, x: Any, ps: Any, st: Any) -> tuple[Any, Any]:
        y, st = self.network(x, ps, st)
        place, t = x[..., 0], x[..., 1]
        return (1 - place**2) * t * y[..., 0] - jnp.sin(jnp.pi * place), st


def residual(model: fl.Layer, points: Any, ps: Any, st: Any) -> jax.Array:
    """`u_t + u u_x - viscosity u_xx` at each of the points."""
    along_x, along_t = (jnp.broadcast_to(unit, points.shape) for unit in jnp.eye(2, dtype=points.dtype))

    def derivative_by_x(points: Any) -> Any:
        return fl.jacobian_vector_product(model)(points, along_x, ps, st)

    u, _ = model(points, ps, st)
    u_t = fl.jacobian_vector_product(model)(points, along_t, ps, st)
    u_x, u_xx = jax.jvp(derivative_by_x, (points,), (along_x,))
    return u_t + u * u_x - VISCOSITY * u_xx


def draw(key: jax.Array) -> jax.Array:
    """Points of space and time, of shape `(POINTS, 2)`: denser towards the middle, where the front forms."""
    points = jax.random.uniform(key, (POINTS, 2), minval=jnp.array([-1.0, 0.0]), maxval=1.0)
    return points.at[:, 0].multiply(jnp.abs(points[:, 0]))


def closed_form(x: np.ndarray, t: np.ndarray) -> np.ndarray:
    """The solution of Cole (1951) and Hopf (1950): two integrals over a Gaussian, by its quadrature."""
    nodes, weights = np.polynomial.hermite.hermgauss(200)
    y = x[..., None] - np.sqrt(4 * VISCOSITY * t[..., None]) * nodes
    density = weights * np.exp(-np.cos(np.pi * y) / (2 * np.pi * VISCOSITY))
    return -np.sum(np.sin(np.pi * y) * density, -1) / np.sum(density, -1)


def train(model: fl.Layer, steps: int, seed: int) -> tuple[fl.TrainResult, fl.TrainResult]:
    """Train by `steps` steps of Adam, and then `FINISH` steps of L-BFGS."""
    setup_key, adam_key, points_key = jax.random.split(jax.random.key(seed), 3)
    ps, st = fl.setup(setup_key, model)

    def loss(ps: Any, st: Any, points: Any) -> tuple[Any, Any]:
        return jnp.mean(residual(model, points, ps, st) ** 2), st

    adam = optax.adam(optax.cosine_decay_schedule(3e-3, steps))
    points = map(jax.jit(draw), jax.random.split(adam_key, steps))
    first = fl.train_loop(loss, ps, st, adam, points, steps=steps)
    lbfgs = optax.lbfgs(memory_size=50)
    return first, fl.train_loop(loss, first.ps, first.st, lbfgs, draw(points_key), steps=FINISH)


def grid() -> tuple[np.ndarray, np.ndarray]:
    """Places and times to compare at, each of shape `(101, 401)`."""
    x, t = np.meshgrid(np.linspace(-1, 1, 401), np.linspace(0, 1, 101))
    return x, t


def relative_error(u: np.ndarray, exact: np.ndarray) -> float:
    return float(np.linalg.norm(u - exact) / np.linalg.norm(exact))


def plot(u: np.ndarray, exact: np.ndarray, out: Path) -> None:
    x, t = grid()
    figure = Figure(figsize=(10, 6.5), layout="constrained")
    top, bottom = figure.subfigures(2, 1, squeeze=False).flat
    maps = {"velocity u of the network": u, "its difference from the closed form": u - exact}
    for axis, (title, values) in zip(top.subplots(1, 2, sharey=True), maps.items(), strict=True):
        most = np.abs(values).max()
        image = axis.pcolormesh(t, x, values, cmap="RdBu_r", vmin=-most, vmax=most)
        top.colorbar(image, ax=axis, label="m/s")
        axis.set(title=title, xlabel="time t (s)", ylabel="place x (m)")
        axis.label_outer()
    for axis, moment in zip(bottom.subplots(1, len(SHOWN), sharey=True), SHOWN, strict=True):
        row = np.argmin(np.abs(t[:, 0] - moment))
        axis.plot(x[row], exact[row], color="0.7", lw=5, label="closed form")
        axis.plot(x[row], u[row], "k--", label="network")
        axis.set(title=f"t = {moment} s", xlabel="place x (m)", ylabel="velocity u (m/s)")
        axis.label_outer()
    bottom.axes[0].legend()
    figure.savefig(out, format="png", dpi=150)


def main() -> None:
    options = command_line.parse(
        "Solve Burgers' equation with a physics-informed network; print its error against the "
        "closed form and draw both.",
        out="pinn.png",
        seed="of the first weights and of the points",
    )
    start = time.perf_counter()
    model = Velocity(fl.MLP(2, (20, 20, 20, 20), 1))
    print(fl.pformat(model), flush=True)
    _, result = train(model, options.steps, options.seed)
    ps, st = result.ps, result.st
    x, t = grid()
    u = np.asarray(model(jnp.stack([x, t], -1), ps, st)[0])
    exact = closed_form(x, t)
    error = relative_error(u, exact)
    plot(u, exact, options.out)
    print(
        f"\nA relative error of {error:.2%} against the closed form with {len(ps)} parameters in one vector, "
        f"after {time.perf_counter() - start:.1f} s\nThe picture is in {options.out}"
    )
    if not error <= REQUIRED:
        sys.exit(f"expected a relative error of at most {REQUIRED:.0%}, found {error:.2%}")


if __name__ == "__main__":
    main()
