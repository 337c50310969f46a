"""Loading and saving a vector of 200 MB, beside NumPy and the safetensors library, in turns.

`python benchmarks/files.py` prints the medians and their ratio to NumPy's. Each file is in the cache of the
system: the disk is not measured.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
import safetensors.numpy

import flatlayers as fl


NUMBERS = 50_000_000  # of float32
ROUNDS = 9


def main() -> None:
    leaf = (NUMBERS // 16,)
    layout = fl.Layout({f"layer_{i}": {"weight": leaf} for i in range(16)})
    ps = fl.ComponentVector(jnp.arange(NUMBERS, dtype=jnp.float32), layout)
    numbers = np.asarray(ps.data)
    with tempfile.TemporaryDirectory() as folder:
        files = {name: os.path.join(folder, name) for name in ("flatlayers", "numpy.npy", "safetensors")}
        views = {path: np.asarray(ps[path]) for path in layout.view_shapes}
        saves: dict[str, Callable[[], object]] = {
            "np.save": lambda: np.save(files["numpy.npy"], numbers),
            "safetensors": lambda: safetensors.numpy.save_file(views, files["safetensors"]),
            "fl.save": lambda: fl.save(files["flatlayers"], ps=ps),
        }
        loads: dict[str, Callable[[], object]] = {
            "np.load": lambda: np.load(files["numpy.npy"]),
            "np.load, to JAX": lambda: jnp.asarray(np.load(files["numpy.npy"])).block_until_ready(),
            "safetensors": lambda: safetensors.numpy.load_file(files["safetensors"]),
            "fl.load": lambda: fl.load(files["flatlayers"])["ps"].data.block_until_ready(),
        }
        for contestants in (saves, loads):
            report(contestants)


def report(contestants: dict[str, Callable[[], object]]) -> None:
    """Print the median time of each, in turns, and its ratio to the first."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(ROUNDS):
        for name, run in contestants.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(found) for name, found in times.items()}
    first = next(iter(medians.values()))
    for name, seconds in medians.items():
        print(f"{name:20}{1e3 * seconds:8.0f} ms{seconds / first:8.2f}")


if __name__ == "__main__":
    main()
