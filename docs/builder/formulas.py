"""Formulas as MathML, which browsers show by themselves: no script, nothing loaded."""

import re

from latex2mathml.converter import convert

from .markdown import CODE_SPAN, map_text


FORMULA = re.compile(
    r"\$\$(?P<block>.+?)\$\$|(?<![\\$\w])\$(?P<inline>[^\s$](?:[^$]*[^\s$])?)\$(?![\w$])", re.DOTALL
)
# Signs that Markdown would read between the tags.
SIGNS = str.maketrans({sign: f"&#{ord(sign)};" for sign in "*_\\`[]!~^$"})


def with_mathml(page: str) -> str:
    """Put MathML in the place of `$...$` and `$$...$$`, but in code."""

    def outside_of_code(text: str) -> str:
        parts = CODE_SPAN.split(text)  # text, ticks, code, text, ...
        formulas = [FORMULA.sub(_mathml, part) for part in parts[::3]]
        codes = [f"{ticks}{code}{ticks}" for ticks, code in zip(parts[1::3], parts[2::3], strict=True)]
        return "".join(a + b for a, b in zip(formulas, [*codes, ""], strict=True))

    return map_text(page, outside_of_code)


def _mathml(found: re.Match[str]) -> str:
    if found["block"] is not None:
        return f'<div class="formula">{_escaped(convert(found["block"].strip(), display="block"))}</div>'
    return f'<span class="formula">{_escaped(convert(found["inline"]))}</span>'


def _escaped(mathml: str) -> str:
    return re.sub(r">([^<]+)<", lambda text: f">{text[1].translate(SIGNS)}<", mathml)
