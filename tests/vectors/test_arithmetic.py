import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flatlayers as fl
from tests.helpers import assert_close, assert_same
from tests.vectors.test_matrix import named_matrix
from tests.vectors.test_vector import vector


OPERATORS = [operator.add, operator.sub, operator.mul, operator.truediv, operator.pow]
OPERATORS += [operator.floordiv, operator.mod]
OPERATORS += [operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge]


@pytest.mark.parametrize("op", OPERATORS)
def test_operators_keep_the_layout(op):
    v, w = abs(vector(0)), abs(vector(1))
    for other in (w, 2.0, w.data, np.asarray(w), jnp.float64(2.0), np.float64(2.0)):
        result = op(v, other)
        assert isinstance(result, fl.ComponentVector)
        assert result.layout == v.layout
        assert_same(result.data, op(v.data, other.data if isinstance(other, fl.ComponentVector) else other))


@pytest.mark.parametrize("op", OPERATORS[:7])
def test_scalars_on_the_left_keep_the_layout_and_arrays_do_not(op):
    v = abs(vector())
    for scalar in (2, 2.0, np.float64(2.0)):
        assert_same(op(scalar, v).data, op(scalar, v.data))
        assert op(scalar, v).layout == v.layout
    for array in (jnp.arange(1.0, 11.0), np.arange(1.0, 11.0)):
        assert isinstance(op(array, v), jax.Array | np.ndarray)
        assert_close(op(array, v), op(array, v.data))


def test_products_signs_and_jax_functions():
    v, w = vector(0), vector(1)
    matrix = jnp.ones((3, 10))
    assert_close(v @ w, jnp.sum(v.data * w.data))
    assert_same(matrix @ v, matrix @ v.data)
    assert_same(np.ones((3, 10)) @ v, matrix @ v.data)
    assert_same(v @ matrix.T, v.data @ matrix.T)
    assert_same((-v).data, -v.data)
    assert_same(abs(v).data, jnp.abs(v.data))
    assert_same((+v).data, v.data)
    assert_same(jnp.sum(v), jnp.sum(v.data))
    assert_same(jnp.where(v > 0, v, 0.0), jnp.where(v.data > 0, v.data, 0.0))
    assert_same(jnp.linalg.norm(v), jnp.linalg.norm(v.data))
    assert isinstance(jnp.sin(v), jax.Array)
    assert isinstance(np.asarray(v), np.ndarray)
    assert np.asarray(v, np.float32).dtype == np.float32
    assert_close(vector(0, (3,)) @ vector(1, (3,)), jnp.sum(vector(0, (3,)).data * vector(1, (3,)).data, -1))


def test_two_different_layouts():
    other = fl.ComponentVector(jnp.ones(10), fl.Layout({"a": (2, 3), "b": {"c": (4,)}}))
    for op in (operator.add, operator.matmul, operator.lt, operator.eq):
        with pytest.raises(TypeError, match=r"b.c: \(3,\) became \(4,\)"):
            op(vector(), other)


def test_other_types_are_left_to_decide():
    v = vector()
    assert v.__add__("x") is NotImplemented
    assert v.__pow__(object()) is NotImplemented
    assert (v == "x") is False
    with pytest.raises(TypeError):
        v + {1.0}
    with pytest.raises(ValueError, match="length 10, found shape"):
        v + jnp.ones(3)
    with pytest.raises(TypeError):
        hash(v)
    with pytest.raises((TypeError, ValueError)):
        bool(v == v)


LOGIC = [operator.and_, operator.or_, operator.xor]


@pytest.mark.parametrize("op", LOGIC)
def test_comparisons_and_masks_combine(op):
    v = vector()
    low, high, mask = v > -1, v < 1, v.layout.mask("b")
    result = op(low, high)
    assert result.layout == v.layout
    assert_same(result.data, op(v.data > -1, v.data < 1))
    for other in (mask, jnp.asarray(mask), True, np.bool_(False)):
        assert_same(op(low, other).data, op(low.data, other))
        assert op(low, other).layout == v.layout
    assert_same(op(True, low).data, op(True, low.data))
    assert isinstance(op(mask, low), jax.Array)
    assert_same(op(mask, low), op(mask, low.data))
    with pytest.raises(TypeError, match="float64"):
        op(v, v)
    counts = fl.ComponentVector(jnp.arange(10), v.layout)
    assert_same(op(counts, 6).data, op(jnp.arange(10), 6))


def test_inverse_and_rounding_are_those_of_an_array():
    v, m = 10 * vector(), named_matrix()
    assert_same((~(v > 0)).data, v.data <= 0)
    assert_same((~fl.ComponentVector(jnp.arange(10), v.layout)).data, ~jnp.arange(10))
    for digits in ((), (None,), (0,), (1,), (-1,)):
        rounded = round(v, *digits)
        assert rounded.layout == v.layout
        assert_same(rounded.data, round(v.data, *digits))
    assert round(v).dtype == int
    assert_same(round(jax.device_get(v), 1).data, round(v.data, 1))
    assert_same(round(m, 1).data, round(m.data, 1))
    assert_same((m // 0.5).data, m.data // 0.5)
    assert_same(jax.jit(lambda v: round(v, 1) // 2)(v).data, round(v.data, 1) // 2)
    with pytest.raises(TypeError, match="float64"):
        operator.invert(v)


def test_quotient_and_remainder_together():
    v = vector()
    for result, expected in ((divmod(v, 0.3), divmod(v.data, 0.3)), (divmod(2, v), divmod(2, v.data))):
        assert_same([part.data for part in result], list(expected))
        assert all(part.layout == v.layout for part in result)
    with pytest.raises(TypeError):
        divmod(v, "x")


@pytest.mark.parametrize("lead", [(), (1,), (1, 1)])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_one_number_is_a_number(lead, shape):
    layout = fl.Layout({"a": {"b": shape}})
    v = fl.ComponentVector(jnp.full((*lead, 1), 2.75), layout)
    assert (float(v), int(v), complex(v), bool(v)) == (2.75, 2, 2.75 + 0j, True)
    assert float(jax.device_get(v)) == 2.75
    assert f"{float(v):.1f}" == "2.8"


@pytest.mark.parametrize("call", [float, int, complex])
def test_several_numbers_are_not_one(call):
    with pytest.raises(TypeError, match=f"{call.__name__}: expected one number, found 10"):
        call(vector())
    with pytest.raises(TypeError, match="expected one number, found 0"):
        call(fl.ComponentVector.of({}))
    with pytest.raises(jax.errors.ConcretizationTypeError):
        jax.jit(lambda v: call(v))(fl.ComponentVector.of({"a": 1.0}))


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
