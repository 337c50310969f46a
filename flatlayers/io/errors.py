"""The errors of files and layouts."""

from collections.abc import Sequence


_SHOWN = 20


class FileFormatError(ValueError):
    """A file that `fl.save` did not write, or that is damaged. The message says by what it was found out.

    >>> import pathlib, tempfile
    >>> import flatlayers as fl
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder, "text")
    ...     _ = path.write_text("not a model")
    ...     try:
    ...         fl.load(path)
    ...     except fl.FileFormatError as error:
    ...         print(str(error).split(",")[0])
    expected a file of safetensors
    """


class LayoutMismatchError(ValueError):
    """Names, shapes or dtypes that are not those of the model. `lines` has one line for each difference.

    >>> import flatlayers as fl
    >>> old = fl.ComponentVector.of({"w": [1.0, 2.0]})
    >>> new = fl.ComponentVector.of({"w": [0.0, 0.0, 0.0]})
    >>> try:
    ...     fl.transfer(old, new)
    ... except fl.LayoutMismatchError as error:
    ...     print(error.lines)
    ['w: (2,) became (3,)']
    """

    lines: list[str]

    def __init__(self, message: str, lines: Sequence[str]):
        super().__init__(message, list(lines))
        self.lines = list(lines)

    def __str__(self) -> str:
        shown = self.lines[:_SHOWN]
        if len(self.lines) > _SHOWN:
            shown = [*shown, f"... and {len(self.lines) - _SHOWN} more"]
        return "\n  ".join([self.args[0], *shown])
