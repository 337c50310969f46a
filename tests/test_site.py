"""The site: its pages of the API have each public name once, no page speaks of a name that is not there, and
the builder gives names their links, signatures their types and code its width.
"""

import ast
import functools
import json
import re
import tomllib
from collections import Counter
from pathlib import Path

import pytest

import flatlayers
from docs.builder import api, code, examples, links, notebooks, sources, tables, times
from flatlayers.adjoints._diffrax import TESTED


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
    """And every page there exists. (Links are checked where the site is built, strictly.)"""
    listed = re.findall(r"(\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    listed.remove("source/index.md")  # the builder writes it
    assert sorted(listed) == sorted(str(page.relative_to(DOCS)) for page in PAGES)


def api_pages():
    return {f"api/{path.name}": path.read_text() for path in (DOCS / "api").glob("*.md")}


def test_the_front_page_of_the_api_lists_every_name_with_a_sentence():
    pages = api_pages()
    rows = re.findall(r"^\| \[`(\S+)`\]\(\S+\) \| (.+) \|$", api.listed(pages, sorted(pages)), re.MULTILINE)
    assert Counter(name for name, _ in rows) == Counter(public_names())
    assert not [name for name, sentence in rows if len(sentence) < 10 or ">>>" in sentence]


def test_each_entry_has_its_signature_with_types_and_a_link_to_its_source():
    page = api.signatures(api.expanded("::: flatlayers.Dense\n", "api/dense.md"))
    assert "### Dense { #flatlayers.Dense .name }" in page
    assert (
        "Dense(in_dims: int, out_dims: int, activation: Callable | None = None, *, use_bias: bool = True"
        in page
    )
    assert "](../source/layers/dense.md#Dense)" in page
    assert "```pycon\n>>> import jax\n" in page
    setup = api.signatures(api.expanded("::: flatlayers.setup\n", "api/layer.md"))
    assert "setup(key: Key, layer: " in setup
    assert "-> tuple[ComponentVector, Record]\n" in setup


def test_a_member_has_an_entry():
    page = api.signatures(
        api.expanded("::: flatlayers.Slot\n    options:\n      members: [stride]\n", "api/vectors.md")
    )
    assert "#### stride { #flatlayers.Slot.stride .name }" in page
    assert "stride: int" in page


def test_a_source_is_whole_in_its_parts():
    for path in sorted(sources.PACKAGE.rglob("*.py")):
        lines = [
            line for _, text in sources.parts(path.read_text()) for line in text.splitlines() if line.strip()
        ]
        assert lines == [line for line in path.read_text().splitlines() if line.strip()]


def test_names_in_code_are_links():
    anchors = api.anchors(api_pages())

    def linked(text):
        return links.with_links(text, "guide.md", anchors)

    place = "api/dense.md#flatlayers.Dense"
    assert linked("A `fl.Dense(2, 3)` is") == f"A [`fl.Dense(2, 3)`]({place}) is"
    assert linked("[text][flatlayers.Dense]") == f"[text]({place})"
    assert linked("`fl.initializers.zeros`") == (
        "[`fl.initializers.zeros`](api/initializers.md#flatlayers.initializers.zeros)"
    )
    for same in (
        "## `fl.Dense`",
        "[`fl.Dense`](else.md)",
        "```python\nfl.Dense\n```",
        "`fl.nothing`",
        "fl.Dense",
    ):
        assert linked(same) == same
    with pytest.raises(KeyError):
        linked("[text][flatlayers.nothing]")


def test_tables_of_text_are_marked_and_say_their_columns():
    table = "| a | of `b` | |\n|---|---|---|\n| x | a text that is long | more `a \\| b` of it |\n"
    marked = tables.stackable(table)
    assert marked.startswith('<div class="stackable" markdown>\n\n| a | of `b` |  |\n|')
    assert '| x | <span class="label">of `b`:</span> a text that is long | more `a \\| b` of it |' in marked
    numbers = "| a | b |\n|---|---|\n| 1 | 2 |\n"
    fenced = f"```text\n{table}```\n"
    for same in (numbers, fenced, "no table | at all\n"):
        assert tables.stackable(same) == same


def test_code_is_broken_at_the_width_of_the_column():
    pytest.importorskip("ruff")
    call = "result = fl.train_loop(loss, ps, st, optax.adam(1e-2), batches, steps=1000, progress=False)"
    page = f"```python\n{call}  # the loop\n```\n\n```pycon\n>>> {call}\n>>> 1 + 1\n2\n```\n"
    broken = code.in_column({"page.md": page})["page.md"]
    assert max(map(len, broken.splitlines())) <= code.WIDTH
    assert "# the loop\nresult = fl.train_loop(\n" in broken
    assert ">>> result = fl.train_loop(\n...     loss" in broken
    assert "\n>>> 1 + 1\n2\n" in broken
    short = "```python\nx = {'a':1}\n```"
    assert code.in_column({"page.md": short})["page.md"] == short


def test_the_versions_are_those_that_are_asked_for_and_tested():
    page = (DOCS / "versions.md").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed, optional = page.split("## Optional packages")
    specifier = r"`([a-z-]+>=[\d.]+)`"
    assert sorted(re.findall(specifier, needed)) == sorted(project["dependencies"])
    extras = project["optional-dependencies"]
    assert set(re.findall(specifier, optional)) <= {*extras["test"], *extras["bench"], *extras["dev"]}
    pythons = re.findall(r"Python :: (3\.\d+)", "\n".join(project["classifiers"]))
    assert re.findall(r"3\.\d+", page.split(".\n")[0].split(". ")[0]) == pythons
    workflow = (ROOT / ".github/workflows/ci.yml").read_text()
    assert f"python: {json.dumps(pythons)}" in workflow
    assert f"diffrax from {TESTED[0]} to before {TESTED[1]}" in page


def test_the_times_are_those_of_the_benchmark():
    results = json.loads((ROOT / "benchmarks" / "results.json").read_text())
    table = times.table(results)
    head, _, *rows = table.splitlines()
    jax_version = re.search(r", jax ([\d.]+),", results["training"]["machine"])[1]
    assert head.startswith(f"| JAX {jax_version}: ")
    name, *numbers = rows[0].strip("| ").split(" | ")
    seconds = results["training"]["tables"]["Training, over sizes"][name]["seconds"]
    assert float(numbers[1]) == pytest.approx(1e3 * seconds["flat step"], rel=5e-3)
    assert "e+" not in table
    assert len(rows) == len(times.SIZES)


def test_formulas_are_mathml_and_code_is_not():
    pytest.importorskip("latex2mathml")
    from docs.builder.formulas import with_mathml

    page = with_mathml("Rate $a_b$ in `$HOME`\n\n$$x * y$$\n\n```bash\necho $a$\n```\n\nat $5 or $6.\n")
    assert page.startswith('Rate <span class="formula"><math')
    assert page.count("<math") == 2
    assert '<div class="formula"><math' in page
    assert "`$HOME`" in page
    assert "echo $a$" in page
    assert "at $5 or $6." in page


def test_a_notebook_is_a_page_with_its_outputs():
    (path,) = (ROOT / "notebooks").glob("01-*.ipynb")
    page = notebooks.Page(path)
    assert page.text.startswith("# ")
    assert "](../docs/" not in page.text
    assert page.text.count(".notebook-picture") == len(page.pictures) > 0
    assert 'data-output="0"' in page.text
    assert "data-output" not in page.with_html(page.text)


def test_every_example_is_in_the_gallery():
    groups = examples.read(ROOT / "examples")
    names = [example.name for group in groups.values() for example in group]
    scripts = {path.stem for path in (ROOT / "examples").glob("*.py")} - {"command_line"}
    assert sorted(names) == sorted(scripts)
    pages = examples.pages(ROOT / "examples", groups)
    assert all(page.count('"""') % 2 == 0 and "python examples/" in page for page in pages.values())
