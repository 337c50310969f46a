import functools

import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest

import flatlayers as fl


N = 20
SOLVERS = [fl.Anderson, fl.Broyden]


def linear(y, args):
    matrix, shift = args
    return matrix @ y + shift


@functools.cache
def problem(kind):
    """A linear map of spectral radius 0.9, and its fixed point."""
    rng = np.random.default_rng(4)
    if kind == "symmetric":
        q, _ = np.linalg.qr(rng.normal(size=(N, N)))
        matrix = q @ np.diag(np.linspace(-0.9, 0.9, N)) @ q.T
    else:
        matrix = rng.normal(size=(N, N)) if kind == "normal" else rng.uniform(size=(N, N))
        matrix *= 0.9 / abs(np.linalg.eigvals(matrix)).max()
    shift = rng.normal(size=N)
    return (jnp.asarray(matrix), jnp.asarray(shift)), np.linalg.solve(np.eye(N) - matrix, shift)


def iterates_of_anderson(matrix, shift, steps, history):
    """Type II as Walker and Ni write it, by least squares, which forgets where it stalls."""
    y, pairs, sizes = np.zeros(N), [], []
    for _ in range(steps):
        residual = matrix @ y + shift - y
        sizes.append(np.linalg.norm(residual))
        pairs.append((y, residual))
        if len(pairs) > history + 1:
            pairs = pairs[-2:] if sizes[-1] > 0.3 * sizes[-1 - history] else pairs[1:]
        dy, dr = (np.diff(np.array(part), axis=0).T for part in zip(*pairs, strict=True))
        y = y + residual
        if len(pairs) > 1:
            y = y - (dy + dr) @ np.linalg.lstsq(dr, residual, rcond=None)[0]
        yield y


def iterates_of_broyden(matrix, shift, steps):
    """The good method, with the whole Jacobian."""
    y, jacobian, last = np.zeros(N), -np.eye(N), None
    for _ in range(steps):
        residual = matrix @ y + shift - y
        if last is not None:
            s, d = y - last[0], residual - last[1]
            jacobian += np.outer(d - jacobian @ s, s) / (s @ s)
        last = y, residual
        y = y - np.linalg.solve(jacobian, residual)
        yield y


def test_the_iterates_are_those_of_the_textbook():
    args, _ = problem("normal")
    plain = [np.asarray(arg) for arg in args]
    for solver, expected in (
        (fl.Anderson(1e-12, 1e-12, history=3), list(iterates_of_anderson(*plain, 9, 3))),
        (fl.Broyden(1e-12, 1e-12), list(iterates_of_broyden(*plain, 9))),
    ):
        found = optx.fixed_point(linear, solver, jnp.zeros(N), args, max_steps=10, throw=False)
        np.testing.assert_allclose(found.state.y[0], expected[8], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("matrix", ["symmetric", "normal", "positive"])
def test_a_third_of_the_steps_of_plain_iteration(matrix):
    args, exact = problem(matrix)
    plain = optx.fixed_point(linear, optx.FixedPointIteration(1e-8, 1e-8), jnp.zeros(N), args)
    for kind in SOLVERS:
        found = optx.fixed_point(linear, kind(1e-8, 1e-8), jnp.zeros(N), args)
        assert 3 * found.stats["num_steps"] <= plain.stats["num_steps"]
        np.testing.assert_allclose(found.value, exact, atol=1e-6)
        bound = np.maximum(1e-8, 1e-8 * np.abs(linear(found.value, args)))
        assert (np.abs(linear(found.value, args) - found.value) <= bound).all()


@pytest.mark.slow
def test_any_pytree_of_any_dtype():
    def cosine(y, args):
        return jax.tree.map(jnp.cos, y)

    root = 0.7390851332151607
    for kind in SOLVERS:
        y0 = {"a": jnp.ones((2, 3), jnp.float32), "b": (jnp.zeros(()), jnp.ones(2, jnp.bfloat16))}
        found = optx.fixed_point(cosine, kind(1e-2, 1e-2), y0).value
        assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), found) == jax.tree.map(
            lambda leaf: (leaf.shape, leaf.dtype), y0
        )
        for leaf in jax.tree.leaves(found):
            np.testing.assert_allclose(np.asarray(leaf, float), root, atol=0.02)
        vector = fl.ComponentVector.of({"a": [1.0, 0.5], "b": 0.0}, dtype=jnp.float32)
        found = optx.fixed_point(cosine, kind(1e-6, 1e-6), vector)
        assert found.value.a.dtype == jnp.float32
        assert found.state.residual.dtype == jnp.float32
        np.testing.assert_allclose(found.value.b, root, rtol=1e-5)


@pytest.mark.long
def test_samples_converge_by_themselves():
    def rates(y, rate):
        return {"z": rate[:, None] * jnp.cos(y["z"])}

    def solve(solver, rate, steps=50):
        y0 = {"z": jnp.ones((len(rate), 3))}
        return optx.fixed_point(rates, solver, y0, rate, max_steps=steps, throw=False)

    rate, solver = jnp.array([0.0, 0.5, 1.0, -1.2]), fl.Anderson(1e-10, 1e-10, batch_axes=1)
    whole, part = solve(solver, rate), solve(solver, rate, 4)
    assert part.result != optx.RESULTS.successful
    assert whole.result == optx.RESULTS.successful
    # What has converged stays exactly as it is; the others go on.
    np.testing.assert_array_equal(part.value["z"][0], whole.value["z"][0])
    assert (part.value["z"][3] != whole.value["z"][3]).all()
    each = jax.vmap(lambda rate: solve(fl.Anderson(1e-10, 1e-10), rate[None]))(rate)
    np.testing.assert_allclose(each.value["z"][:, 0], whole.value["z"], rtol=1e-12)
    assert each.stats["num_steps"].max() == whole.stats["num_steps"]


def lowest(y, _):
    """A residual of `1 + y^2`: least at 0, and never 0."""
    return y + 1 + y**2


@pytest.mark.parametrize("kind", SOLVERS)
def test_the_best_iterate_is_returned(kind):
    found = optx.fixed_point(lowest, kind(1e-6, 1e-6), 0.0, max_steps=5, throw=False)
    assert found.value == 0
    assert found.result == optx.RESULTS.nonlinear_max_steps_reached


def cosine(y, scale):
    return scale * jnp.cos(y)


@pytest.mark.parametrize("kind", SOLVERS)
def test_what_is_not_finite_is_a_code(kind):
    def solve(y0, scale):
        return optx.fixed_point(cosine, kind(1e-8, 1e-8, batch_axes=1), y0, scale, throw=False)

    found = solve(jnp.ones((2, 1)), jnp.array([[jnp.nan], [1.0]]))
    assert found.result == optx.RESULTS.nonfinite
    np.testing.assert_allclose(found.value, [[1.0], [0.7390851332151607]], rtol=1e-7)
    assert solve(jnp.full((2, 1), jnp.nan), jnp.ones((2, 1))).result == optx.RESULTS.nonfinite


@pytest.mark.long
@pytest.mark.parametrize("adjoint", [optx.ImplicitAdjoint(), optx.RecursiveCheckpointAdjoint()])
def test_gradients_are_those_of_the_linear_system(adjoint):
    args, exact = problem("positive")
    matrix = np.asarray(args[0])

    def loss(shift, solver):
        found = optx.fixed_point(linear, solver, jnp.zeros(N), (args[0], shift), adjoint=adjoint)
        return jnp.sum(found.value**2)

    gradient = jax.grad(loss)(args[1], fl.Anderson(1e-12, 1e-12))
    np.testing.assert_allclose(gradient, np.linalg.solve(np.eye(N) - matrix.T, 2 * exact), rtol=1e-6)


def test_the_auxiliary_output_is_that_of_the_value():
    def fn(y, _):
        return jnp.cos(y), {"sine": jnp.sin(y)}

    found = optx.fixed_point(fn, fl.Anderson(1e-6, 1e-6), 1.0, has_aux=True)
    assert found.aux["sine"] == jnp.sin(found.value)


def test_bad_input_is_named():
    for bad in (
        {"rtol": np.nan},
        {"atol": -1e-6},
        {"atol": np.inf},
        {"history": 0},
        {"history": 2.5},
        {"batch_axes": -1},
        {"damping": 0.0},
        {"damping": np.nan},
        {"regularization": -1.0},
    ):
        ((name, value),) = bad.items()
        for kind in SOLVERS if name in fl.Broyden.__dataclass_fields__ else [fl.Anderson]:
            with pytest.raises(ValueError, match=f"{kind.__name__}.{name}: expected .*, found {value!r}"):
                kind(**{"rtol": 1e-6, "atol": 1e-6} | bad)
    for bad in ({"history": True}, {"rtol": "small"}, {"norm": 2}):
        with pytest.raises(TypeError, match=f"Anderson.{next(iter(bad))}: expected"):
            fl.Anderson(**{"rtol": 1e-6, "atol": 1e-6} | bad)
    solver = fl.Broyden(1e-6, 1e-6, batch_axes=1)
    for y in (jnp.ones(()), (jnp.ones(2), jnp.ones(3))):
        with pytest.raises(ValueError, match="1 leading axes in common, found"):
            optx.fixed_point(lambda y, _: y, solver, y)
    assert fl.Anderson(1e-4, 1e-4) == fl.Anderson(1e-4, 1e-4) != fl.Anderson(1e-4, 1e-4, damping=0.5)
    assert hash(fl.Broyden(1e-4, 1e-4)) == hash(fl.Broyden(1e-4, 1e-4))
    numpys = fl.Anderson(np.float64(1e-4), jnp.asarray(1e-4), history=np.int64(4), batch_axes=np.int32(1))
    assert numpys == fl.Anderson(1e-4, 1e-4, history=4, batch_axes=1)
    y = optx.fixed_point(lambda y, _: jnp.cos(y), numpys, jnp.ones((2, 1), jnp.float32)).value
    assert y.dtype == jnp.float32
