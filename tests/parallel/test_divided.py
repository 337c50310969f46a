"""Plain `jax.jit` divides what has its batch on several devices, checks included."""

import contextlib

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import flatlayers as fl
from tests.parallel.programs import arrays_of_shape, compiled, mesh_of, placed


pytestmark = pytest.mark.long


BATCH, HIDDEN, DEVICES = 64, 37, 4


def mlp(in_dims, out_dims):
    return fl.Chain(fl.Dense(in_dims, HIDDEN, jnp.tanh), fl.Dense(HIDDEN, out_dims, jnp.tanh))


def controls(x):
    """A path for each sample, of time and one channel."""
    ts = jnp.linspace(0.0, 1.0, 5)
    values = jnp.stack([jnp.broadcast_to(ts, (len(x), 5)), jnp.sin(ts[None] * x[:, :1])], axis=-1)
    coefficients = jax.vmap(lambda ys: diffrax.backward_hermite_coefficients(ts, ys))(values)
    return diffrax.CubicInterpolation(ts, jax.tree.map(lambda c: jnp.moveaxis(c, 0, 1), coefficients))


class OfTheState(fl.Wrapper):
    """A model of `(z, x)`, small enough that all iterations settle."""

    model: fl.Layer

    def forward(self, x, ps, st):
        z, x = x
        y, st = self.model(jnp.concatenate([z, x], axis=-1), ps, st)
        return 0.1 * y, st


def deq(**options):
    return fl.DeepEquilibriumNetwork(OfTheState(mlp(4, 2)), throw=True, **options)


LAYERS = {
    "ode": fl.NeuralODE(mlp(2, 2)),
    "each": fl.NeuralODE(mlp(2, 2), batching="each"),
    "saved": fl.NeuralODE(mlp(2, 2), saveat=(0.5, 1.0)),
    "gauss": fl.NeuralODE(mlp(2, 2), adjoint=fl.GaussAdjoint()),
    "recursive": fl.NeuralODE(mlp(2, 2), adjoint=diffrax.RecursiveCheckpointAdjoint()),
    "second order": fl.Chain(lambda x: (x, x), fl.SecondOrderNeuralODE(mlp(4, 2))),
    "sde": fl.NeuralSDE(mlp(2, 2), fl.Dense(2, 2), dt0=0.1),
    "cde": fl.Chain(lambda x: (x, controls(x)), fl.NeuralCDE(mlp(2, 4), 2)),
    "deq": deq(),
    "depth": deq(fixed_depth=5),
    "phantom": deq(adjoint="phantom"),
    "steady": deq(solver=fl.SteadyState(rtol=1e-5, atol=1e-5)),
}


def total(layer):
    def loss(ps, x, st):
        y, st = layer(x, ps, st)
        return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(y)), st

    return loss


def problem(layer):
    ps, st = fl.setup(jax.random.key(0), layer)
    x = np.random.default_rng(0).normal(size=(BATCH, 2))
    return ps.map(lambda p: p.astype(jnp.float64)), jnp.asarray(x), st


def on_devices(ps, x, st):
    mesh = mesh_of(DEVICES)
    return placed(ps, mesh), placed(x, mesh, "data"), st


FIRST = ("ode", "each", "gauss", "sde", "cde", "deq", "steady")


@pytest.mark.parametrize(
    "name", [n if n in FIRST else pytest.param(n, marks=pytest.mark.slow) for n in LAYERS]
)
def test_no_device_has_the_whole_batch(name):
    layer = LAYERS[name]
    text = compiled(jax.value_and_grad(total(layer), has_aux=True), *on_devices(*problem(layer)))
    assert arrays_of_shape(text, BATCH, HIDDEN) == 0
    assert arrays_of_shape(text, BATCH // DEVICES, HIDDEN) > 0


@pytest.mark.parametrize("name", ["ode", "each", "deq"])
def test_it_is_the_same_on_one_device(name):
    layer, args = LAYERS[name], problem(LAYERS[name])
    function = jax.jit(jax.value_and_grad(total(layer), has_aux=True))
    (one, st), of_one = function(*args)
    (several, st_several), of_several = function(*on_devices(*args))
    np.testing.assert_allclose(several, one, rtol=1e-9)
    np.testing.assert_allclose(of_several.data, of_one.data, rtol=1e-6, atol=1e-9)
    assert (
        jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), st.stats, st_several.stats)) or name == "deq"
    )


def test_arrays_that_are_closed_over_may_lie_on_several_devices():
    """The program has one device then, unless its arguments have more."""
    layer = LAYERS["ode"]
    ps, x, st = problem(layer)
    expected = jax.jit(jax.grad(lambda ps: total(layer)(ps, x, st)[0]))(ps)
    for whole in (ps, placed(ps, mesh_of(DEVICES))):
        parts = on_devices(ps, x, st)[1]
        found = jax.jit(jax.grad(lambda ps, parts=parts: total(layer)(ps, parts, st)[0]))(whole)
        np.testing.assert_allclose(found.data, expected.data, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("context", [False, True])
def test_the_same_devices_in_two_meshes(context):
    layer = LAYERS["ode"]
    ps, x, st = problem(layer)
    function = jax.jit(lambda *args: total(layer)(*args)[0])
    expected = function(ps, x, st)
    mesh = jax.make_mesh((2, 2), ("a", "b"), (AxisType.Auto,) * 2, devices=jax.devices()[:DEVICES])
    args = placed(ps, mesh), placed(x, mesh_of(DEVICES), "data"), st
    with jax.set_mesh(mesh) if context else contextlib.nullcontext():
        np.testing.assert_allclose(function(*args), expected, rtol=1e-9)


@pytest.mark.parametrize("batching", ["shared", "each"])
def test_what_follows_a_solve_is_divided_too(batching):
    layer = fl.Chain(
        fl.NeuralODE(fl.Dense(2, 2), batching=batching), fl.Dense(2, HIDDEN), fl.Dense(HIDDEN, 2)
    )
    text = compiled(jax.grad(lambda *args: total(layer)(*args)[0]), *on_devices(*problem(layer)))
    assert arrays_of_shape(text, BATCH, HIDDEN) == 0
    assert arrays_of_shape(text, BATCH // DEVICES, HIDDEN) > 0


@pytest.mark.parametrize("batching", ["shared", "each"])
@pytest.mark.parametrize("where", [0, BATCH - 1])
def test_a_start_that_is_not_finite_raises_whatever_device_has_it(batching, where):
    layer = fl.NeuralODE(mlp(2, 2), batching=batching)
    ps, x, st = problem(layer)
    args = on_devices(ps, x.at[where, 1].set(jnp.nan), st)
    with pytest.raises(Exception, match="expected an initial state of finite numbers"):
        jax.block_until_ready(jax.jit(layer)(args[1], args[0], st))


@pytest.mark.parametrize("batching", ["shared", "each"])
def test_a_solve_that_fails_raises_whatever_device_has_it(batching):
    layer = fl.NeuralODE(lambda y: y**2, max_steps=32, batching=batching)
    ps, _, st = problem(layer)
    x = placed(jnp.zeros((BATCH, 2)).at[-1].set(5.0), mesh_of(DEVICES), "data")
    with pytest.raises(Exception, match="maximum number of solver steps was reached"):
        jax.block_until_ready(jax.jit(layer)(x, ps, st))


def test_a_gradient_whose_solve_fails_raises():
    # Back in time the adjoint state grows by exp(2000): its steps are too many.
    adjoint = fl.GaussAdjoint(stepsize_controller=diffrax.PIDController(rtol=1e-14, atol=1e-14))
    layer = fl.NeuralODE(lambda y: -jnp.sin(20 * y), adjoint=adjoint, max_steps=24)
    ps, x, st = on_devices(*problem(layer))
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(layer(x, ps, st)[0])))
    with pytest.raises(Exception, match="maximum number of solver steps was reached"):
        jax.block_until_ready(gradient(x))


def test_an_equilibrium_that_is_not_found_raises():
    layer = fl.DeepEquilibriumNetwork(lambda zx: jnp.exp(zx[0] ** 2) + zx[1], throw=True, max_steps=5)
    ps, x, st = on_devices(*problem(layer))
    with pytest.raises(Exception, match="nonlinear solver|finite"):
        jax.block_until_ready(jax.jit(layer)(x, ps, st))
