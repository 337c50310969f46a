import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flatlayers as fl
from flatlayers.display.flops import flops


def struct(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def test_a_product_of_matrices():
    found = flops(jnp.matmul, struct(3, 5), struct(5, 7))
    assert found == 2 * 3 * 5 * 7
    assert flops(lambda x: x, struct(3)) == 0


def test_a_scan_counts_as_often_as_it_runs():
    (row,) = fl.summary(fl.Dense(3, 3), struct(50, 3)).rows
    for n in (1, 4, 40):
        deep = fl.summary(fl.Repeated(fl.Dense(3, 3), n), struct(50, 3))
        np.testing.assert_allclose(deep.total.flops, n * row.flops, rtol=0.05)
        twice = fl.summary(fl.Repeated(fl.Repeated(fl.Dense(3, 3), n), 2), struct(50, 3))
        np.testing.assert_allclose(twice.total.flops, 2 * n * row.flops, rtol=0.05)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.checkpoint])
def test_scans_inside_of_other_programs(wrap):
    @wrap
    def power(x):
        return jax.lax.scan(lambda c, _: (c @ x, None), x, length=6)[0]

    np.testing.assert_allclose(flops(power, struct(8, 8)), 6 * 2 * 8**3, rtol=0.05)


def test_it_is_not_known_without_a_cost_analysis(monkeypatch):
    monkeypatch.setattr(jax.stages.Lowered, "cost_analysis", lambda self: None)
    assert flops(jnp.sin, struct(2)) is None
