import dataclasses
import pickle

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from scipy.linalg import expm

import flatlayers as fl
from tests.helpers import assert_close, assert_same, central_difference, count_primitives


TIGHT = diffrax.PIDController(rtol=1e-9, atol=1e-11)
FIXED = {"solver": diffrax.Heun(), "stepsize_controller": diffrax.ConstantStepSize(), "dt0": 0.1}
NETWORK = fl.Chain(fl.Dense(2, 8, jnp.tanh), fl.Dense(8, 2))
A = np.array([[0.3, -0.8, 0.2], [0.5, -0.4, 0.5], [-0.6, 0.3, 0.7]])
b = np.array([0.3, -0.2, 0.5])
T = 1.5


def linear(**options):
    """A flow along `dz/dt = A z + b`, which takes a standard normal to a normal."""
    given = fl.initializers.from_array
    return fl.FFJORD(fl.Dense(3, 3, init_weight=given(A), init_bias=given(b)), t0=0.5, t1=0.5 + T, **options)


def normal():
    """What it takes it to: `z(t1) = E z(t0) + A⁻¹ (E - 1) b` with `E = exp(A T)`."""
    E = expm(A * T)
    return stats.multivariate_normal(np.linalg.solve(A, (E - np.eye(3)) @ b), E @ E.T)


class Rate(fl.Layer):
    """dz/dt = rate t z: x = z exp(rate t² / 2) at time t, from z at time 0."""

    def parameters(self):
        return {"rate": fl.Param((), fl.initializers.constant(0.6))}

    def forward(self, x, ps, st):
        t, z = x
        return ps.rate * t * z, st


class Noisy(fl.Layer):
    """A field that counts its evaluations and draws a number."""

    def states(self, key):
        return {"count": 0, "key": key}

    def forward(self, y, ps, st):
        key, now = jax.random.split(st.key)
        return y * jax.random.uniform(now, (), y.dtype), st.replace(count=st.count + 1, key=key)


@dataclasses.dataclass(frozen=True)
class Cauchy:
    """A base density, as a user writes it."""

    scale: float

    def log_prob(self, x):
        return jnp.sum(jax.scipy.stats.cauchy.logpdf(x, 0.0, self.scale), -1)

    def sample(self, key, shape, dtype):
        return self.scale * jax.random.cauchy(key, shape, dtype)


# Densities in closed form


@pytest.mark.long
def test_a_linear_field_gives_a_normal_density(key):
    flow = linear(stepsize_controller=TIGHT)
    ps, st = fl.setup(key, flow, float)
    assert ps.layout == flow.model.layout
    x = np.random.default_rng(0).normal(size=(2, 4, 3))
    log_density, new = jax.jit(flow)(x, ps, st)
    np.testing.assert_allclose(log_density, normal().logpdf(x), rtol=1e-8)
    each, _ = jax.jit(jax.vmap(flow, (0, None, None)))(x[0], ps, st)
    np.testing.assert_allclose(each, normal().logpdf(x[0]), rtol=1e-8)
    assert jax.tree.structure(new) == jax.tree.structure(st)
    assert new.stats.num_steps > 0
    assert new.stats.result == 0
    assert list(st) == ["stats"]


def test_its_log_determinant_is_exact(key):
    flow = linear(regularize=True)
    ps, st = fl.setup(key, flow, float)
    x = np.random.default_rng(0).normal(size=(4, 3))
    solution, new = jax.jit(lambda *args: (lambda s, st: (s.ys, st))(*flow.solve(*args)))(x, ps, st)
    np.testing.assert_allclose(solution.log_density, np.full((1, 4), -np.trace(A) * T), rtol=1e-13)
    np.testing.assert_allclose(new.stats.jacobian, np.sum(A**2) * T, rtol=1e-13)
    # The path that ends in x, by its closed form, and Simpson's rule for the integral of its speed.
    times = np.linspace(0, T, 101)
    fixed = np.linalg.solve(A, b)
    speed = np.array([(x + fixed) @ expm(-A * t).T @ A.T for t in times])
    kinetic = np.mean(np.sum(speed**2, -1), -1)
    simpson = np.r_[1, np.tile([4, 2], 50)[:-1], 1] / 300 * T
    np.testing.assert_allclose(new.stats.kinetic, simpson @ kinetic, rtol=1e-4)
    assert {name: float(value) for name, value in st.stats.items()} == dict.fromkeys(new.stats, 0.0)


def test_samples_have_the_moments_of_the_density(key):
    flow = linear()
    ps, st = fl.setup(key, flow, float)
    x, new = jax.jit(lambda key: flow.sample(key, (100, 200, 3), ps, st))(key)
    assert x.shape == (100, 200, 3)
    x = x.reshape(-1, 3)
    np.testing.assert_allclose(x.mean(0), normal().mean, atol=0.1)
    np.testing.assert_allclose(np.cov(x.T), normal().cov, atol=0.4)
    assert jax.tree.structure(new) == jax.tree.structure(st)
    assert new.stats.num_steps > 0


def test_time_is_an_input_with_time(key):
    flow = fl.FFJORD(Rate(), t1=2.0, with_time=True, stepsize_controller=TIGHT)
    ps, st = fl.setup(key, flow, float)
    x = np.array([[0.5], [-2.0]])
    log_density, _ = jax.jit(flow)(x, ps, st)
    np.testing.assert_allclose(log_density, stats.norm(0, np.exp(1.2)).logpdf(x[:, 0]), rtol=1e-8)


def test_the_first_step_has_a_sign_of_its_own(key):
    """Ten steps of Euler's method each way: x = (1 + h)^10 z, and z = (1 - h)^10 x."""
    options = FIXED | {"solver": diffrax.Euler()}
    flow = fl.FFJORD(lambda z: z, **options)
    ps, st = fl.setup(key, flow, float)
    log_density, _ = flow(np.ones(2), ps, st)
    np.testing.assert_allclose(log_density, np.sum(stats.norm().logpdf(0.9**10 * np.ones(2))) - 2)
    x, _ = flow.sample(key, (2,), ps, st)
    np.testing.assert_allclose(x, 1.1**10 * jax.random.normal(key, (2,)))


@pytest.mark.long
def test_another_base(key):
    flow = fl.FFJORD(lambda z: z, base=Cauchy(0.5), **FIXED)
    assert flow == fl.FFJORD(flow.model, base=Cauchy(0.5), **FIXED) != fl.FFJORD(flow.model, **FIXED)
    assert hash(flow) == hash(fl.FFJORD(flow.model, base=Cauchy(0.5), **FIXED))
    ps, st = fl.setup(key, flow, float)
    x = np.array([[1.0], [-3.0]])
    expected = stats.cauchy(0, 0.5 * np.e).logpdf(x[:, 0])
    np.testing.assert_allclose(flow(x, ps, st)[0], expected, rtol=1e-2)
    samples, _ = flow.sample(key, (2, 1), ps, st)
    np.testing.assert_allclose(samples, np.e * 0.5 * jax.random.cauchy(key, (2, 1)), rtol=1e-2)


# Networks


def test_densities_of_a_network_integrate_to_one(key):
    flow = fl.FFJORD(NETWORK)
    ps, st = fl.setup(key, flow, float)
    line = np.linspace(-8, 8, 161)
    grid = np.stack(np.meshgrid(line, line), -1)
    log_density, _ = jax.jit(flow)(grid, 1.5 * ps, st)
    assert log_density.shape == (161, 161)
    np.testing.assert_allclose(np.sum(np.exp(log_density)) * 0.1**2, 1, atol=1e-3)


@pytest.mark.slow
def test_density_undoes_sampling(key):
    flow = fl.FFJORD(fl.Chain(fl.Dense(2, 16, jnp.tanh), fl.Dropout(0.5), fl.Dense(16, 2)), **FIXED)
    ps, st = fl.setup(key, flow, float)
    x, after = jax.jit(lambda: flow.sample(key, (5, 2), ps, st))()
    z = jax.random.normal(key, (5, 2))
    assert np.abs(x - z).max() > 0.3
    solution, new = flow.solve(x, ps, st)
    np.testing.assert_allclose(solution.ys.z[-1], z, atol=0.01)
    assert isinstance(solution, diffrax.Solution)
    # One mask for both solves, from one state; another one from the state after.
    assert_same(after.model, new.model)
    again, _ = flow.solve(x, ps, new)
    assert np.abs(again.ys.z[-1] - z).max() > 0.1


@pytest.mark.slow
def test_gradients_agree_with_central_differences(key):
    flow = fl.FFJORD(NETWORK, regularize=True, **FIXED)
    ps, st = fl.setup(key, flow, float)
    x = np.random.default_rng(0).normal(size=(4, 2))
    along_ps = fl.ComponentVector(jax.random.normal(jax.random.key(1), ps.shape), ps.layout)
    along_x = jax.random.normal(jax.random.key(2), x.shape)

    @jax.jit
    def loss(ps, x):
        log_density, new = flow(x, ps, st)
        return jnp.sum(log_density) + 0.3 * new.stats.kinetic + 0.1 * new.stats.jacobian

    by_ps, by_x = jax.jit(jax.grad(loss, (0, 1)))(ps, x)
    expected = central_difference(lambda ps: loss(ps, x), ps, along_ps)
    np.testing.assert_allclose(by_ps @ along_ps, expected, rtol=1e-6)
    expected = central_difference(lambda x: loss(ps, x), x, along_x)
    np.testing.assert_allclose(jnp.sum(by_x * along_x), expected, rtol=1e-6)


@pytest.mark.slow
def test_gradients_with_probes_and_an_adjoint_of_its_own(key):
    """The equation solved backwards knows nothing of the steps: equal for small ones."""
    x = np.random.default_rng(0).normal(size=(3, 2))

    def gradient(adjoint):
        flow = fl.FFJORD(fl.Dense(2, 2, jnp.tanh), divergence="hutchinson", adjoint=adjoint, **FIXED)
        ps, st = fl.setup(key, flow, float)
        return jax.jit(jax.grad(lambda ps: flow(x, ps, st)[0].sum()))(ps).data

    np.testing.assert_allclose(gradient(diffrax.BacksolveAdjoint()), gradient(None), rtol=0.01)


@pytest.mark.long
def test_in_a_chain_of_float32(key):
    flow = fl.FFJORD(NETWORK, divergence="hutchinson", regularize=True, **FIXED)
    chain = fl.Chain(fl.Diagonal(2), flow, lambda log_density: -log_density)
    ps, st = fl.setup(key, chain)
    x = np.random.default_rng(0).normal(size=(4, 2)).astype(np.float32)
    loss, new = jax.jit(chain)(x, ps, st)
    assert loss.dtype == new.layer_1.stats.kinetic.dtype == jnp.float32
    assert_close(-loss, flow(x, ps.layer_1, st.layer_1)[0], rtol=1e-4)
    assert jax.tree.map(jnp.result_type, new) == jax.tree.map(jnp.result_type, st)
    sample, _ = flow.sample(key, (4, 2), ps.layer_1, st.layer_1)
    assert sample.dtype == jnp.float32


# Hutchinson's estimate


def test_the_average_over_all_probes_is_the_exact_trace(key):
    """The estimates of a linear field are e' A e: over many keys, one value for each pair of e and -e."""
    flow = linear(divergence="hutchinson", regularize=True, **FIXED)
    ps, st = fl.setup(key, flow, float)

    @jax.jit
    @jax.vmap
    def estimates(key):
        solution, new = flow.solve(np.ones(3), ps, st.replace(key=key))
        return solution.ys.log_density[-1], new.stats.jacobian

    traces, squares = estimates(jax.random.split(key, 64))
    signs = np.array([[1, i, j] for i in (-1, 1) for j in (-1, 1)])
    expected = np.sort([-e @ A @ e * T for e in signs])
    found, index = np.unique(np.round(traces, 10), return_index=True)
    np.testing.assert_allclose(found, expected)
    np.testing.assert_allclose(np.mean(found), -np.trace(A) * T)
    np.testing.assert_allclose(np.mean(squares[index]), np.sum(A**2) * T)


@pytest.mark.long
def test_one_probe_a_solve(key):
    flow = linear(divergence="hutchinson", probes=2, **FIXED)
    ps, st = fl.setup(key, flow, float)
    x = np.ones((50, 3))
    call = jax.jit(flow)
    first, new = call(x, ps, st)
    second, _ = call(x, ps, new)
    assert_same(first, call(x, ps, st)[0])
    assert not np.array_equal(first, second)
    assert_same(new.key, jax.random.split(st.key)[0])
    # Samples have probes of their own: the mean of two of the four values e' A e.
    assert len(np.unique(np.round(first, 10))) > 4
    _, sampled = flow.sample(key, (2, 3), ps, st)
    assert_same(sampled.key, st.key)


def test_the_dimensions_are_one_vectorised_pass(key):
    """As many equations for ten dimensions as for two."""
    counts = []
    for n in (2, 10):
        flow = fl.FFJORD(fl.Dense(n, n, jnp.tanh))
        ps, st = fl.setup(key, flow, float)
        counts.append(count_primitives(flow, np.ones(n), ps, st))
    assert counts[0] == counts[1]
    assert jax.eval_shape(flow, np.ones(n), ps, st)[0].shape == ()
    assert jax.jit(flow).lower(np.ones(n), ps, st).out_info[0].shape == ()


def test_equal_flows_are_equal():
    model = fl.Dense(2, 2)
    flow = fl.FFJORD(model, divergence="hutchinson")
    assert flow == pickle.loads(pickle.dumps(flow)) == dataclasses.replace(flow) != fl.FFJORD(model)
    assert hash(flow) == hash(dataclasses.replace(flow))
    assert repr(flow) == "FFJORD(Dense(2, 2), divergence='hutchinson')"
    assert repr(fl.FFJORD(model)) == "FFJORD(Dense(2, 2))"


# State and errors


def test_the_state_is_frozen_during_the_solve(key):
    flow = fl.FFJORD(Noisy(), t1=2.0, stepsize_controller=TIGHT)
    ps, st = fl.setup(key, flow, float)
    log_density, new = jax.jit(flow)(np.array([[1.0]]), ps, st)
    rate = jax.random.uniform(jax.random.split(st.model.key)[1], (), float)
    np.testing.assert_allclose(log_density[0], stats.norm(0, np.exp(2 * rate)).logpdf(1.0), rtol=1e-8)
    assert new.model.count == 1
    assert jax.tree.structure(new) == jax.tree.structure(st)


def test_bad_input(key):
    flow = fl.FFJORD(NETWORK, **FIXED)
    ps, st = fl.setup(key, flow, float)
    with pytest.raises(ValueError, match=r"expected x of shape \(..., n\), found shape \(\)"):
        flow(1.0, ps, st)
    with pytest.raises(TypeError, match="expected floating x"):
        flow(np.ones((4, 2), int), ps, st)
    with pytest.raises(ValueError, match=r"\(..., 2\), found shape \(4,\)") as info:
        flow.sample(key, (4,), ps, st)
    assert "in the layer layer_0: Dense(2, 8" in info.value.__notes__[0]
    wide = fl.FFJORD(fl.Dense(2, 3))
    wide_ps, wide_st = fl.setup(key, wide, float)
    for call, x in ((wide, np.ones(2)), (lambda *args: wide.sample(key, *args), (2,))):
        with pytest.raises(ValueError, match=r"output is like y0, float64\[2\], found float64\[3\]") as info:
            call(x, wide_ps, wide_st)
        assert "in the layer FFJORD: FFJORD(Dense(2, 3))" in info.value.__notes__[0]


def test_bad_options(key):
    with pytest.raises(ValueError, match="'exact' or 'hutchinson', found 'half'"):
        fl.FFJORD(NETWORK, divergence="half")
    with pytest.raises(ValueError, match="FFJORD.probes: expected an integer of at least 1, found 0"):
        fl.FFJORD(NETWORK, probes=0)
    with pytest.raises(TypeError, match=r"base with the methods .*, found 3"):
        fl.FFJORD(NETWORK, base=3)

    class Elementwise(Cauchy):
        def log_prob(self, x):
            return x

    flow = fl.FFJORD(NETWORK, base=Elementwise(1.0), **FIXED)
    with pytest.raises(ValueError, match=r"log_prob\(x\) is of shape \(4,\) .* found float64\[4,2\]"):
        jax.eval_shape(flow, np.ones((4, 2)), *fl.setup(key, flow, float))


def test_a_failed_solve_raises_or_leaves_its_code(key):
    options = {"max_steps": 2, "solver": diffrax.Heun(), "stepsize_controller": TIGHT}
    flow, quiet = fl.FFJORD(jnp.sin, **options), fl.FFJORD(jnp.sin, throw=False, **options)
    ps, st = fl.setup(key, flow, float)
    with pytest.raises(Exception, match="maximum number of solver steps"):
        flow(np.ones(2), ps, st)
    _, new = quiet(np.ones(2), ps, st)
    assert new.stats.result != 0
