"""Flat vectors with names: a layer in three ways, an epidemic, and derivatives of second order."""

import re

import jax
import numpy as np
import pytest

import flatlayers as fl
from tests.examples.scripts import load, run


pytestmark = pytest.mark.long


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


# Parameters of equations


@pytest.mark.slow
def test_an_epidemic(monkeypatch, tmp_path, capsys):
    flat_vectors = load("flat_vectors")
    with pytest.raises(SystemExit, match="expected rates off by at most 3%"):
        run(flat_vectors, monkeypatch, tmp_path, ["--steps", "2"])
    ys = flat_vectors.epidemic(fl.ComponentVector.of(flat_vectors.TRUE))
    np.testing.assert_allclose(ys.data.sum(axis=-1), 1.0, atol=1e-5)
    # The final share that was never infected: log s = (infection / recovery) (s - 1), up to the patients.
    final = float(ys.susceptible[-1])
    assert np.log(final / 0.999) == pytest.approx(4.0 * (final + float(ys.infected[-1]) - 1), abs=1e-3)
    assert float(re.search(r"the Jacobian by (\S+)%", capsys.readouterr().out)[1]) < 1


@pytest.mark.slow
def test_second_order(monkeypatch, tmp_path, capsys):
    second_order = load("second_order")
    monkeypatch.setattr(second_order, "CHUNK", 5)
    monkeypatch.setattr(second_order, "REQUIRED", 0.0)
    out = tmp_path / "second_order.png"
    assert second_order.main(["--steps", "20", "--out", str(out)]) == 1
    assert out.read_bytes().startswith(b"\x89PNG")
    assert "expected deviations within" in capsys.readouterr().out
    with jax.enable_x64(True):
        times, data, _ = second_order.load()
        posterior = second_order.Posterior(times, data)
        mode, hessian = posterior.mode()
        gradient = jax.grad(posterior.energy)(mode)
    np.testing.assert_allclose(gradient.data, 0.0, atol=1e-6)
    assert np.linalg.eigvalsh(hessian.data).min() > 0
