"""The parts of a page: blocks of code, and the text between them."""

import posixpath
import re
from collections.abc import Callable


FENCE = re.compile(
    r"^(?P<indent> *)(?P<ticks>`{3,})(?P<info>[^`\n]*)\n(?P<code>.*?)^(?P=indent)(?P=ticks) *$",
    re.DOTALL | re.MULTILINE,
)
CODE_SPAN = re.compile(r"(?P<ticks>`+)(?P<code>.+?)(?P=ticks)(?!`)", re.DOTALL)


def fence(text: str, info: str) -> str:
    """Return a block of code, with more ticks than are in it."""
    ticks = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{ticks} {info}\n{text}\n{ticks}"


def map_text(page: str, change: Callable[[str], str]) -> str:
    """Change the text outside of blocks of code."""
    parts, end = [], 0
    for block in FENCE.finditer(page):
        parts += [change(page[end : block.start()]), block[0]]
        end = block.end()
    return "".join([*parts, change(page[end:])])


def relative(target: str, page: str) -> str:
    """Return the path of a file as a link on a page."""
    return posixpath.relpath(target, posixpath.dirname(page) or ".")
