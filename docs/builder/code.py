"""Code in the width of the site's column: longer lines are broken as the formatter breaks them."""

import io
import re
import subprocess
import sys
import tempfile
import textwrap
import tokenize
from collections.abc import Callable, Iterable
from pathlib import Path

from .markdown import FENCE


WIDTH = 80
EXAMPLE = re.compile(r"^>>> .*(?:\n\.\.\.(?: .*)?)*", re.MULTILINE)
PROMPT = len(">>> ")


def in_column(pages: dict[str, str]) -> dict[str, str]:
    """Break the long lines of Python on all pages, with one call of the formatter."""
    found: dict[str, str] = {}
    for page in pages.values():
        _each_source(page, lambda source, width: found.setdefault(f"{width}:{source}", source))
    found = {key: source for key, source in found.items() if is_long(source, int(key.partition(":")[0]))}
    broken = dict(zip(found, _formatted({key: comments_above(found[key]) for key in found}), strict=True))
    return {
        uri: _each_source(page, lambda source, width: broken.get(f"{width}:{source}", source))
        for uri, page in pages.items()
    }


def is_long(source: str, width: int = WIDTH) -> bool:
    return any(len(line) > width for line in source.splitlines())


def _each_source(page: str, change: Callable[[str, int], str]) -> str:
    """Change the Python of a page: blocks of it, and the statements of sessions."""

    def block(found: re.Match[str]) -> str:
        code, info = found["code"], found["info"].strip(" {}.").split()[:1]
        if info in (["python"], ["py"]):
            code = change(code, WIDTH)
        elif info == ["pycon"]:
            code = EXAMPLE.sub(lambda one: _session(change(_plain(one[0]), WIDTH - PROMPT)), code)
        return found[0].replace(found["code"], code) if code != found["code"] else found[0]

    return FENCE.sub(block, page)


def _plain(example: str) -> str:
    return "".join(f"{line[PROMPT:]}\n" for line in example.splitlines())


def _session(source: str) -> str:
    lines = source.rstrip("\n").split("\n")
    # A comment in front is an entry of its own.
    code = next((i for i, line in enumerate(lines) if not line.startswith("#")), 0)
    return "\n".join(f"{'>>>' if i <= code else '...'} {line}".rstrip() for i, line in enumerate(lines))


def comments_above(source: str) -> str:
    """Put a comment that makes its line too long above it, in lines that are short enough."""
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    except (tokenize.TokenError, SyntaxError):
        return source
    lines = source.splitlines()
    comments = [token for token in tokens if token.type == tokenize.COMMENT]
    for token in reversed(comments):
        row, column = token.start[0] - 1, token.start[1]
        if len(lines[row]) <= WIDTH:
            continue
        code = lines[row][:column].rstrip()
        indent = " " * (len(lines[row]) - len(lines[row].lstrip()))
        words = token.string.removeprefix("#").strip()
        above = textwrap.wrap(words, WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")
        lines[row : row + 1] = [*above, *([code] if code else [])]
    return "\n".join(lines) + "\n"


def _formatted(sources: dict[str, str]) -> Iterable[str]:
    """Format each source to the width in front of its key; what is no whole Python stays as it is."""
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for i, (key, source) in enumerate(sources.items()):
            width = key.partition(":")[0]
            files.append(Path(folder, width, f"{i}.py"))
            files[-1].parent.mkdir(exist_ok=True)
            files[-1].write_text(source)
        for part in {file.parent for file in files}:
            ruff = [sys.executable, "-m", "ruff", "format", "--isolated", "--no-cache", "--quiet"]
            subprocess.run([*ruff, "--line-length", part.name, str(part)], capture_output=True, check=False)
        return [file.read_text() for file in files]
