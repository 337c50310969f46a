"""Write the site's pages into `build/pages`, and its configuration into `build/mkdocs.yml`."""

import json
import re
import shutil
import sys
import tomllib
from pathlib import Path
from typing import Any

import yaml

from . import api, examples, notebooks, sources, times
from .code import in_column
from .formulas import with_mathml
from .links import with_links
from .markdown import FENCE, relative
from .tables import stackable


ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build"
SNIPPET = re.compile(r'^--8<-- "([^"]+)"$', re.MULTILINE)
ALONE = re.compile(r"^!\[[^\]]*\]\(([^)\s]+)\)(?:\{[^}]*\})?$", re.MULTILINE)
PICTURE = re.compile(r"!\[[^\]]*\]\(([^)\s]+)\)")
LINK = re.compile(r"\]\((?![a-z]+:|#)([^)#\s]+)(#[^)\s]*)?\)")
# Pages that are made of files elsewhere.
PAGES = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "benchmarks/README.md": "benchmarks/tables.md",
    "examples/README.md": "examples/index.md",
}
LISTS = {
    "api/index.md": "<!-- names -->",
    "examples/index.md": "<!-- gallery -->",
    "notebooks/index.md": "<!-- list -->",
    "performance.md": "<!-- times -->",
    "index.md": "<!-- vector -->",
}


def written() -> dict[str, str]:
    """Return the pages as they are in the repository, with the files that they include."""
    folder = ROOT / "docs"
    return {
        uri: SNIPPET.sub(lambda found, uri=uri: included(found[1], uri), (folder / uri).read_text())
        for uri in sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.md"))
    }


def included(file: str, uri: str) -> str:
    """Return a file of the repository, its links between files as links between pages."""

    def on_the_site(link: re.Match[str]) -> str:
        target = (Path(file).parent / link[1]).as_posix()
        page = PAGES.get(target) or target.removeprefix("docs/")
        known = page != target or page in PAGES.values()
        return f"]({relative(page, uri)}{link[2] or ''})" if known else link[0]

    return LINK.sub(on_the_site, (ROOT / file).read_text())


def generated(pages: dict[str, str], told: list[notebooks.Page]) -> dict[str, str]:
    """Return all pages: the lists filled, the API expanded, notebooks, examples and sources added."""
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    order = [uri for uri in in_navigation(config["nav"]) if uri.startswith("api/") and uri != "api/index.md"]
    groups = examples.read(ROOT / "examples")
    lists = {
        "api/index.md": api.listed(pages, order),
        "examples/index.md": examples.gallery(groups),
        "notebooks/index.md": "\n\n".join(notebooks.entry(page.path) for page in told),
        "index.md": f'<div class="notebook-html">{vector_of(pages["index.md"])}</div>',
        "performance.md": times.table(json.loads((ROOT / "benchmarks/results.json").read_text())),
    }
    filled = {
        uri: page.replace(LISTS[uri], lists[uri]) if uri in lists else page for uri, page in pages.items()
    }
    made = {
        **{uri: api.expanded(page, uri) if uri.startswith("api/") else page for uri, page in filled.items()},
        **{page.uri: page.text for page in told},
        **examples.pages(ROOT / "examples", groups),
    }
    return {**in_column(made), **sources.pages()}


def vector_of(page: str) -> str:
    """Return the display of the vector that the example of a page makes, in its lines up to `fl.setup`."""
    code = next(block["code"] for block in FENCE.finditer(page) if block["info"].strip() == "python")
    names: dict[str, Any] = {}
    exec(code[: code.index("\n", code.index("fl.setup("))], names)
    return names["ps"]._repr_html_()


def in_navigation(nav: Any) -> list[str]:
    """Return the pages of a navigation, in order."""
    if isinstance(nav, str):
        return [nav]
    parts = nav.values() if isinstance(nav, dict) else nav
    return [uri for part in parts for uri in in_navigation(part)]


def configuration() -> str:
    """Return the configuration with notebooks, folders, and the repository's address if it has one."""
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    stems = [f"notebooks/{path.stem}.md" for path in sorted(ROOT.glob("notebooks/*.ipynb"))]
    for section in config["nav"]:
        if "Notebooks" in section:
            section["Notebooks"] += stems
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"].get("urls", {})
    for name, address in urls.items():
        if name.lower() in ("repository", "source", "source code"):
            config["repo_url"] = address
    return yaml.safe_dump({**config, "docs_dir": "pages", "site_dir": "site"}, sort_keys=False)


def finished(page: str, uri: str, anchors: dict[str, str]) -> str:
    """Return a page with its signatures, formulas, tables and links; a picture alone opens in full size."""
    page = ALONE.sub(r"[\g<0>](\g<1>)", with_mathml(api.signatures(page)))
    return with_links(stackable(page), uri, anchors)


def write() -> list[str]:
    """Write everything; return the pictures that pages show and that are not there."""
    for folder in ("pages", "site"):
        shutil.rmtree(BUILD / folder, ignore_errors=True)
    own = written()
    told = [notebooks.Page(path) for path in sorted(ROOT.glob("notebooks/*.ipynb"))]
    anchors = api.anchors(own)
    pages = {
        uri: page if uri.startswith("source/") else finished(page, uri, anchors)
        for uri, page in generated(own, told).items()
    }
    pages |= {page.uri: page.with_html(pages[page.uri]) for page in told}
    for folder in ("assets", "pictures"):
        shutil.copytree(ROOT / "docs" / folder, BUILD / "pages" / folder)
    for uri, page in pages.items():
        file = BUILD / "pages" / uri
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(page)
    for picture in ROOT.glob("benchmarks/*.png"):
        shutil.copy(picture, BUILD / "pages/benchmarks")
    for page in told:
        shutil.copy(page.path, BUILD / "pages/notebooks")
        for name, picture in page.pictures.items():
            (BUILD / "pages/notebooks" / name).write_bytes(picture)
    (BUILD / "mkdocs.yml").write_text(configuration())
    shown = [(uri, link) for uri, page in pages.items() for link in PICTURE.findall(page)]
    return [f"{uri}: {link}" for uri, link in shown if not ((BUILD / "pages" / uri).parent / link).exists()]


if __name__ == "__main__":
    BUILD.mkdir(exist_ok=True)
    if missing := write():
        sys.exit("pictures that are not there:\n" + "\n".join(missing))
