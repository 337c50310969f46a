"""A table of results, and the versions that it was measured with."""

import dataclasses
import importlib.metadata
from typing import Any

import flatlayers as fl


@dataclasses.dataclass(frozen=True)
class Table:
    """One table: what heads its columns, its rows of text, and the numbers behind them."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    data: Any
    note: str = ""

    def markdown(self) -> str:
        head, line = " | ".join(self.columns), "|---" * len(self.columns) + "|"
        rows = [f"| {' | '.join(row)} |" for row in self.rows]
        return "\n".join(
            [f"### {self.title}", "", *([self.note, ""] if self.note else []), f"| {head} |", line, *rows]
        )


def versions(*packages: str) -> str:
    """Name packages with their versions, and this library with its own."""
    found = [f"{name} {importlib.metadata.version(name)}" for name in packages]
    return ", ".join([*found, f"flatlayers {fl.__version__}"])
