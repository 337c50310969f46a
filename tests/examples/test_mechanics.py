"""Pendulums, oscillators and spirals, and what it costs to differentiate a solve."""

import jax
import numpy as np
import pytest

import flatlayers as fl
from tests.examples.scripts import load, run


pytestmark = pytest.mark.long


def test_a_pendulum_that_keeps_its_energy_passes(tmp_path, monkeypatch, capsys):
    pendulum = load("pendulum")
    times = np.linspace(0, 1, 5)
    true = np.asarray(pendulum.swing(pendulum.STARTS, times))
    np.testing.assert_allclose(
        pendulum.energy(true), np.tile(9.81 * (1 - np.cos([1.0, 1.5])), (5, 1)), rtol=1e-4
    )
    monkeypatch.setattr(pendulum, "train", lambda field, *args: None)
    monkeypatch.setattr(pendulum, "LONG", 1.0)
    long = np.repeat(true, 201, axis=0)[:1001]
    monkeypatch.setattr(pendulum, "symplectic", lambda *args: 1.005 * long)
    monkeypatch.setattr(pendulum, "adaptive", lambda *args: 1.05 * long)
    out = tmp_path / "pendulum.png"
    assert pendulum.main(["--out", str(out)]) == 0
    monkeypatch.setattr(pendulum, "symplectic", lambda *args: 1.05 * long)
    assert pendulum.main(["--out", str(out)]) == 1
    assert out.read_bytes().startswith(b"\x89PNG")
    assert "neural ODE          off by" in capsys.readouterr().out


@pytest.mark.slow
def test_the_pendulum_networks_train_and_swing(monkeypatch, key):
    pendulum = load("pendulum")
    monkeypatch.setattr(pendulum, "LONG", 0.5)
    times = np.linspace(0, 0.5, 6)
    field = fl.HamiltonianNN(pendulum.SeparableEnergy(fl.MLP(1, (4,), 1), fl.MLP(1, (4,), 1)))
    ps = pendulum.train(field, 10, key)
    paths = [solve(field, ps, times) for solve in (pendulum.symplectic, pendulum.adaptive)]
    np.testing.assert_allclose(*paths, atol=0.01)
    assert paths[0].shape == (6, 2, 2)


@pytest.mark.slow
def test_oscillators(monkeypatch, tmp_path):
    oscillators = load("oscillators")
    small = {"OSCILLATORS": 8, "BATCH": 4, "TIMES": np.linspace(0.0, 10.0, 20), "PHASES": {1.0: 1e-2}}
    with pytest.raises(SystemExit, match="a loss of at most 0.004 after the second phase, found"):
        run(oscillators, monkeypatch, tmp_path, ["--steps", "2"], **small)
    paths = np.asarray(oscillators.draw(jax.random.key(0)))
    assert paths.shape == (20, 8, 2)
    conserved = (paths - np.log1p(paths)).sum(axis=-1)  # of x' = y / (1 + y), y' = -x / (1 + x)
    np.testing.assert_allclose(conserved, np.broadcast_to(conserved[0], (20, 8)), atol=1e-3)


@pytest.mark.slow
def test_a_spiral(monkeypatch, tmp_path):
    spiral = load("spiral")
    with pytest.raises(SystemExit, match="expected errors of at most 0.1, found"):
        run(spiral, monkeypatch, tmp_path, ["--steps", "2"])
    path = spiral.law(np.linspace(0.0, 2.0, 401))
    change = np.gradient(path, 5e-3, axis=0)
    np.testing.assert_allclose(change[1:-1], (path**3 @ spiral.MATRIX.T)[1:-1], atol=0.1)


@pytest.mark.slow
def test_adjoints(tmp_path, monkeypatch, capsys):
    adjoints = load("adjoints")
    out = tmp_path / "adjoints.png"
    assert adjoints.main(["--steps", "1", "--out", str(out)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(adjoints, "REQUIRED", 0)
    assert adjoints.main(["--steps", "1", "--out", str(out)]) == 1
    assert "expected errors of at most 0 tolerances" in capsys.readouterr().out
