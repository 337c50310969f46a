"""Compare flatlayers on a GPU with Equinox, diffrax and optax, in one command that ends within its minutes.

python benchmarks/gpu.py --out build/gpu    # at most 8 minutes; writes gpu.md and gpu.json
python benchmarks/gpu.py --rows 1 5         # some rows alone
python benchmarks/gpu.py --small            # small sizes and few calls, for a look on a CPU

The files are whole after every measurement, so that a run that is cut off leaves what it has measured.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tables import Table, versions
from training import Problem, Trajectories
from workers import CONTESTANTS, Failure, OutOfTime, Worker


PROGRAMS = {"gradient": "gradient", "step": "training step", "scan": "step in a scan"}
TURNS = 3  # of each contestant

ROWS = {
    "32, 2, 1": Problem(32, 2, 1),
    "64, 2, 1024": Problem(64, 2, 1024),
    "256, 3, 256": Problem(256, 3, 256),
    "512, 8, 1024": Problem(512, 8, 1024),
    "32, 2, 10 000 trajectories": Trajectories(32, 2, 10_000, steps=1, t1=20.0),
}
SMALL = {
    "4, 1, 1": Problem(4, 1, 1, max_steps=64),
    "4, 1, 8": Problem(4, 1, 8, max_steps=64),
    "8, 2, 4": Problem(8, 2, 4, max_steps=64),
    "8, 2, 8": Problem(8, 2, 8, max_steps=64),
    "4, 1, 20 trajectories": Trajectories(4, 1, 20, steps=1, t1=20.0, max_steps=64),
}


@dataclasses.dataclass(frozen=True)
class Figures:
    """One program of one contestant: seconds a step, seconds to trace and to compile, temporary bytes."""

    seconds: float
    trace_seconds: float
    compile_seconds: float
    memory: int | None


@dataclasses.dataclass
class Row:
    """A row of the tables, as far as it was measured."""

    name: str
    status: str = "not run"
    difference: float | None = None  # of the gradients
    programs: dict[str, dict[str, Figures]] = dataclasses.field(default_factory=dict)
    peaks: dict[str, int | None] = dataclasses.field(default_factory=dict)

    def pair(self, program: str, of: Callable[[Figures], float | None]) -> list[float | None]:
        """Return a figure of Equinox and of flat, where it was measured."""
        found = self.programs.get(program, {})
        return [of(found[name]) if name in found else None for name in CONTESTANTS]


@dataclasses.dataclass(frozen=True)
class Options:
    """How to measure: the precision of products, the seconds a program, how far gradients may differ."""

    precision: str
    seconds: float
    tolerance: float


# Measuring


def difference(found: list[np.ndarray], expected: list[np.ndarray]) -> float:
    """The largest difference, relative to the largest number; NaN if there is one on either side."""
    a, b = (np.concatenate([np.ravel(part) for part in parts]).astype(float) for parts in (found, expected))
    if a.shape != b.shape:
        raise Failure(f"expected gradients of one size, found {a.size} and {b.size} numbers")
    return float(np.max(np.abs(a - b)) / np.max(np.abs(b)))


def require_same(name: str, found: float, tolerance: float) -> None:
    """Raise unless it is at most the tolerance, NaN included."""
    if not found <= tolerance:
        raise Failure(f"the {name} differ by {found:.2g}, expected at most {tolerance:.2g}")


def measure(row: Row, problem: Problem, report: "Report", deadline: float) -> None:
    """Fill the row in, and save it whenever there is more of it."""
    options = report.options
    with contextlib.ExitStack() as stack:
        # All start at once, and then take turns: nothing is compiled or timed beside anything else.
        workers = [
            stack.enter_context(Worker(name, problem, options.precision, deadline)) for name in CONTESTANTS
        ]
        report.device, _ = (worker.ask("device") for worker in workers)
        losses: list[float] = []
        for program in PROGRAMS:
            compiled = [worker.ask("compile", program) for worker in workers]
            if program == "gradient":
                row.difference = difference(*(worker.ask("gradient") for worker in reversed(workers)))
                require_same("gradients", row.difference, options.tolerance)
            losses += [part.loss for part in compiled]
            off = difference([np.array(losses)], [np.full(len(losses), losses[0])])
            require_same("losses", off, options.tolerance)
            times: list[list[float]] = [[] for _ in workers]
            for _ in range(TURNS):
                for worker, found in zip(workers, times, strict=True):
                    found += worker.ask("times", program, options.seconds / TURNS)
            steps = problem.scanned if program == "scan" else 1
            row.programs[program] = {
                worker.name: Figures(
                    statistics.median(found) / steps, part.trace_seconds, part.compile_seconds, part.memory
                )
                for worker, found, part in zip(workers, times, compiled, strict=True)
            }
            row.peaks = {worker.name: worker.ask("peak") for worker in workers}
            report.save()


@dataclasses.dataclass
class Report:
    """All rows, and the files that they are written to."""

    rows: list[Row]
    options: Options
    out: Path
    device: str = "no device yet"

    def save(self) -> None:
        """Write the files whole: whoever reads them, now or after an end of this process, finds no half."""
        data = {
            "machine": self.machine(),
            **dataclasses.asdict(self.options),
            "rows": [dataclasses.asdict(row) for row in self.rows],
        }
        text = "\n\n".join([self.heading(), *(table.markdown() for table in self.tables())])
        for name, content in (("gpu.json", json.dumps(data, indent=1)), ("gpu.md", text)):
            beside = self.out / f".{name}.new"
            beside.write_text(content + "\n")
            os.replace(beside, self.out / name)

    def machine(self) -> str:
        packages = versions("jax", "jaxlib", "diffrax", "equinox", "optax")
        return f"{self.device}, {os.cpu_count()} cores, Python {platform.python_version()}, {packages}"

    def heading(self) -> str:
        return (
            "# flatlayers against Equinox, diffrax and optax\n\n"
            f"Measured on: {self.machine()}.\n\n"
            f"float32, products of matrices with precision `{self.options.precision}` for both. *flat*: "
            "`fl.NeuralODE` with its default adjoint, `AdaptiveCheckpointAdjoint`, and for trajectories with "
            '`batching="each"`; *Equinox*: `eqx.nn.MLP`, diffrax with its default adjoint, for trajectories '
            "`jax.vmap` of `diffeqsolve`; optax for both. Ratios are flat to Equinox: below 1 is faster. "
            "Gradients are compared before anything is timed: their largest difference, relative to the "
            f"largest number, has to be at most {self.options.tolerance:.2g}."
        )

    def tables(self) -> list[Table]:
        return [_times(self.rows), _compiling(self.rows), _memory(self.rows)]


# Tables


def _text(value: float | None, factor: float = 1.0) -> str:
    return "-" if value is None else f"{factor * value:.3g}"


def _ratio(equinox: float | None, flat: float | None) -> str:
    return "-" if not equinox or flat is None else f"{flat / equinox:.2f}"


def _columns(names: list[str], unit: str) -> list[str]:
    found = ["width, depth, batch"]
    for name in names:
        found += [f"{name}: Equinox, {unit}", f"flat, {unit}", "ratio"]
    return found


def _times(rows: list[Row]) -> Table:
    cells = []
    for row in rows:
        cells.append([row.name])
        for program in PROGRAMS:
            pair = row.pair(program, lambda figures: figures.seconds)
            cells[-1] += [*(_text(value, 1e3) for value in pair), _ratio(*pair)]
        cells[-1] += [_text(row.difference), row.status]
    columns = [*_columns(list(PROGRAMS.values()), "ms"), "gradients differ by", "status"]
    return Table("Times", columns, cells, None)


def _compiling(rows: list[Row]) -> Table:
    cells = []
    for row in rows:
        cells.append([row.name])
        for program in PROGRAMS:
            pair = row.pair(program, lambda figures: figures.trace_seconds + figures.compile_seconds)
            cells[-1] += [*map(_text, pair), _ratio(*pair)]
    note = "To trace, lower and compile, without the first call; one contestant after the other."
    return Table("Compiling", _columns(list(PROGRAMS.values()), "s"), cells, None, note)


def _memory(rows: list[Row]) -> Table:
    cells = []
    for row in rows:
        pairs = [row.pair(program, lambda figures: figures.memory) for program in PROGRAMS]
        pairs.append([row.peaks.get(name) for name in CONTESTANTS])
        cells.append([row.name])
        for pair in pairs:
            cells[-1] += [*(_text(value, 1e-6) for value in pair), _ratio(*pair)]
    note = (
        "Of each program the temporary memory, by `memory_analysis()` of the compiled program. Peak: "
        "`peak_bytes_in_use` of the device after all that was measured, arguments and tuning by the compiler "
        "included; each contestant has a process of its own for each row. A dash: not measured, or the "
        "device does not tell. A training step of Equinox donates no arguments, as it is usually written; "
        "one of flat does, and so do both in a scan."
    )
    return Table("Memory", _columns([*PROGRAMS.values(), "peak"], "MB"), cells, None, note)


# The run


def run(report: Report, problems: dict[str, Problem], deadline: float) -> None:
    """Measure row after row. A row for which less time is left than for the longest before is not run."""
    longest = 0.0
    report.save()
    for row in report.rows:
        start = time.monotonic()
        if deadline - start <= longest:
            row.status = "not run: out of time"
            report.save()
            continue
        row.status = "not finished"
        report.save()
        try:
            measure(row, problems[row.name], report, deadline)
            row.status = "agree"
        except OutOfTime:
            row.status = "stopped: out of time"
        except Failure as failure:
            row.status = f"error: {' '.join(str(failure).split())[:300]}".replace("|", "/")
        longest = max(longest, time.monotonic() - start)
        report.save()
        print(f"{row.name}: {row.status}, after {time.monotonic() - start:.0f} s", flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("build/gpu"), help="a folder for the tables")
    parser.add_argument("--minutes", type=float, default=8.0, help="the time for all (default: 8)")
    parser.add_argument("--rows", type=int, nargs="+", metavar="N", help="measure these alone, from 1 on")
    parser.add_argument("--small", action="store_true", help="small sizes and few calls")
    parser.add_argument(
        "--precision",
        choices=("default", "high", "highest"),
        default="highest",
        help="of products of matrices, as jax.default_matmul_precision has it (default: highest)",
    )
    parser.add_argument(
        "--tolerance", type=float, default=1e-3, help="how far gradients may differ (default: 1e-3)"
    )
    found = parser.parse_args()
    if not found.minutes >= 0 or math.isinf(found.minutes):
        parser.error(f"--minutes: expected a number of at least 0, found {found.minutes}")
    if not set(found.rows or [1]) <= set(range(1, len(ROWS) + 1)):
        parser.error(f"--rows: expected numbers from 1 to {len(ROWS)}, found {found.rows}")
    return found


def main() -> int:
    start = time.monotonic()
    given = arguments()
    # A process that takes most of a GPU at its start leaves no room for the other contestant.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    problems = SMALL if given.small else ROWS
    names = [name for i, name in enumerate(problems, 1) if i in (given.rows or range(1, len(ROWS) + 1))]
    options = Options(given.precision, 0.03 if given.small else 1.5, given.tolerance)
    given.out.mkdir(parents=True, exist_ok=True)
    report = Report([Row(name) for name in names], options, given.out)
    run(report, problems, start + 60 * given.minutes)
    print((given.out / "gpu.md").read_text())
    return 1 if any(row.status.startswith("error") for row in report.rows) else 0


if __name__ == "__main__":
    raise SystemExit(main())
