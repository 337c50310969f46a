"""Handwritten digits: a deep equilibrium, a run that is killed and goes on, several devices."""

import os
import re
import subprocess
import sys
import time

import numpy as np
import pytest

import flatlayers as fl
from tests.examples.scripts import EXAMPLES, load, run
from tests.helpers import assert_same


# A deep equilibrium


@pytest.mark.slow
def test_digits_by_a_deep_equilibrium(monkeypatch, tmp_path, capsys):
    pytest.importorskip("sklearn")
    digits = load("digits_deq")
    small = {"BATCH": 8, "FEATURES": 4, "APPLICATIONS": 3}
    followed, residuals = [], digits.residuals
    monkeypatch.setattr(digits, "residuals", lambda *args: followed.append(residuals(*args)) or followed[-1])
    with pytest.raises(SystemExit, match="an accuracy of at least 97%, found"):
        run(digits, monkeypatch, tmp_path, ["--steps", "10"], **small)
    assert "test images read right" in capsys.readouterr().out
    # One application from zero is the same for all; then the residuals fall.
    for values in followed:
        np.testing.assert_allclose(values[:2], followed[0][:2], rtol=1e-6)
        assert values[3] < 0.2 * values[0]


# Digits


def digits_script(tmp_path, name, *options):
    command = [sys.executable, str(EXAMPLES / "digits.py"), "--steps", "100", *options]
    command += ["--file", str(tmp_path / f"{name}.safetensors"), "--out", str(tmp_path / f"{name}.png")]
    return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(EXAMPLES.parent)})


@pytest.mark.slow
def test_digits_killed_and_resumed(tmp_path):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    killed, file = digits_script(tmp_path, "killed"), tmp_path / "killed.safetensors"
    while killed.poll() is None and not file.exists():
        time.sleep(0.01)
    killed.kill()
    killed.wait()
    assert fl.describe_file(file)["step"] == 50
    assert not (tmp_path / "killed.png").exists()
    for process in (
        digits_script(tmp_path, "killed", "--resume"),
        digits_script(tmp_path, "whole"),
    ):
        assert process.wait() in (0, 1)
    resumed, whole = (fl.load(tmp_path / f"{name}.safetensors") for name in ("killed", "whole"))
    assert resumed["step"] == whole["step"] == 100
    assert_same(*([part[name] for name in ("ps", "st", "opt_state")] for part in (resumed, whole)))
    np.testing.assert_array_equal(resumed["losses"], whole["losses"])
    assert_same(resumed["best"]["ps"], whole["best"]["ps"])
    assert (resumed["best"]["step"], resumed["best"]["value"]) == (
        whole["best"]["step"],
        whole["best"]["value"],
    )
    assert (tmp_path / "killed.png").read_bytes() == (tmp_path / "whole.png").read_bytes()


# Several devices


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--devices", "8"), ("--processes", "2", "--devices", "2")])
def test_digits_on_several_devices(options):
    pytest.importorskip("sklearn")
    command = [sys.executable, str(EXAMPLES / "distributed.py"), "--steps", "8", *options]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment |= {"PYTHONPATH": str(EXAMPLES.parent), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    # So few steps do not learn it.
    assert done.returncode == 1, done.stderr
    lines = [line for line in done.stdout.splitlines() if not line.startswith("[Gloo]")]
    devices = {(): 1, ("--devices", "8"): 8}.get(options, 4)
    assert lines[0].startswith(f"Devices: {devices}, processes: {2 if '--processes' in options else 1}, ")
    alone, together, apart = (re.match(r"(.*?) +(\S+) +(\S+) +([\d,]+)  (.*)", line) for line in lines[2:5])
    assert alone[2] == together[2] == apart[2]
    assert alone[3] == together[3] == apart[3]
    assert float(alone[3]) < float(alone[2])
    whole, part = (int(found[4].replace(",", "")) for found in (alone, apart))
    assert whole / devices <= part <= whole / devices + 100
    if devices > 1:
        assert apart[5].startswith("1 all-gather, 1 reduce-scatter, ")
    assert float(re.search(r"differ by at most (\S+);", lines[5])[1]) < 1e-9
