"""The pages of the API: `::: flatlayers.Dense` becomes its heading, signature with types, and docstring."""

import ast
import dataclasses
import functools
import inspect
import re
import textwrap
import types
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import flatlayers
from flatlayers.initializers import Initializer

from . import sources
from .markdown import FENCE, fence


ENTRY = re.compile(r"^::: flatlayers\.(?P<name>\S+)\n(?P<options>(?: +.*\n)*)", re.MULTILINE)
DOCTEST = re.compile(r"^>>> .*(?:\n.+)*", re.MULTILINE)
SIGNATURE = "{ .python .signature }"
SENTENCE = re.compile(r"(?<=[^.]\.)\s+(?=[A-Z`])")


def expanded(page: str, uri: str) -> str:
    """Put the documentation of a name in the place of each `:::`."""

    def entry(found: re.Match[str]) -> str:
        level = re.search(r"heading_level: (\d)", found["options"])
        members = re.search(r"members: \[(.*)\]", found["options"])
        names = members[1].split(", ") if members else []
        return "\n\n".join(_entry(found["name"], names, int(level[1]) if level else 3, uri)) + "\n"

    return ENTRY.sub(entry, page)


def anchors(pages: dict[str, str]) -> dict[str, str]:
    """Return the place of each documented name, `api/dense.md#flatlayers.Dense`."""
    found = {}
    for uri, page in pages.items():
        for entry in ENTRY.finditer(page):
            members = re.search(r"members: \[(.*)\]", entry["options"])
            for name in ["", *(f".{member}" for member in (members[1].split(", ") if members else []))]:
                path = f"flatlayers.{entry['name']}{name}"
                found[path] = f"{uri}#{path}"
    return found


def listed(pages: dict[str, str], order: list[str]) -> str:
    """Return a table for each page of the API: the public names, and the first sentence of each."""
    tables = []
    for uri in order:
        title = re.search(r"^# (.*)", pages[uri], re.MULTILINE)
        file = uri.removeprefix("api/")
        rows = [
            f"| [`{found['name']}`]({file}#flatlayers.{found['name']}) | {first_sentence(found['name'])} |"
            for found in ENTRY.finditer(pages[uri])
        ]
        heading = f"## [{title[1] if title else file}]({file})"
        tables.append("\n".join([heading, "", "| name | |", "|---|---|", *rows]))
    return '<div class="names" markdown>\n\n' + "\n\n".join(tables) + "\n\n</div>"


def first_sentence(name: str) -> str:
    """Return the first sentence of a docstring as the text of a cell."""
    paragraph = (inspect.getdoc(_value(name)) or "").split("\n\n")[0]
    return SENTENCE.split(" ".join(paragraph.split()))[0].replace("|", "\\|")


def _value(name: str) -> object:
    return functools.reduce(inspect.getattr_static, name.split("."), flatlayers)


def _entry(name: str, members: list[str], level: int, uri: str) -> Iterator[str]:
    value = _value(name)
    yield f"{'#' * level} {name.rpartition('.')[2]} {{ #flatlayers.{name} .name }}"
    if not isinstance(value, types.ModuleType):
        yield _signature(name.rpartition(".")[2], value)
    if link := sources.link_to(value, uri):
        yield f"[source]({link}){{ .source-link }}"
    yield _documentation(value)
    for member in members:
        yield from _member(name, value, member, level + 1, uri)


def _member(name: str, owner: object, member: str, level: int, uri: str) -> Iterator[str]:
    value = inspect.getattr_static(owner, member)
    yield f"{'#' * level} {member} {{ #flatlayers.{name}.{member} .name }}"
    if isinstance(value, property | functools.cached_property):
        function = value.fget if isinstance(value, property) else value.func
        kind = _annotations(function).get("return") if function else None
        yield fence(f"{member}: {kind}" if kind else member, "python")
        yield _documentation(function)
    elif isinstance(value, types.FunctionType | staticmethod | classmethod | type):
        yield _signature(member, getattr(value, "__func__", value))
        if not isinstance(owner, type) and (link := sources.link_to(value, uri)):
            yield f"[source]({link}){{ .source-link }}"
        yield _documentation(value)
    else:
        yield _attribute(owner, member, value)


def _attribute(owner: Any, member: str, value: object) -> str:
    """A value of a module: an initializer with its options, or another one with the comment above it."""
    if isinstance(value, Initializer):
        given = inspect.signature(value.draw).parameters.values()
        options = [one for one in given if one.kind is one.KEYWORD_ONLY and one.name != "fans"]
        call = inspect.Signature([one.replace(annotation=one.empty) for one in options])
        shown = fence(f"{member}{call}", "python") + "\n\n" if options else ""
        return shown + _documentation(value.draw)
    comment = re.search(rf"((?:^# .*\n)+){member} = ", inspect.getsource(owner), re.MULTILINE)
    above = " ".join(line.removeprefix("# ") for line in comment[1].splitlines()) if comment else ""
    return fence(f"{member} = {value!r}", "python") + "\n\n" + above


def _documentation(value: object) -> str:
    return _fenced(inspect.getdoc(value) or "")


def _fenced(docstring: str) -> str:
    return DOCTEST.sub(r"```pycon\n\g<0>\n```", docstring)


def _signature(name: str, value: Any) -> str:
    """The call with types and defaults, broken as the formatter breaks a definition."""
    try:
        signature = inspect.signature(value)
    except ValueError:  # an exception with the constructor of its base
        return fence(name, "python")
    given = list(signature.parameters.values())
    if given and given[0].name in ("self", "cls"):
        given = given[1:]
    written = {} if isinstance(value, type) else _annotations(value)
    parameters = [
        one.replace(
            annotation=_Plain(written.get(one.name) or type_text(one.annotation)),
            default=one.default if one.default is one.empty else _Plain(_default(one.default)),
        )
        if one.annotation is not one.empty
        else one.replace(default=one.default if one.default is one.empty else _Plain(_default(one.default)))
        for one in given
    ]
    returned = written.get("return") if not isinstance(value, type) else None
    text = str(inspect.Signature(parameters)) + (f" -> {returned}" if returned else "")
    # A definition, which the formatter breaks where it is too long; `signatures` takes `def` away again.
    return fence(f"def {name}{text}: ...", SIGNATURE)


def signatures(page: str) -> str:
    """Turn the definitions that stand for signatures into signatures."""

    def stripped(block: re.Match[str]) -> str:
        code = block["code"].strip().removeprefix("def ").removesuffix(": ...")
        return fence(code, "python")

    return FENCE.sub(lambda block: stripped(block) if block["info"].strip() == SIGNATURE else block[0], page)


class _Plain:
    """Text that a signature shows as it is."""

    def __init__(self, text: str):
        self.text = text

    def __repr__(self) -> str:
        return self.text


def _annotations(function: Any) -> dict[str, str]:
    """The annotations of a function as its source has them."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
    except (OSError, TypeError):
        return {}
    definition = tree.body[0]
    if not isinstance(definition, ast.FunctionDef):
        return {}
    arguments = definition.args
    every = [
        *arguments.posonlyargs,
        *arguments.args,
        arguments.vararg,
        *arguments.kwonlyargs,
        arguments.kwarg,
    ]
    found = {one.arg: one.annotation for one in every if one is not None} | {"return": definition.returns}
    return {name: _unquoted(node) for name, node in found.items() if node is not None}


def _unquoted(node: ast.expr) -> str:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ast.unparse(node)


def type_text(kind: Any) -> str:
    """Return a type as a reader writes it: without the checks that its annotation has."""
    if isinstance(kind, str):
        return kind
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return type_text(arguments[0])
    if origin in (Union, types.UnionType):
        # A wrapper that gives a field its hash is no kind of its own.
        texts = [type_text(one) for one in arguments if getattr(one, "__name__", "") != "Hashable"]
        return " | ".join(dict.fromkeys(texts))
    if origin is Literal:
        return f"Literal[{', '.join(map(repr, arguments))}]"
    if origin is Callable and all(one in (Any, ..., object) for one in _flat(arguments)):
        return "Callable"
    name = _type_name(origin or kind)
    return f"{name}[{', '.join(map(_argument, arguments))}]" if arguments else name


def _flat(arguments: tuple[Any, ...]) -> list[Any]:
    return [one for part in arguments for one in (part if isinstance(part, list) else [part])]


def _argument(kind: Any) -> str:
    if kind is ...:
        return "..."
    return f"[{', '.join(map(type_text, kind))}]" if isinstance(kind, list) else type_text(kind)


def _type_name(kind: Any) -> str:
    if kind is type(None):
        return "None"
    if kind is Any:
        return "Any"
    name = getattr(kind, "__name__", str(kind))
    package = getattr(kind, "__module__", "").partition(".")[0]
    return f"{package}.{name}" if package in ("diffrax", "optax", "optimistix", "lineax") else name


def _default(value: Any) -> str:
    if isinstance(value, dataclasses.Field) or type(value).__name__ == "_HAS_DEFAULT_FACTORY_CLASS":
        return "..."
    if isinstance(value, type):
        return f"jnp.{value.__name__}" if value.__module__.startswith("jax") else value.__name__
    if inspect.isroutine(value) or (isinstance(value, Callable) and hasattr(value, "__name__")):
        return value.__name__
    text = repr(value)
    try:
        ast.parse(text)
    except SyntaxError:
        return "..."
    return text
