"""Programs that NumPy runs against JAX itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flatlayers.train.in_numpy import InNumpy

from ..helpers import assert_close


X = np.random.default_rng(0).normal(size=(3, 4))


@jax.custom_jvp
def halved(x):
    return x / 2


halved.defjvp(lambda primals, tangents: (halved(*primals), tangents[0] / 2))


PROGRAMS = {
    "arithmetic": lambda x: (x + 2 * x - x / 3) ** 3 + jnp.abs(x) ** 0.7 - jnp.square(-x),
    "roots": lambda x: jnp.sqrt(jnp.abs(x)) + jax.lax.rsqrt(x**2 + 1) + jnp.cbrt(x),
    "exponentials": lambda x: jnp.exp(x) + jnp.log(x**2) + jnp.log1p(x**2) + jnp.tanh(x),
    "comparisons": lambda x: ((x > 0) & (x < 1)) | (x >= 2) | ~(x <= 3) | (x == 0) | (x != x),
    "selection": lambda x: jnp.where(x > 0, jnp.maximum(x, 1.0), jnp.minimum(x, -1.0)) + jnp.sign(x),
    "clipping": lambda x: jnp.clip(x, -0.5, 0.5) + jax.lax.clamp(0.0, x, 1.0),
    "finite": lambda x: jnp.isfinite(jnp.where(x > 0, x, jnp.inf)),
    "conversion": lambda x: x.astype(jnp.bfloat16).astype(jnp.float64) + x.astype(int).astype(x.dtype),
    "integers": lambda x: (jnp.int32(-7) // 2, jnp.int32(-7) % 4, jax.lax.div(jnp.int32(-7), jnp.int32(2))),
    "reductions": lambda x: (x.sum(), x.sum(0), x.max(1), x.min(), (x > 0).all(0), (x > 0).any()),
    "shapes": lambda x: jnp.concatenate([x.reshape(2, 6)[:, ::2].T, jnp.ones((3, 1))], axis=1)[None],
    "splitting": lambda x: jnp.split(x, [1, 3], axis=1),
    "products": lambda x: (x @ x.T, x[0] @ x[1], jnp.einsum("ij,ik->ijk", x, x), jnp.vecdot(x, x)),
    "calls": lambda x: halved(x) + jax.jit(jnp.sin)(x) + jax.checkpoint(lambda x: x**2)(x),
    "branches": lambda x: jax.lax.switch(2, [lambda x: x, lambda x: 2 * x, lambda x: 3 * x], x),
    "loops": lambda x: jax.lax.scan(lambda total, row: (total + row, total), jnp.zeros(4), x),
    "decomposition": lambda x: jnp.linalg.svd(x, compute_uv=False),
    "complex numbers": lambda x: (jax.lax.complex(x, x**2).conj() ** 2).imag,
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_it_is_what_jax_computes(name):
    assert_close(InNumpy(PROGRAMS[name], X)(X), PROGRAMS[name](jnp.asarray(X)))


def test_trees_and_double_precision():
    numbers = {"a": X.astype(np.float32), "b": [np.float32(1 / 3)]}
    found = InNumpy(lambda tree: (tree["a"] * tree["b"][0], tree), numbers)(numbers)
    assert found[0].dtype == np.float64
    assert_close(found[0], numbers["a"].astype(float) * np.float64(np.float32(1 / 3)), rtol=1e-15)
    assert_close(found[1], numbers)


def test_constants_of_a_program():
    constants = jnp.arange(4.0)
    assert_close(InNumpy(lambda x: x * constants[None], X)(X), X * np.arange(4.0))


def test_what_is_a_function():
    key = jax.random.key(0)
    assert InNumpy(jnp.sin, X).is_a_function
    assert not InNumpy(lambda x: x + jax.random.normal(key, x.shape), X).is_a_function
    assert not InNumpy(jax.jit(lambda x: jax.random.permutation(key, x)), X).is_a_function
    assert not InNumpy(lambda x: jax.debug.print("{}", x) or x, X).is_a_function
