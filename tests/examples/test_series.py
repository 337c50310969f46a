"""Series in time: latent equations, controlled ones, and forecasts of what was measured."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

import flatlayers as fl
from tests.examples.scripts import load, run


@pytest.mark.slow
def test_latent_ode(monkeypatch, tmp_path):
    latent_ode = load("latent_ode")
    with pytest.raises(SystemExit, match="an error of at most 15%, found"):
        run(latent_ode, monkeypatch, tmp_path, ["--steps", "2"], SERIES=8, BATCH=4, TIMES=5)
    start, ts, ys = latent_ode.draw(np.random.default_rng(0), 4)
    matrix = np.array([[-0.1, 1.3], [-1.0, -0.1]])
    expected = [
        [scipy.linalg.expm(matrix * t) @ x for t in times] for x, times in zip(start, ts, strict=True)
    ]
    np.testing.assert_allclose(ys, expected, atol=1e-6)


@pytest.mark.slow
def test_spirals(monkeypatch, tmp_path):
    spirals = load("spirals_cde")
    times = np.linspace(0, 4 * np.pi, 20, dtype=np.float32)
    with pytest.raises(SystemExit, match="an accuracy of 100.0%, found"):
        run(spirals, monkeypatch, tmp_path, ["--steps", "1"], SPIRALS=16, BATCH=8, WIDTH=4, TIMES=times)
    series, clockwise = spirals.draw(np.random.default_rng(0))
    t, x, y = np.moveaxis(series, -1, 0)
    z = (x + 1j * y) / (x[0] + 1j * y[0])
    turns = np.where(clockwise, -1, 1)
    np.testing.assert_allclose(z, np.exp((2j * turns - 0.3) * t), atol=1e-4)


@pytest.mark.slow
def test_carbon_dioxide(monkeypatch, tmp_path, key):
    co2 = load("co2")
    with pytest.raises(SystemExit, match="expected a better forecast than that of the line"):
        run(co2, monkeypatch, tmp_path, ["--steps", "2"])
    # Without a season the equation is linear.
    controller = diffrax.PIDController(rtol=1e-6, atol=1e-6)
    node = fl.NeuralODE(co2.change, t1=30.0, with_time=True, stepsize_controller=controller)
    ps, st = fl.setup(key, node)
    rates = {"emission": jnp.array([2.0]), "growth": jnp.array([0.03]), "uptake": jnp.array([0.02])}
    season = jax.tree.map(jnp.zeros_like, ps.season.unpack())
    above, _ = node(jnp.array([36.0]), {**rates, "season": season}, st)
    rest = 2.0 / 0.02 - 0.03 / 0.02**2
    expected = (36 - rest) * np.exp(-0.6) + rest + 0.03 * 30 / 0.02
    np.testing.assert_allclose(above, expected, rtol=1e-5)


@pytest.mark.slow
def test_sunspots(monkeypatch, tmp_path):
    sunspots = load("sunspots")
    with pytest.raises(SystemExit, match="expected a forecast with 67% of the error of the mean"):
        run(sunspots, monkeypatch, tmp_path, ["--steps", "2"], BATCH=4)
    pieces, seen = sunspots.draw(jax.random.key(0), np.arange(100, dtype=np.float32))
    assert pieces.shape == (4, 33)
    assert seen.shape == (4, 22)
    np.testing.assert_allclose(np.diff(pieces, n=2), 0.0, atol=1e-4)  # a stretched line is a line


@pytest.mark.slow
def test_an_encoder_and_a_decoder(monkeypatch, tmp_path):
    encoder_decoder = load("encoder_decoder")
    with pytest.raises(SystemExit, match="expected the least error by the model, found"):
        run(encoder_decoder, monkeypatch, tmp_path, ["--steps", "2"], BATCH=4)
    times, series = encoder_decoder.read()
    assert (len(times), np.isfinite(series).sum()) == (526, 521)
    np.testing.assert_allclose(times[[0, -1]], [1958 + 2.5 / 12, 2001 + 11.5 / 12])
    # A line: its level is that of the middle of the last year, and a rule of growth is exact.
    ahead = np.arange(200) / 12
    (past, months), ys, level = encoder_decoder.pieces(1958 + ahead, 2 * ahead)
    assert (past.shape, months.shape) == ((117, 60, 4), (117, 24, 3))
    np.testing.assert_allclose(
        ys * encoder_decoder.SCALE, 2 * (np.arange(24) + 6.5) / 12 + 0 * level, rtol=1e-4
    )
    found = encoder_decoder.others(2 * ahead)["that and the mean growth"]
    np.testing.assert_allclose(found, ys * encoder_decoder.SCALE + level, rtol=1e-5)
