"""Formulas as MathML, which browsers show by themselves: no script, nothing loaded."""

import html
import re
from typing import Any

from latex2mathml.converter import convert


# What pymdownx.arithmatex with `generic: true` leaves of `$...$` and `$$...$$`.
FORMULA = re.compile(r'class="arithmatex">\\([(\[])(.*?)\\[)\]]<', re.DOTALL)


def on_page_content(content: str, **_: Any) -> str:
    return FORMULA.sub(_mathml, content)


def _mathml(found: re.Match[str]) -> str:
    tex = html.unescape(found[2]).strip()
    return f'class="arithmatex">{convert(tex, display="inline" if found[1] == "(" else "block")}<'
