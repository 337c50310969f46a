"""`save`, `load` and `describe_file`: a run as one file, with names."""

import functools
import json
import math
import os
from collections.abc import Mapping
from typing import Any, BinaryIO, TypeAlias

import jax
import numpy as np

from ..types import PyTree
from ..vectors.json_text import strict_json
from ..vectors.names import UnknownNameError, listing
from ._atomic import replace_file
from ._checksum import checksum, digest, pieces_of
from ._describe import Block, Description, describe
from ._format import Header, Tensor, header_bytes, read_header
from ._like import fit
from ._numbers import check_dtype, read_numbers
from ._processes import first_does, is_spread
from ._rebuild import TYPES, Rebuild, Span, Take
from .errors import FileFormatError


Path: TypeAlias = str | os.PathLike[str]

_VERSION = 1
_KEY = "flatlayers"


def save(path: Path, /, **parts: PyTree) -> None:
    """Write vectors, states, optimiser states and numbers to one file, all or nothing.

    The file is one of `safetensors`, which NumPy, PyTorch and others read: each name of a vector is a
    tensor there, in the order of the vector, such as `ps.hidden.weight`. The copies of a stack are
    tensors of their own, such as `ps.blocks.1.weight`, tied names are there once, and a vector with leading
    axes is one tensor. Layouts, structure and a checksum are in the metadata. Nothing in it is code.

    It is written to `path + ".tmp"`, which takes the place of the file when all of it is on the disk: a
    process that is killed leaves the old file as it was, and the next call removes what it left.

    A `ShardedVector` is gathered, and written as the vector that it was cut from: the file says nothing of
    devices. If some array is on devices of several processes, all of them have to call it; the first one
    writes, one vector after another, and all return when the file is there. Otherwise a process writes what
    it has, whatever the others do.

    **Arguments:**

    - `path`: the file. An old one is replaced.
    - `**parts`: the parts by name: vectors, sharded ones too, records, mappings with text as names, tuples,
        named tuples such as the states of optax, lists, arrays of JAX and NumPy, typed PRNG keys, numbers,
        text and `None`, inside each other as you like.

    **Returns:** nothing.

    **Raises:** `TypeError` for what cannot be saved, with its path; `ValueError` for two parts with one name
    in the file, and for names that are no identifiers or that `fl.load` has for itself (`finite`). An error
    of the process that writes is one in all of them, an `OSError` in the others.

    >>> import os, tempfile
    >>> import jax.numpy as jnp
    >>> import flatlayers as fl
    >>> ps = fl.ComponentVector.of({"hidden": {"weight": [[1.0, 2.0]], "bias": [3.0]}})
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = os.path.join(folder, "run.safetensors")
    ...     fl.save(path, ps=ps, step=100)
    ...     saved = fl.load(path)
    >>> saved["ps"].hidden.bias, saved["step"]
    (Array([3.], dtype=float32), 100)
    """
    for name in parts:
        if not name.isidentifier() or name.startswith("_") or name == "finite":
            raise ValueError(f"expected identifiers without a leading underscore as names, found {name!r}")
    blocks: list[Block] = []
    described = {name: describe(part, name, blocks) for name, part in parts.items()}
    write = functools.partial(_write, os.fspath(path), described, blocks)
    first_does(write) if is_spread(parts) else write()


def load(path: Path, /, *, finite: bool = False, **like: PyTree) -> dict[str, Any]:
    """Read a file that `fl.save` wrote.

    Vectors, records, mappings, tuples, lists, arrays, keys, numbers and text come back as what they were, bit
    for bit, arrays on JAX's default device. Named tuples, such as the states of optax, come back as records
    with the names of their fields, or with `like` as their own types.

    **Arguments:**

    - `path`: the file.
    - `finite`: whether to refuse numbers that are infinite or NaN, which are read otherwise.
    - `**like`: for some of the parts what they have to be like: `ps=ps` compares layouts, shapes and dtypes,
        `opt_state=optimizer.init(ps)` also gives the types. Numbers do not matter; in the place of arrays
        there may be `jax.ShapeDtypeStruct`, as `jax.eval_shape(optimizer.init, ps)` gives them. For a
        `ShardedVector` the vector is cut for its devices, whatever devices wrote the file, and arrays that
        are on several devices are loaded there. Several processes read the file each for itself.

    **Returns:** a dictionary of the parts.

    **Raises:** `fl.FileFormatError` for a file that is damaged or was not written by `fl.save`;
    `fl.LayoutMismatchError` for a part that is not like the one given, with a line for each difference (see
    `fl.transfer`); `KeyError` for a part that is not there; `TypeError` for numbers of 64 bits if JAX has
    them switched off, since nothing is converted; `ValueError` for numbers that are not finite;
    `FileNotFoundError`.

    >>> import os, tempfile
    >>> import optax
    >>> import flatlayers as fl
    >>> ps, optimizer = fl.ComponentVector.of({"w": [1.0, 2.0]}), optax.adam(0.1)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = os.path.join(folder, "run.safetensors")
    ...     fl.save(path, ps=ps, opt_state=optimizer.init(ps))
    ...     state = fl.load(path)["opt_state"]
    ...     again = fl.load(path, ps=ps, opt_state=optimizer.init(ps))["opt_state"]
    >>> state[0].mu.w, type(again[0]).__name__
    (Array([0., 0.], dtype=float32), 'ScaleByAdamState')
    """
    with open(path, "rb", buffering=0) as file:
        header, parts, expected = _read_description(file)
        for name in like:
            if name not in parts:
                raise UnknownNameError(f"no part {name!r} in the file; there are: {listing(parts)}")
        spans = _spans(header, parts)
        numbers, of_numbers = read_numbers(file, spans)
    if _whole_checksum(of_numbers, header.tensors, parts) != expected:
        raise FileFormatError("the file is damaged: expected another checksum of what is in it")
    if finite:
        numbers.check_finite(header, spans)
    found: dict[str, Any] = {}
    for name, description in parts.items():
        # Parts that are placed like others stay on the host until they are.
        take = numbers.on_host() if name in like else numbers.take()
        part = Rebuild(header, take).part(description, name, 1)
        if finite:
            _check_floats({name: part})
        found[name] = fit(part, like[name], name) if name in like else part
    return found


def describe_file(path: Path, /) -> dict[str, Any]:
    """Say what is in a file that `fl.save` wrote: layouts, shapes and dtypes, without reading the numbers.

    **Arguments:**

    - `path`: the file.

    **Returns:** a dictionary of the parts as `fl.load` gives it, with a `jax.ShapeDtypeStruct` in the place
    of each array: `fl.describe_file(path)["ps"].layout` is the layout of a vector.

    **Raises:** `fl.FileFormatError` and `FileNotFoundError` as `fl.load`, but for the checksum.

    >>> import os, tempfile
    >>> import flatlayers as fl
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = os.path.join(folder, "run.safetensors")
    ...     fl.save(path, ps=fl.ComponentVector.of({"w": [1.0, 2.0]}), step=100)
    ...     fl.describe_file(path)
    {'ps': ComponentVector(float32[2], w=(2,)), 'step': 100}
    """
    with open(path, "rb", buffering=0) as file:
        header, parts, _ = _read_description(file)
    return Rebuild(header, TYPES).parts(parts)


def _write(path: str, described: Description, blocks: list[Block]) -> None:
    """Write the file of described parts and their numbers."""
    # Behind numbers of more bytes, all lie at a multiple of theirs, as PyTorch needs it.
    blocks.sort(key=lambda block: -block.numbers.dtype.itemsize)
    tensors = _tensors(blocks)
    numbers = [block.numbers.view(np.uint8).data for block in blocks]
    of_numbers = checksum(piece for part in numbers for piece in pieces_of(part))
    content = {
        "version": _VERSION,
        "checksum": _whole_checksum(of_numbers, tensors, described),
        "parts": described,
    }
    replace_file(path, [header_bytes(tensors, {_KEY: json.dumps(content)}), *numbers])


def _check_floats(parts: Mapping[str, Any]) -> None:
    """Raise `ValueError` if a number that is no array is infinite or NaN."""
    for path, leaf in jax.tree_util.tree_flatten_with_path(dict(parts))[0]:
        if isinstance(leaf, float) and not math.isfinite(leaf):
            where = jax.tree_util.keystr(path, simple=True, separator=".")
            raise ValueError(f"{where!r}: expected a finite number, found {leaf}")


def _tensors(blocks: list[Block]) -> dict[str, Tensor]:
    """Return the tensors of all blocks, one after another."""
    tensors: dict[str, Tensor] = {}
    place = 0
    for block in blocks:
        for name, shape in block.pieces:
            if name in tensors:
                raise ValueError(f"expected different names for all parts, found {name!r} twice")
            size = block.numbers.dtype.itemsize
            for axis in shape:
                size *= axis
            tensors[name] = Tensor(block.code, shape, place, place + size)
            place += size
    return tensors


def _whole_checksum(of_numbers: bytes, tensors: Mapping[str, Tensor], parts: Description) -> str:
    """Return the checksum of the numbers, the table of tensors and the description together."""
    table = {name: [t.code, t.shape, t.start, t.stop] for name, t in tensors.items()}
    return digest(of_numbers + json.dumps([table, parts]).encode()).hex()


def _read_description(file: BinaryIO) -> tuple[Header, Description, str]:
    """Return the header, the description of the parts and the checksum."""
    header = read_header(file)
    if _KEY not in header.metadata:
        raise FileFormatError(
            "expected a file that `fl.save` wrote, found another one of safetensors; "
            "`safetensors.numpy.load_file` reads its arrays"
        )
    try:
        content = strict_json(header.metadata[_KEY])
    except ValueError as error:
        raise FileFormatError(f"the description: {error}") from None
    if not isinstance(content, dict) or set(content) != {"version", "checksum", "parts"}:
        raise FileFormatError("the description: expected version, checksum and parts")
    version, expected, parts = content["version"], content["checksum"], content["parts"]
    if type(version) is not int or version != _VERSION:
        raise FileFormatError(f"expected a file of version {_VERSION}, found {str(version)[:80]}")
    if not isinstance(expected, str) or not isinstance(parts, dict):
        raise FileFormatError("the description: expected a checksum and parts by name")
    return header, parts, expected


def _spans(header: Header, parts: Description) -> list[Span]:
    """Return the bytes of all arrays, which fill the file. Nothing is read before all of it fits."""
    spans: list[Span] = []

    def of_jax(span: Span, *_: str) -> Any:
        check_dtype(span)
        spans.append(span)

    Rebuild(header, Take(of_jax, spans.append, spans.append, of_jax)).parts(parts)
    return spans
