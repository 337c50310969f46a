"""A small run to save, and files made by hand."""

import hashlib
import json
import struct

import jax
import jax.numpy as jnp
import numpy as np

import flatlayers as fl


def small_run():
    """One of each: a vector with a stack and a tie, a state, moments, a key, numbers and text."""
    layout = fl.Layout({"s": fl.Layout({"w": (2,), "b": ()}).stack(2), "a": (2,), "t": (2,), "e": (0, 3)})
    layout = layout.tie({"t": "a"})
    ps = fl.ComponentVector(jnp.arange(1.0, 9.0, dtype=jnp.float32), layout)
    st = fl.Record(key=jax.random.key(7), training=True, mean=jnp.arange(2.0), inner={"count": jnp.int32(3)})
    return {"ps": ps, "st": st, "step": 41, "rate": 0.1, "note": "fit", "flags": (True, None, [False])}


def assert_round(a, b):
    """Equal in structure, types and bits."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    assert [type(x) for x in jax.tree.leaves(a)] == [type(x) for x in jax.tree.leaves(b)]
    for x, y in zip(*(filter(is_array, jax.tree.leaves(tree)) for tree in (a, b)), strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        assert bits(x) == bits(y)
    others = [[x for x in jax.tree.leaves(t) if not is_array(x)] for t in (a, b)]
    assert repr(others[0]) == repr(others[1])


def file_of(header, data=b"", length=None):
    """The bytes of a file with a header of our own: a text, bytes or what JSON can hold."""
    text = header if isinstance(header, bytes | str) else json.dumps(header)
    text = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def flat_file(parts, tensors=None, data=b"", **content):
    """The bytes of a file whose checksum is right, whatever the description of its parts says."""
    tensors = tensors or {}
    table = {name: [t["dtype"], t["shape"], *t["data_offsets"]] for name, t in tensors.items()}
    assert len(data) < 4096  # which the checksum takes as they are
    of_both = blake2b(blake2b(data) + json.dumps([table, parts]).encode())
    content = {"version": 1, "checksum": of_both.hex(), "parts": parts, **content}
    return file_of({"__metadata__": {"flatlayers": json.dumps(content)}, **tensors}, data)


def blake2b(content):
    return hashlib.blake2b(content, digest_size=8).digest()


def tensor(dtype, shape, start, stop):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def is_array(x):
    return hasattr(x, "dtype")


def bits(x):
    is_key = isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(x) if is_key else x).tobytes()
