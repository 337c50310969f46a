"""Traced functions, which hold what they close over."""

import jax
import jax.numpy as jnp

from flatlayers.adjoints._traced import TracedFunction


def double(x):
    return 2 * x


def test_it_computes_as_the_function_does():
    traced = TracedFunction.of(
        lambda x, y: {"sum": x["a"] + y, "more": (y * y, None, "text")},
        {"a": 1.0 + jnp.zeros(2)},
        jnp.ones(2),
    )
    found = traced({"a": jnp.array([1.0, 2.0])}, jnp.array([3.0, 4.0]))
    assert found["sum"].tolist() == [4, 6]
    assert found["more"][0].tolist() == [9, 16]
    assert found["more"][1:] == (None, "text")
    assert jax.tree.map(jnp.shape, traced.out_struct["sum"]) == (2,)


def test_its_leaves_are_what_it_closes_over():
    def f(c, x):
        traced = TracedFunction.of(lambda x: c * x, x)
        assert [leaf.shape for leaf in jax.tree.leaves(traced) if isinstance(leaf, jax.Array)] == [(2,)]
        return jnp.sum(traced(x))

    assert jax.grad(f)(jnp.ones(2), jnp.array([3.0, 4.0])).tolist() == [3, 4]


def test_functions_without_closure_are_traced_too():
    traced = TracedFunction.of(double, jnp.ones(2))
    assert [eqn.primitive.name for eqn in traced.jaxpr.eqns] == ["mul"]
    assert traced.consts == []
    assert traced(jnp.ones(2)).tolist() == [2, 2]


def test_shapes_do_for_an_example():
    traced = TracedFunction.of(double, jax.ShapeDtypeStruct((3,), jnp.float64))
    assert traced(jnp.ones(3)).shape == (3,)
