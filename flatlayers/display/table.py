"""Numbers and tables as text."""

from collections.abc import Sequence

import wadler_lindig as wl


WIDTH = 100
_GAP = "  "
_NARROWEST = 8


def counted(n: int, noun: str) -> str:
    """Write `1 parameter`, `1_056 parameters`."""
    return f"{n:_} {noun}{'s' * (n != 1)}"


def scaled(n: float, units: Sequence[str]) -> str:
    """Write a number with three digits and a unit, each a thousand times the one before."""
    for unit in units[:-1]:
        if n < 999.5:
            return f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:.3g} {units[-1]}"


def bytes_text(n: int) -> str:
    """Write `1 byte`, `260 bytes`, `3.52 kB`."""
    return counted(n, "byte") if n < 1000 else scaled(n / 1000, ("kB", "MB", "GB", "TB"))


def filled(pieces: Sequence[str], gap: str = " ") -> wl.AbstractDoc:
    """Put pieces of text on as few lines as they need."""
    first, *rest = pieces
    # Each break is a group of its own: it breaks if the next piece does not fit.
    more = [(wl.BreakDoc(gap) + wl.TextDoc(piece)).group() for piece in rest]
    return wl.ConcatDoc(wl.TextDoc(first), *more)


def table(
    head: Sequence[str], rows: Sequence[Sequence[object]], foot: Sequence[object] = (), right: str = ""
) -> str:
    """Write columns under their heads, within `WIDTH`.

    **Arguments:**

    - `head`: the heads.
    - `rows`: one cell per column, text or a document of wadler-lindig, which breaks where it has to.
    - `foot`: one more row, under a rule.
    - `right`: the heads of the columns of numbers, which are aligned to the right, with spaces in between.
    """
    body = [[_as_doc(cell) for cell in row] for row in [*rows, *([foot] if foot else [])]]
    numbers = [name in right.split() for name in head]
    widths = _widths(head, body, numbers)
    lines = [_row(row, widths, numbers) for row in [[filled(name.split(" ")) for name in head], *body]]
    rule = "─" * max(len(line) for row in lines for line in row)
    lines.insert(1, [rule])
    if foot and rows:
        lines.insert(-1, [rule])
    return "\n".join(line for row in lines for line in row)


def _as_doc(cell: object) -> wl.AbstractDoc:
    return cell if isinstance(cell, wl.AbstractDoc) else filled(str(cell).split(" ")).nest(2)


def _widths(head: Sequence[str], body: list[list[wl.AbstractDoc]], numbers: list[bool]) -> list[int]:
    """Return what each column needs; if that is too much in all, break heads, then the widest texts."""
    needed = [max(len(wl.pformat(row[i], width=1000)) for row in body) for i in range(len(head))]
    for heads in (head, [max(name.split(" "), key=len) for name in head]):
        widths = [max(width, len(name)) for width, name in zip(needed, heads, strict=True)]
        if _total(widths) <= WIDTH:
            return widths
    texts = [i for i, is_number in enumerate(numbers) if not is_number]
    while _total(widths) > WIDTH:
        widest = max(texts, key=widths.__getitem__)
        if widths[widest] <= _NARROWEST:
            break
        widths[widest] -= 1
    return widths


def _total(widths: Sequence[int]) -> int:
    return sum(widths) + len(_GAP) * (len(widths) - 1)


def _row(cells: list[wl.AbstractDoc], widths: list[int], numbers: list[bool]) -> list[str]:
    columns = [
        [piece for line in wl.pformat(cell, width=width).split("\n") for piece in _cut(line, width)]
        for cell, width in zip(cells, widths, strict=True)
    ]
    lines = []
    for i in range(max(map(len, columns))):
        texts = [column[i] if i < len(column) else "" for column in columns]
        padded = [
            text.rjust(width) if is_number else text.ljust(width)
            for text, width, is_number in zip(texts, widths, numbers, strict=True)
        ]
        lines.append(_GAP.join(padded).rstrip())
    return lines


def _cut(line: str, width: int) -> list[str]:
    return [line[i : i + width] for i in range(0, len(line), width)] or [""]
