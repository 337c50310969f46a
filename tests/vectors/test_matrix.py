import operator
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flatlayers as fl
from tests.helpers import assert_close, assert_same


LAYOUT = fl.Layout({"x": {"b": (2, 3), "c": ()}, "y": (4,)})


@pytest.fixture
def v():
    return fl.ComponentVector(jax.random.normal(jax.random.key(0), (LAYOUT.length,)), LAYOUT)


def potential(v):
    return jnp.sum(jnp.sin(v.x.b)) * v.x.c + jnp.sum(v.y**3) * v.x.c**2


def test_jacobian_to_a_vector_is_a_matrix_with_names(v):
    def f(v):
        return fl.ComponentVector.of({"sum": v.y[0] + v.x.c, "part": {"twice": 2 * v.x.b}})

    J = fl.jacobian(f)(v)
    assert isinstance(J, fl.ComponentMatrix)
    assert J.shape == (J.rows.length, J.cols.length) == (7, 11)
    assert J["part.twice", "x.b"].shape == (2, 3, 2, 3)
    assert_same(J["part.twice", "x.b"].reshape(6, 6), 2 * jnp.eye(6))
    assert_same(J["sum", "y"], jnp.array([1.0, 0, 0, 0]))
    assert_same(J["part", "x"].data, J.data[1:, :7])
    assert_same(J["sum", "x"].data, J.data[:1, :7])
    assert_same(J.T["x.b", "sum"], J["sum", "x.b"])


@pytest.mark.parametrize("shape", [(), (2,), (30, 2)])
def test_jacobian_to_an_array_is_a_vector_with_leading_axes(v, shape):
    def f(v, scale):
        return jnp.full(shape, scale * potential(v))

    J = fl.jacobian(f)(v, 3.0)
    assert J.shape == (*shape, 11)
    assert J.x.b.shape == (*shape, 2, 3)
    assert_close(J.data, jnp.broadcast_to(3 * jax.grad(potential)(v).data, (*shape, 11)))


def test_both_modes_agree(v):
    def f(v):
        return jnp.sin(v.data) * v.x.c

    assert_close(fl.jacobian(f, mode="fwd")(v).data, fl.jacobian(f)(v).data)


def test_hessian(v):
    H = jax.jit(fl.hessian(potential))(v)
    assert H["x.b", "y"].shape == (2, 3, 4)
    assert_close(H["y", "y"], jnp.diag(6 * v.y * v.x.c**2))
    assert_close(H["x.b", "x.c"], jnp.cos(v.x.b))
    assert_same(H.data, H.T.data)
    w = H @ v
    assert w.layout == v.layout
    assert_close(w.data, H.data @ v.data)
    assert_close(H @ v.data, H.data @ v.data)
    assert_close(v.data @ H, v.data @ H.data)
    assert_close((H @ H).data, H.data @ H.data)
    assert_same(np.asarray(H), np.asarray(H.data))
    assert_same(jnp.trace(H), jnp.trace(H.data))
    assert_same(pickle.loads(pickle.dumps(H))["x.b", "y"], H["x.b", "y"])
    assert len(jax.tree.leaves(H)) == 1


def test_bad_input(v):
    H = fl.hessian(potential)(v)
    with pytest.raises(KeyError, match="nearest: y"):
        H["yy", "x"]
    with pytest.raises(TypeError, match="two paths"):
        H["y"]
    with pytest.raises(TypeError, match="same layout"):
        H @ v.x
    with pytest.raises(TypeError, match="ComponentVector"):
        fl.jacobian(jnp.sum)(v.data)
    with pytest.raises(ValueError, match="vmap"):
        fl.hessian(potential)(fl.ComponentVector(jnp.ones((2, 11)), LAYOUT))
    with pytest.raises(ValueError, match="scalar"):
        fl.hessian(lambda v: v.y)(v)
    with pytest.raises(ValueError, match=r"\(..., 11, 11\)"):
        fl.ComponentMatrix(jnp.ones((3, 3)), LAYOUT, LAYOUT)


# Arithmetic


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


@pytest.mark.parametrize("op", [operator.add, operator.sub, operator.mul, operator.truediv])
def test_elementwise_arithmetic(op):
    a, b = named_matrix(0), named_matrix(1)
    for other in (b, 2, 0.5, np.float64(3.0), b.data, np.asarray(b.data)):
        result = op(a, other)
        assert isinstance(result, fl.ComponentMatrix)
        assert (result.rows, result.cols) == (a.rows, a.cols)
        assert_same(result.data, op(a.data, other.data if other is b else other))
    with pytest.raises(TypeError, match="same layout"):
        op(a, a.T)
    with pytest.raises(TypeError):
        op(a, fl.ComponentVector.zeros(a.rows))
    with pytest.raises(ValueError, match=r"broadcasts to \(6, 5\), found \(3, 6, 5\)"):
        op(a, jnp.ones((3, 6, 5)))


def test_a_number_on_the_left():
    m = named_matrix()
    for result, expected in ((2 * m, 2 * m.data), (2 + m, 2 + m.data), (2 - m, 2 - m.data), (-m, -m.data)):
        assert_same(result.data, expected)
        assert result.rows == m.rows
    assert_same((m + m - 2 * m).data, jnp.zeros((6, 5)))


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
