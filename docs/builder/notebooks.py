"""Notebooks as pages, with the outputs of their last run."""

import base64
import json
import re
from pathlib import Path
from typing import Any

from .markdown import fence


ANSI = re.compile(r"\x1b\[[0-9;]*m")
LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+)\)")
PLACE = '<div class="notebook-html" data-output="{}"></div>'


class Page:
    """The Markdown of one notebook, and what belongs to it: pictures by name, and outputs in HTML."""

    def __init__(self, path: Path):
        self.path, self.uri = path, f"notebooks/{path.stem}.md"
        self.pictures: dict[str, bytes] = {}
        self.html: list[str] = []
        self.text = self._markdown()

    def with_html(self, text: str) -> str:
        """Return the page with its outputs in HTML in their places."""
        for i, output in enumerate(self.html):
            text = text.replace(PLACE.format(i), f'<div class="notebook-html">{output}</div>')
        return text

    def _markdown(self) -> str:
        cells = json.loads(self.path.read_text())["cells"]
        parts = [part for cell in cells for part in self._cell(cell)]
        download = f"[Download this notebook]({self.path.name}){{ .notebook-download }}"
        return "\n\n".join([*parts, download])

    def _cell(self, cell: Any) -> list[str]:
        source = _joined(cell["source"]).rstrip()
        if cell["cell_type"] == "markdown":
            return [LINK.sub(_on_the_site, source)]
        if cell["cell_type"] != "code" or not source:
            return []
        outputs = [text for output in cell["outputs"] if (text := self._output(output))]
        return [fence(source, "python"), *outputs]

    def _output(self, output: Any) -> str:
        if output["output_type"] == "stream":
            return _text(_joined(output["text"])) if output["name"] == "stdout" else ""
        if output["output_type"] == "error":
            return _text("\n".join(output["traceback"]))
        data = output["data"]
        if "image/png" in data:
            return self._picture(base64.b64decode(_joined(data["image/png"])), "png")
        if "image/svg+xml" in data:
            return self._picture(_joined(data["image/svg+xml"]).encode(), "svg")
        if "text/html" in data:
            self.html.append(_joined(data["text/html"]))
            return PLACE.format(len(self.html) - 1)
        if "text/markdown" in data:
            return _joined(data["text/markdown"])
        return _text(_joined(data.get("text/plain", "")))

    def _picture(self, content: bytes, kind: str) -> str:
        name = f"{self.path.stem}-{len(self.pictures) + 1}.{kind}"
        self.pictures[name] = content
        return f"![Output of the cell above]({name}){{ .notebook-picture }}"


def entry(path: Path) -> str:
    """Return a link to a notebook, and the paragraph of its opening that says what one will learn."""
    opening = _joined(json.loads(path.read_text())["cells"][0]["source"])
    title, *paragraphs = opening.split("\n\n")
    learn = next((part for part in paragraphs if "will learn" in part), paragraphs[0])
    return f"- **[{title.lstrip('# ')}]({path.stem}.md)**. {' '.join(learn.split())}"


def _joined(text: Any) -> str:
    return text if isinstance(text, str) else "".join(text)


def _text(text: str) -> str:
    """Printed text; of a line that was written over, the last state."""
    lines = [line.rstrip("\r").rsplit("\r", 1)[-1] for line in ANSI.sub("", text).rstrip().split("\n")]
    return fence("\n".join(lines), "{ .text .notebook-text }") if any(lines) else ""


def _on_the_site(link: re.Match[str]) -> str:
    """A link between files of the repository, as one between pages; its text alone if there is no page."""
    text, target = link.groups()
    if re.match(r"[a-z]+:|#", target):
        return link[0]
    if target.startswith("../docs/"):
        return f"[{text}]({target.replace('../docs/', '../', 1)})"
    if re.fullmatch(r"[\w.-]+\.ipynb", target):
        return f"[{text}]({target.removesuffix('.ipynb')}.md)"
    if example := re.fullmatch(r"\.\./examples/(\w+)\.py", target):
        return f"[{text}](../examples/{example[1]}.md)"
    pages = {"../benchmarks/README.md": "../benchmarks/tables.md", "../CONTRIBUTING.md": "../contributing.md"}
    return f"[{text}]({pages[target]})" if target in pages else text
