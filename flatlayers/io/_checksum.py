"""The checksum of numbers, by pieces: threads make those of what has been read while the rest is."""

import os
import zlib
from collections.abc import Iterable, Iterator


_PIECE = 8 * 2**20  # bytes
_THREADS = min(4, os.cpu_count() or 1)


def pieces_of(numbers: memoryview) -> Iterator[memoryview]:
    """Return the bytes of an array piece by piece."""
    for start in range(0, len(numbers), _PIECE):
        yield numbers[start : start + _PIECE]


def checksum(pieces: Iterable[memoryview]) -> int:
    """Return the CRC-32 of the CRC-32 of each piece. A piece is taken up as soon as there is one."""
    from concurrent.futures import ThreadPoolExecutor  # here, so that importing the library does not load it

    with ThreadPoolExecutor(_THREADS) as threads:
        found = list(threads.map(zlib.crc32, pieces))
    return zlib.crc32(b"".join(one.to_bytes(4, "little") for one in found))
