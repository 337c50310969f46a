"""What tests share: comparisons and counts of structure."""

import functools
import textwrap
from collections import Counter

import jax
import jax.extend.core
import numpy as np


def assert_same(a, b):
    """Equal bit for bit, leaf by leaf, dtypes included."""
    a, b = jax.tree.leaves(a), jax.tree.leaves(b)
    assert len(a) == len(b)
    for x, y in zip(map(_numbers, a), map(_numbers, b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def _numbers(x):
    is_key = isinstance(x, jax.Array) and jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(x) if is_key else x)


def assert_close(a, b, rtol=1e-10, atol=1e-12):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=rtol, atol=atol)


def compiled_by_default(lowered):
    """Compile a lowered program as it is for users, whose size and memory count; see `conftest.py`."""
    is_old = jax.__version_info__ < (0, 11)
    return lowered.compile({"xla_cpu_use_fusion_emitters": True} if is_old else None)


def counting_jit(function, **options):
    """`jax.jit(function, ...)`, and a list with an entry for each time that it is traced.

    The size of JAX's own cache tells it only as long as no other function pushes entries out.
    """
    traced = []

    @functools.wraps(function)
    def counted(*args, **kwargs):
        traced.append(function)
        return function(*args, **kwargs)

    return jax.jit(counted, **options), traced


def equations(jaxpr):
    """All equations of a jaxpr, those of inner ones included."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in inner_jaxprs(eqn):
            yield from equations(inner)


def inner_jaxprs(eqn):
    for value in eqn.params.values():
        for part in value if isinstance(value, tuple | list) else [value]:
            if isinstance(part, jax.extend.core.ClosedJaxpr):
                yield part.jaxpr
            elif isinstance(part, jax.extend.core.Jaxpr):
                yield part


def count_primitives(f, *args):
    return Counter(eqn.primitive.name for eqn in equations(jax.make_jaxpr(f)(*args).jaxpr))


def central_difference(f, x, direction, eps=1e-6):
    """The derivative of a scalar function along a direction."""
    return (f(x + eps * direction) - f(x - eps * direction)) / (2 * eps)


def text(drawn):
    """What a string between triple quotes shows, without the margin."""
    return textwrap.dedent(drawn).strip("\n ")
