"""The examples, in a few steps: each as a user runs it, with x64 off and JAX's own promotion."""

import importlib.util
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from scipy import stats

import flatlayers as fl
from tests.helpers import assert_same


EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(autouse=True)
def _next_to_each_other(monkeypatch):
    """Examples import each other, as they do when they are run."""
    monkeypatch.syspath_prepend(str(EXAMPLES))


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


# Hare and lynx


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


# A density


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


# Networks inside solvers


def run(example, monkeypatch, tmp_path, options, **constants):
    """Run an example's `main` with other constants, and check that there is a picture."""
    for name, value in constants.items():
        monkeypatch.setattr(example, name, value)
    out = tmp_path / "picture.png"
    monkeypatch.setattr(sys, "argv", ["example.py", *options, "--out", str(out)])
    try:
        example.main()
    finally:
        assert out.read_bytes().startswith(b"\x89PNG")


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


# The command line


def test_the_command_line(tmp_path, capsys):
    parse = load("command_line", needs=()).parse
    texts = {"description": "Do it.", "out": "it.png", "seed": "of it"}
    options = parse(**texts, argv=[])
    assert (options.steps, options.seed, options.out) == (1000, 0, Path("it.png"))
    out = tmp_path / "other.png"
    options = parse(**texts, steps=7, chunk=50, argv=["--seed", "3", "--out", str(out)])
    assert (options.steps, options.seed, options.out) == (50, 3, out)
    for argv, message in (
        (["--steps", "0"], "expected a positive number"),
        (["--out", "no/it.png"], "no directory"),
    ):
        with pytest.raises(SystemExit) as failure:
            parse(**texts, argv=argv)
        assert failure.value.code == 2
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse(**texts, steps_of="rounds", chunk=50, argv=["--help"])
    assert "rounds, rounded up to 50s (default: 1000)" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_each_example_is_in_the_readme(path):
    if path.stem != "command_line":
        assert f"[`{path.name}`]({path.name})" in (EXAMPLES / "README.md").read_text()


# The cores of the notebooks


@pytest.mark.slow
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
def test_a_spiral(monkeypatch, tmp_path):
    spiral = load("spiral")
    with pytest.raises(SystemExit, match="expected errors of at most 0.1, found"):
        run(spiral, monkeypatch, tmp_path, ["--steps", "2"])
    path = spiral.law(np.linspace(0.0, 2.0, 401))
    change = np.gradient(path, 5e-3, axis=0)
    np.testing.assert_allclose(change[1:-1], (path**3 @ spiral.MATRIX.T)[1:-1], atol=0.1)


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


@pytest.mark.slow
def test_adjoints(tmp_path, monkeypatch, capsys):
    adjoints = load("adjoints")
    out = tmp_path / "adjoints.png"
    assert adjoints.main(["--steps", "1", "--out", str(out)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(adjoints, "REQUIRED", 0)
    assert adjoints.main(["--steps", "1", "--out", str(out)]) == 1
    assert "expected errors of at most 0 tolerances" in capsys.readouterr().out


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
