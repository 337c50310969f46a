"""The package's source as pages: one for each module, with a heading for each class and function."""

import ast
import inspect
import sys
from pathlib import Path

from .markdown import fence, relative


ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "flatlayers"


def uri_of(path: Path) -> str:
    """Return the page of a module."""
    return f"source/{path.relative_to(PACKAGE).with_suffix('').as_posix().replace('__init__', 'package')}.md"


def link_to(value: object, page: str) -> str | None:
    """Return a link from a page to the source of a class or a function; `None` for what has none here."""
    value = inspect.unwrap(value) if callable(value) else value
    module = sys.modules.get(getattr(value, "__module__", ""))
    name = getattr(value, "__qualname__", "").split(".")[0]
    if module is None or not module.__name__.startswith("flatlayers") or not name.isidentifier():
        return None
    path = Path(module.__file__ or "")
    defined = name in (each for each, _ in parts(path.read_text()))
    return f"{relative(uri_of(path), page)}#{name}" if defined else None


def parts(source: str) -> list[tuple[str, str]]:
    """Return the classes and functions of a source, each with its lines, and `""` with what is between."""
    lines = source.splitlines()
    found: list[tuple[str, str]] = []
    end = 0
    for node in ast.parse(source).body:
        if not isinstance(node, ast.ClassDef | ast.FunctionDef):
            continue
        start = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) - 1
        while start > end and lines[start - 1].startswith("#"):
            start -= 1
        found += [("", "\n".join(lines[end:start])), (node.name, "\n".join(lines[start : node.end_lineno]))]
        end = node.end_lineno or start
    found.append(("", "\n".join(lines[end:])))
    return [(name, text.strip("\n")) for name, text in found if text.strip()]


def pages() -> dict[str, str]:
    """Return the pages of all modules, and the page that lists them."""
    files = sorted(PACKAGE.rglob("*.py"))
    made = {uri_of(path): _page(path) for path in files}
    rows = [
        f"| [`{path.relative_to(ROOT)}`]({relative(uri_of(path), 'source/index.md')}) | {_first_line(path)} |"
        for path in files
    ]
    table = "\n".join(["| module | |", "|---|---|", *rows])
    text = f'# Source\n\nThe modules of the package.\n\n<div class="stackable" markdown>\n\n{table}\n\n</div>'
    return {**made, "source/index.md": _not_searched(text)}


def _first_line(path: Path) -> str:
    return (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n")[0].replace("|", "\\|")


def _page(path: Path) -> str:
    seen: set[str] = set()
    text = [f"# {path.relative_to(ROOT)}"]
    for name, code in parts(path.read_text()):
        if name and name not in seen:  # an overload has the heading of the first
            text.append(f"## {name} {{ #{name} }}")
            seen.add(name)
        text.append(fence(code, "python"))
    return _not_searched("\n\n".join(text))


def _not_searched(text: str) -> str:
    """Return a page in the front matter of sources: not searched, and as wide as the lines of the sources."""
    return f"---\nhide: [navigation]\nsearch:\n  exclude: true\n---\n\n{text}\n"
