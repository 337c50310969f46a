"""Where the examples are, and how the tests run them."""

import importlib.util
import sys
from pathlib import Path

import pytest


EXAMPLES = Path(__file__).parent.parent.parent / "examples"


def load(name, needs=("matplotlib", "tqdm")):
    """An example as a module of its own."""
    for package in needs:
        pytest.importorskip(package)
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(example, monkeypatch, tmp_path, options, **constants):
    """Run an example's `main` with other constants, and check that there is a picture."""
    for name, value in constants.items():
        monkeypatch.setattr(example, name, value)
    out = tmp_path / "picture.png"
    monkeypatch.setattr(sys, "argv", ["example.py", *options, "--out", str(out)])
    try:
        example.main()
    finally:
        assert out.read_bytes().startswith(b"\x89PNG")
