"""The structure of the package, read from its sources: imports, types and the first words of docstrings."""

import ast
from pathlib import Path

import pytest

import flatlayers as fl


PACKAGE = Path(fl.__file__).parent
SOURCES = {path: ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}

# What each part of the package may import besides itself: only what is further down.
BELOW = {
    "types": set(),
    "dtypes": {"types"},
    "transforms": {"types", "dtypes"},
    "checks": {"types", "dtypes"},
    "devices": {"types", "dtypes"},
    "vectors": {"devices", "types", "dtypes"},
    "adjoints": {"checks", "types", "dtypes"},
    "io": {"vectors", "types", "dtypes"},
    "core": {"vectors", "transforms", "types", "dtypes"},
    "parallel": {"core", "vectors", "types", "dtypes"},
    "activations": {"types", "dtypes"},
    "initializers": {"core", "vectors", "types", "dtypes"},
    "derivatives": {"core", "vectors", "types", "dtypes"},
    "layers": {"initializers", "activations", "core", "vectors", "devices", "types", "dtypes"},
    "wrappers": {"layers", "initializers", "core", "vectors", "transforms", "checks", "types", "dtypes"},
    "equations": {"layers", "adjoints", "core", "vectors", "checks", "devices", "types", "dtypes"},
    "equilibria": {
        "equations",
        "layers",
        "adjoints",
        "core",
        "vectors",
        "checks",
        "devices",
        "types",
        "dtypes",
    },
    "fitting": {"equations", "io", "parallel", "layers", "core", "vectors", "transforms", "types", "dtypes"},
    "weights": {"wrappers", "layers", "initializers", "io", "core", "vectors", "types", "dtypes"},
    "display": {"core", "vectors", "types", "dtypes", "wrappers", "layers"},
}


def module_name(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


MODULES = {module_name(path): tree for path, tree in SOURCES.items()}
PACKAGES = {module_name(path) for path in SOURCES if path.name == "__init__.py"}


def imported(module):
    """The modules of the package that a module imports anywhere: also for annotations and in functions."""
    package = module if module in PACKAGES else module.rpartition(".")[0]
    for node in ast.walk(MODULES[module]):
        if isinstance(node, ast.ImportFrom) and node.level:
            parts = package.split(".") if package else []
            base = ".".join([*parts[: len(parts) - node.level + 1], *(node.module or "").split(".")]).strip(
                "."
            )
            for name in node.names:
                inner = f"{base}.{name.name}".strip(".")
                yield inner if inner in MODULES else base
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "flatlayers":
            yield node.module.partition(".")[2]


GRAPH = {module: {name for name in imported(module) if name != module} for module in MODULES if module}


def circle(graph):
    """A circle of imports, if there is one."""
    done, path = set(), []

    def visit(module):
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return None
        path.append(module)
        found = next(filter(None, map(visit, sorted(graph.get(module, ())))), None)
        path.pop()
        done.add(module)
        return found

    return next(filter(None, map(visit, sorted(graph))), None)


def test_no_module_imports_itself_by_way_of_others():
    assert circle(GRAPH) is None
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a", "b", "c", "a"]


def test_imports_go_down_only():
    up = [
        (module, name)
        for module, names in GRAPH.items()
        for name in names
        if (part := name.split(".")[0]) != module.split(".")[0] and part not in BELOW[module.split(".")[0]]
    ]
    assert up == []
    order = list(BELOW)
    assert all(order.index(low) < order.index(part) for part, lower in BELOW.items() for low in lower)


def test_layouts_need_no_jax():
    seen, todo = set(), ["vectors.layout"]
    while todo:
        module = todo.pop()
        if module not in seen:
            seen.add(module)
            todo += GRAPH[module]
    found = {
        name.split(".")[0]
        for module in seen
        for node in ast.walk(MODULES[module])
        if isinstance(node, ast.Import | ast.ImportFrom) and not getattr(node, "level", 0)
        for name in (
            [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
        )
    }
    assert "jax" not in found
    assert "numpy" in found


def annotations(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            arguments = node.args
            every = [
                *arguments.posonlyargs,
                *arguments.args,
                *arguments.kwonlyargs,
                arguments.vararg,
                arguments.kwarg,
            ]
            yield from (part.annotation for part in every if part is not None and part.annotation is not None)


@pytest.mark.parametrize("part", [None, *BELOW])
def test_few_arguments_are_any(part):
    trees = [
        tree
        for path, tree in SOURCES.items()
        if part in (None, path.relative_to(PACKAGE).parts[0].removesuffix(".py"))
    ]
    found = [ast.unparse(annotation) for tree in trees for annotation in annotations(tree)]
    share = sum(text in ("Any", "typing.Any") for text in found) / max(len(found), 1)
    assert share <= 0.1


# First words that leave the reader to find out what is described.
VAGUE = ("What", "That", "Those", "Where", "Whether", "How", "Which")


def docstrings():
    for path, tree in SOURCES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (
                text := ast.get_docstring(node)
            ):
                yield f"{module_name(path)}:{getattr(node, 'name', '')}", text


def test_docstrings_start_with_a_verb_or_a_noun():
    assert [name for name, text in docstrings() if text.split()[0].strip(",.:") in VAGUE] == []


def test_no_sentence_of_a_docstring_starts_with_what_it_is_not():
    """`What`, `That of` and `Those` start no sentence."""
    starts = ("What ", "That of ", "Those ", "Where ")
    found = []
    for name, text in docstrings():
        sentences = text.replace("\n", " ").replace(". ", ".\n").split("\n")
        found += [(name, part.strip()[:40]) for part in sentences if part.strip().startswith(starts)]
    assert found == []


def test_functions_and_files_are_short():
    long_functions = [
        (module_name(path), node.name)
        for path, tree in SOURCES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and lines_of(node) > 40
    ]
    assert long_files(SOURCES) == []
    assert long_functions == []


def test_files_of_tests_are_short():
    assert long_files(sorted(Path(__file__).parent.rglob("*.py"))) == []


def long_files(paths):
    return [(path.name, n) for path in paths if (n := len(path.read_text().splitlines())) > 450]


def lines_of(function):
    """The lines of a function without its docstring."""
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0
