import hashlib
import struct

import numpy as np
import pytest

from flatlayers.io import _checksum
from flatlayers.io._checksum import checksum, pieces_of


def test_pieces_are_the_bytes_in_order(monkeypatch):
    monkeypatch.setattr(_checksum, "_PIECE", 4)
    numbers = memoryview(bytes(range(10)))
    assert [bytes(piece) for piece in pieces_of(numbers)] == [b"\0\1\2\3", b"\4\5\6\7", b"\x08\x09"]
    assert list(pieces_of(memoryview(b""))) == []


def test_it_is_that_of_the_sums_of_rows():
    rng = np.random.default_rng(0)
    parts = [rng.bytes(3 * 4096 + 5), b"two", rng.bytes(2 * 4096)]
    condensed = b""
    for part in parts:
        whole = len(part) // 4096 * 4096
        for start in range(0, whole, 4096):
            words = struct.unpack("<512Q", part[start : start + 4096])
            condensed += struct.pack("<Q", sum(words) % 2**64)
        condensed += part[whole:]
    assert checksum(map(memoryview, parts)) == hashlib.blake2b(condensed, digest_size=8).digest()
    assert checksum(map(memoryview, parts[::-1])) != checksum(map(memoryview, parts))


def test_it_tells_of_each_changed_byte_and_of_rows_in_another_order():
    content = bytearray(np.random.default_rng(1).bytes(2 * 4096 + 9))
    first = checksum([memoryview(content)])
    for place in range(0, len(content), 7):
        for change in (1, 128, 255):
            content[place] ^= change
            assert checksum([memoryview(content)]) != first
            content[place] ^= change
    assert checksum([memoryview(content)]) == first
    turned = content[4096:8192] + content[:4096] + content[8192:]
    assert checksum([memoryview(turned)]) != first
    assert checksum([memoryview(content + bytes(1))]) != first


def test_an_error_while_reading_is_handed_on():
    def pieces():
        yield memoryview(b"one")
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        checksum(pieces())
