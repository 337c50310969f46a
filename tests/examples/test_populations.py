"""Predators and prey: Lotka-Volterra, a universal equation, and an ensemble over the devices."""

import re

import jax.numpy as jnp
import numpy as np
import pytest

import flatlayers as fl
from tests.examples.scripts import load, run


@pytest.mark.slow
def test_hare_and_lynx(monkeypatch, tmp_path, capsys):
    lynx_hare = load("lynx_hare")
    run(lynx_hare, monkeypatch, tmp_path, ["--steps", "2"], FINISH=2)
    text = capsys.readouterr().out
    for name in ("Lotka-Volterra", "neural ODE", "UDE"):
        assert re.search(rf"\n{name} +\d+ +[\d.]+ +[\d.]+ +[\d.]+\n", text)
    # The solution in logarithms, from which equal rates and populations of 1 do not move.
    model = lynx_hare.lotka_volterra(np.zeros(2, np.float32))
    np.testing.assert_allclose(model.predict(model.ps, np.linspace(0.0, 3.0, 4)), 0.0, atol=1e-6)
    # Growth alone: the hares double each year.
    rates = {"growth": np.log(np.log(2.0)), "predation": -40.0, "decay": -40.0, "conversion": -40.0}
    ps = model.ps.replace(log_rates=rates)
    found = model.predict(ps, np.linspace(0.0, 3.0, 4))
    np.testing.assert_allclose(np.exp(found), np.stack([2.0 ** np.arange(4), np.ones(4)], axis=-1), rtol=1e-4)
    # A fit that fails says so.
    monkeypatch.setattr(lynx_hare, "MAX_STEPS", 1)
    with pytest.raises(SystemExit, match="Lotka-Volterra: the fit failed, its loss is not"):
        lynx_hare.main()


@pytest.mark.slow
def test_a_universal_equation(monkeypatch, tmp_path, key):
    example = load("universal_ode")
    with pytest.raises(SystemExit, match="expected all to be within 15%, found"):
        run(example, monkeypatch, tmp_path, ["--steps", "2"])
    # With the formula in the place of the network, the fixed point of the equations is one.
    law = example.PredatorPrey(fl.WrappedFunction(lambda x: 1.5 / (1 + 0.9 * x)))
    ps, st = fl.setup(key, law)
    ps = ps.replace(log_rates={name: np.log(rate) for name, rate in example.RATES.items()})
    prey = 0.5 / (1.5 - 0.9 * 0.5)  # g = death / efficiency
    predators = (1 - prey / 3) * (1 + 0.9 * prey) / 1.5
    np.testing.assert_allclose(law(np.log([prey, predators]), ps, st)[0], 0.0, atol=1e-6)


@pytest.mark.slow
def test_ensemble(monkeypatch, tmp_path, key, capsys):
    ensemble = load("ensemble")
    with pytest.raises(SystemExit, match="expected a spread 1e\\+09 times as large after 1920, found"):
        run(ensemble, monkeypatch, tmp_path, ["--steps", "2"], REQUIRED=1e9, FORECAST=22.0)
    assert "Each device has 2 of 10 members" in capsys.readouterr().out  # on five of eight devices
    # Without hidden units the law is a constant velocity.
    ps, st = fl.setup(key, ensemble.MODEL)
    ps = ps.replace(ode=ps.ode.map(jnp.zeros_like)).replace(**{"ode.layer_1.bias": jnp.array([0.1, -0.2])})
    line = ensemble.DATA[0] + np.outer([0.0, 1.0, 4.0], [0.1, -0.2])
    np.testing.assert_allclose(ensemble.predict(ps, st, np.array([0.0, 1.0, 4.0])), line, atol=1e-5)
