"""Times of a training step, from the numbers of the benchmark."""

from collections.abc import Mapping
from typing import Any


SIZES = ("32, 2, 1", "64, 2, 32", "256, 3, 32", "512, 3, 1", "512, 8, 256")
KINDS = ("Equinox step", "flat step", "flat steps in a scan")


def table(results: Mapping[str, Any]) -> str:
    """Return a table of milliseconds, with a row for each size."""
    group = results["training"]
    head = [f"{_version(group['machine'])}: width, depth, batch", "Equinox", "flatlayers", "in a scan"]
    rows = [[size, *_times(group["tables"]["Training, over sizes"][size]["seconds"])] for size in SIZES]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---", "---:", "---:", "---:"], *rows])


def _times(seconds: Mapping[str, float]) -> list[str]:
    """Milliseconds with three digits, and no power of ten."""
    return [f"{float(f'{1e3 * seconds[kind]:.3g}'):g}" for kind in KINDS]


def _version(machine: str) -> str:
    version = next(part for part in machine.split(", ") if part.startswith("jax "))
    return version.replace("jax", "JAX")
