import zlib

import pytest

from flatlayers.io import _checksum
from flatlayers.io._checksum import checksum, pieces_of


def test_pieces_are_the_bytes_in_order(monkeypatch):
    monkeypatch.setattr(_checksum, "_PIECE", 4)
    numbers = memoryview(bytes(range(10)))
    assert [bytes(piece) for piece in pieces_of(numbers)] == [b"\0\1\2\3", b"\4\5\6\7", b"\x08\x09"]
    assert list(pieces_of(memoryview(b""))) == []


def test_it_is_the_crc_of_the_crcs_in_order():
    parts = [b"one", b"two", bytes(100_000)]
    of_parts = b"".join(zlib.crc32(part).to_bytes(4, "little") for part in parts)
    assert checksum(map(memoryview, parts)) == zlib.crc32(of_parts)
    assert checksum(map(memoryview, parts[::-1])) != zlib.crc32(of_parts)
    assert checksum(iter(())) == zlib.crc32(b"")


def test_an_error_while_reading_is_handed_on():
    def pieces():
        yield memoryview(b"one")
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        checksum(pieces())
