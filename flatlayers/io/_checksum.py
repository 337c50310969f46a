"""The checksum of numbers, by pieces: threads make those of what has been read while the rest is."""

import hashlib
import os
from collections.abc import Iterable, Iterator

import numpy as np


_PIECE = 8 * 2**20  # bytes
_ROW = 4096  # bytes
_THREADS = min(4, os.cpu_count() or 1)


def pieces_of(numbers: memoryview) -> Iterator[memoryview]:
    """Return the bytes of an array piece by piece."""
    for start in range(0, len(numbers), _PIECE):
        yield numbers[start : start + _PIECE]


def checksum(pieces: Iterable[memoryview]) -> bytes:
    """Return the checksum of pieces in their order. A piece is taken up as soon as there is one."""
    from concurrent.futures import ThreadPoolExecutor  # here, so that importing the library does not load it

    with ThreadPoolExecutor(_THREADS) as threads:
        return digest(b"".join(threads.map(_condensed, pieces)))


def digest(content: bytes) -> bytes:
    """Return 8 bytes of BLAKE2b."""
    return hashlib.blake2b(content, digest_size=8).digest()


def _condensed(piece: memoryview) -> bytes:
    """Return the sum of the 64-bit integers of each row, and the bytes behind the last row.

    A cryptographic sum of all bytes, and also a CRC, would take several times as long as reading them does.
    A change of some bytes changes the sum of their row, and the order of rows counts.
    """
    whole = len(piece) // _ROW * _ROW
    rows = np.frombuffer(piece[:whole], "<u8").reshape(-1, _ROW // 8)
    return rows.sum(axis=1, dtype="<u8").tobytes() + bytes(piece[whole:])
