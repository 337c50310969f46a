"""Writing a file so that there is always a whole one: the old one, or the new one."""

import contextlib
import os
from collections.abc import Iterable
from typing import BinaryIO


def replace_file(path: str, parts: Iterable[bytes | memoryview]) -> None:
    """Write the parts, one after another, to a file beside `path`, and move it there when it is on the disk.

    The file beside it is always `path + ".tmp"`: what a killed process left is removed by the next one.
    """
    path = os.path.realpath(path)  # the file that a link leads to, not the link
    temporary = path + ".tmp"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(temporary)
    # "x": of two processes that write at the same time one fails here, or below.
    with open(temporary, "xb", buffering=0) as file:
        try:
            for part in parts:
                _write(file, part)
            os.fsync(file.fileno())
            if not os.path.samestat(os.fstat(file.fileno()), os.stat(temporary)):
                raise FileExistsError(f"another process is writing {path!r}")
        except BaseException:
            _remove(temporary, file)
            raise
    try:
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    _sync_folder(os.path.dirname(path))


def _write(file: BinaryIO, part: bytes | memoryview) -> None:
    rest = memoryview(part)
    while rest:
        rest = rest[file.write(rest) :]


def _remove(temporary: str, file: BinaryIO) -> None:
    """Remove the file, if it is still this process's own."""
    with contextlib.suppress(FileNotFoundError):
        if os.path.samestat(os.fstat(file.fileno()), os.stat(temporary)):
            os.unlink(temporary)


def _sync_folder(folder: str) -> None:
    """Bring the new name of the file to the disk, where the system can."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
