"""The table for a GPU, on what there is: real runs in processes of their own, whole and cut off."""

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest


pytestmark = pytest.mark.long


ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"
ROWS = ["4, 1, 1", "4, 1, 8", "8, 2, 4", "8, 2, 8", "4, 1, 20 trajectories"]
PROGRAMS = ("gradient", "step", "scan")


@pytest.fixture(autouse=True)
def _as_a_user_has_it(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def start(out, *options):
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--small", "--out", str(out), *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finish(out, *options):
    """Run to the end: the exit code, and the rows of the JSON file."""
    process = start(out, *options)
    _, errors = process.communicate(timeout=500)
    assert errors.decode() == ""
    return process.returncode, read(out)


def read(out):
    """The rows of the JSON file, which are those of each table of the Markdown file."""
    assert sorted(path.name for path in out.iterdir()) == ["gpu.json", "gpu.md"]
    rows = json.loads((out / "gpu.json").read_text())["rows"]
    names = [row["name"] for row in rows]
    assert [list(table) for table in tables(out)] == [names] * 3
    assert [cells[-1] for cells in tables(out)[0].values()] == [row["status"] for row in rows]
    return rows


def tables(out):
    """The tables for times, compiling and memory: cells by the name of the row."""
    found = []
    for part in (out / "gpu.md").read_text().split("### ")[1:]:
        lines = [line.strip("| ").split(" | ") for line in part.splitlines() if line.startswith("|")]
        assert {len(line) for line in lines[2:]} == {len(lines[0])}
        found.append({line[0]: line[1:] for line in lines[2:]})
    return found


@pytest.mark.slow
def test_every_row_is_measured_and_agrees(tmp_path):
    code, rows = finish(tmp_path)
    assert code == 0
    assert [(row["name"], row["status"]) for row in rows] == [(name, "agree") for name in ROWS]
    times, compiling, memory = tables(tmp_path)
    for row in rows:
        name = row["name"]
        assert 0 < row["difference"] < 1e-5  # two orders of the same sums, in float32
        assert row["peaks"] == {"Equinox": None, "flat": None}  # a CPU does not tell
        assert memory[name][-3:] == ["-"] * 3
        for i, program in enumerate(PROGRAMS):
            figures = row["programs"][program]
            equinox, flat = figures["Equinox"], figures["flat"]
            columns = slice(3 * i, 3 * i + 3)
            for table, values in (
                (times, [1e3 * part["seconds"] for part in (equinox, flat)]),
                (compiling, [part["trace_seconds"] + part["compile_seconds"] for part in (equinox, flat)]),
                (memory, [1e-6 * part["memory"] for part in (equinox, flat)]),
            ):
                assert min(values) > 0
                cells = [float(cell) for cell in table[name][columns]]
                np.testing.assert_allclose(cells[:2], values, rtol=6e-3)
                np.testing.assert_allclose(cells[2], values[1] / values[0], atol=6e-3)
    text = (tmp_path / "gpu.md").read_text()
    for word in ("Measured on: cpu (cpu)", "jax ", "jaxlib ", "diffrax ", "equinox ", "precision `highest`"):
        assert word in text


def test_without_time_no_row_is_run(tmp_path):
    code, rows = finish(tmp_path, "--minutes", "0")
    assert code == 0
    assert [(row["name"], row["status"]) for row in rows] == [(name, "not run: out of time") for name in ROWS]
    assert "no device yet" in (tmp_path / "gpu.md").read_text()


@pytest.mark.slow
def test_a_row_stops_when_the_time_is_over(tmp_path):
    gpu = importlib.import_module("gpu")
    rows = [gpu.Row(name) for name in ROWS[3:]]
    report = gpu.Report(rows, gpu.Options("highest", seconds=0.1, tolerance=1e-3), tmp_path)
    gpu.run(report, gpu.SMALL, time.monotonic() + 2.0)
    assert [row["status"] for row in read(tmp_path)] == ["stopped: out of time", "not run: out of time"]


@pytest.mark.slow
def test_a_run_that_is_killed_leaves_the_rows_before(tmp_path):
    limit = time.monotonic() + 300
    with start(tmp_path, "--rows", "1", "2", "5") as process:
        try:
            while not (tmp_path / "gpu.md").exists() or tables(tmp_path)[0][ROWS[0]][-1] != "agree":
                assert process.poll() is None
                assert time.monotonic() < limit
                time.sleep(0.05)
        finally:
            process.kill()
    for path in tmp_path.glob(".*.new"):  # half of a file, which is never the one that is read
        path.unlink()
    first, second, third = read(tmp_path)
    assert first["status"] == "agree"
    assert sorted(first["programs"]) == sorted(PROGRAMS)
    assert second["status"] in ("not run", "not finished")
    assert (third["status"], third["programs"]) == ("not run", {})


@pytest.mark.slow
def test_gradients_that_differ_are_an_error(tmp_path):
    code, [row] = finish(tmp_path, "--rows", "2", "--tolerance", "0")
    assert code == 1
    expected = f"error: the gradients differ by {row['difference']:.2g}, expected at most 0"
    assert row["status"] == expected
    assert row["programs"] == {}


def test_differences_are_relative_to_the_largest_number():
    gpu = importlib.import_module("gpu")
    found = gpu.difference(
        [np.array([1.0, 2.0]), np.array([[3.0]])], [np.array([1.0, 4.0]), np.array([[3.0]])]
    )
    assert found == 0.5
    gpu.require_same("numbers", 0.5, 0.5)
    nan = gpu.difference([np.array([np.nan, 4.0])], [np.array([1.0, 4.0])])
    for value in (0.51, nan):
        with pytest.raises(gpu.Failure, match="the numbers differ by .*, expected at most 0.5"):
            gpu.require_same("numbers", value, 0.5)
    with pytest.raises(gpu.Failure, match="expected gradients of one size, found 2 and 3 numbers"):
        gpu.difference([np.ones(2)], [np.ones(3)])


@pytest.mark.slow
def test_trajectories_are_solves_of_their_own():
    """The loss of a batch is the mean of those of its samples alone, each with its own steps."""
    training = importlib.import_module("training")
    options = {"steps": 1, "t1": 20.0, "max_steps": 64}
    several, alone = training.Trajectories(4, 1, 5, **options), training.Problem(4, 1, 1, **options)
    y0 = several.start()
    for make in (training.tree_loss, training.flat_loss):
        loss, params = make(alone)
        expected = [jax.jit(loss)(params, y) for y in y0]
        loss, params = make(several)
        np.testing.assert_allclose(jax.jit(loss)(params, y0), jnp.mean(jnp.array(expected)), rtol=1e-5)
