"""From a description and a header back to the parts, all of it checked before any number is read."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from ..types import Shape
from ..vectors.json_text import MAX_DEPTH, from_plain, is_shape
from ..vectors.layout import Layout
from ..vectors.names import check_name, join_path
from ..vectors.pieces import piece_count, pieces
from ..vectors.record import Record
from ..vectors.vector import ComponentVector
from ._describe import stored
from ._format import DTYPES, Header
from .errors import FileFormatError


_DTYPE_BY_NAME = {dtype.name: dtype for dtype in [*DTYPES.values(), np.dtype(np.complex128)]}
_IMPLEMENTATIONS = ("threefry2x32", "rbg", "unsafe_rbg")


@dataclasses.dataclass(frozen=True)
class Span:
    """The bytes of one array in a file, counted from the first number, and how to read them."""

    path: str
    start: int
    stop: int
    dtype: np.dtype
    shape: Shape


@dataclasses.dataclass(frozen=True)
class Take:
    """The ways from the bytes of an array to the array, by kind."""

    array: Callable[[Span], Any]
    numpy: Callable[[Span], Any]
    scalar: Callable[[Span], Any]
    key: Callable[[Span, str], Any]


@dataclasses.dataclass
class Rebuild:
    """Makes parts of their descriptions. `used` has the tensors that belong to one."""

    header: Header
    take: Take
    used: set[str] = dataclasses.field(default_factory=set)

    def parts(self, description: object) -> dict[str, Any]:
        """Return all parts. **Raises:** `FileFormatError` for a description that does not fit the header."""
        parts = self.named(description, "", 0)
        for name in self.header.tensors:
            if name not in self.used:
                raise FileFormatError(f"the tensor {name!r} belongs to no part")
        return parts

    def part(self, description: object, path: str, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise FileFormatError(f"expected at most {MAX_DEPTH} parts inside each other, found more")
        if not isinstance(description, dict) or len(description) != 1:
            raise FileFormatError(f"{path!r}: expected a description of one kind")
        ((kind, content),) = description.items()
        if kind in _PLAIN:
            return _plain(kind, content, path)
        if kind in ("mapping", "record", "named"):
            parts = self.named(content, path, depth)
            return parts if kind == "mapping" else _record(parts, path, checked=kind == "record")
        if kind in ("tuple", "list"):
            return self.sequence(tuple if kind == "tuple" else list, content, path, depth)
        if kind in ("vector", "array", "numpy", "scalar", "key"):
            return getattr(self, kind)(content, path)
        raise FileFormatError(f"{path!r}: expected a kind of part, found {kind[:80]!r}")

    def named(self, content: object, path: str, depth: int) -> dict[str, Any]:
        if not isinstance(content, dict):
            raise FileFormatError(f"{path!r}: expected parts by name")
        # A name can be empty or have dots: `path` is that of the tensors, not one of a vector.
        return {
            name: self.part(part, f"{path}.{name}" if path else name, depth + 1)
            for name, part in content.items()
        }

    def sequence(self, kind: type, content: object, path: str, depth: int) -> Any:
        if not isinstance(content, list):
            raise FileFormatError(f"{path!r}: expected a list of parts")
        return kind([self.part(part, f"{path}.{i}", depth + 1) for i, part in enumerate(content)])

    def vector(self, content: object, path: str) -> ComponentVector:
        dtype, shape = _numbers_of(content, path, "layout")
        try:
            # The paths of leaves are those of tensors, which stand in the header in full.
            room = 1_000_000 + 64 * self.header.start
            layout = from_plain(content["layout"], Layout, room)  # pyright: ignore[reportIndexIssue]
        except ValueError as error:
            raise FileFormatError(f"{path!r}: {error}") from None
        # With leading axes, or with other numbers in the place of its own, it is one tensor.
        is_named = shape == (layout.length,)
        span = self.vector_span(path, dtype, layout) if is_named else self.span(path, dtype, shape)
        return ComponentVector._new(data=self.take.array(span), layout=layout)

    def vector_span(self, path: str, dtype: np.dtype, layout: Layout) -> Span:
        """Return the bytes of a vector, which its pieces fill in order."""
        if piece_count(layout) > len(self.header.tensors):
            raise FileFormatError(f"{path!r}: expected {piece_count(layout)} tensors, found fewer")
        start: int | None = None
        for name, place, shape in pieces(layout):
            piece = self.span(join_path(path, name), dtype, shape)
            start = piece.start if start is None else start
            if piece.start != start + place * dtype.itemsize:
                raise FileFormatError(f"{piece.path!r}: expected it behind the name before it")
        start = start or 0
        return Span(path, start, start + layout.length * dtype.itemsize, dtype, (layout.length,))

    def array(self, content: object, path: str) -> Any:
        return self.take.array(self.span(path, *_numbers_of(content, path)))

    def numpy(self, content: object, path: str) -> Any:
        return self.take.numpy(self.span(path, *_numbers_of(content, path)))

    def scalar(self, content: object, path: str) -> Any:
        dtype, shape = _numbers_of(content, path)
        if shape:
            raise FileFormatError(f"{path!r}: expected one number, found the shape {shape}")
        return self.take.scalar(self.span(path, dtype, shape))

    def key(self, content: object, path: str) -> Any:
        if not isinstance(content, dict) or set(content) != {"implementation", "shape"}:
            raise FileFormatError(f"{path!r}: expected an implementation and a shape")
        name, shape = content["implementation"], content["shape"]
        if name not in _IMPLEMENTATIONS or not is_shape(shape):
            raise FileFormatError(f"{path!r}: expected a key of {', '.join(_IMPLEMENTATIONS)}")
        width = 2 if name == "threefry2x32" else 4
        if shape[-1:] != [width]:
            raise FileFormatError(f"{path!r}: expected {width} numbers for each key, found the shape {shape}")
        return self.take.key(self.span(path, np.dtype(np.uint32), tuple(shape)), name)

    def span(self, path: str, dtype: np.dtype, shape: Shape) -> Span:
        """Return the bytes of the tensor `path`, if it is as the description says, and of no other part."""
        tensor, form = self.header.tensors.get(path), stored(dtype)
        assert form is not None
        code, behind = form
        if tensor is None or path in self.used:
            raise FileFormatError(f"{path!r}: expected a tensor of its own, found none")
        if (tensor.code, tensor.shape) != (code, shape + behind):
            raise FileFormatError(f"{path!r}: expected {dtype}{shape}, found {tensor.code}{tensor.shape}")
        self.used.add(path)
        return Span(path, tensor.start, tensor.stop, dtype, shape)


def _numbers_of(content: object, path: str, *more: str) -> tuple[np.dtype, Shape]:
    if not isinstance(content, dict) or set(content) != {"dtype", "shape", *more}:
        raise FileFormatError(f"{path!r}: expected {', '.join(['dtype', 'shape', *more])}")
    name, shape = content["dtype"], content["shape"]
    if not isinstance(name, str) or name not in _DTYPE_BY_NAME or not is_shape(shape):
        raise FileFormatError(f"{path!r}: expected a dtype and a shape, found {str(name)[:80]!r}")
    if math.prod(shape) >= 2**63:
        raise FileFormatError(f"{path!r}: expected a shape that memory has room for, found {shape}")
    return _DTYPE_BY_NAME[name], tuple(shape)


def _record(parts: dict[str, Any], path: str, checked: bool) -> Record:
    """Return a record. The fields of a named tuple, which can be any, are not checked."""
    try:
        return Record._of({check_name(name) if checked else name: part for name, part in parts.items()})
    except ValueError as error:
        raise FileFormatError(f"{path!r}: {error}") from None


_PLAIN = {"none": type(None), "bool": bool, "int": int, "text": str, "float": str}


def _plain(kind: str, content: object, path: str) -> Any:
    if type(content) is not _PLAIN[kind]:
        raise FileFormatError(f"{path!r}: expected {kind}, found {type(content).__name__}")
    if kind != "float":
        return content
    try:
        number = float(content)  # pyright: ignore[reportArgumentType]
    except ValueError:
        number = None
    if repr(number) != content:
        raise FileFormatError(f"{path!r}: expected a number, found {str(content)[:80]!r}")
    return number


def type_of(span: Span) -> jax.ShapeDtypeStruct:
    """Return the shape and the dtype of an array without its numbers."""
    return jax.ShapeDtypeStruct(span.shape, span.dtype)


def type_of_key(span: Span, implementation: str) -> jax.ShapeDtypeStruct:
    """Return the shape and the dtype of an array of keys without its numbers."""
    one = jax.eval_shape(lambda: jax.random.key(0, impl=implementation))
    return jax.ShapeDtypeStruct(span.shape[:-1], one.dtype)


TYPES = Take(type_of, type_of, type_of, type_of_key)
