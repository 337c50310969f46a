"""Run all benchmarks, and write `results.json` and the tables of `README.md` beside this file.

python benchmarks/run.py            # about a quarter of an hour on two cores
python benchmarks/run.py --quick    # half of it, for a look; writes nothing
"""

import argparse
import dataclasses
import importlib.metadata
import json
import os
import platform
from pathlib import Path

import jax
from gradients import adam, mlp, neural_ode
from timing import Result


HERE = Path(__file__).parent
START, END = "<!-- tables: written by run.py -->", "<!-- end of tables -->"


@dataclasses.dataclass(frozen=True)
class Table:
    """One table: a title, what heads the rows, and a result a row."""

    title: str
    head: str
    rows: dict[str, Result]

    def markdown(self) -> str:
        names = list(next(iter(self.rows.values())).seconds)
        peers = [name for name in names if name != "tree"]
        lines = [
            f"### {self.title}",
            "",
            f"| {self.head} | tree, ms | {' | '.join(peers)} | compile: tree, {', '.join(peers)}, s |",
            "|---" * (len(names) + 2) + "|",
        ]
        for row, result in self.rows.items():
            cells = [f"{result.ratio(name, 'tree'):.2f}" for name in peers]
            compiling = ", ".join(f"{result.compile_seconds[name]:.1f}" for name in names)
            lines.append(
                f"| {row} | {1e3 * result.seconds['tree']:.3g} | {' | '.join(cells)} | {compiling} |"
            )
        return "\n".join(lines)


def measure(options: dict) -> list[Table]:
    """All tables, in order. Ratios are to the tree of arrays."""
    gradients = Table(
        "Gradient of a perceptron, batch 32",
        "leaves, parameters",
        {
            "100, 53 k": mlp(32, 49, **options),
            "16, 526 k": mlp(256, 7, **options),
            "100, 3.3 M": mlp(256, 49, **options),
        },
    )
    sizes = {"512, 3, 1": (512, 3, 1), "256, 3, 16": (256, 3, 16), "64, 2, 32": (64, 2, 32)}
    odes = Table(
        "Gradient of a neural ODE",
        "width, depth, batch",
        {row: neural_ode(w, w, d, b, **options) for row, (w, d, b) in sizes.items()},
    )
    depths = Table(
        "The same at every depth, a state of 64 numbers, width 256",
        "depth, batch",
        {
            f"{depth}, {batch}": neural_ode(64, 256, depth, batch, all_peers=False, **options)
            for batch in (1, 16)
            for depth in range(1, 9)
        },
    )
    steps = Table(
        "One Adam step",
        "leaves",
        {str(leaves): adam(32, leaves // 2 - 1, **options) for leaves in (6, 18, 66)},
    )
    return [gradients, odes, depths, steps]


def machine() -> str:
    """What the figures were measured with."""
    packages = ("jax", "jaxlib", "diffrax", "equinox", "optax")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    device = jax.devices()[0]
    where = f"{device.platform} ({device.device_kind}), {os.cpu_count()} cores"
    return f"{where}, Python {platform.python_version()}, {versions}"


def write(tables: list[Table]) -> None:
    text = "\n\n".join([f"Measured on: {machine()}.", *(table.markdown() for table in tables)])
    readme = HERE / "README.md"
    before, _, rest = readme.read_text().partition(START)
    after = rest.partition(END)[2]
    readme.write_text(f"{before}{START}\n\n{text}\n\n{END}{after}")
    results = {
        table.title: {row: dataclasses.asdict(result) for row, result in table.rows.items()}
        for table in tables
    }
    (HERE / "results.json").write_text(json.dumps({"machine": machine(), "tables": results}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one compilation, few calls, nothing written")
    quick = parser.parse_args().quick
    tables = measure({"compilations": 1, "seconds": 0.2} if quick else {"compilations": 2, "seconds": 0.5})
    for table in tables:
        print(table.markdown(), end="\n\n")
    if not quick:
        write(tables)


if __name__ == "__main__":
    main()
