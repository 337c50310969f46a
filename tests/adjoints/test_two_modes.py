"""One function, its tangents by one way and its cotangents by another."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flatlayers.adjoints._two_modes import TwoModes
from tests.helpers import assert_close, equations


def wave(problem, constants):
    x, w = problem
    return {"y": jnp.sin(w * x) * constants[0], "n": jnp.array(3), "name": "wave", "c": jnp.ones(2)}


def forward(perturbed, problem, constants):
    x, w = problem
    return wave(problem, constants), jnp.cos(w * x)


def backward(cos, cotangents, perturbed, problem, constants):
    assert (cotangents["n"], cotangents["name"], cotangents["c"]) == (None, None, None)
    x, w = problem
    return cotangents["y"] * w * cos * constants[0], jnp.sum(cotangents["y"] * x * cos * constants[0])


MODES = TwoModes(wave, forward, backward, "Wave")
X, W = jnp.array([0.3, -1.0, 2.0]), jnp.array(0.7)


def f(x, w=W):
    return MODES((x, w), (2.0,))["y"]


def plain(x, w=W):
    return jnp.sin(w * x) * 2.0


DERIVATIVES = {
    "jvp": lambda f: jax.jvp(f, (X, W), (X, W)),
    "jvp by one": lambda f: jax.jvp(lambda w: f(X, w), (W,), (W,)),
    "jacfwd": lambda f: jax.jacfwd(f, (0, 1))(X, W),
    "jacrev": lambda f: jax.jacrev(f, (0, 1))(X, W),
    "jit": lambda f: (jax.jit(jax.jacfwd(f))(X), jax.jit(jax.jacrev(f))(X)),
    "linearize and its transpose": lambda f: (
        jax.linearize(f, X)[1](X),
        jax.linear_transpose(jax.linearize(f, X)[1], X)(X),
    ),
    "vmap of jvp": lambda f: jax.vmap(lambda x: jax.jvp(f, (x, W), (x, W))[1])(X),
    "jvp of vmap": lambda f: jax.jvp(lambda w: jax.vmap(f, (0, None))(X, w), (W,), (W,)),
    "vmap of grad": lambda f: jax.vmap(jax.grad(f, (0, 1)), (0, None))(X, W),
    "grad of vmap": lambda f: jax.grad(lambda x, w: jax.vmap(f, (0, None))(x, w).sum(), (0, 1))(X, W),
    "vmap at another axis": lambda f: jax.vmap(jax.jacfwd(f), in_axes=1, out_axes=2)(jnp.stack([X, X], 1)),
    "jacfwd of vmap of vmap": lambda f: jax.jacfwd(jax.vmap(jax.vmap(f), axis_name="i"))(X[None]),
    "jvp of vmap of jit": lambda f: jax.jvp(jax.vmap(jax.jit(f)), (X,), (X,)),
    "remat": lambda f: (jax.jacfwd(jax.checkpoint(f))(X), jax.jacrev(jax.checkpoint(f))(X)),
    "scan": lambda f: [
        mode(lambda x: jax.lax.scan(lambda x, _: (f(x), x), x, length=3))(X)
        for mode in (jax.jacfwd, jax.jacrev)
    ],
    "forward over reverse": lambda f: jax.jacfwd(jax.jacrev(f, (0, 1)), (0, 1))(X, W),
    "forward over forward": lambda f: jax.jacfwd(jax.jacfwd(f, (0, 1)), (0, 1))(X, W),
    "linear in the tangent": lambda f: jax.grad(lambda v: jax.jvp(f, (X,), (v,))[1].sum())(X),
}


@pytest.mark.parametrize("name", DERIVATIVES)
def test_derivatives(name):
    assert_close(DERIVATIVES[name](f), DERIVATIVES[name](plain))


def test_reverse_mode_over_forward_mode_is_refused():
    with pytest.raises(TypeError, match=r"Wave has no reverse mode over forward mode.*DirectAdjoint\(\)"):
        jax.grad(lambda x: jax.jvp(f, (x,), (X,))[1].sum())(X)


def test_what_is_no_part_of_the_problem_has_no_tangent():
    with pytest.raises(RuntimeError, match="Wave cannot be autodifferentiated"):
        jax.jacfwd(lambda c: MODES((X, W), (c,))["y"])(1.0)


def test_the_rest_of_what_it_gives_is_as_it_was():
    out = MODES((X, W), (2.0,))
    assert out["name"] == "wave"
    np.testing.assert_array_equal(out["n"], 3)


def test_neither_mode_has_the_other_in_its_program():
    def primitives(function):
        return {eqn.primitive.name for eqn in equations(jax.make_jaxpr(function)(X).jaxpr)}

    seen = []

    def wave_seen(problem, constants):
        seen.append("function")
        return wave(problem, constants)

    modes = TwoModes(wave_seen, forward, backward, "Wave")
    gradient = jax.grad(lambda x: modes((x, W), (2.0,))["y"].sum())
    assert "tangent_of_two_modes" not in primitives(gradient)
    assert not seen
