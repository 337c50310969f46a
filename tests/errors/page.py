"""The messages of the page of errors and their cures, by section, and those that fit an error."""

import re
from pathlib import Path


_PAGE = (Path(__file__).parent.parent.parent / "docs" / "errors.md").read_text()

SECTIONS = {
    section.partition("\n")[0]: re.findall(r"^``` text\n(.*?)\n```$", section, re.DOTALL | re.MULTILINE)
    for section in re.split(r"^## ", _PAGE, flags=re.MULTILINE)[1:]
}


def messages_for(error):
    """The messages of the page that say what an error says, alone or together with one of its notes."""
    found = texts(error)
    every = [message for messages in SECTIONS.values() for message in messages]
    return [message for message in every if any(re.fullmatch(pattern(message), text) for text in found)]


def texts(error):
    """What an error says: its class and message, and these with each of its notes, as Python prints them.

    Of a check in a compiled program JAX gives a long report, which counts as the message of the check.
    """
    report = re.search(r"(EquinoxRuntimeError: .*?)\s*\n-{19,20}\n", str(error), re.DOTALL)
    first = report[1] if report else f"{type(error).__name__}: {error}"
    return [
        " ".join(text.split())
        for text in (first, *(f"{first}\n{note}" for note in getattr(error, "__notes__", [])))
    ]


def pattern(message):
    """`...` stands for anything, and so does the end of a line for any space."""
    return r"\s+".join(re.escape(word).replace(r"\.\.\.", ".*?") for word in message.split())
