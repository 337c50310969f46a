"""The examples, in a few steps: each as a user runs it, with x64 off and JAX's own promotion."""

import importlib.util
import re
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from scipy import stats

import flatlayers as fl


EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(autouse=True)
def _as_a_user_has_it():
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def load(name, needs=("matplotlib", "tqdm")):
    """An example as a module of its own."""
    for package in needs:
        pytest.importorskip(package)
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# Burgers' equation


def test_the_closed_form_of_burgers_equation_solves_it():
    pinn = load("pinn")
    x, t = np.meshgrid(np.linspace(-0.9, 0.9, 8), [0.1, 0.4, 0.9])
    h, u = 1e-4, pinn.closed_form
    u_t = (u(x, t + h) - u(x, t - h)) / (2 * h)
    u_x = (u(x + h, t) - u(x - h, t)) / (2 * h)
    u_xx = (u(x + h, t) - 2 * u(x, t) + u(x - h, t)) / h**2
    np.testing.assert_allclose(u_t + u(x, t) * u_x, pinn.VISCOSITY * u_xx, atol=1e-4)
    np.testing.assert_allclose(u(x, 0 * t), -np.sin(np.pi * x), atol=1e-12)
    np.testing.assert_allclose(u(np.ones(3), t[:, 0]), 0, atol=1e-12)


def test_the_network_of_burgers_equation(key):
    pinn = load("pinn")
    model = pinn.Velocity(fl.MLP(2, (8, 8), 1))
    with jax.enable_x64(True):
        ps, st = fl.setup(key, model, float)
        points = jax.random.uniform(key, (20, 2), float)
        h, along_x, along_t = 1e-4, np.array([1e-4, 0]), np.array([0, 1e-4])

        def u(points):
            return np.asarray(model(points, ps, st)[0])

        u_t = (u(points + along_t) - u(points - along_t)) / (2 * h)
        u_x = (u(points + along_x) - u(points - along_x)) / (2 * h)
        u_xx = (u(points + along_x) - 2 * u(points) + u(points - along_x)) / h**2
        found = pinn.residual(model, points, ps, st)
        np.testing.assert_allclose(found, u_t + u(points) * u_x - pinn.VISCOSITY * u_xx, atol=1e-5)
        x = np.linspace(-1, 1, 5)
        np.testing.assert_allclose(u(np.stack([x, 0 * x], -1)), -np.sin(np.pi * x), atol=1e-12)
        np.testing.assert_allclose(u(np.array([[-1.0, 0.3], [1.0, 0.7]])), 0, atol=1e-12)


def test_burgers_equation_is_learned_and_what_is_inaccurate_is_a_failure(monkeypatch, tmp_path, capsys):
    pinn = load("pinn")
    for name, value in (("POINTS", 100), ("CHUNK", 50), ("FINISH", 50)):
        monkeypatch.setattr(pinn, name, value)
    trained, train = [], pinn.train
    monkeypatch.setattr(pinn, "train", lambda *args: trained.append(train(*args)) or trained[0])
    out = tmp_path / "pinn.png"
    monkeypatch.setattr(sys, "argv", ["pinn.py", "--steps", "60", "--out", str(out)])
    with pytest.raises(SystemExit, match="relative error of at most 1%, found"):
        pinn.main()
    assert out.read_bytes().startswith(b"\x89PNG")
    assert "against the closed form" in capsys.readouterr().out
    adam, lbfgs = np.split(trained[0][1], [100])
    assert len(lbfgs) == 50
    assert np.mean(adam[-20:]) < 0.8 * np.mean(adam[:20])
    assert lbfgs[-1] < 0.5 * lbfgs[0]


# A layer of one's own


def test_a_layer_written_in_three_ways(capsys):
    custom_layer = load("custom_layer", needs=())
    assert custom_layer.main([]) == 0
    assert "The three agree." in capsys.readouterr().out


def test_another_layer_is_found_out(monkeypatch, capsys):
    custom_layer = load("custom_layer", needs=())
    plain, container, _ = custom_layer.MODELS
    wide = custom_layer.PlainNetwork(custom_layer.IN, custom_layer.HIDDEN + 1, custom_layer.OUT)
    monkeypatch.setattr(custom_layer, "MODELS", (plain, container, wide))
    assert custom_layer.main(["--seed", "1"]) == 1
    assert "The three do not agree." in capsys.readouterr().out


# Pendulums


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


def test_the_pendulum_networks_train_and_swing(monkeypatch, key):
    pendulum = load("pendulum")
    monkeypatch.setattr(pendulum, "CHUNK", 5)
    monkeypatch.setattr(pendulum, "LONG", 0.5)
    times = np.linspace(0, 0.5, 6)
    field = fl.HamiltonianNN(pendulum.SeparableEnergy(fl.MLP(1, (4,), 1), fl.MLP(1, (4,), 1)))
    ps = pendulum.train(field, "test", 10, key)
    paths = [solve(field, ps, times) for solve in (pendulum.symplectic, pendulum.adaptive)]
    np.testing.assert_allclose(*paths, atol=0.01)
    assert paths[0].shape == (6, 2, 2)


# A density


def test_the_two_moons_and_the_normal_distribution_next_to_them(key):
    density = load("density")
    x = np.asarray(density.two_moons(key, 20_000), float)
    np.testing.assert_allclose(x.mean(0), 0, atol=0.03)
    np.testing.assert_allclose(x.std(0), 1, atol=0.25)
    normal = stats.multivariate_normal(x.mean(0), np.cov(x.T))
    np.testing.assert_allclose(density.normal_log_density(x), normal.logpdf(x).mean(), rtol=1e-3)


def test_the_density_in_a_few_steps(tmp_path, monkeypatch, capsys):
    density = load("density")
    for name, value in {"CHUNK": 2, "BATCH": 8, "POINTS": 41, "REQUIRED": -1.0}.items():
        monkeypatch.setattr(density, name, value)
    out = tmp_path / "density.png"
    assert density.main(["--steps", "3", "--out", str(out)]) == 1
    assert out.read_bytes().startswith(b"\x89PNG")
    text = capsys.readouterr().out
    assert float(re.search(r"An integral of (\S+)", text)[1]) == pytest.approx(1, abs=0.01)
    assert "expected an integral of 1" in text
