"""Adjoints: time, memory and accuracy of four ways to differentiate a solve, on one problem.

A damped network of 8 states is solved by diffrax, and a loss at its end is differentiated with respect to
the flat vector by diffrax's `RecursiveCheckpointAdjoint` and `BacksolveAdjoint` and by
`AdaptiveCheckpointAdjoint` and `GaussAdjoint` of flatlayers, in float64. The reference is the gradient at a
tolerance of 1e-12.

The script prints a table (the least time of many calls in turn, the working memory of the compiled function,
the error at each of three tolerances) and draws a picture. If the two checkpointing adjoints differ by more
than rounding, or if one of the first three adjoints is off by more than 100 times the tolerance, the exit
code is 1. It takes about 15 seconds on two cores. Times mean something only if nothing else is running.
"""

import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import command_line
import diffrax
import jax
import jax.numpy as jnp
from matplotlib.figure import Figure
from tqdm import tqdm

import flatlayers as fl


STATES, WIDTH = 8, 128
END = 10.0
TOLERANCES = (1e-4, 1e-6, 1e-8)
TIMED = 1e-6  # the tolerance at which time is measured
ADJOINTS: dict[str, diffrax.AbstractAdjoint] = {
    "RecursiveCheckpoint": diffrax.RecursiveCheckpointAdjoint(),
    "AdaptiveCheckpoint": fl.AdaptiveCheckpointAdjoint(),
    "Gauss": fl.GaussAdjoint(),
    "Backsolve": diffrax.BacksolveAdjoint(),
}
REQUIRED = 100  # tolerances


class Measured(NamedTuple):
    milliseconds: float
    kibibytes: float
    errors: list[float]


def gradient_of(adjoint: diffrax.AbstractAdjoint, key: jax.Array) -> tuple[Any, Any]:
    """The compiled gradient, a function of the vector and the tolerance, and the vector."""
    model = fl.MLP(STATES, (WIDTH,), STATES, jnp.tanh)
    setup_key, start_key = jax.random.split(key)
    ps, st = fl.setup(setup_key, model, jnp.float64)
    ps = 2 * ps  # livelier than the first values
    y0 = jax.random.normal(start_key, (STATES,))

    def loss(ps: Any, tolerance: Any) -> Any:
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, ps: model(y, ps, st)[0] - y),
            diffrax.Tsit5(),
            t0=0.0,
            t1=END,
            dt0=None,
            y0=y0,
            args=ps.unpack(),  # once, outside the loop
            stepsize_controller=diffrax.PIDController(rtol=tolerance, atol=tolerance),
            adjoint=adjoint,
        )
        ys: Any = solution.ys
        return jnp.mean((ys - 1) ** 2)

    return jax.jit(jax.grad(loss)).lower(ps, TIMED).compile(), ps


def measure(repetitions: int, key: jax.Array) -> tuple[dict[str, Measured], float]:
    """Measurements of each adjoint, and the difference of the checkpointing ones."""
    compiled = {name: gradient_of(adjoint, key) for name, adjoint in ADJOINTS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in compiled}
    for _ in tqdm(range(repetitions), desc="measuring", unit="round"):
        for name, (gradient, ps) in compiled.items():
            start = time.perf_counter()
            jax.block_until_ready(gradient(ps, TIMED))
            seconds[name].append(time.perf_counter() - start)
    gradient, ps = compiled["RecursiveCheckpoint"]
    reference = gradient(ps, 1e-12).data
    found, at_timed = {}, {}
    for name, (gradient, ps) in compiled.items():
        values = [gradient(ps, tolerance).data for tolerance in TOLERANCES]
        errors = [float(jnp.linalg.norm(v - reference) / jnp.linalg.norm(reference)) for v in values]
        memory = gradient.memory_analysis().temp_size_in_bytes / 1024
        found[name] = Measured(1e3 * min(seconds[name]), memory, errors)
        at_timed[name] = values[TOLERANCES.index(TIMED)]
    a, b = at_timed["RecursiveCheckpoint"], at_timed["AdaptiveCheckpoint"]
    return found, float(jnp.abs(a - b).max() / jnp.abs(a).max())


def plot(found: dict[str, Measured], out: Path) -> None:
    figure = Figure(figsize=(13, 3.8), layout="constrained")
    times, memory, errors = figure.subplots(1, 3)
    colors = [f"C{i}" for i in range(len(found))]
    for axis, values, label in (
        (times, [m.milliseconds for m in found.values()], "time of a gradient (ms)"),
        (memory, [m.kibibytes for m in found.values()], "working memory (KiB)"),
    ):
        bars = axis.barh(list(found), values, color=colors)
        axis.bar_label(bars, fmt="%.3g", padding=3)
        axis.set(xlabel=label, xlim=(0, 1.25 * max(values)))
        axis.invert_yaxis()
    memory.set_yticklabels([])
    for (name, measured), marker in zip(found.items(), "os^d", strict=True):
        errors.loglog(TOLERANCES, measured.errors, marker + "-", ms=9 if marker == "o" else 6, label=name)
    errors.set(xlabel="tolerance of the solver", ylabel="relative error of the gradient")
    errors.invert_xaxis()
    errors.legend(fontsize="small")
    figure.savefig(out, format="png", dpi=110)


def main(argv: list[str] | None = None) -> int:
    options = command_line.parse(
        "Measure time, memory and accuracy of four adjoints; print a table and draw it.",
        out="adjoints.png",
        seed="of the weights and of the start",
        steps=30,
        steps_of="calls of each gradient, the least time of which counts",
        argv=argv,
    )
    with jax.enable_x64(True):
        found, difference = measure(options.steps, jax.random.key(options.seed))
    plot(found, options.out)
    print(f"\n{'adjoint':20}  time (ms)  memory (KiB)" + "".join(f"  error at {t:.0e}" for t in TOLERANCES))
    for name, m in found.items():
        errors = "".join(f"  {error:14.1e}" for error in m.errors)
        print(f"{name:20}  {m.milliseconds:9.1f}  {m.kibibytes:12.0f}{errors}")
    print(f"The checkpointing adjoints differ by {difference:.0e}.\nThe picture is in {options.out}")
    accurate = all(
        error <= REQUIRED * tolerance
        for name, m in found.items()
        for error, tolerance in zip(m.errors, TOLERANCES, strict=True)
        if name != "Backsolve"
    )
    if accurate and difference <= 1e-10:
        return 0
    print(f"expected errors of at most {REQUIRED} tolerances and checkpointing adjoints that agree")
    return 1


if __name__ == "__main__":
    sys.exit(main())
