"""Run all benchmarks, and write `results.json`, the tables of `README.md` and the plot beside this file.

python benchmarks/run.py                  # one to two hours on two cores
python benchmarks/run.py --only layers    # one group of tables; those of other groups stay as they are
python benchmarks/run.py --quick          # a fraction of the time, for a look; writes nothing
"""

import argparse
import dataclasses
import json
import math
import os
import platform
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path

import jax
from adjoints import ADJOINTS, KEEPING, STATES_ONLY, adjoints, errors, keeping, memory, slope
from applications import deep_equilibrium, simple_chains
from gradients import adam, mlp, neural_ode
from layers import attention, batch_norm, conv, lstm, repeated
from operators import fno
from peers import gradient_peers, peers
from plot import plot_grid
from tables import Table, versions
from timing import Program, Result, program
from training import Problem, flat_loss, gradient, grid_row, tree_loss


HERE = Path(__file__).parent


def ratios(title: str, head: str, results: dict[str, Result], unit: str = "tree", note: str = "") -> Table:
    """A result a row: the time of `unit`, and the times of the others relative to it."""
    names = list(next(iter(results.values())).seconds)
    others = [name for name in names if name != unit]
    columns = [head, f"{unit}, ms", *others, f"compile: {', '.join(names)}, s"]
    rows = [
        [
            row,
            f"{1e3 * result.seconds[unit]:.3g}",
            *(f"{result.ratio(name, unit):.2f}" for name in others),
            ", ".join(f"{result.compile_seconds[name]:.1f}" for name in names),
        ]
        for row, result in results.items()
    ]
    if len(results) > 2:
        means = (mean(result.ratio(name, unit) for result in results.values()) for name in others)
        rows.append(["geometric mean", "", *(f"{value:.2f}" for value in means), ""])
    return Table(title, columns, rows, {row: dataclasses.asdict(r) for row, r in results.items()}, note)


def mean(values: Iterable[float]) -> float:
    """The geometric mean."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))


# Groups of tables


def measure_vectors(options: dict) -> list[Table]:
    """One vector against a tree of arrays."""
    gradients = {
        "100, 53 k": mlp(32, 49, **options),
        "16, 526 k": mlp(256, 7, **options),
        "100, 3.3 M": mlp(256, 49, **options),
    }
    sizes = {"512, 3, 1": (512, 3, 1), "256, 3, 16": (256, 3, 16), "64, 2, 32": (64, 2, 32)}
    odes = {row: neural_ode(w, w, d, b, **options) for row, (w, d, b) in sizes.items()}
    depths = {
        f"{depth}, {batch}": neural_ode(64, 256, depth, batch, all_peers=False, **options)
        for batch in (1, 16)
        for depth in range(1, 9)
    }
    steps = {str(leaves): adam(32, leaves // 2 - 1, **options) for leaves in (6, 18, 66, 200)}
    return [
        ratios("Gradient of a perceptron, batch 32", "leaves, parameters", gradients),
        ratios("Gradient of a neural ODE, diffrax's default adjoint", "width, depth, batch", odes),
        ratios("The same at every depth, a state of 64 numbers, width 256", "depth, batch", depths),
        ratios("One Adam step", "leaves", steps),
    ]


def measure_layers(options: dict) -> list[Table]:
    """Layers against those of other libraries."""
    layers = {
        "`Conv` 3x3, 16 to 32 channels, (16, 32, 32)": conv(16, 32, 16, 32, **options),
        "`Conv` 3x3, 1 to 16 channels, (32, 28, 28)": conv(32, 28, 1, 16, **options),
        "`BatchNorm`, (32, 16, 16, 32)": batch_norm(32, 16, 32, **options),
        "`BatchNorm`, (64, 32, 32, 64)": batch_norm(64, 32, 64, **options),
        "`LSTM` 32 to 32, 100 steps, batch 16": lstm(16, 32, 32, **options),
        "`LSTM` 64 to 128, 100 steps, batch 32": lstm(32, 64, 128, **options),
        "`MultiHeadAttention` 64, 4 heads, (8, 32)": attention(8, 32, 64, 4, **options),
        "`MultiHeadAttention` 128, 8 heads, (8, 128)": attention(8, 128, 128, 8, **options),
    }
    equal = {"64 times `Dense(64, 64, tanh)`": repeated(64, 64, **options)}
    return [
        ratios("Value and gradient of one layer", "layer and size", layers, "flatlayers"),
        ratios("Equal layers one after another, batch 32", "layer", equal, "chain"),
    ]


WIDTHS, DEPTHS, BATCHES = (32, 64, 256, 512), (2, 3, 8), (1, 32, 256)


def measure_training(options: dict) -> list[Table]:
    """Neural ODEs, against the scripts that people write now."""
    rows = {}
    for width in WIDTHS:
        for depth in DEPTHS:
            for batch in BATCHES:
                problem = Problem(width, depth, batch)
                once = {"compilations": 1} if problem.scanned < 20 else {}  # where a call takes seconds
                result = grid_row(problem, **options | once)
                rows[f"{width}, {depth}, {batch}"] = result
                print(_grid_cells(f"{width}, {depth}, {batch}", result), flush=True)
    steps = {}
    for number in (5, 20, 50, 200):
        problem = Problem(64, 2, 32, steps=number, t1=2.0)
        steps[str(problem.counts()[0])] = grid_row(problem, **options)
    sizes = [
        Problem(32, 2, 1),
        Problem(64, 2, 32),
        Problem(32, 8, 32),
        Problem(256, 2, 1),
        Problem(256, 3, 32),
    ]
    named = {f"{p.width}, {p.depth}, {p.batch}": p for p in sizes}
    whole = {row: peers(problem, **options) for row, problem in named.items()}
    alone = {row: gradient_peers(problem, **options) for row, problem in named.items()}
    return [
        _grid("Training, over sizes", "width, depth, batch", rows),
        _grid("Training, over steps of the solver (64, 2, 32)", "accepted steps", steps),
        ratios("A training step with `Dopri5`, all peers", "width, depth, batch", whole, "Equinox"),
        ratios("The gradient with `Tsit5`, all peers", "width, depth, batch", alone, "Equinox"),
    ]


def _grid(title: str, head: str, results: dict[str, Result]) -> Table:
    columns = [head, "Equinox gradient, ms", "gradient", "times the limit", "Equinox step, ms", "step"]
    columns += ["step in a scan", "compile: gradient", "compile: step"]
    rows = [_grid_cells(row, result) for row, result in results.items()]
    summary = ["geometric mean", *(_mean_of(rows, i) for i in range(1, len(columns)))]
    largest = ["largest", *(f"{max(float(row[i]) for row in rows):.3g}" for i in range(1, len(columns)))]
    data = {row: dataclasses.asdict(result) for row, result in results.items()}
    return Table(title, columns, [*rows, summary, largest], data)


def _mean_of(rows: list[list[str]], i: int) -> str:
    return f"{mean(float(row[i]) for row in rows):.2f}"


def _grid_cells(row: str, result: Result) -> list[str]:
    numbers = [
        1e3 * result.seconds["Equinox"],
        result.ratio("flat", "Equinox"),
        result.ratio("flat", "products"),
        1e3 * result.seconds["Equinox step"],
        result.ratio("flat step", "Equinox step"),
        result.ratio("flat steps in a scan", "Equinox step"),
        result.compile_ratio("flat", "Equinox"),
        result.compile_ratio("flat step", "Equinox step"),
    ]
    return [row, *(f"{number:#.3g}" for number in numbers)]


def measure_adjoints(options: dict) -> list[Table]:
    """Ways to differentiate a solve."""
    # The tolerance alone sets the steps: those of `GaussAdjoint` on the way back are set by it as well.
    sizes = ((256, 2, 32), (64, 2, 1), (512, 3, 1), (256, 3, 16), (64, 2, 256), (240, 2, 24))
    named = [Problem(*size, steps=1, size=2, t1=30.0, tolerance=1e-7) for size in sizes]
    problems = {f"{p.width}, {p.depth}, {p.batch}, {p.counts()[0]} steps": p for p in named}
    times = {row: adjoints(problem, **options) for row, problem in problems.items()}
    programs = {row: memory(problem) for row, problem in problems.items()}
    tolerances = (1e-4, 1e-6, 1e-8, 1e-10)
    wrong = {
        f"{tolerance:.0e}": errors(Problem(32, 2, 8, steps=1, size=2, t1=10.0, tolerance=tolerance))
        for tolerance in tolerances
    }
    return [
        ratios("Time of a gradient", "width, depth, batch", times, "diffrax default"),
        _programs("Temporary memory in kB, and instructions of the HLO", "width, depth, batch", programs),
        Table(
            "Error of the gradient, as a multiple of the tolerance",
            ["tolerance", *ADJOINTS],
            [[row, *(f"{e[name] / float(row):.2g}" for name in ADJOINTS)] for row, e in wrong.items()],
            wrong,
            "In float64, relative to its largest number. `AdaptiveCheckpoint` against the default, which "
            "differentiates the same numerical solution; the others against a hundredth of the tolerance.",
        ),
        *_growth(options),
    ]


def _programs(title: str, head: str, programs: dict[str, dict[str, Program]]) -> Table:
    names = list(next(iter(programs.values())))
    rows = [
        [row, *(f"{p[name].memory / 1e3:.0f}, {p[name].instructions}" for name in names)]
        for row, p in programs.items()
    ]
    data = {row: {n: dataclasses.asdict(q) for n, q in p.items()} for row, p in programs.items()}
    return Table(title, [head, *names], rows, data)


def _growth(options: dict) -> list[Table]:
    """What the gradient takes with more steps, parameters and leaves."""
    steps = {n: Problem(64, 3, 32, steps=n, t1=2.0) for n in (25, 50, 100, 200)}
    widths = {w: Problem(w, 3, 32) for w in (128, 256, 512)}
    depths = {d: Problem(64, d, 1) for d in (2, 4, 8, 16)}
    kept = {n: Problem(64, 3, 32, max_steps=n) for n in (32, 64, 96, 128)}

    def seconds(problem: Problem) -> float:
        return _flat_time(problem, options)

    by_steps = {problem.counts()[0]: seconds(problem) for problem in steps.values()}
    by_parameters = {problem.layer()[1].size: seconds(problem) for problem in widths.values()}
    programs = {2 * (d + 1): program(gradient(problem, flat_loss)) for d, problem in depths.items()}
    trees = {2 * (d + 1): program(gradient(problem, tree_loss)) for d, problem in depths.items()}
    # Of states alone: residuals are kept of as many steps as there are bytes for.
    memories = {
        n: program(gradient(problem, flat_loss, adjoint=STATES_ONLY)).memory for n, problem in kept.items()
    }
    state = 32 * 4 * 4
    a_step = (memories[128] - memories[32]) / (96 * state)
    text = {
        "time over accepted steps": (
            by_steps,
            1e3,
            f"slope {slope(list(by_steps), list(by_steps.values())):.2f}",
        ),
        "time over parameters": (
            by_parameters,
            1e3,
            f"slope {slope(list(by_parameters), list(by_parameters.values())):.2f}",
        ),
        "temporary memory over `max_steps`, kB": (memories, 1e-3, f"{a_step:.2f} states per step"),
        "HLO instructions over leaves, flat": ({n: p.instructions for n, p in programs.items()}, 1, ""),
        "HLO instructions over leaves, Equinox": ({n: p.instructions for n, p in trees.items()}, 1, ""),
    }
    rows = [
        [name, ", ".join(f"{n}: {factor * value:.4g}" for n, value in values.items()), fit]
        for name, (values, factor, fit) in text.items()
    ]
    return [
        Table(
            "Growth of the gradient, `AdaptiveCheckpoint`",
            ["what", "values (times in ms)", "in logarithms"],
            rows,
            {name: {str(n): value for n, value in values.items()} for name, (values, *_) in text.items()},
        )
    ]


def _flat_time(problem: Problem, options: dict) -> float:
    from timing import race

    return race({"flat": gradient(problem, flat_loss)}, **options).seconds["flat"]


def measure_applications(options: dict) -> list[Table]:
    """Whole applications."""
    networks = {
        f"{batch}, {width}, {what}": deep_equilibrium(batch, width, what == "gradient", **options)
        for batch, width in ((32, 32), (16, 128))
        for what in ("forward", "gradient")
    }
    return [
        ratios(
            "One epoch of a 4-32-16-4 perceptron on 10 000 points, as SimpleChains.jl has it",
            "what",
            {"epoch": simple_chains(**options)},
            "PyTorch",
        ),
        ratios("A deep equilibrium network", "batch, width", networks, "by hand, GMRES"),
    ]


def measure_kept(options: dict) -> list[Table]:
    """What `keep` of `AdaptiveCheckpointAdjoint` saves, and takes."""
    sizes = ((32, 2, 1), (256, 2, 1), (512, 3, 1), (64, 2, 32), (32, 8, 32), (256, 3, 32), (64, 2, 256))
    problems = {f"{w}, {d}, {b}": Problem(w, d, b) for w, d, b in (*sizes, (256, 3, 256))}
    times = {row: keeping(problem, **options) for row, problem in problems.items()}
    rows = [
        [
            row,
            *(str(program(gradient(problem, flat_loss, adjoint=a)).memory // 1024) for a in KEEPING.values()),
        ]
        for row, problem in problems.items()
    ]
    return [
        ratios("Time of a gradient that keeps residuals", "width, depth, batch", times, "diffrax default"),
        Table("Temporary memory in kB", ["width, depth, batch", *KEEPING], rows, rows),
    ]


def measure_programs(options: dict) -> list[Table]:
    """What the compiled gradients of all sizes take; nothing is timed."""
    ways = {name: KEEPING[name] for name in ("diffrax default", "nothing", "auto")}
    programs = {
        f"{w}, {d}, {b}": {
            name: program(gradient(Problem(w, d, b), flat_loss, adjoint=adjoint))
            for name, adjoint in ways.items()
        }
        for w in WIDTHS
        for d in DEPTHS
        for b in BATCHES
    }
    return [_programs("Temporary memory in kB, and instructions, by size", "width, depth, batch", programs)]


def measure_operators(options: dict) -> list[Table]:
    """Fourier neural operators against neuraloperator on PyTorch."""
    sizes = {"16, 64, (20, 256)": ((16,), 256, 64, 20), "12 x 12, 32, (8, 64, 64)": ((12, 12), 64, 32, 8)}
    races = {
        f"{row}, `{activation}`": fno(*size, activation=activation, **options)
        for row, size in sizes.items()
        for activation in ("relu", "gelu")
    }
    title = "Value and gradient of a Fourier neural operator of four layers"
    head, note = "modes, width, (batch, points), activation", f"neuraloperator {version('neuraloperator')}."
    return [ratios(title, head, races, "flatlayers", note)]


GROUPS: dict[str, Callable[[dict], list[Table]]] = {
    "training": measure_training,
    "adjoints": measure_adjoints,
    "kept": measure_kept,
    "programs": measure_programs,
    "applications": measure_applications,
    "vectors": measure_vectors,
    "layers": measure_layers,
    "operators": measure_operators,
}


def machine() -> str:
    """What the figures were measured with."""
    packages = (
        "jax",
        "jaxlib",
        "diffrax",
        "equinox",
        "optax",
        "flax",
        "torch",
        "torchdiffeq",
        "neuraloperator",
    )
    device = jax.devices()[0]
    where = f"{device.platform} ({device.device_kind}), {os.cpu_count()} cores"
    return f"{where}, Python {platform.python_version()}, {versions(*packages)}"


def write(name: str, tables: list[Table]) -> None:
    """Put tables in the place of those under the same name in `README.md` and `results.json`."""
    start, end = f"<!-- {name}: written by run.py -->", f"<!-- end of {name} -->"
    text = "\n\n".join([f"Measured on: {machine()}.", *(table.markdown() for table in tables)])
    readme = HERE / "README.md"
    if start not in readme.read_text():
        raise ValueError(f"expected a place for the tables in README.md, {start} and {end}, found none")
    before, _, rest = readme.read_text().partition(start)
    after = rest.partition(end)[2]
    readme.write_text(f"{before}{start}\n\n{text}\n\n{end}{after}")
    path = HERE / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    results[name] = {"machine": machine(), "tables": {table.title: table.data for table in tables}}
    path.write_text(json.dumps(results, indent=1) + "\n")
    if name == "training":
        plot_grid(results[name]["tables"], HERE / "training.png")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=GROUPS, help="measure one group of tables")
    parser.add_argument("--quick", action="store_true", help="one compilation, few calls, nothing written")
    arguments = parser.parse_args()
    quick = arguments.quick
    options = {"compilations": 1, "seconds": 0.1} if quick else {"compilations": 2, "seconds": 0.4}
    for group, measure in GROUPS.items():
        if arguments.only in (None, group):
            tables = measure(options)
            for table in tables:
                print(table.markdown(), end="\n\n")
            if not quick:
                write(group, tables)


if __name__ == "__main__":
    main()
