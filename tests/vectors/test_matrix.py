import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flatlayers as fl
from tests.helpers import assert_close, assert_same


def named_matrix(seed=0, lead=()):
    rows, cols = fl.Layout({"a": (2,), "b": {"c": (), "d": (3,)}}), fl.Layout({"x": (), "y": (2, 2)})
    data = jax.random.normal(jax.random.key(seed), (*lead, rows.length, cols.length))
    return fl.ComponentMatrix(data, rows, cols)


def test_a_vector_times_a_matrix():
    m = named_matrix()
    v = fl.ComponentVector(jnp.arange(6.0), m.rows)
    product = v @ m
    assert product.layout == m.cols
    np.testing.assert_allclose(product.data, np.asarray(v.data) @ np.asarray(m.data), rtol=1e-12)
    np.testing.assert_allclose((m.T @ v).data, product.data, rtol=1e-12)
    # No conjugate on either side.
    turned = fl.ComponentMatrix(1j * m.data.astype(complex), m.rows, m.cols)
    turned_product = v.map(lambda x: 1j * x.astype(complex)) @ turned
    np.testing.assert_allclose(turned_product.data, -product.data, rtol=1e-12)
    with pytest.raises(TypeError, match="same layout for both, found: a: "):
        fl.ComponentVector.zeros(m.cols) @ m
    many, vs = named_matrix(lead=(4,)), fl.ComponentVector(jnp.arange(24.0).reshape(4, 6), m.rows)
    assert_close((vs @ many).y, jnp.einsum("ti,tij->tj", vs.data, many.data)[:, 1:].reshape(4, 2, 2))


def test_a_colon_is_all_rows_or_columns():
    m = named_matrix()
    assert_same(m["a", :].data, m.data[:2])
    assert m["a", :].rows == fl.Layout({"a": (2,)})
    assert m["a", :].cols == m.cols
    assert_same(m["b.d", :].data, m.data[3:])
    assert_same(m["b", :].data, m.data[2:])
    assert_same(m[:, "y"].data, m.data[:, 1:])
    assert_same(m[:, "y"]["a", "y"], m["a", "y"])
    assert m[:, :] is m
    for key in ["a", ("a", 0), ("a", slice(1)), (slice(None),)]:
        with pytest.raises(TypeError, match="expected two paths, or `:`"):
            m[key]


def test_bad_input():
    m = named_matrix()
    with pytest.raises(KeyError, match="nearest: b"):
        m["bb", "x"]
    with pytest.raises(TypeError, match="two paths"):
        m["b"]
    with pytest.raises(TypeError, match="same layout"):
        m @ fl.ComponentVector.zeros(m.rows)
    with pytest.raises(ValueError, match=r"\(..., 6, 5\)"):
        fl.ComponentMatrix(jnp.ones((3, 3)), m.rows, m.cols)


def test_blocks_of_an_abstract_matrix_are_shapes():
    m = named_matrix()
    abstract = jax.eval_shape(lambda: m)
    for key in [(row, col) for row in (*m.rows.names, slice(None)) for col in (*m.cols.names, slice(None))]:
        assert jax.tree.leaves(abstract[key]) == jax.tree.leaves(jax.eval_shape(lambda key=key: m[key]))
        assert jax.tree.structure(abstract[key]) == jax.tree.structure(m[key])
    assert abstract.T.shape == m.T.shape
