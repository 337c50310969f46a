"""Partial differential equations: by a network, by an operator between functions, and with a learned term."""

import re
import sys

import jax
import numpy as np
import pytest

import flatlayers as fl
from tests.examples.scripts import load, run


# Burgers' equation


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_burgers_equation_is_learned_and_what_is_inaccurate_is_a_failure(monkeypatch, tmp_path, capsys):
    pinn = load("pinn")
    for name, value in (("POINTS", 100), ("FINISH", 50)):
        monkeypatch.setattr(pinn, name, value)
    trained, train = [], pinn.train
    monkeypatch.setattr(pinn, "train", lambda *args: trained.append(train(*args)) or trained[0])
    out = tmp_path / "pinn.png"
    monkeypatch.setattr(sys, "argv", ["pinn.py", "--steps", "100", "--out", str(out)])
    with pytest.raises(SystemExit, match="relative error of at most 1%, found"):
        pinn.main()
    assert out.read_bytes().startswith(b"\x89PNG")
    assert "against the closed form" in capsys.readouterr().out
    adam, lbfgs = (result.losses for result in trained[0])
    assert (len(adam), len(lbfgs)) == (100, 50)
    assert np.mean(adam[-20:]) < 0.8 * np.mean(adam[:20])
    assert lbfgs[-1] < 0.5 * lbfgs[0]


# Operators between functions


@pytest.mark.slow
def test_the_data_of_the_burgers_operator(monkeypatch, tmp_path):
    burgers = load("burgers_operator")
    start = burgers.draw(np.random.default_rng(1), 4)
    found = burgers.solve(start)
    # By Cole and Hopf, u = -2 nu phi_x / phi, where phi satisfies the heat equation.
    n, nu, k = 1024, burgers.VISCOSITY, 2 * np.pi * np.arange(513)
    u = np.fft.irfft(np.fft.rfft(start[..., 0].astype(float), norm="forward"), n, norm="forward")
    coefficients = np.fft.rfft(u)
    coefficients[:, 1:] /= 1j * k[1:]
    integral = np.fft.irfft(coefficients, n)
    phi = np.fft.rfft(np.exp(-integral / (2 * nu))) * np.exp(-nu * k**2 * burgers.END)
    exact = -2 * nu * np.fft.irfft(1j * k * phi, n) / np.fft.irfft(phi, n)
    np.testing.assert_allclose(found.end[..., 0], exact[:, :: n // burgers.POINTS], atol=2e-3)
    # In a few steps it is not learned.
    small = {"LEARNED": 50, "VALIDATED": 5, "TESTED": 8, "CHUNK": 2}
    options = ["--steps", "2", "--file", str(tmp_path / "run.safetensors")]
    with pytest.raises(SystemExit, match="a relative error of at most 2% on both grids, found"):
        run(burgers, monkeypatch, tmp_path, options, **small)


@pytest.mark.slow
def test_the_burgers_operator_at_two_resolutions(monkeypatch, tmp_path, capsys):
    burgers = load("burgers_operator")
    run(burgers, monkeypatch, tmp_path, ["--file", str(tmp_path / "run.safetensors")])
    text = capsys.readouterr().out
    for points in (64, 128):
        assert float(re.search(rf"operator on +{points} points: off by (\S+)%", text)[1]) < 2


def kuramoto_sivashinsky(u, length, end, dt):
    """By the exponential method of Kassam and Trefethen (2005)."""
    n = u.shape[-1]
    k = 2 * np.pi / length * np.arange(n // 2 + 1)
    linear = dt * (k**2 - k**4)
    slope = -0.5j * dt * np.where(np.arange(n // 2 + 1) < n // 2, k, 0)
    z = linear[:, None] + np.exp(1j * np.pi * (np.arange(1, 33) - 0.5) / 32)
    q, *f = (
        value.mean(axis=1).real
        for value in (
            (np.exp(z / 2) - 1) / z,
            (-4 - z + np.exp(z) * (4 - 3 * z + z**2)) / z**3,
            (2 + z + np.exp(z) * (z - 2)) / z**3,
            (-4 - 3 * z - z**2 + np.exp(z) * (4 - z)) / z**3,
        )
    )
    whole, half = np.exp(linear), np.exp(linear / 2)

    def rest(v):
        return slope * np.fft.rfft(np.fft.irfft(v, n) ** 2)

    v = np.fft.rfft(u)
    for _ in range(round(end / dt)):
        at_v = rest(v)
        a = half * v + q * at_v
        at_a = rest(a)
        at_b = rest(half * v + q * at_a)
        at_c = rest(half * a + q * (2 * at_b - at_v))
        v = whole * v + f[0] * at_v + 2 * f[1] * (at_a + at_b) + f[2] * at_c
    return np.fft.irfft(v, n)


@pytest.mark.slow
def test_the_data_and_the_parts_of_the_learned_equation(monkeypatch, tmp_path):
    learned = load("learned_pde")
    small = {"SPIN_UP": 5.0, "HORIZON": 10.0, "LEARNED": 3, "TESTED": 2, "WIDTH": 2, "MODES": 8}
    for name, value in small.items():
        monkeypatch.setattr(learned, name, value)
    start = learned.waves(np.random.default_rng(0), 3, 2 * learned.POINTS)
    paths = learned.resolved(start)
    assert paths.shape == (21, 3, learned.POINTS)
    for end, u in ((5.0, paths[0]), (15.0, paths[-1])):
        exact = kuramoto_sivashinsky(start, learned.LENGTH, end, 0.01)
        np.testing.assert_allclose(u, exact[:, ::2], atol=2e-3)
    k = 2 * np.pi / learned.LENGTH * 3
    x = k * np.arange(learned.POINTS) * learned.LENGTH / learned.POINTS
    u = np.sin(x).astype(np.float32)
    np.testing.assert_allclose(learned.term(learned.Advection(), u), -k * np.sin(x) * np.cos(x), atol=1e-5)
    np.testing.assert_allclose(learned.term(learned.Linear(), u), (k**2 - k**4) * u, atol=1e-2)
    # A forecast by the true term goes on as the path does.
    found = learned.forecast(learned.Advection(), paths[0])
    np.testing.assert_allclose(found, paths, atol=0.05)
    with pytest.raises(SystemExit, match="a term off by at most 3% and forecasts for 10 by 10%"):
        run(learned, monkeypatch, tmp_path, ["--steps", "50"])


@pytest.mark.slow
def test_the_learned_equation(monkeypatch, tmp_path, capsys):
    learned = load("learned_pde")
    run(learned, monkeypatch, tmp_path, [])
    text = capsys.readouterr().out
    assert float(re.search(r"learned term is off by (\S+)% on paths", text)[1]) < 3
    rows = {name: re.search(rf"\n{name} +(.*)\n", text)[1].split() for name in ("learned", "persistence")}
    after = [[float(value.rstrip("%")) for value in row] for row in rows.values()]
    assert after[0][2] < 10
    assert all(model < same for model, same in zip(*after, strict=True))
