"""What the documentation shows runs: every docstring, every page of the site, and the README's example."""

import doctest
import importlib
import importlib.util
import pkgutil
import re
from pathlib import Path

import jax
import pytest

import flatlayers


MODULES = [m.name for m in pkgutil.walk_packages(flatlayers.__path__, "flatlayers.")]
ROOT = Path(__file__).parent.parent
PAGES = [*sorted((ROOT / "docs").glob("**/*.md")), ROOT / "CONTRIBUTING.md"]
SLOW = {"with-other-libraries.md", "uncertainty.md"}  # tests/others has the same calls, one by one
OPTIONAL = {"flax", "jaxopt", "torch"}  # packages that the tests do without
BLOCK = re.compile(r"^```(python|pycon)\n(.*?)^```", re.DOTALL | re.MULTILINE)


@pytest.fixture(autouse=True)
def _as_a_user_has_it():
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.long
@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name):
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0


def test_every_public_name_has_a_docstring_with_an_example():
    for name, value in vars(flatlayers).items():
        if (
            not name.startswith("_")
            and callable(value)
            and getattr(value, "__module__", "").startswith("flatlayers")
        ):
            assert value.__doc__, name
            if name != "Slot":
                assert ">>>" in value.__doc__, name


@pytest.mark.long
def test_the_example_of_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(example.splitlines()) <= 25
    names = {}
    exec(compile(example, "README.md", "exec"), names)
    assert names["result"].losses[-1] < 1e-4
    assert (tmp_path / "spiral.png").exists()


def section(text, place):
    """Return the section of a page that the place is in."""
    end = text.find("\n##", place)
    return text[max(text.rfind("\n##", 0, place), 0) : end if end >= 0 else None]


def lacks_a_package(section):
    code = "".join(block[2] for block in BLOCK.finditer(section))
    imported = [name for name in OPTIONAL if re.search(rf"^(import|from) {name}\b", code, re.MULTILINE)]
    return any(importlib.util.find_spec(name) is None for name in imported)


@pytest.mark.long
@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=[pytest.mark.slow] * (page.name in SLOW)) for page in PAGES],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch):
    """Its blocks in order, in one namespace; what a `pycon` block shows is what comes out.

    A section that imports an optional package is left out where that is missing.
    """
    monkeypatch.chdir(tmp_path)
    text, names = page.read_text(), {}
    for block in BLOCK.finditer(text):
        line = text[: block.start()].count("\n") + 1
        if lacks_a_package(section(text, block.start())):
            continue
        if block[1] == "python":
            exec(compile("\n" * line + block[2], page, "exec"), names)
        else:
            example = doctest.DocTestParser().get_doctest(block[2], names, page.name, str(page), line)
            runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
            assert runner.run(example, clear_globs=False).failed == 0
            names |= example.globs


def test_importing_changes_nothing_and_loads_nothing_extra():
    import subprocess
    import sys

    script = (
        "import jax, diffrax, sys, os;"
        "before = (dict(jax.config.values), dict(os.environ), set(sys.modules));"
        "import flatlayers;"
        "assert dict(jax.config.values) == before[0];"
        "assert dict(os.environ) == before[1];"
        "new = {m.split('.')[0] for m in set(sys.modules) - before[2]};"
        "print(sorted(new))"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout.strip() == "['flatlayers']"
