"""Times of a training step, from the numbers of the benchmark."""

from collections.abc import Iterator, Mapping
from typing import Any


# The groups of the benchmark, by the column that shows their version of JAX.
GROUPS = ("training", "training-newest")
SIZES = ("32, 2, 1", "64, 2, 32", "256, 3, 32", "512, 3, 1", "512, 8, 256")
KINDS = ("Equinox step", "flat step", "flat steps in a scan")


def table(results: Mapping[str, Any]) -> str:
    """Return a table of milliseconds: a row for each size, three columns for each version of JAX."""
    groups = [results[name] for name in GROUPS if name in results]
    versions = [_version(group["machine"]) for group in groups]
    columns = [
        f"{kind}, {version}" for version in versions for kind in ("Equinox", "flatlayers", "in a scan")
    ]
    head = ["width, depth, batch", *columns]
    rows = [[size, *_times(groups, size)] for size in SIZES]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---", *["---:"] * len(columns)], *rows])


def _times(groups: list[Any], size: str) -> Iterator[str]:
    for group in groups:
        seconds = group["tables"]["Training, over sizes"][size]["seconds"]
        yield from (f"{1e3 * seconds[kind]:.3g}" for kind in KINDS)


def _version(machine: str) -> str:
    version = next(part for part in machine.split(", ") if part.startswith("jax "))
    return version.replace("jax", "JAX")
