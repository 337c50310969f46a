"""Distributions: a density by a normalizing flow, and a stochastic process."""

import re

import numpy as np
import pytest
from scipy import stats

from tests.examples.scripts import load, run


def test_the_two_moons_and_the_normal_distribution_next_to_them(key):
    density = load("density")
    x = np.asarray(density.two_moons(key, 20_000), float)
    np.testing.assert_allclose(x.mean(0), 0, atol=0.03)
    np.testing.assert_allclose(x.std(0), 1, atol=0.25)
    normal = stats.multivariate_normal(x.mean(0), np.cov(x.T))
    np.testing.assert_allclose(density.normal_log_density(x), normal.logpdf(x).mean(), rtol=1e-3)


@pytest.mark.slow
def test_the_density_in_a_few_steps(tmp_path, monkeypatch, capsys):
    density = load("density")
    for name, value in {"BATCH": 8, "POINTS": 41, "REQUIRED": -1.0}.items():
        monkeypatch.setattr(density, name, value)
    out = tmp_path / "density.png"
    assert density.main(["--steps", "3", "--out", str(out)]) == 1
    assert out.read_bytes().startswith(b"\x89PNG")
    text = capsys.readouterr().out
    assert float(re.search(r"An integral of (\S+)", text)[1]) == pytest.approx(1, abs=0.01)
    assert "expected an integral of 1" in text


@pytest.mark.slow
def test_ornstein_uhlenbeck(monkeypatch, tmp_path):
    process = load("ornstein_uhlenbeck")
    with pytest.raises(SystemExit, match="errors of at most 5%, found"):
        run(process, monkeypatch, tmp_path, ["--steps", "1"], PATHS=8, SAMPLES=200)
    monkeypatch.setattr(process, "PATHS", 20_000)
    paths = process.draw(np.random.default_rng(0))
    mean, variance = process.moments(process.START, process.TIMES)
    np.testing.assert_allclose(paths[:, 1:].mean(0), mean, rtol=0.02)
    np.testing.assert_allclose(paths[:, 1:].var(0), variance, rtol=0.05)
    m, v = process.moments(3.0, 1e-6)  # dm = rate (level - m) dt, dv = (noise^2 - 2 rate v) dt
    np.testing.assert_allclose([m - 3.0, v], [1e-6 * (1.0 - 3.0), 1e-6 * 0.64], rtol=1e-3)


def test_the_energy_score_is_least_for_the_same_distribution():
    process = load("ornstein_uhlenbeck")
    rng = np.random.default_rng(0)
    observed = rng.normal(size=50_000)

    def score(mean, deviation):
        return process.energy_score(mean + deviation * rng.normal(size=(2, 50_000)), observed)

    same = score(0.0, 1.0)
    np.testing.assert_allclose(same, 1 / np.sqrt(np.pi), atol=0.01)
    assert all(same < score(*other) for other in [(0.3, 1.0), (0.0, 0.7), (0.0, 1.4)])
