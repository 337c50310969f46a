"""Run all benchmarks, and write `results.json` and the tables of `README.md` beside this file.

python benchmarks/run.py                  # about a quarter of an hour on two cores
python benchmarks/run.py --only layers    # one group of tables; those of other groups stay as they are
python benchmarks/run.py --quick          # half the time, for a look; writes nothing
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
from layers import attention, batch_norm, conv, lstm, repeated
from timing import Result


HERE = Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class Table:
    """One table: a title, what heads the rows, a result a row, and whose time is 1."""

    title: str
    head: str
    rows: dict[str, Result]
    unit: str = "tree"

    def markdown(self) -> str:
        names = list(next(iter(self.rows.values())).seconds)
        peers = [name for name in names if name != self.unit]
        lines = [
            f"### {self.title}",
            "",
            f"| {self.head} | {self.unit}, ms | {' | '.join(peers)} | compile: {', '.join(names)}, s |",
            "|---" * (len(names) + 2) + "|",
        ]
        for row, result in self.rows.items():
            cells = [f"{result.ratio(name, self.unit):.2f}" for name in peers]
            compiling = ", ".join(f"{result.compile_seconds[name]:.1f}" for name in names)
            lines.append(
                f"| {row} | {1e3 * result.seconds[self.unit]:.3g} | {' | '.join(cells)} | {compiling} |"
            )
        return "\n".join(lines)


def measure_vectors(options: dict) -> list[Table]:
    """One vector against a tree of arrays."""
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


def measure_layers(options: dict) -> list[Table]:
    """Layers against those of other libraries."""
    layers = Table(
        "Value and gradient of one layer",
        "layer and size",
        {
            "`Conv` 3x3, 16 to 32 channels, (16, 32, 32)": conv(16, 32, 16, 32, **options),
            "`Conv` 3x3, 1 to 16 channels, (32, 28, 28)": conv(32, 28, 1, 16, **options),
            "`BatchNorm`, (32, 16, 16, 32)": batch_norm(32, 16, 32, **options),
            "`BatchNorm`, (64, 32, 32, 64)": batch_norm(64, 32, 64, **options),
            "`LSTM` 32 to 32, 100 steps, batch 16": lstm(16, 32, 32, **options),
            "`LSTM` 64 to 128, 100 steps, batch 32": lstm(32, 64, 128, **options),
            "`MultiHeadAttention` 64, 4 heads, (8, 32)": attention(8, 32, 64, 4, **options),
            "`MultiHeadAttention` 128, 8 heads, (8, 128)": attention(8, 128, 128, 8, **options),
        },
        unit="flatlayers",
    )
    equal = Table(
        "Equal layers one after another, batch 32",
        "layer",
        {"64 times `Dense(64, 64, tanh)`": repeated(64, 64, **options)},
        unit="chain",
    )
    return [layers, equal]


GROUPS = {"vectors": measure_vectors, "layers": measure_layers}


def machine() -> str:
    """What the figures were measured with."""
    packages = ("jax", "jaxlib", "diffrax", "equinox", "optax", "flax")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    device = jax.devices()[0]
    where = f"{device.platform} ({device.device_kind}), {os.cpu_count()} cores"
    return f"{where}, Python {platform.python_version()}, {versions}"


def write(group: str, tables: list[Table]) -> None:
    """Put the tables of a group in the place of those in `README.md` and `results.json`."""
    start, end = f"<!-- {group}: written by run.py -->", f"<!-- end of {group} -->"
    text = "\n\n".join([f"Measured on: {machine()}.", *(table.markdown() for table in tables)])
    readme = HERE / "README.md"
    before, _, rest = readme.read_text().partition(start)
    after = rest.partition(end)[2]
    readme.write_text(f"{before}{start}\n\n{text}\n\n{end}{after}")
    path = HERE / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    results[group] = {
        "machine": machine(),
        "tables": {
            table.title: {row: dataclasses.asdict(result) for row, result in table.rows.items()}
            for table in tables
        },
    }
    path.write_text(json.dumps(results, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=GROUPS, help="measure one group of tables")
    parser.add_argument("--quick", action="store_true", help="one compilation, few calls, nothing written")
    arguments = parser.parse_args()
    quick = arguments.quick
    options = {"compilations": 1, "seconds": 0.2} if quick else {"compilations": 2, "seconds": 0.5}
    for group, measure in GROUPS.items():
        if arguments.only in (None, group):
            tables = measure(options)
            for table in tables:
                print(table.markdown(), end="\n\n")
            if not quick:
                write(group, tables)


if __name__ == "__main__":
    main()
