"""The door at which a display registers how a kind of object is shown."""

import functools


@functools.singledispatch
def as_text(value: object) -> str:
    """Return what `print` shows. `as_text.register(kind, function)` chooses it for a kind of object."""
    return repr(value)


@functools.singledispatch
def as_html(value: object) -> str | None:
    """Return what a notebook shows, `None` where that is the text. `register` works as for `as_text`."""
    return None
