"""Names of the library as links: `fl.Dense` in the text of any page goes to its place in the API."""

import re

from .markdown import CODE_SPAN, map_text, relative


# Links, headings and HTML stay as they are.
SKIPPED = re.compile(
    r"\[(?:[^\[\]]|\[[^\]]*\])*\](?:\([^)]*\)|\[[^\]]*\])|^#[^\n]*$|<a .*?</a>", re.DOTALL | re.MULTILINE
)
REFERENCE = re.compile(r"\[([^\]]*)\]\[(flatlayers\.[\w.]+)\]")
NAME = re.compile(r"fl\.([A-Za-z_]\w*(?:\.\w+)*)")


def with_links(page: str, uri: str, anchors: dict[str, str]) -> str:
    """Link the names in code spans that start with `fl.`, and resolve `[text][flatlayers.name]`.

    **Raises:** `KeyError` for a reference to a name that has no place in the API.
    """

    def text(part: str) -> str:
        part = REFERENCE.sub(lambda found: f"[{found[1]}]({relative(anchors[found[2]], uri)})", part)
        pieces, end = [], 0
        for kept in SKIPPED.finditer(part):
            pieces += [CODE_SPAN.sub(name, part[end : kept.start()]), kept[0]]
            end = kept.end()
        return "".join([*pieces, CODE_SPAN.sub(name, part[end:])])

    def name(span: re.Match[str]) -> str:
        found = NAME.match(span["code"])
        place = found and place_of(found[1], anchors)
        return f"[{span[0]}]({relative(place, uri)})" if place else span[0]

    return map_text(page, text)


def place_of(name: str, anchors: dict[str, str]) -> str | None:
    """Return the place of a name, or of the longest part of it that has one."""
    parts = name.split(".")
    for n in range(len(parts), 0, -1):
        if place := anchors.get(".".join(["flatlayers", *parts[:n]])):
            return place
    return None
