"""The plot of the training benchmark."""

from pathlib import Path
from typing import Any

import matplotlib


matplotlib.use("Agg")
import matplotlib.pyplot as plt


SHOWN = {
    "gradient": ("flat", "Equinox"),
    "training step": ("flat step", "Equinox step"),
    "training step in a scan": ("flat steps in a scan", "Equinox step"),
}


def plot_grid(tables: dict[str, Any], path: Path) -> None:
    """Times relative to Equinox: over sizes, and over the steps of the solver."""
    sizes, steps = list(tables.values())[:2]
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(12, 4.5), width_ratios=(3, 1), sharey=True, layout="constrained"
    )
    markers = "osd"
    for (label, (name, unit)), marker in zip(SHOWN.items(), markers, strict=True):
        for axes, rows in ((left, sizes), (right, steps)):
            ratios = [row["seconds"][name] / row["seconds"][unit] for row in rows.values()]
            axes.plot(list(rows), ratios, marker, markersize=5, label=label)
    for axes, title in ((left, "width, depth, batch"), (right, "accepted steps (64, 2, 32)")):
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set_xlabel(title)
        axes.set_ylim(0, 1.2)
        axes.grid(axis="y", alpha=0.3)
    left.tick_params(axis="x", rotation=90)
    left.set_ylabel("time, relative to Equinox + diffrax + optax")
    left.legend(loc="upper left", ncols=3)
    figure.savefig(path, dpi=110)
    plt.close(figure)
