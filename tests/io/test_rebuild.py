"""Files with a right checksum whose description does not fit: only what was meant by `fl.save` is read."""

import json

import pytest

import flatlayers as fl
from tests.io.helpers import flat_file, tensor
from tests.io.test_format import refused_at_once


LAYOUT = json.loads(fl.Layout({"w": (1,), "b": ()}).to_json())
TENSORS = {"v.w": tensor("F32", [1], 0, 4), "v.b": tensor("F32", [], 4, 8)}
SWAPPED = {"v.w": tensor("F32", [1], 4, 8), "v.b": tensor("F32", [], 0, 4)}
ARRAY = {"a": tensor("F32", [2], 0, 8)}
DATA = bytes(8)


def vector(**changed):
    return {"v": {"vector": {"layout": LAYOUT, "dtype": "float32", "shape": [2], **changed}}}


def layout(tree, ties=(), **changed):
    plain = {"flatlayers_layout": 1, "tree": tree, "ties": dict(ties), **changed}
    return {"v": {"vector": {"layout": plain, "dtype": "float32", "shape": [0]}}}


def array(kind="numpy", **changed):
    return {"a": {kind: {"dtype": "float32", "shape": [2], **changed}}}


def nested(kind, depth):
    part = {"none": None}
    for _ in range(depth):
        part = {kind: [part]} if kind in ("list", "tuple") else {kind: {"a": part}}
    return {"a": part}


def stacks(copies, inside):
    return {"names": {"s": {"names": inside, "copies": copies}}}


TWICE = {"a": {"mapping": {"b.c": array()["a"], "b": {"mapping": {"c": array()["a"]}}}}}
HOSTILE = {
    "no parts": flat_file([]),
    "a part of no kind": flat_file({"a": {}}),
    "a part of two kinds": flat_file({"a": {"none": None, "int": 1}}),
    "an unknown kind": flat_file({"a": {"pickle": "x"}}),
    "a method": flat_file({"a": {"parts": {}}}),
    "version 2": flat_file({}, version=2),
    "version true": flat_file({}, version=True),
    "more": flat_file({}, more=1),
    "checksum": flat_file({}, checksum="0" * 16),
    "checksum no text": flat_file({}, checksum=1),
    "tensor of no part": flat_file({}, ARRAY, DATA),
    "part of no tensor": flat_file(array()),
    "other dtype": flat_file(array(dtype="int32"), ARRAY, DATA),
    "unknown dtype": flat_file(array(dtype="object"), ARRAY, DATA),
    "dtype no text": flat_file(array(dtype=[1]), ARRAY, DATA),
    "other shape": flat_file(array(shape=[1, 2]), ARRAY, DATA),
    "shape of bools": flat_file(array(shape=[True]), {"a": tensor("F32", [1], 0, 4)}, bytes(4)),
    "more of an array": flat_file(array(more=1), ARRAY, DATA),
    "scalar with an axis": flat_file(array("scalar"), ARRAY, DATA),
    "one tensor twice": flat_file(TWICE, {"a.b.c": tensor("F32", [2], 0, 8)}, DATA),
    "int no int": flat_file({"a": {"int": 1.5}}),
    "int a bool": flat_file({"a": {"int": True}}),
    "bool an int": flat_file({"a": {"bool": 1}}),
    "text no text": flat_file({"a": {"text": 1}}),
    "none some": flat_file({"a": {"none": 1}}),
    "float no number": flat_file({"a": {"float": "x"}}),
    "float in other words": flat_file({"a": {"float": "1e0"}}),
    "float a number": flat_file({"a": {"float": 1.0}}),
    "tuple no list": flat_file({"a": {"tuple": {}}}),
    "mapping no object": flat_file({"a": {"mapping": []}}),
    "record with a bad name": flat_file({"a": {"record": {"shape": {"int": 1}}}}),
    "key of an unknown kind": flat_file(
        {"a": {"key": {"implementation": "x", "shape": [2]}}}, {"a": tensor("U32", [2], 0, 8)}, DATA
    ),
    "key of another width": flat_file(
        {"a": {"key": {"implementation": "rbg", "shape": [2]}}}, {"a": tensor("U32", [2], 0, 8)}, DATA
    ),
    "key no name": flat_file({"a": {"key": {"implementation": ["rbg"], "shape": [4]}}}),
    "vector of another length": flat_file(vector(shape=[3]), TENSORS, DATA),
    "vector without an axis": flat_file(vector(shape=[]), TENSORS, DATA),
    "vector of another order": flat_file(vector(), SWAPPED, DATA),
    "vector with a name missing": flat_file(vector(), {"v.w": tensor("F32", [1], 0, 4)}, bytes(4)),
    "vector without a layout": flat_file({"v": array("vector")["a"]}, TENSORS, DATA),
    "layout a text": flat_file(vector(layout=json.dumps(LAYOUT)), TENSORS, DATA),
    "stack of nothing": flat_file(layout(stacks([10**7], {}))),
    "stack of empty leaves": flat_file(layout(stacks([10**7], {"a": [0]}))),
    "stacks of stacks": flat_file(layout(stacks([10**7], {"t": {"names": {"a": [0]}, "copies": [10**7]}}))),
    "many stacks of nothing": flat_file(layout(stacks([2**62] * 64, {"a": [0]}))),
    "deep lists": flat_file(nested("list", 150)),
    "deep mappings": flat_file(nested("mapping", 150)),
}


# A stack of nothing has no tensors and no numbers: however many copies, it is read at once.
HARMLESS = {"stack of nothing"}


@pytest.mark.parametrize("name", [name for name in HOSTILE if name not in HARMLESS])
def test_hostile_files_are_refused_at_once(name, tmp_path):
    if name == "checksum":
        (tmp_path / "x").write_bytes(HOSTILE[name])
        with pytest.raises(fl.FileFormatError, match="damaged"):
            fl.load(tmp_path / "x")
    else:
        refused_at_once(tmp_path, HOSTILE[name])


@pytest.mark.parametrize("name", sorted(HARMLESS))
def test_stacks_of_nothing_are_not_walked_through(name, tmp_path):
    (tmp_path / "x").write_bytes(HOSTILE[name])
    assert fl.load(tmp_path / "x")["v"].layout["s"].copies == (10**7,)


def test_what_is_not_hostile_is_read(tmp_path):
    (tmp_path / "x").write_bytes(flat_file({**vector(), **nested("list", 90)}, TENSORS, DATA))
    assert fl.load(tmp_path / "x")["v"].layout == fl.Layout({"w": (1,), "b": ()})
