import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flatlayers as fl
from tests.helpers import assert_close, assert_same, central_difference


SMOOTH = fl.Chain(fl.Dense(4, 8, jax.nn.softplus), fl.Dense(8, 1))
G = 9.81


class Oscillator(fl.Layer):
    """H = p² / (2 mass) + stiffness q² / 2 a sample, of shape (...) or (..., 1)."""

    keep_axis: bool = False

    def parameters(self):
        return {
            "mass": fl.Param((), fl.initializers.constant(2.0)),
            "stiffness": fl.Param((), fl.initializers.constant(3.0)),
        }

    def forward(self, x, ps, st):
        q, p = jnp.split(x, 2, -1)
        energy = p**2 / (2 * ps.mass) + ps.stiffness * q**2 / 2
        return jnp.sum(energy, -1, keepdims=self.keep_axis), st


def pendulum(x):
    """The energy of a pendulum of mass and length 1."""
    return x[..., 1] ** 2 / 2 - G * jnp.cos(x[..., 0])


def double_pendulum(x):
    """The Lagrangian of two pendulums, one below the other, of masses and lengths 1."""
    a, b, u, w = jnp.moveaxis(x, -1, 0)
    return u**2 + w**2 / 2 + u * w * jnp.cos(a - b) + G * (2 * jnp.cos(a) + jnp.cos(b))


def double_pendulum_acceleration(a, b, u, w):
    """Its equations of motion, as textbooks give them."""
    d = a - b
    below = 3 - np.cos(2 * d)
    first = -3 * G * np.sin(a) - G * np.sin(a - 2 * b) - 2 * np.sin(d) * (w**2 + u**2 * np.cos(d))
    second = 2 * np.sin(d) * (2 * u**2 + 2 * G * np.cos(a) + w**2 * np.cos(d))
    return np.stack([first / below, second / below], -1)


class Noisy(fl.Layer):
    """A scalar with a mask drawn from a key in state, and a count of the calls."""

    def states(self, key):
        return {"count": 0, "key": key, "training": True}

    def forward(self, x, ps, st):
        key, now = jax.random.split(st.key)
        mask = jax.random.uniform(now, x.shape, x.dtype) + 0.5
        return jnp.sum(mask * x**2, -1) / 2, st.replace(count=st.count + 1, key=key)


# Hamiltonian


@pytest.mark.parametrize("keep_axis", [False, True])
def test_the_field_of_an_oscillator(key, keep_axis):
    layer = fl.HamiltonianNN(Oscillator(keep_axis))
    ps, st = fl.setup(key, layer, float)
    assert ps.layout == Oscillator().layout
    for lead in ((), (1,), (2, 3), (0,)):
        x = np.random.default_rng(0).normal(size=(*lead, 4))
        expected = np.concatenate([x[..., 2:] / 2.0, -3.0 * x[..., :2]], -1)
        dx, new = jax.jit(layer)(x, ps, st)
        np.testing.assert_allclose(dx, expected, rtol=1e-12)
        assert new == st == {}
    each, _ = jax.jit(jax.vmap(layer, (0, None, None)))(np.ones((3, 4)), ps, st)
    np.testing.assert_allclose(each, [[0.5, 0.5, -3.0, -3.0]] * 3)


def test_the_field_of_a_network(key):
    layer = fl.HamiltonianNN(SMOOTH)
    ps, st = fl.setup(key, layer, float)
    x = jax.random.normal(key, (3, 4))

    energy = jax.jit(lambda x: SMOOTH(x, ps, st)[0][0])

    slopes = [[central_difference(energy, row, unit, 1e-5) for unit in np.eye(4)] for row in np.asarray(x)]
    by_q, by_p = np.split(np.array(slopes), 2, -1)
    dx, _ = jax.jit(layer)(x, ps, st)
    np.testing.assert_allclose(dx, np.concatenate([by_p, -by_q], -1), rtol=1e-7)


@pytest.mark.parametrize("kind", [fl.HamiltonianNN, fl.LagrangianNN])
def test_gradients_agree_with_central_differences(key, kind):
    layer = kind(SMOOTH)
    ps, st = fl.setup(key, layer, float)
    x = jax.random.normal(key, (3, 4))
    along_ps = fl.ComponentVector(jax.random.normal(jax.random.key(1), ps.shape), ps.layout)
    along_x = jax.random.normal(jax.random.key(2), x.shape)

    @jax.jit
    def loss(ps, x):
        return jnp.sum(jnp.sin(layer(x, ps, st)[0]))

    by_ps, by_x = jax.jit(jax.grad(loss, (0, 1)))(ps, x)
    np.testing.assert_allclose(
        by_ps @ along_ps, central_difference(lambda ps: loss(ps, x), ps, along_ps), rtol=1e-5
    )
    np.testing.assert_allclose(
        jnp.sum(by_x * along_x), central_difference(lambda x: loss(ps, x), x, along_x), rtol=1e-5
    )


@pytest.mark.parametrize("kind", [fl.HamiltonianNN, fl.LagrangianNN])
def test_float32_stays_float32_and_a_vector_is_an_input(key, kind):
    layer = kind(SMOOTH)
    ps, st = fl.setup(key, layer)
    v = fl.ComponentVector.of({"place": [0.5, 1.0], "motion": [-1.0, 2.0]}, dtype=jnp.float32)
    dx, _ = jax.jit(layer)(v, ps, st)
    assert dx.dtype == jnp.float32
    assert_same(dx, jax.jit(layer)(v.data, ps, st)[0])


def test_solves_of_an_oscillator(key):
    rate = np.sqrt(3.0 / 2.0)
    controller = diffrax.PIDController(rtol=1e-9, atol=1e-11)
    ode = fl.NeuralODE(fl.HamiltonianNN(Oscillator()), t1=2.0, stepsize_controller=controller)
    ps, st = fl.setup(key, ode, float)
    expected = np.array([np.cos(2 * rate), -2 * rate * np.sin(2 * rate)])
    np.testing.assert_allclose(jax.jit(ode)(jnp.array([1.0, 0.0]), ps, st)[0], expected, atol=1e-8)
    leapfrog = fl.NeuralODE(
        ode.model,
        t1=2.0,
        solver=diffrax.LeapfrogMidpoint(),
        stepsize_controller=diffrax.ConstantStepSize(),
        dt0=1e-3,
    )
    np.testing.assert_allclose(jax.jit(leapfrog)(jnp.array([1.0, 0.0]), ps, st)[0], expected, atol=1e-5)


def test_a_symplectic_solve_keeps_the_energy(key):
    """Semi-implicit Euler as in textbooks; the explicit method of the same step gains energy without end."""
    layer = fl.HamiltonianNN(pendulum)
    steps, dt = 5000, 0.02

    def solve(solver, terms, y0):
        saveat = diffrax.SaveAt(steps=True)
        end = steps * dt
        return diffrax.diffeqsolve(terms, solver, 0, end, dt, y0, ({}, {}), saveat=saveat, max_steps=steps).ys

    q, p = solve(diffrax.SemiImplicitEuler(), layer.separable_terms(), (jnp.ones(1), jnp.zeros(1)))
    expected = [(1.0, 0.0)]
    for _ in range(100):
        moved = expected[-1][0] + dt * expected[-1][1]
        expected.append((moved, expected[-1][1] - dt * G * np.sin(moved)))
    ys = np.concatenate([q, p], -1)
    assert_close(ys[:100], np.array(expected)[1:])
    swing = G * (1 - np.cos(1.0))
    assert np.abs(pendulum(ys) + G - swing).max() < 0.06 * swing
    explicit = diffrax.ODETerm(lambda t, y, args: layer(y, *args)[0])
    end = solve(diffrax.Euler(), explicit, jnp.array([1.0, 0.0]))[-1]
    assert pendulum(end) + G > 1.5 * swing


def test_separable_terms_take_batches_and_gradients(key):
    layer = fl.HamiltonianNN(Oscillator())
    ps, st = fl.setup(key, layer, float)
    y0 = (jnp.arange(6.0).reshape(3, 2), jnp.ones((3, 2)))
    assert layer.separable_terms() == layer.separable_terms()

    @jax.jit
    def loss(ps):
        args = (ps.unpack(), st)
        solver = diffrax.SemiImplicitEuler()
        q, p = diffrax.diffeqsolve(layer.separable_terms(), solver, 0.0, 1.0, 0.1, y0, args).ys
        return jnp.sum(q**2 + p**3)

    along = fl.ComponentVector(jnp.array([0.3, -0.8]), ps.layout)
    slope = jax.jit(jax.grad(loss))(ps) @ along
    np.testing.assert_allclose(slope, central_difference(loss, ps, along), rtol=1e-7)


# Lagrangian


def test_the_acceleration_of_pendulums(key):
    single, double = fl.LagrangianNN(lambda x: x[..., 1] ** 2 - pendulum(x)), fl.LagrangianNN(double_pendulum)
    x = np.random.default_rng(0).normal(size=(2, 3, 2))
    expected = np.stack([x[..., 1], -G * np.sin(x[..., 0])], -1)
    np.testing.assert_allclose(jax.jit(single)(x, {}, {})[0], expected, rtol=1e-12)
    for lead in ((), (2, 3), (0,)):
        x = np.random.default_rng(0).normal(size=(*lead, 4))
        dx, _ = jax.jit(double)(x, {}, {})
        np.testing.assert_allclose(dx[..., :2], x[..., 2:])
        acceleration = double_pendulum_acceleration(*np.moveaxis(x, -1, 0))
        np.testing.assert_allclose(dx[..., 2:], acceleration, rtol=1e-10)


def test_it_is_the_formula_sample_by_sample(key):
    layer = fl.LagrangianNN(SMOOTH)
    ps, st = fl.setup(key, layer, float)
    x = jax.random.normal(key, (5, 4))

    @jax.jit
    @jax.vmap
    def formula(x):
        gradient, hessian = (d(lambda x: SMOOTH(x, ps, st)[0][0])(x) for d in (jax.grad, jax.hessian))
        force = gradient[:2] - hessian[2:, :2] @ x[2:]
        return jnp.concatenate([x[2:], jnp.linalg.inv(hessian[2:, 2:]) @ force])

    dx, _ = jax.jit(layer)(x, ps, st)
    np.testing.assert_allclose(dx, formula(x), rtol=1e-7)
    assert_close(dx, jax.jit(jax.vmap(layer, (0, None, None)))(x, ps, st)[0], rtol=1e-9)


def test_a_lagrangian_solve_keeps_the_energy(key):
    controller = diffrax.PIDController(rtol=1e-9, atol=1e-11)
    times = np.linspace(0, 3, 7)
    ode = fl.NeuralODE(fl.LagrangianNN(double_pendulum), t1=3.0, saveat=times, stepsize_controller=controller)
    ys, new = jax.jit(ode)(jnp.array([1.0, 2.0, 0.0, 0.0]), *fl.setup(key, ode, float))
    a, b, u, w = np.asarray(ys).T
    energy = u**2 + w**2 / 2 + u * w * np.cos(a - b) - G * (2 * np.cos(a) + np.cos(b))
    np.testing.assert_allclose(energy, energy[0], rtol=1e-7)
    assert new.stats.num_steps > 20


# State and errors


@pytest.mark.parametrize("kind", [fl.HamiltonianNN, fl.LagrangianNN])
def test_the_state_of_the_model_is_updated_once(key, kind):
    layer = kind(Noisy())
    ps, st = fl.setup(key, layer, float)
    x = jnp.ones((3, 4))
    dx, new = jax.jit(layer)(x, ps, st)
    mask = jax.random.uniform(jax.random.split(st.key)[1], x.shape, x.dtype) + 0.5
    expected = mask[:, 2:], -mask[:, :2]
    if kind is fl.LagrangianNN:
        expected = x[:, 2:], mask[:, :2] / mask[:, 2:]
    np.testing.assert_allclose(dx, np.concatenate(expected, -1))
    assert new.count == 1
    assert jax.tree.structure(new) == jax.tree.structure(st)


def test_the_state_is_frozen_during_a_solve(key):
    layer, x = fl.HamiltonianNN(Noisy()), jnp.ones((3, 4))
    ode = fl.NeuralODE(layer)
    ps, st = fl.setup(key, ode, float)
    ys, new = jax.jit(ode)(x, ps, st)
    assert new.model.count == 1
    assert np.isfinite(ys).all()


@pytest.mark.parametrize("kind", [fl.HamiltonianNN, fl.LagrangianNN])
def test_bad_input(key, kind):
    layer = kind(SMOOTH)
    ps, st = fl.setup(key, layer, float)
    for x in (jnp.ones((2, 3)), jnp.ones(()), jnp.ones((2, 0))):
        with pytest.raises(ValueError, match=r"x of shape \(..., 2n\), positions and .*, found shape"):
            layer(x, ps, st)
    with pytest.raises(TypeError, match="expected floating x"):
        layer(jnp.ones((2, 4), int), ps, st)
    for model in (fl.Dense(4, 2), jnp.sum, lambda x: (x[..., 0],), lambda x: x[..., None, :1]):
        bad = kind(model)
        with pytest.raises(ValueError, match=r"scalar per sample, of shape \(2,\) or \(2, 1\)") as info:
            bad(jnp.ones((2, 4)), *fl.setup(key, bad, float))
    assert any(f"in the layer {kind.__name__}" in note for note in info.value.__notes__)
    with pytest.raises(TypeError, match="expected a layer or a function"):
        kind(3)


def test_a_singular_mass_matrix_is_an_error_where_numbers_are_known(key):
    layer = fl.LagrangianNN(fl.Chain(fl.Dense(4, 8, jax.nn.relu), fl.Dense(8, 1)))
    ps, st = fl.setup(key, layer, float)
    with pytest.raises(ValueError, match="invertible mass matrix .* found a singular one"):
        layer(jnp.ones((2, 4)), ps, st)
    assert not jnp.isfinite(jax.jit(layer)(jnp.ones((2, 4)), ps, st)[0]).all()
