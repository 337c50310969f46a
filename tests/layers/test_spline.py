import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.interpolate import CubicSpline

import flatlayers as fl
from tests.helpers import assert_close, assert_same, central_difference


GRID = (-1.0, -0.4, 0.1, 1.5, 2.0)


def reference(kind, grid, points, x):
    """The curve by NumPy and SciPy, held outside of the grid."""
    x = np.clip(x, grid[0], grid[-1])
    if kind == "cubic":
        return CubicSpline(grid, points, bc_type="natural")(x)
    columns = points.reshape(len(grid), -1).T
    values = np.stack([np.interp(x, grid, column) for column in columns], axis=-1)
    return values.reshape(*x.shape, *points.shape[1:])


@pytest.mark.parametrize("kind", ["linear", "cubic"])
@pytest.mark.parametrize("learn_grid", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize(("lead", "dims"), [((), 3), ((40,), ()), ((4, 10), (2, 3))])
def test_against_scipy(key, kind, learn_grid, dtype, lead, dims):
    layer = fl.SplineLayer(GRID, dims, kind=kind, learn_grid=learn_grid)
    ps, st = fl.setup(key, layer, dtype)
    x = jax.random.uniform(jax.random.key(1), lead, dtype, -1.5, 2.5)
    y, new = jax.jit(layer)(x, ps, st)
    assert y.dtype == dtype
    assert new == st == {}
    expected = reference(kind, np.array(GRID), np.asarray(ps.points, float), np.asarray(x, float))
    rtol = 2e-5 if dtype == jnp.float32 else 1e-12
    np.testing.assert_allclose(y, expected, rtol=rtol, atol=rtol)
    shape = (dims,) if isinstance(dims, int) else dims
    assert y.shape == fl.output_shape(layer, x) == (*lead, *shape)
    assert ps.points.shape == (5, *shape)
    assert fl.parameter_length(layer) == ps.size
    if learn_grid:
        assert_same(ps.grid, jnp.array(GRID, dtype))
    assert eval(repr(layer), vars(fl)) == layer


@pytest.mark.long
@pytest.mark.parametrize("kind", ["linear", "cubic"])
def test_goes_through_its_points_and_is_held_outside(key, kind):
    layer = fl.SplineLayer(GRID, 2, kind=kind)
    ps, st = fl.setup(key, layer, float)
    assert_close(layer(jnp.array(GRID), ps, st)[0], ps.points)
    assert_close(layer(jnp.array([-9.0, 9.0]), ps, st)[0], ps.points[jnp.array([0, -1])])
    assert_close(layer(1, ps, st)[0], layer(1.0, ps, st)[0])
    assert jnp.isnan(layer(jnp.nan, ps, st)[0]).all()


@pytest.mark.parametrize("kind", ["linear", "cubic"])
def test_two_points_make_a_line(kind):
    layer = fl.SplineLayer((0.0, 2.0), (), kind=kind)
    y, _ = layer(jnp.array([0.0, 0.5, 2.0]), {"points": jnp.array([1.0, 3.0])}, {})
    assert_close(y, jnp.array([1.0, 1.5, 3.0]))


@pytest.mark.parametrize("kind", ["linear", "cubic"])
@pytest.mark.parametrize("learn_grid", [False, True])
def test_gradient_of_the_parameters(key, kind, learn_grid):
    layer = fl.SplineLayer(GRID, 3, kind=kind, learn_grid=learn_grid)
    ps, st = fl.setup(key, layer, float)
    x = jnp.array([-2.0, -0.9, 0.0, 0.3, 1.0, 1.7, 3.0])
    direction = fl.ComponentVector(jax.random.normal(jax.random.key(2), ps.shape), ps.layout)

    def loss(ps):
        return jnp.sum(layer(x, ps, st)[0] ** 2)

    slope = jax.grad(loss)(ps) @ direction
    np.testing.assert_allclose(slope, central_difference(loss, ps, direction), rtol=1e-6)


@pytest.mark.slow
def test_derivatives_of_the_curve(key):
    layer = fl.SplineLayer(GRID, (), kind="cubic")
    ps, st = fl.setup(key, layer, float)
    spline = CubicSpline(GRID, ps.points, bc_type="natural")
    # At the points and at both ends as well as between them.
    x = jnp.array([*GRID, 0.0, 0.7, 1.8])
    first = jax.grad(lambda x: layer(x, ps, st)[0])
    second = jax.grad(first)
    np.testing.assert_allclose(jax.vmap(first)(x), spline(x, 1), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(jax.vmap(second)(x), spline(x, 2), rtol=1e-10, atol=1e-10)
    assert first(3.0) == first(-3.0) == 0


def test_derivative_of_a_line_at_its_points():
    layer = fl.SplineLayer((0.0, 1.0, 3.0), (), kind="linear")
    ps = {"points": jnp.array([0.0, 2.0, 8.0])}
    slopes = jax.vmap(jax.grad(lambda x: layer(x, ps, {})[0]))(jnp.array([0.0, 0.5, 1.0, 3.0]))
    assert_close(slopes, jnp.array([2.0, 2.0, 3.0, 3.0]))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["linear", "cubic"])
def test_vmap_over_places_and_over_curves(key, kind):
    layer = fl.SplineLayer(GRID, 2, kind=kind, learn_grid=True)
    keys = jax.random.split(key, 3)
    ps = jax.vmap(lambda key: fl.initial_parameters(key, layer, float))(keys)
    x = jax.random.uniform(key, (3, 4))
    y = jax.vmap(lambda x, ps: layer(x, ps, {})[0])(x, ps)
    for i in range(3):
        own = fl.initial_parameters(keys[i], layer, float)
        assert_close(y[i], layer(x[i], own, {})[0])
        assert_close(y[i], jax.vmap(lambda x, own=own: layer(x, own, {})[0])(x[i]))


def test_known_points_and_a_grid_from_an_array(key):
    points = np.sin(np.linspace(0, 3, 20))
    layer = fl.SplineLayer(
        np.linspace(0, 3, 20), (), kind="cubic", init_points=fl.initializers.from_array(points)
    )
    assert layer == fl.SplineLayer(list(layer.grid), (), kind="cubic", init_points=layer.init_points)
    ps, st = fl.setup(key, layer, float)
    np.testing.assert_allclose(layer(1.234, ps, st)[0], np.sin(1.234), atol=1e-4)


@pytest.mark.parametrize("grid", [(), (1.0,), (1.0, 1.0), (0.0, 2.0, 1.0)])
def test_a_grid_is_increasing(grid):
    with pytest.raises(ValueError, match="expected a grid of 2 or more increasing numbers, found"):
        fl.SplineLayer(grid, 2)


@pytest.mark.parametrize("grid", [(0.0, np.nan), (0.0, np.inf), (False, True), ("a", "b"), 3.0, "ab", None])
def test_a_grid_is_of_numbers(grid):
    with pytest.raises(
        (ValueError, TypeError), match="SplineLayer.grid: expected a tuple, each part a finite"
    ):
        fl.SplineLayer(grid, 2)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("kind", ["linear", "cubic"])
@pytest.mark.parametrize("learn_grid", [False, True])
def test_half_precisions_compute_in_float32(key, dtype, kind, learn_grid):
    """With a grid of places that bfloat16 cannot tell apart, unless they are learned, in its dtype."""
    grid = (0.0, 1.0, 2.0) if learn_grid else (1000.0, 1001.0, 1003.0, 1004.0)
    layer = fl.SplineLayer(grid, 3, kind=kind, learn_grid=learn_grid)
    ps, st = fl.setup(key, layer, dtype)
    x = jnp.asarray([0.25, 1.75] if learn_grid else [1000.0, 1004.0], dtype)
    y, _ = jax.jit(layer)(x, ps, st)
    wide, _ = layer(x.astype(float), ps.map(lambda p: p.astype(float)), st)
    assert y.dtype == dtype
    np.testing.assert_allclose(y.astype(float), wide, rtol=4 * float(jnp.finfo(dtype).eps), atol=1e-2)
    slope = jax.grad(lambda ps: layer(x, ps, st)[0].astype(jnp.float32).sum())(ps)
    assert slope.dtype == dtype
    assert jnp.isfinite(slope.data).all()


@pytest.mark.parametrize("kind", ["linear", "cubic"])
def test_complex_points(key, kind):
    """A spline is linear in its points."""
    layer = fl.SplineLayer((0.0, 1.0, 3.0, 4.0), 2, kind=kind)
    with jax.numpy_dtype_promotion("standard"):
        ps, st = fl.setup(key, layer, complex)
        x = jnp.linspace(-1, 5, 13)
        parts = [layer(x, {"points": part(ps.points)}, st)[0] for part in (jnp.real, jnp.imag)]
        y, _ = layer(x, ps, st)
        assert y.dtype == complex
        assert_close(y, parts[0] + 1j * parts[1])
        with pytest.raises(TypeError, match=r"a real x and a real grid, found complex128\[13\]"):
            layer(x.astype(complex), ps, st)
        learned = fl.SplineLayer((0.0, 1.0), 2, learn_grid=True)
        with pytest.raises(TypeError, match=r"a real x and a real grid, found complex128\[2\]"):
            learned(x, *fl.setup(key, learned, complex))


@pytest.mark.parametrize("kind", ["linear", "cubic"])
def test_a_place_that_is_nan_gives_nan(key, kind):
    layer = fl.SplineLayer((0.0, 1.0, 3.0), 2, kind=kind)
    ps, st = fl.setup(key, layer, float)
    y, _ = jax.jit(layer)(jnp.array([jnp.nan, 0.5, jnp.inf]), ps, st)
    assert jnp.isnan(y).all(1).tolist() == [True, False, False]
    assert_close(y[2], ps.points[-1])  # what is outside is held
    assert jnp.isnan(layer(0.5, {"points": ps.points.at[0].set(jnp.nan)}, st)[0]).all()


def test_there_are_two_kinds():
    with pytest.raises(ValueError, match="'linear' or 'cubic', found 'quintic'"):
        fl.SplineLayer(GRID, 2, kind="quintic")
