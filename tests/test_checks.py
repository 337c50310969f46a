"""Errors of a program that runs: what they are tied to stays as it is."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flatlayers.checks import checked_by, error_if


def bits(x):
    return np.asarray(x).tobytes()


VALUES = [
    jnp.array([0.0, -0.0, jnp.nan, -jnp.inf, 5e-324]),
    jnp.array([0.0, -0.0, jnp.inf], jnp.float16),
    jnp.array([-0.0, 1.0], jnp.bfloat16),
    jnp.array([complex(-0.0, -0.0), complex(jnp.nan, -0.0)]),
    jnp.array([-(2**63), 2**63 - 1]),
    jnp.array([255], jnp.uint8),
    jnp.array([True, False]),
]


@pytest.mark.parametrize("value", VALUES, ids=lambda x: str(x.dtype))
def test_arrays_keep_their_bits_and_dtypes(value):
    found = jax.jit(lambda x, bad: error_if({"x": x}, bad, "wrong"))(value, False)["x"]
    assert found.dtype == value.dtype
    assert bits(found) == bits(value)
    assert bits(error_if(value, jnp.array(False), "wrong")) == bits(value)


def test_what_is_no_array_stays():
    key = jax.random.key(0)
    found = jax.jit(lambda key, bad: error_if((key, None), bad, "wrong"))(key, False)
    assert found[1] is None
    assert (jax.random.key_data(found[0]) == jax.random.key_data(key)).all()
    tree = ("text", jnp.ones(2))
    assert error_if(tree, jnp.array(False), "wrong") is tree


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit, eqx.filter_jit])
def test_it_raises(transform):
    function = transform(lambda x: error_if(x, x[0] > 1, "the first is too large"))
    assert function(jnp.array([1.0, 2.0]))[1] == 2
    with pytest.raises(Exception, match="the first is too large"):
        jax.block_until_ready(function(jnp.array([2.0, 2.0])))


@pytest.mark.parametrize("outer", [lambda f: f, jax.jit])
def test_one_sample_that_fails_raises_for_all(outer):
    function = outer(jax.vmap(lambda x: error_if(x, x > 1, "too large")))
    assert (function(jnp.array([0.0, 1.0])) == jnp.array([0.0, 1.0])).all()
    with pytest.raises(Exception, match="too large"):
        jax.block_until_ready(function(jnp.array([0.0, 2.0])))


def test_derivatives_pass():
    def f(x):
        return jnp.sum(error_if(x, jnp.isnan(x).any(), "NaN") ** 3)

    x = jnp.array([1.0, -2.0])
    np.testing.assert_array_equal(jax.jit(jax.grad(f))(x), 3 * x**2)
    np.testing.assert_array_equal(jax.jit(jax.hessian(f))(x), jnp.diag(6 * x))
    np.testing.assert_array_equal(jax.jit(jax.jvp, static_argnums=0)(f, (x,), (x,))[1], 3 * jnp.sum(x**3))


def test_one_number_goes_through_the_check_alone():
    seen = []

    def check(token, bad):
        seen.append((token.shape, token.dtype))
        return token

    jax.jit(lambda x: checked_by(check, x, True))(jnp.ones((100, 3)))
    assert seen == [((), jnp.float32)]
    jaxpr = jax.make_jaxpr(lambda x, bad: error_if(x, bad, "wrong"))(jnp.ones((100, 3)), True)
    assert [eqn.primitive.name for eqn in jaxpr.eqns if (100, 3) in [v.aval.shape for v in eqn.invars]] == [
        "select_n"
    ]
