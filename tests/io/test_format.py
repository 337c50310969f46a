import json
import struct
import time
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy

import flatlayers as fl
from tests.io.helpers import assert_round, bits, file_of, flat_file, small_run, tensor


DTYPES = ["bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"]
DTYPES += ["float16", "float32", "float64", "complex64", "bfloat16"]

# Read by the safetensors library


def test_the_library_sees_each_view_by_name(tmp_path):
    layout = fl.Layout(
        {
            "hidden": {"weight": (4, 2), "bias": (4,)},
            "blocks": fl.Layout({"w": (2, 2), "inner": fl.Layout({"b": (3,)}).stack(2)}).stack(3),
            "tied": (4, 2),
            "gain": (),
            "empty": (0, 2),
        }
    ).tie({"tied": "hidden.weight"})
    ps = fl.ComponentVector(jnp.arange(float(layout.length), dtype=jnp.float32), layout)
    two = fl.ComponentVector(jnp.stack([ps.data] * 2), layout)
    fl.save(tmp_path / "x", flag=jnp.ones(3, bool), ps=ps, two=two)
    arrays = safetensors.numpy.load_file(tmp_path / "x")
    expected = {"flag": np.ones(3, bool), "two": two.data}
    for path in ("hidden.weight", "hidden.bias", "gain", "empty"):
        expected[f"ps.{path}"] = ps[path]
    for i in range(3):
        expected[f"ps.blocks.{i}.w"] = ps.blocks.w[i]
        for j in range(2):
            expected[f"ps.blocks.{i}.inner.{j}.b"] = ps.blocks.inner.b[i, j]
    assert set(arrays) == set(expected)
    for name, array in arrays.items():
        assert (array.dtype, array.shape) == (expected[name].dtype, expected[name].shape)
        assert bits(array) == bits(expected[name])
    with safetensors.safe_open(tmp_path / "x", framework="numpy") as file:
        assert set(file.keys()) == set(expected)
        assert bits(file.get_tensor("ps.blocks.2.w")) == bits(ps.blocks.w[2])
        assert set(file.metadata()) == {"flatlayers"}


@pytest.mark.parametrize(
    "dtype",
    [
        "bool",
        "uint8",
        "int8",
        "uint16",
        "int16",
        "uint32",
        "int32",
        "uint64",
        "int64",
        "float16",
        "float32",
        "float64",
        "complex64",
        "bfloat16",
    ],
)
def test_the_library_reads_each_dtype(dtype, tmp_path):
    array = np.arange(6).reshape(2, 3).astype(jnp.dtype(dtype))
    fl.save(tmp_path / "x", a=array, byte=np.ones(1, np.uint8))
    with safetensors.safe_open(tmp_path / "x", framework="numpy") as file:
        found = file.get_tensor("a")
    assert found.shape == (2, 3)
    assert bits(found) == bits(array)


def test_a_vector_is_one_piece_in_its_order(tmp_path):
    run = small_run()
    fl.save(tmp_path / "x", **run)
    whole = (tmp_path / "x").read_bytes()
    assert bits(run["ps"].data) in whole
    # And each array lies at a multiple of the bytes of its numbers, whatever was in front of it.
    fl.save(
        tmp_path / "x", a=np.ones(3, bool), b=np.ones(1, np.float16), c=np.ones(1), d=np.ones(1, np.float32)
    )
    with open(tmp_path / "x", "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        content = json.loads(file.read(length))
    sizes = {"BOOL": 1, "F16": 2, "F64": 8, "F32": 4}
    del content["__metadata__"]
    assert (8 + length) % 64 == 0
    assert all(t["data_offsets"][0] % sizes[t["dtype"]] == 0 for t in content.values())


def test_pytorch_reads_a_file(tmp_path):
    pytest.importorskip("torch")
    import safetensors.torch

    run = small_run()
    fl.save(tmp_path / "x", odd=np.ones(3, bool), half=jnp.ones(3, jnp.bfloat16), **run)
    arrays = safetensors.torch.load_file(tmp_path / "x")
    assert bits(arrays["ps.s.1.w"].numpy()) == bits(run["ps"].s.w[1])
    assert arrays["half"].float().tolist() == [1.0, 1.0, 1.0]


# Files of others


def test_files_of_others(tmp_path):
    safetensors.numpy.save_file({"a": np.ones(3)}, tmp_path / "x")
    with pytest.raises(fl.FileFormatError, match="found another one of safetensors"):
        fl.load(tmp_path / "x")
    np.savez(tmp_path / "y.npz", a=np.ones(3))
    with pytest.raises(fl.FileFormatError, match="or is something else"):
        fl.load(tmp_path / "y.npz")
    for read in (fl.load, fl.describe_file):
        with pytest.raises(FileNotFoundError):
            read(tmp_path / "nothing")


# Damaged and hostile ones

PART = {"a": {"numpy": {"dtype": "float32", "shape": [2]}}}
GOOD = tensor("F32", [2], 0, 8)
DATA = bytes(8)


def head(text, data=b""):
    """A header by hand, with the metadata of a good file in front of it."""
    description = json.dumps(json.dumps({"version": 1, "checksum": "", "parts": PART}))
    return file_of('{"__metadata__":{"flatlayers":' + description + "}" + text + "}", data)


def entry(**changed):
    return file_of({"a": {**GOOD, **changed}}, DATA)


MALFORMED = {
    "empty": b"",
    "seven bytes": bytes(7),
    "no header": bytes(8),
    "text": b"this is not a model at all, but a longer text",
    "huge length": file_of("{}", length=2**64 - 1),
    "length of 2 GB": file_of("{}", length=2**31),
    "length one too long": file_of("{}", length=3),
    "no JSON": file_of("abc"),
    "no object": file_of("[1]"),
    "no UTF-8": file_of(b'{"\xff":1}'),
    "number": file_of("12"),
    "more behind JSON": file_of("{} {}"),
    "deep lists": file_of("[" * 100_000),
    "deep objects": file_of('{"a":' * 100_000),
    "deep entries": file_of('{"a":' + "[" * 5000 + "]" * 5000 + "}"),
    "NaN": file_of('{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,0]}}'),
    "infinity": file_of('{"a":{"dtype":"F32","shape":[Infinity],"data_offsets":[0,0]}}'),
    "many digits": file_of('{"a":{"dtype":"F32","shape":[%s],"data_offsets":[0,0]}}' % ("9" * 100_000)),
    "a name twice": head(',"a":%s,"a":%s' % ((json.dumps(GOOD),) * 2), DATA),
    "metadata twice": file_of('{"__metadata__":{},"__metadata__":{}}'),
    "a field twice": file_of('{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', DATA),
    "metadata no object": file_of({"__metadata__": []}),
    "metadata no text": file_of({"__metadata__": {"flatlayers": 1}}),
    "tensor no object": file_of({"a": 1}),
    "field missing": file_of({"a": {"dtype": "F32", "shape": [2]}}, DATA),
    "field too many": entry(more=1),
    "unknown dtype": entry(dtype="F33"),
    "dtype no text": entry(dtype=[]),
    "shape no list": entry(shape=2),
    "shape of bools": entry(shape=[True, 2]),
    "shape of floats": entry(shape=[2.0]),
    "negative shape": entry(shape=[-2]),
    "shape that wraps around": entry(shape=[2**62 + 2, 4]),
    "huge shape": entry(shape=[2**62] * 64),
    "many axes": entry(shape=[1] * 10_000),
    "other size": entry(shape=[3]),
    "one place": entry(data_offsets=[0]),
    "places of floats": entry(data_offsets=[0.0, 8.0]),
    "places turned": entry(data_offsets=[8, 0]),
    "beyond the end": file_of({"a": tensor("F32", [2], 8, 16)}, DATA),
    "hole in front": file_of({"a": tensor("F32", [1], 4, 8)}, DATA),
    "hole between": file_of({"a": tensor("U8", [2], 0, 2), "b": tensor("U8", [2], 6, 8)}, DATA),
    "overlap": file_of({"a": tensor("U8", [6], 0, 6), "b": tensor("U8", [4], 4, 8)}, DATA),
    "the same place": file_of({"a": GOOD, "b": GOOD}, DATA),
    "bytes behind": file_of({"a": GOOD}, DATA + b"\0"),
    "a byte missing": file_of({"a": GOOD}, DATA[:-1]),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_files_are_refused_at_once(name, tmp_path):
    refused_at_once(tmp_path, MALFORMED[name])


def refused_at_once(tmp_path, content, milliseconds=10):
    """Refused as what it is, by all that reads, within 10 ms and 10 MB."""
    path = tmp_path / "x"
    path.write_bytes(content)
    for read in (fl.load, fl.describe_file):
        times = []
        for _ in range(5):
            start = time.perf_counter()
            with pytest.raises(fl.FileFormatError):
                read(path)
            times.append(time.perf_counter() - start)
        assert min(times) < milliseconds / 1000
        tracemalloc.start()
        with pytest.raises(fl.FileFormatError):
            read(path)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 10e6


# A whole file that was cut off or changed


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "x"
    fl.save(path, **small_run())
    return path.read_bytes()


def test_every_truncation_is_refused(whole, tmp_path):
    for length in range(len(whole)):
        (tmp_path / "x").write_bytes(whole[:length])
        with pytest.raises(fl.FileFormatError):
            fl.load(tmp_path / "x")


@pytest.mark.long
@pytest.mark.parametrize("flip", [0x01, 0x20, 0x80])
def test_every_changed_byte_is_refused_or_changes_nothing(flip, whole, tmp_path):
    run, accepted = small_run(), 0
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] ^= flip
        (tmp_path / "x").write_bytes(changed)
        try:
            loaded = fl.load(tmp_path / "x")
        except fl.FileFormatError:
            continue
        accepted += 1
        assert_round(loaded, run)
        assert loaded["ps"].layout == run["ps"].layout
    assert accepted < 20


def test_a_good_file_by_hand_is_read(tmp_path):
    """The helper that the hostile files are made with makes good ones."""
    (tmp_path / "x").write_bytes(flat_file(PART, {"a": GOOD}, DATA))
    np.testing.assert_array_equal(fl.load(tmp_path / "x")["a"], np.zeros(2, np.float32))
    assert isinstance(fl.describe_file(tmp_path / "x")["a"], jax.ShapeDtypeStruct)
