"""The container: a file of `safetensors`, which is a length, a header in JSON and the numbers.

It is written and read by hand, in the format of the `safetensors` library. When that library writes, it sorts
the tensors by dtype and name, so that a vector would not lie there in one piece; of a name that is there
twice it reads the last.
"""

import dataclasses
import json
import math
import os
import struct
from collections.abc import Mapping
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np

from ..types import Shape
from ..vectors.json_text import is_shape, is_size, strict_json
from .errors import FileFormatError


MAX_HEADER = 100_000_000  # bytes, as the safetensors library
_ALIGNMENT = 64

_DTYPES = {
    "BOOL": np.bool_,
    "U8": np.uint8,
    "I8": np.int8,
    "F8_E4M3": jnp.float8_e4m3fn,
    "F8_E5M2": jnp.float8_e5m2,
    "F8_E8M0": jnp.float8_e8m0fnu,
    "U16": np.uint16,
    "I16": np.int16,
    "F16": np.float16,
    "BF16": jnp.bfloat16,
    "U32": np.uint32,
    "I32": np.int32,
    "F32": np.float32,
    "U64": np.uint64,
    "I64": np.int64,
    "F64": np.float64,
    "C64": np.complex64,
}
DTYPES: dict[str, np.dtype] = {code: np.dtype(dtype) for code, dtype in _DTYPES.items()}
CODES: dict[np.dtype, str] = {dtype: code for code, dtype in DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """The dtype by its code, the shape and the bytes of an array in a file, from the first number on."""

    code: str
    shape: Shape
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class Header:
    """The tensors of a file by name, its metadata, and the place of its first number."""

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    start: int


def header_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Return what stands in front of the numbers. **Raises:** `ValueError` for more than a reader takes."""
    content: dict[str, Any] = {"__metadata__": dict(metadata)}
    for name, tensor in tensors.items():
        offsets = [tensor.start, tensor.stop]
        content[name] = {"dtype": tensor.code, "shape": list(tensor.shape), "data_offsets": offsets}
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % _ALIGNMENT)
    if len(text) > MAX_HEADER:
        raise ValueError(f"expected names of at most {MAX_HEADER} bytes together, found {len(text)}")
    return struct.pack("<Q", len(text)) + text


def read_header(file: BinaryIO) -> Header:
    """Return the header of a file that is open at its start. **Raises:** `FileFormatError`."""
    size = os.fstat(file.fileno()).st_size
    first = file.read(8)
    length = struct.unpack("<Q", first)[0] if len(first) == 8 else 0
    if not 2 <= length <= min(MAX_HEADER, size - 8):
        raise FileFormatError(
            f"expected a file of safetensors, found {size} bytes with a header of {length}: it is cut off, "
            "or is something else"
        )
    content = _read_json(read_exactly(file, length), "the header")
    metadata = content.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise FileFormatError("the header: expected texts as metadata")
    tensors = {name: _read_tensor(name, entry) for name, entry in content.items()}
    _check_places(tensors, size - 8 - length)
    return Header(tensors, metadata, 8 + length)


def read_exactly(file: BinaryIO, length: int) -> bytes:
    """Return the next `length` bytes."""
    content = bytearray(length)
    read_into(file, memoryview(content))
    return bytes(content)


def read_into(file: BinaryIO, buffer: memoryview) -> None:
    """Fill a buffer with the next bytes of a file. **Raises:** `FileFormatError` if there are fewer."""
    while buffer:
        count = file.readinto(buffer)  # pyright: ignore[reportAttributeAccessIssue]
        if not count:
            raise FileFormatError("the file ended while it was read")
        buffer = buffer[count:]


def _read_json(text: bytes, where: str) -> dict[str, Any]:
    try:
        content = strict_json(text.decode())
    except ValueError as error:
        raise FileFormatError(f"{where}: {error}") from None
    if not isinstance(content, dict):
        raise FileFormatError(f"{where}: expected an object, found {type(content).__name__}")
    return content


def _read_tensor(name: str, entry: object) -> Tensor:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise FileFormatError(f"the tensor {name!r}: expected a dtype, a shape and data_offsets")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in DTYPES:
        raise FileFormatError(f"the tensor {name!r}: expected one of {', '.join(DTYPES)}, found {code!r}")
    if not is_shape(shape) or not is_shape(offsets) or len(offsets) != 2:
        raise FileFormatError(f"the tensor {name!r}: expected a shape and two places")
    start, stop = offsets
    if not is_size(stop - start) or stop - start != math.prod(shape) * DTYPES[code].itemsize:
        raise FileFormatError(f"the tensor {name!r}: expected bytes for {code}{shape}, found {offsets}")
    return Tensor(code, tuple(shape), start, stop)


def _check_places(tensors: Mapping[str, Tensor], size: int) -> None:
    """Check that the tensors fill the rest of the file, one after another."""
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if tensor.start != end:
            raise FileFormatError(f"the tensor {name!r}: expected it at {end}, found it at {tensor.start}")
        end = tensor.stop
    if end != size:
        raise FileFormatError(
            f"expected {end} bytes of numbers, found {size}: the file is cut off, or has more behind its end"
        )
