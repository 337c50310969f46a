"""Vectors, models, summaries and trees as HTML for notebooks, with styles inside and without scripts."""

import dataclasses
import html
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import jax
import numpy as np
from jax.core import Tracer

from ..core.layer import Layer, constructor_name
from ..vectors.layout import Layout
from ..vectors.names import describe, join_path
from ..vectors.vector import ComponentVector
from ..vectors.vector_text import is_other
from .model import totals, written
from .places import Run, alike, leaves_in_order, span_text
from .summary import Row, Summary, texts_of
from .table import bytes_text
from .tree import LeafRow, Tree, notes_of, number_text, numbers_of


# The "bright" scheme of Paul Tol, to be told apart by the color-blind, with the color of text on each.
_PALETTE = (
    ("#4477aa", "#fff"),
    ("#ee6677", "#000"),
    ("#228833", "#fff"),
    ("#ccbb44", "#000"),
    ("#66ccee", "#000"),
    ("#aa3377", "#fff"),
)
_GRAY = ("#999", "#000")
# Below this share of the whole a part is shown with its neighbours.
_LEAST = 1 / 150
_TALL, _LOWEST_WITH_TEXT = 22, 14
_MOST_KEYS = 8
_MOST_ROWS = 60


def vector_html(vector: ComponentVector) -> str:
    """Show a vector: the places of its parts, and its numbers to be unfolded."""
    head = _head(type(vector).__name__, describe(vector.data) if hasattr(vector.data, "shape") else "")
    if is_other(vector.data, vector.layout):
        return _box(_pre(html.escape(str(vector))))
    if not isinstance(vector.data, jax.Array | np.ndarray | jax.ShapeDtypeStruct):
        return _box(head)
    colors = Colors(vector.layout)
    size = _muted(bytes_text(vector.size * vector.dtype.itemsize))
    return _box(head + size, _bar(vector.layout, colors), _legend(vector.layout, colors), _unfold(vector))


def model_html(model: Layer) -> str:
    """Show a model: the tree of its layers, and their places in the vector."""
    colors = Colors(model.layout)
    lines = "".join(_colored(line.text, colors[line.path]) for line in written(model))
    head = _head(constructor_name(model), totals(model))
    return _box(head, _bar(model.layout, colors), _pre(lines))


def summary_html(summary: Summary) -> str:
    """Show a summary: the table, with a bar of the share of each layer."""
    total = summary.total
    colors = Colors(total.layer.layout)
    heads = ("path", "layer", "output shape", "parameters", "place", "share", "", "FLOPs")
    rows = list(_summary_rows(summary.grouped, colors, 0))
    rows = [*_shortened(rows), _summary_row(total, "total", colors, 0, "border-top:1px solid #8888")]
    head = _head(constructor_name(total.layer), totals(total.layer))
    return _box(head, _bar(total.layer.layout, colors), _table(heads, rows, numbers=(3, 4, 5, 7)))


def tree_html(tree: Tree) -> str:
    """Show a tree: each leaf's range as a line, mean and spread as a box, all to one scale."""
    known = [abs(x) for row in tree.rows for x in (row.min, row.max) if x is not None]
    largest = max(known, default=0.0) or 1.0
    first_names = [row.path.split(".")[0] for row in tree.rows]
    colors = dict(zip(dict.fromkeys(first_names), itertools.cycle(_PALETTE), strict=False))
    heads = ("name", "shape", "dtype", "min", "max", "mean", "std", f"\u00b1{largest:.3g}", "")
    rows = [
        _tree_row(row, largest, colors[name][0]) for row, name in zip(tree.rows, first_names, strict=True)
    ]
    return _box(_head(tree.title, ""), _table(heads, _shortened(rows), numbers=(3, 4, 5, 6)))


# Colors


Color = tuple[str, str]


class Colors:
    """A color for each part of a vector, by path; equal neighbours share one."""

    def __init__(self, layout: Layout):
        self.prefix, level = "", layout
        while len(level.entries) == 1 and isinstance(inner := next(iter(level.entries.values())), Layout):
            self.prefix, level = join_path(self.prefix, level.names[0]), inner
        self.depth = self.prefix.count(".") + 1 if self.prefix else 0
        pairs = zip(alike(level.entries), itertools.cycle(_PALETTE), strict=False)
        self.groups = {span_text(names): (names, color) for names, color in pairs}
        self._by_name = {name: color for names, color in self.groups.values() for name in names}

    def __getitem__(self, path: str) -> Color:
        names = path.split(".")
        if ".".join(names[: self.depth]) != self.prefix or len(names) <= self.depth:
            return _GRAY
        return self._by_name.get(names[self.depth], _GRAY)


# The bar


@dataclasses.dataclass(frozen=True)
class _Segment:
    label: str
    start: int
    stop: int
    path: str

    @property
    def size(self) -> int:
        return self.stop - self.start


def _bar(layout: Layout, colors: Colors) -> str:
    """Draw the vector from its first number to its last, one row per level: layers, inner layers, leaves."""
    if not layout.length:
        return ""
    leaves = leaves_in_order(layout)
    deepest = max(path.count(".") for _, path in leaves) + 1
    first = min(colors.depth + 1, deepest)
    depths = sorted({first, min(first + 1, deepest), deepest})
    heights = {1: (_TALL,), 2: (_TALL, 9), 3: (_TALL, _LOWEST_WITH_TEXT, 7)}[len(depths)]
    rows = [
        _bar_row(_segments(leaves, depth, layout.length), colors, height, layout.length)
        for depth, height in zip(depths, heights, strict=True)
    ]
    ends = "".join(f"<span>{_muted(text)}</span>" for text in ("0", f"{layout.length:_}"))
    axis = f'<div style="display:flex;justify-content:space-between;font-size:85%">{ends}</div>'
    return f'<div style="max-width:820px;margin:6px 0">{"".join(rows)}{axis}</div>'


def _segments(leaves: Sequence[tuple[Run, str]], depth: int, length: int) -> list[_Segment]:
    """Return the runs of neighbours under one path of that depth, small ones together."""

    def part(leaf: tuple[Run, str]) -> str:
        return ".".join(leaf[1].split(".")[:depth])

    segments = []
    for path, run in itertools.groupby(leaves, part):
        places = [place for place, _ in run]
        segments.append(_Segment(path, places[0][0], places[-1][1], path))
    return list(_small_together(segments, length * _LEAST))


def _small_together(segments: Iterable[_Segment], least: float) -> Iterator[_Segment]:
    pending: list[_Segment] = []
    for segment in segments:
        if segment.size >= least:
            yield from _as_one(pending)
            pending = []
            yield segment
            continue
        pending.append(segment)
        if sum(small.size for small in pending) >= least:
            yield from _as_one(pending)
            pending = []
    yield from _as_one(pending)


def _as_one(segments: list[_Segment]) -> list[_Segment]:
    if len(segments) < 2:
        return segments
    first, last = segments[0], segments[-1]
    return [_Segment(f"{first.label} \u2013 {last.label}", first.start, last.stop, first.path)]


def _bar_row(segments: list[_Segment], colors: Colors, height: int, length: int) -> str:
    siblings: dict[str, list[str]] = {}
    shown = ""
    for segment in segments:
        around = siblings.setdefault(segment.path.rpartition(".")[0], [])
        around += [segment.path] * (segment.path not in around)
        # Neighbours in one layer have its color, every other one paler.
        pale = height < _TALL and around.index(segment.path) % 2 == 1
        shown += _bar_part(segment, colors[segment.path], height, length, pale)
    gap = 1 if len(segments) <= 60 else 0
    style = f"display:flex;gap:{gap}px;margin-bottom:1px;height:{height}px;line-height:{height}px"
    style += f";font-size:{min(height - 3, 11)}px;text-align:center;white-space:nowrap"
    return f'<div style="{style}">{shown}</div>'


def _bar_part(segment: _Segment, color: Color, height: int, length: int, pale: bool) -> str:
    share = 100 * segment.size / length
    title = f"{segment.label}: {segment.size:_} ({share:.1f} %), {segment.start}:{segment.stop}"
    name = segment.label.rsplit(".", 1)[-1]
    # A letter is about 0.9 % of the width.
    text = html.escape(name) if height >= _LOWEST_WITH_TEXT and share > 0.9 * len(name) + 1 else ""
    shade = f"{color[0]}88;color:inherit" if pale else f"{color[0]};color:{color[1]}"
    style = f"flex:{segment.size};overflow:hidden;background:{shade}"
    return f'<div style="{style}" title="{html.escape(title)}">{text}</div>'


def _legend(layout: Layout, colors: Colors) -> str:
    sizes: Counter[str] = Counter()
    for (start, stop), path in leaves_in_order(layout):
        sizes[path.split(".")[colors.depth]] += stop - start
    keys = []
    for label, (names, color) in list(colors.groups.items())[:_MOST_KEYS]:
        text = f"{html.escape(label)} {_muted(f'{sum(sizes[name] for name in names):_}')}"
        keys.append(f'<span style="white-space:nowrap">{_swatch(color[0])}{text}</span>')
    if len(colors.groups) > _MOST_KEYS:
        keys.append(_muted(f"and {len(colors.groups) - _MOST_KEYS} more"))
    return f'<div style="display:flex;flex-wrap:wrap;gap:2px 18px">{"".join(keys)}</div>'


# Tables


def _summary_rows(around: Row, colors: Colors, depth: int) -> Iterator[tuple[str, list[str]]]:
    """Give the rows inside of one, each under its own name and farther to the right."""
    for row in around.children:
        name = row.path.removeprefix(around.path).removeprefix(".")
        yield _summary_row(row, name, colors, depth, "opacity:.75" if row.children else "")
        yield from _summary_rows(row, colors, depth + 1)


def _summary_row(row: Row, name: str, colors: Colors, depth: int, style: str) -> tuple[str, list[str]]:
    layer, shape, parameters, place, share, operations = texts_of(row)
    layer = layer if len(layer) <= 60 else layer[:59] + "\u2026"
    color = colors[row.path][0] if row.parameters else "transparent"
    bar = f'<div style="width:{0.7 * row.share:.1f}px;min-width:1px;height:9px;background:{color}"></div>'
    return style, [
        f'<span style="margin-left:{14 * depth}px" title="{html.escape(row.path)}">'
        f"{_swatch(color)}{html.escape(name)}</span>",
        html.escape(layer),
        html.escape(shape),
        parameters,
        place,
        share,
        f'<div style="width:70px">{bar}</div>',
        operations,
    ]


def _tree_row(row: LeafRow, largest: float, color: str) -> tuple[str, list[str]]:
    shape = str(row.shape) if row.dtype else ""
    strip = "" if row.min is None else _strip(row, largest, color)
    numbers = map(number_text, numbers_of(row))
    note = f'<b style="color:#cc3311">{html.escape(notes_of(row))}</b>' if row.nan or row.inf else ""
    note = note or html.escape(row.note)
    return "", [_swatch(color) + html.escape(row.path), shape, row.dtype, *numbers, strip, note]


def _strip(row: LeafRow, largest: float, color: str) -> str:
    """Draw the range as a line, mean and standard deviation as a box, zero as a mark."""
    least, most, mean, std = (number or 0.0 for number in numbers_of(row))
    at = [f"{80 + 75 * number / largest:.1f}" for number in (least, most, mean)]
    low, high = max(mean - std, least), min(mean + std, most)
    start, width = 80 + 75 * low / largest, max(75 * (high - low) / largest, 1)
    return (
        '<svg width="160" height="14" style="vertical-align:middle">'
        '<line x1="80" x2="80" y1="0" y2="14" stroke="currentColor" opacity=".35"/>'
        f'<line x1="{at[0]}" x2="{at[1]}" y1="7" y2="7" stroke="{color}" stroke-width="2"/>'
        f'<rect x="{start:.1f}" y="2" width="{width:.1f}" height="10" rx="2" fill="{color}" opacity=".6"/>'
        f'<circle cx="{at[2]}" cy="7" r="2.5" fill="{color}" stroke="currentColor"/>'
        "</svg>"
    )


def _shortened(rows: list[tuple[str, list[str]]]) -> list[tuple[str, list[str]]]:
    """Return the first rows and the last ones of many."""
    if len(rows) <= _MOST_ROWS:
        return rows
    half = _MOST_ROWS // 2
    dots = [_muted(f"... {len(rows) - 2 * half} more"), *[""] * (len(rows[0][1]) - 1)]
    return [*rows[:half], ("", dots), *rows[-half:]]


def _table(heads: Sequence[str], rows: list[tuple[str, list[str]]], numbers: Sequence[int]) -> str:
    def line(cells: Sequence[str], tag: str, style: str) -> str:
        inside = "".join(
            f'<{tag} style="text-align:{"right" if i in numbers else "left"};padding:1px 10px 1px 0;'
            f'border:0;white-space:nowrap">{cell}</{tag}>'
            for i, cell in enumerate(cells)
        )
        return f'<tr style="background:none;{style}">{inside}</tr>'

    head = line(heads, "th", "border-bottom:1px solid #8888")
    body = "".join(line(cells, "td", style) for style, cells in rows)
    return (
        '<table style="border-collapse:collapse;margin:4px 0;font-size:inherit;color:inherit">'
        f"<thead>{head}</thead><tbody>{body}</tbody></table>"
    )


# Pieces


_FONT = "font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;font-size:12px;line-height:1.5"


def _box(*parts: str) -> str:
    return f'<div style="{_FONT};overflow-x:auto">{"".join(parts)}</div>'


def _head(name: str, text: str) -> str:
    return f"<b>{html.escape(name)}</b> {_muted(text)} "


def _muted(text: str) -> str:
    return f'<span style="opacity:.65">{html.escape(text)}</span>'


def _swatch(color: str) -> str:
    style = "display:inline-block;width:9px;height:9px;border-radius:2px;margin-right:6px"
    return f'<span style="{style};background:{color}"></span>'


def _pre(inside: str) -> str:
    style = "margin:6px 0;padding:0;background:none;border:0;color:inherit;font:inherit;white-space:pre"
    return f'<pre style="{style}">{inside}</pre>'


def _colored(line: str, color: Color) -> str:
    """Write a line of a model with a mark in the color that its layer has in the bar."""
    text, mark, comment = line.partition("  # ")
    if line.startswith("# "):
        text, comment = "", line
    shown = html.escape(text) + (_muted(mark + comment) if comment else "")
    edge = "transparent" if color == _GRAY else color[0]
    return f'<span style="display:block;border-left:4px solid {edge};padding-left:8px">{shown}</span>'


def _unfold(vector: ComponentVector) -> str:
    if isinstance(vector.data, jax.ShapeDtypeStruct | Tracer):
        return ""
    label = '<summary style="opacity:.65;cursor:pointer">names and values</summary>'
    return f"<details>{label}{_pre(html.escape(str(vector)))}</details>"
