"""What lies elsewhere in the repository, on the site: notebooks with outputs, pictures of benchmarks."""

import base64
import json
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files


ANSI = re.compile(r"\x1b\[[0-9;]*m")
LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+)\)")
PLACE = '<div class="notebook-html" data-output="{}"></div>'

_html: dict[str, list[str]] = {}  # page -> its HTML outputs, put in after Markdown is done


def _in_repository(config: MkDocsConfig, pattern: str) -> list[Path]:
    return sorted(Path(config.config_file_path).parent.glob(pattern))


def _notebooks(config: MkDocsConfig) -> list[Path]:
    return _in_repository(config, "notebooks/*.ipynb")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add each notebook to the navigation."""
    for entry in config.nav or []:
        if isinstance(entry, dict) and "Notebooks" in entry:
            entry["Notebooks"] = [
                "notebooks/index.md",
                *(f"notebooks/{path.stem}.md" for path in _notebooks(config)),
            ]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page, its pictures and the notebook itself for each notebook; and the pictures of benchmarks."""
    for path in _in_repository(config, "benchmarks/*.png"):
        files.append(File.generated(config, f"benchmarks/{path.name}", content=path.read_bytes()))
    for path in _notebooks(config):
        page = Page(path)
        files.append(File.generated(config, page.uri, content=page.markdown()))
        files.append(File.generated(config, f"notebooks/{path.name}", content=path.read_bytes()))
        for name, picture in page.pictures.items():
            files.append(File.generated(config, f"notebooks/{name}", content=picture))
        _html[page.uri] = page.html
    return files


def on_page_markdown(markdown: str, page: Any, config: MkDocsConfig, **_: Any) -> str:
    """List the notebooks, each with what one will learn, on the first page of their section."""
    if page.file.src_uri != "notebooks/index.md":
        return markdown
    return "\n\n".join([markdown, *(f"- {_entry(path)}" for path in _notebooks(config))])


def on_page_content(html: str, page: Any, **_: Any) -> str:
    """Put HTML outputs in their places."""
    for i, output in enumerate(_html.get(page.file.src_uri, [])):
        html = html.replace(PLACE.format(i), f'<div class="notebook-html">{output}</div>')
    return html


class Page:
    """The Markdown of one notebook, and what belongs to it."""

    def __init__(self, path: Path):
        self.path, self.uri = path, f"notebooks/{path.stem}.md"
        self.pictures: dict[str, bytes] = {}
        self.html: list[str] = []

    def markdown(self) -> str:
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
        return [_fence(source, "python"), *outputs]

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


def _entry(path: Path) -> str:
    """A link to a notebook, and the paragraph of its opening that says what one will learn."""
    opening = _joined(json.loads(path.read_text())["cells"][0]["source"])
    title, *paragraphs = opening.split("\n\n")
    learn = next((part for part in paragraphs if "will learn" in part), paragraphs[0])
    return f"**[{title.lstrip('# ')}]({path.stem}.md)**. {' '.join(learn.split())}"


def _joined(text: Any) -> str:
    return text if isinstance(text, str) else "".join(text)


def _text(text: str) -> str:
    """Printed text; of a line that was written over, the last state."""
    lines = [line.rstrip("\r").rsplit("\r", 1)[-1] for line in ANSI.sub("", text).rstrip().split("\n")]
    return _fence("\n".join(lines), "{ .text .notebook-text }") if any(lines) else ""


def _fence(text: str, kind: str) -> str:
    ticks = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{ticks} {kind}\n{text}\n{ticks}"


def _on_the_site(link: re.Match[str]) -> str:
    """A link between files of the repository, as one between pages; its text alone if there is no page."""
    text, target = link.groups()
    if re.match(r"[a-z]+:|#", target):
        return link[0]
    if target.startswith("../docs/"):
        return f"[{text}]({target.replace('../docs/', '../', 1)})"
    if re.fullmatch(r"[\w.-]+\.ipynb", target):
        return f"[{text}]({target.removesuffix('.ipynb')}.md)"
    pages = {"../benchmarks/README.md": "../benchmarks/tables.md", "../CONTRIBUTING.md": "../contributing.md"}
    return f"[{text}]({pages[target]})" if target in pages else text
