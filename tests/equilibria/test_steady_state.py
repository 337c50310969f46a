import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest

import flatlayers as fl


pytestmark = pytest.mark.long


def test_bad_options_of_a_steady_state_are_named():
    for bad in (
        {"rtol": np.nan},
        {"atol": -1.0},
        {"dt0": 0.0},
        {"dt0": -np.inf},
        {"max_steps": 0},
        {"max_steps": 2.5},
    ):
        ((name, value),) = bad.items()
        with pytest.raises(ValueError, match=f"SteadyState.{name}: expected .*, found {value!r}"):
            fl.SteadyState(**bad)
    for bad in ({"solver": fl.SteadyState()}, {"event": 1.0}, {"stepsize_controller": 0.1}, {"dt0": True}):
        with pytest.raises(TypeError, match=f"SteadyState.{next(iter(bad))}: expected .*, found"):
            fl.SteadyState(**bad)
    assert fl.SteadyState(max_steps=np.int64(7)) == fl.SteadyState(max_steps=7)


def test_a_steady_state_that_does_not_come_is_a_code():
    def solve(fn, **options):
        return optx.fixed_point(fn, fl.SteadyState(1e-6, 1e-6, max_steps=60, **options), 1.0, throw=False)

    codes = (
        optx.RESULTS.nonlinear_max_steps_reached,
        optx.RESULTS.nonlinear_divergence,
        optx.RESULTS.nonfinite,
    )
    for fn in (lambda y, _: y + 1, lambda y, _: y + y**2, lambda y, _: jnp.nan * y):
        assert solve(fn).result in codes
    assert solve(lambda y, _: -3 * y).result == optx.RESULTS.successful


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_a_half_precision_is_solved_in_float32(dtype):
    """The result is the fixed point to a rounding of the half precision, and has its dtype."""
    seen = []

    def fn(y, shift):
        seen.append(jax.tree.leaves(y)[0].dtype)
        return {"a": shift - 5 * y["a"]}

    y0, shift = {"a": jnp.ones(2, dtype)}, jnp.array([1.0, 1.5], dtype)
    solution = optx.fixed_point(fn, fl.SteadyState(1e-2, 1e-2), y0, shift)
    assert solution.result == optx.RESULTS.successful
    assert solution.value["a"].dtype == dtype
    assert set(seen) == {jnp.dtype(dtype)}
    expected = np.array([1.0, 1.5]) / 6
    np.testing.assert_allclose(solution.value["a"].astype(float), expected, rtol=0.03)
