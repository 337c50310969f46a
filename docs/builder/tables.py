"""Tables of text for narrow screens: they are marked, so that the style can stack the cells of a row."""

import re

from .markdown import map_text


TABLE = re.compile(r"(?:^\|.*\|[ ]*\n)+", re.MULTILINE)
CELLS = re.compile(r"(?<!\\)\|")


def stackable(page: str) -> str:
    """Mark the tables of text; where a row has several cells after its first, each says its column."""

    def marked(text: str) -> str:
        return TABLE.sub(lambda found: _marked(found[0]), text)

    return map_text(f"{page}\n", marked).removesuffix("\n")


def _marked(table: str) -> str:
    head, rule, *rows = [cells_of(line) for line in table.splitlines()]
    if not is_text(rows):
        return table
    if len(head) > 2:
        labels = [f'<span class="label">{name}:</span> ' if name else "" for name in head[1:]]
        rows = [[row[0], *(a and b + a for a, b in zip(row[1:], labels, strict=True))] for row in rows]
    lines = "\n".join(f"| {' | '.join(row)} |" for row in [head, rule, *rows])
    return f'<div class="stackable" markdown>\n\n{lines}\n\n</div>\n'


def cells_of(line: str) -> list[str]:
    """Return the cells of a row."""
    return [cell.strip() for cell in CELLS.split(line.strip())[1:-1]]


def is_text(rows: list[list[str]]) -> bool:
    """Tell whether a table has long cells: numbers and single words are short."""
    cells = [cell for row in rows for cell in row[1:]]
    return sum(map(len, cells)) > 15 * len(cells)
