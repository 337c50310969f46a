"""The numbers of a file: read block by block, checked against their checksum, and made arrays of."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, BinaryIO

import jax
import numpy as np

from ._checksum import checksum, pieces_of
from ._format import DTYPES, Header, read_into
from ._rebuild import Span, Take


_ALIGNMENT = 64  # bytes


def read_numbers(file: BinaryIO, spans: Iterable[Span]) -> "tuple[Numbers, bytes]":
    """Return the bytes of all spans, which lie one after another from here on, and their checksum."""
    found: dict[tuple[int, int], np.ndarray] = {}

    def read() -> Iterator[memoryview]:
        for span in sorted(spans, key=lambda span: (span.start, span.stop)):
            found[span.start, span.stop] = buffer = _empty(span.stop - span.start)
            for piece in pieces_of(buffer.data):
                read_into(file, piece)
                yield piece

    return Numbers(found), checksum(read())


@dataclasses.dataclass(frozen=True)
class Numbers:
    """The bytes of each array by its place: that of empty ones can be the same, and so are they."""

    found: Mapping[tuple[int, int], np.ndarray]

    def take(self) -> Take:
        return Take(self.array, self.numpy, self.scalar, self.key)

    def on_host(self) -> Take:
        """Return the ways to NumPy's arrays alone, but for keys, which it has not."""
        return Take(self.numpy, self.numpy, self.scalar, self.key)

    def numpy(self, span: Span) -> np.ndarray:
        return self.found[span.start, span.stop].view(span.dtype).reshape(span.shape)

    def scalar(self, span: Span) -> Any:
        return self.numpy(span)[()]

    def array(self, span: Span) -> jax.Array:
        # Nothing else writes to the numbers: so on a CPU JAX can have them where they are.
        return jax.device_put(self.numpy(span))

    def key(self, span: Span, implementation: str) -> jax.Array:
        return jax.random.wrap_key_data(self.array(span), impl=implementation)

    def check_finite(self, header: Header, spans: Iterable[Span]) -> None:
        """Raise `ValueError` if a number is infinite or NaN, with the name of its tensor."""
        for span in spans:
            if np.isfinite(self.numpy(span)).all():
                continue
            buffer = self.found[span.start, span.stop]
            for name, tensor in header.tensors.items():
                if span.start <= tensor.start < tensor.stop <= span.stop:
                    piece = buffer[tensor.start - span.start : tensor.stop - span.start]
                    if not np.isfinite(piece.view(DTYPES[tensor.code])).all():
                        raise ValueError(f"{name!r}: expected finite numbers, found others")


def _empty(size: int) -> np.ndarray:
    """Return room for so many bytes, at a place from which JAX takes over arrays without a copy."""
    room = np.empty(size + _ALIGNMENT, np.uint8)
    start = -room.ctypes.data % _ALIGNMENT
    return room[start : start + size]


def check_dtype(span: Span) -> None:
    """Raise `TypeError` if JAX would give the numbers another dtype."""
    if jax.dtypes.canonicalize_dtype(span.dtype) != span.dtype:
        raise TypeError(
            f"{span.path!r} has numbers of dtype {span.dtype}, which JAX has only with "
            "`jax.config.update('jax_enable_x64', True)`: nothing is converted without being asked for"
        )
