"""The site's pages of the API have each public name once, and no page speaks of a name that is not there."""

import ast
import functools
import re
from collections import Counter
from pathlib import Path

import pytest

import flatlayers


ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("**/*.md"))


def public_names():
    """What `flatlayers/__init__.py` exports: the names of its `from` imports."""
    tree = ast.parse((ROOT / "flatlayers" / "__init__.py").read_text())
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    return [alias.asname or alias.name for node in imports for alias in node.names]


def documented_names():
    pages = [page.read_text() for page in (DOCS / "api").glob("*.md")]
    return [name for page in pages for name in re.findall(r"^::: flatlayers\.(\S+)$", page, re.MULTILINE)]


def test_each_public_name_is_on_one_page_of_the_api():
    assert Counter(documented_names()) == Counter(public_names())


def test_the_page_of_functions_lists_them_all():
    page = (DOCS / "api" / "initializers.md").read_text()
    (members,) = re.findall(
        r"^::: flatlayers\.initializers\n(?: .*\n)*? +members: \[(.*)\]", page, re.MULTILINE
    )
    initializers = vars(flatlayers.initializers)
    own = {
        name
        for name, value in initializers.items()
        if not name.startswith("_")
        and (isinstance(value, flatlayers.initializers.Initializer) or name in ("Initializer", "from_array"))
    }
    assert set(members.split(", ")) == own
    listed = set(re.findall(r"`(\w+)`", page.split("::: flatlayers.activations")[1]))
    public = {name for name in vars(flatlayers.activations) if not name.startswith("_")}
    assert public <= listed | {"identity"}


def exists(path):
    try:
        functools.reduce(getattr, path.split("."), flatlayers)
    except AttributeError:
        return False
    return True


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_names_on_a_page_exist(page):
    named = re.findall(r"\bfl\.([A-Za-z_][\w.]*\w)", page.read_text())
    assert not [name for name in named if not exists(name)]


def test_every_page_is_in_the_navigation():
    """And every page there exists. (Links are checked where the site is built: `mkdocs build` is strict.)"""
    listed = re.findall(r"(\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(str(page.relative_to(DOCS)) for page in PAGES)
