"""The gallery: the tables of `examples/README.md` as pictures, and a page for each script."""

import ast
import re
from dataclasses import dataclass
from pathlib import Path

from .markdown import fence


ROW = re.compile(
    r"^\| \[`(?P<file>\w+)\.py`\]\([^)]*\) \| (?P<what>.*?) \| (?P<notebook>.*?) "
    r"\| .*? \| (?P<picture>.*?) \|$"
)
NOTEBOOK = re.compile(r"\(\.\./notebooks/([\w-]+)\.ipynb\)")


@dataclass(frozen=True)
class Example:
    """A row of a table."""

    name: str
    what: str
    notebook: str | None
    has_picture: bool


def read(folder: Path) -> dict[str, list[Example]]:
    """Return the examples under the headings of their tables."""
    groups: dict[str, list[Example]] = {}
    heading = ""
    for line in (folder / "README.md").read_text().splitlines():
        if line.startswith("## "):
            heading = line[3:]
        elif row := ROW.match(line):
            notebook = NOTEBOOK.search(row["notebook"])
            example = Example(*(row["file"], row["what"], notebook and notebook[1], "<img" in row["picture"]))
            groups.setdefault(heading, []).append(example)
    return groups


def gallery(groups: dict[str, list[Example]]) -> str:
    """Return the cards of all examples, in their groups."""
    parts = []
    for heading, examples in groups.items():
        with_pictures_first = sorted(examples, key=lambda example: not example.has_picture)
        cards = "\n".join(map(_card, with_pictures_first))
        parts.append(f'## {heading}\n\n<div class="gallery" markdown>\n\n{cards}\n\n</div>')
    return "\n\n".join(parts)


def _card(example: Example) -> str:
    picture = (
        f"[![Its picture](../pictures/examples/{example.name}.png)]({example.name}.md)<br>"
        if example.has_picture
        else ""
    )
    return f"- {picture}[`{example.name}.py`]({example.name}.md)<br>{example.what}"


def pages(folder: Path, groups: dict[str, list[Example]]) -> dict[str, str]:
    """Return the page of each script."""
    return {
        f"examples/{example.name}.md": _page(folder / f"{example.name}.py", example)
        for examples in groups.values()
        for example in examples
    }


def _page(path: Path, example: Example) -> str:
    """What the script's docstring says is text here, and not once more in its code."""
    source = path.read_text().strip()
    docstring = ast.get_docstring(ast.parse(source)) or ""
    code = source.split('"""', 2)[2].strip() if docstring else source
    parts = [f"---\nhide: [navigation]\n---\n\n# {path.name}", docstring]
    parts.append(fence(f"python examples/{path.name}", "bash"))
    if example.notebook:
        parts.append(f"[The notebook](../notebooks/{example.notebook}.md) tells more.")
    if example.has_picture:
        parts.append(f"![Its picture](../pictures/examples/{example.name}.png){{ .notebook-picture }}")
    return "\n\n".join([*parts, fence(code, "python")]) + "\n"
