"""The flat vector as other libraries take it: optimisers, minimisers and checkpoints of state."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix
import pytest
import scipy.optimize

import flatlayers as fl
from tests.helpers import assert_same


MODEL = fl.Chain(fl.Dense(1, 8, jnp.tanh), fl.Dense(8, 1))
X = jnp.linspace(-1, 1, 20)[:, None]
Y = X**2


@pytest.fixture(autouse=True)
def _promotion_of_the_other_libraries():
    # optax and optimistix mix integers and floats by themselves.
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def problem(key):
    ps, st = fl.setup(key, MODEL, float)
    return ps, lambda ps: jnp.mean((MODEL(X, ps, st)[0] - Y) ** 2)


def test_optax_adamw(problem):
    ps, loss = problem
    optimizer = optax.adamw(0.05)

    @jax.jit
    def train(ps, state):
        def step(carry, _):
            ps, state = carry
            updates, state = optimizer.update(jax.grad(loss)(ps), state, ps)
            return (optax.apply_updates(ps, updates), state), None

        return jax.lax.scan(step, (ps, state), length=1000)[0]

    trained, state = train(ps, optimizer.init(ps))
    assert loss(trained) < 1e-3 < loss(ps)
    assert state[0].mu.layout == trained.layout == ps.layout


@pytest.mark.slow
def test_optax_lbfgs(problem):
    ps, loss = problem
    optimizer = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(loss)

    @jax.jit
    def step(ps, state):
        value, gradient = value_and_grad(ps, state=state)
        updates, state = optimizer.update(gradient, state, ps, value=value, grad=gradient, value_fn=loss)
        return optax.apply_updates(ps, updates), state

    state, trained = optimizer.init(ps), ps
    for _ in range(60):
        trained, state = step(trained, state)
    assert loss(trained) < 1e-4
    assert trained.layout == ps.layout


def test_optax_rates_and_decay_by_name(problem):
    ps, _ = problem
    st = fl.initial_states(jax.random.key(0), MODEL, float)
    schedule = optax.cosine_decay_schedule(0.05, 200)
    rate = ps.layout.values({"layer_0": 1.0, "layer_1": 0.2})
    decay = ps.layout.values({"*.weight": 1e-2}, default=0.0)
    flat = optax.adamw(lambda i: schedule(i) * rate, weight_decay=decay)

    def group(share, decay):
        return optax.adamw(lambda i: schedule(i) * share, weight_decay=decay)

    labels = {f"layer_{i}": {"weight": f"w{i}", "bias": f"b{i}"} for i in range(2)}
    groups = {f"w{i}": group(share, 1e-2) for i, share in enumerate((1.0, 0.2))}
    groups |= {f"b{i}": group(share, 0.0) for i, share in enumerate((1.0, 0.2))}
    tree = optax.multi_transform(groups, labels)

    def loss(ps):
        return jnp.mean((MODEL(X, ps, st)[0] - Y) ** 2)

    def train(optimizer, ps):
        def step(carry, _):
            ps, state = carry
            updates, state = optimizer.update(jax.grad(loss)(ps), state, ps)
            return (optax.apply_updates(ps, updates), state), None

        return jax.lax.scan(step, (ps, optimizer.init(ps)), length=200)[0][0]

    found, expected = jax.jit(lambda ps: (train(flat, ps), train(tree, ps.to_dict())))(ps)
    np.testing.assert_allclose(found, fl.ComponentVector.of(expected, ps.layout), rtol=0, atol=1e-6)
    assert float(abs(found.layer_0.weight - ps.layer_0.weight).max()) > 0.1


def test_optax_keeps_still_what_has_a_rate_of_zero_or_masked_updates(problem):
    ps, loss = problem
    ps = ps + 1.0
    rate = ps.layout.values({"*.weight": 1.0, "*.bias": 0.0})
    mask = ps.layout.mask("*.weight")
    gradient = jax.jit(jax.grad(loss))(ps)
    by_rate = optax.adamw(0.05 * rate, weight_decay=0.1)
    updates, _ = by_rate.update(gradient, by_rate.init(ps), ps)
    assert (updates.layer_0.bias == 0).all()
    plain = optax.adamw(0.05, weight_decay=0.1)
    masked, _ = plain.update(gradient, plain.init(ps), ps)
    np.testing.assert_allclose(masked * jnp.asarray(mask, float), updates, rtol=1e-6)
    # A masked gradient does not keep them still.
    moved, _ = plain.update(gradient * jnp.asarray(mask, float), plain.init(ps), ps)
    assert (moved.layer_0.bias != 0).all()


def test_optax_masks_by_name(problem):
    ps, loss = problem
    mask = ps.layout.mask("*.weight")
    gradient = jax.jit(jax.grad(loss))(ps) * jnp.asarray(mask, float)
    assert (gradient.layer_0.bias == 0).all()
    assert (gradient.layer_0.weight != 0).all()


@pytest.mark.long
def test_scipy_minimize(problem):
    ps, loss = problem
    value_and_grad = jax.jit(jax.value_and_grad(lambda data: loss(fl.ComponentVector(data, ps.layout))))
    result = scipy.optimize.minimize(
        lambda data: [np.asarray(part) for part in value_and_grad(data)], np.asarray(ps), jac=True
    )
    assert loss(fl.ComponentVector(result.x, ps.layout)) < 1e-5
    vectors = jax.value_and_grad(loss)
    result = scipy.optimize.minimize(
        lambda data: vectors(fl.ComponentVector(data, ps.layout)), np.asarray(ps), jac=True, method="L-BFGS-B"
    )
    assert loss(fl.ComponentVector(result.x, ps.layout)) < 1e-4


def test_optimistix_bfgs(problem):
    ps, loss = problem
    solver = optimistix.BFGS(rtol=1e-8, atol=1e-10)
    solution = optimistix.minimise(lambda ps, _: loss(ps), solver, ps, max_steps=500, throw=False)
    assert solution.value.layout == ps.layout
    assert loss(solution.value) < 1e-5


def test_optimistix_root_of_a_vector():
    def residual(v, target):
        return v.replace(a=v.a**2 - target, b=v.b - v.a)

    v0 = fl.ComponentVector.of({"a": [1.0, 1.0], "b": [0.0, 0.0]})
    solution = optimistix.root_find(residual, optimistix.Newton(1e-10, 1e-10), v0, 4.0)
    np.testing.assert_allclose(solution.value.b, 2.0, rtol=1e-8)


def test_a_saved_vector_says_what_it_is(problem, tmp_path):
    ps, _ = problem
    np.savez(tmp_path / "model.npz", data=np.asarray(ps), layout=ps.layout.to_json())
    with np.load(tmp_path / "model.npz") as saved:
        again = fl.ComponentVector(saved["data"], fl.Layout.from_json(str(saved["layout"])))
    assert_same(again, ps)
    wider = fl.Chain(fl.Dense(1, 9, jnp.tanh), fl.Dense(9, 1))
    assert again.layout.diff(wider.layout)[0] == "layer_0.weight: (8, 1) became (9, 1)"
