import io
import os

import numpy as np
import pytest

import flatlayers as fl
from flatlayers.io import _atomic


OLD, PARTS = b"the old file", [b"0123456789", memoryview(b"abcdef"), b"", b"the end"]
NEW = b"".join(map(bytes, PARTS))


class Killed(BaseException):
    """The process is gone: nothing more happens."""


class Machine:
    """The system as `_atomic` sees it, which stops after so many bytes, or before a call."""

    def __init__(self, monkeypatch, bytes_left=None, call=None):
        self.bytes_left, self.call, self.dead = bytes_left, call, False
        for name in ("fsync", "replace", "unlink"):
            real = getattr(os, name)
            monkeypatch.setattr(os, name, self.guarded(name, real))
        monkeypatch.setattr(_atomic, "open", self.open, raising=False)

    def guarded(self, name, real):
        def call(*args, **named):
            if self.dead or name == self.call:
                self.die()
            return real(*args, **named)

        return call

    def die(self):
        self.dead = True
        raise Killed

    def open(self, path, mode, buffering):
        assert buffering == 0
        return File(self, path, mode)


class File(io.FileIO):
    """A file of a machine, to which a few bytes are written at a time."""

    def __init__(self, machine, path, mode):
        super().__init__(path, mode)
        self.machine = machine

    def write(self, part):
        machine = self.machine
        if machine.bytes_left is None:
            return super().write(part)
        if machine.bytes_left == 0:
            machine.die()
        count = super().write(part[: min(3, machine.bytes_left)])
        machine.bytes_left -= count
        return count


def kills():
    return [*({"bytes_left": n} for n in range(len(NEW))), *({"call": c} for c in ("fsync", "replace"))]


@pytest.mark.parametrize("kill", kills(), ids=str)
def test_a_kill_leaves_the_old_file_and_at_most_one_other(kill, tmp_path):
    path = tmp_path / "x"
    path.write_bytes(OLD)
    with pytest.MonkeyPatch.context() as monkeypatch:
        Machine(monkeypatch, **kill)
        with pytest.raises(Killed):
            _atomic.replace_file(str(path), PARTS)
    assert path.read_bytes() == OLD
    assert sorted(file.name for file in tmp_path.iterdir()) == ["x", "x.tmp"]
    # The next one removes what was left.
    _atomic.replace_file(str(path), PARTS)
    assert path.read_bytes() == NEW
    assert [file.name for file in tmp_path.iterdir()] == ["x"]


def test_a_save_that_is_killed_at_any_byte_leaves_the_old_file(tmp_path):
    path = tmp_path / "x"
    old, new = (fl.ComponentVector(np.arange(3.0) + i, fl.Layout({"w": (2,), "b": ()})) for i in (0, 1))
    fl.save(path, ps=old, step=1)
    whole = path.read_bytes()
    for bytes_left in range(len(whole)):
        with pytest.MonkeyPatch.context() as monkeypatch:
            Machine(monkeypatch, bytes_left=bytes_left)
            with pytest.raises(Killed):
                fl.save(path, ps=new, step=2)
        assert path.read_bytes() == whole
        assert (tmp_path / "x.tmp").stat().st_size == bytes_left
    fl.save(path, ps=new, step=2)
    assert fl.load(path)["ps"].data.tolist() == [1.0, 2.0, 3.0]
    assert [file.name for file in tmp_path.iterdir()] == ["x"]


def test_short_writes_are_gone_on_with(tmp_path, monkeypatch):
    Machine(monkeypatch, bytes_left=1000)
    _atomic.replace_file(str(tmp_path / "x"), PARTS)
    assert (tmp_path / "x").read_bytes() == NEW


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_an_error_leaves_nothing_behind(call, tmp_path, monkeypatch):
    (tmp_path / "x").write_bytes(OLD)

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="no space"):
        _atomic.replace_file(str(tmp_path / "x"), PARTS)
    assert [file.name for file in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x").read_bytes() == OLD


def test_file_and_folder_are_synchronised_in_order(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)

        def note(*args, name=name, real=real):
            calls.append((name, args))
            return real(*args)

        monkeypatch.setattr(os, name, note)
    _atomic.replace_file(str(tmp_path / "x"), PARTS)
    assert [name for name, _ in calls] == ["fsync", "replace", "fsync"]
    assert calls[1][1] == (str(tmp_path / "x.tmp"), str(tmp_path / "x"))


def test_another_writer_is_told(tmp_path):
    """The second one has removed the first one's file, and the first does not move the second one's."""
    path = str(tmp_path / "x")

    def parts():
        yield b"first"
        os.unlink(path + ".tmp")
        (tmp_path / "x.tmp").write_bytes(b"half of the sec")

    with pytest.raises(FileExistsError, match="another process"):
        _atomic.replace_file(path, parts())
    assert [file.name for file in tmp_path.iterdir()] == ["x.tmp"]


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder" / "x")
    _atomic.replace_file(str(tmp_path / "link"), PARTS)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "folder" / "x").read_bytes() == NEW
