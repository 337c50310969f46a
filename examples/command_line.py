"""Command-line options that the examples share: `--steps`, `--seed` and `--out`, or more."""

import argparse
from collections.abc import Sequence
from pathlib import Path


def parse(
    description: str,
    *,
    out: str,
    seed: str,
    steps: int = 1000,
    steps_of: str = "steps of Adam",
    chunk: int = 1,
    file: str | None = None,
    argv: Sequence[str] | None = None,
) -> argparse.Namespace:
    """The options `steps`, `seed` and `out` of a script.

    **Arguments:**

    - `description`: what the script does, for `--help`.
    - `out`: the default name of the picture.
    - `seed`: what is drawn with the seed, for `--help`.
    - `steps`: the default number of steps; `steps_of`: what they are, for `--help`.
    - `chunk`: the number of steps is rounded up to a multiple of it.
    - `file`: the default name of the file in which the run is saved; with it there are the options `file` and
        `resume`.
    - `argv`: the command line, `None` for that of the process.

    **Raises:** `SystemExit` with code 2 for steps below 1 and for a picture in a directory that is not there.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    rounded = f", rounded up to {chunk}s" if chunk > 1 else ""
    parser.add_argument("--steps", type=int, default=steps, help=steps_of + rounded)
    parser.add_argument("--seed", type=int, default=0, help=seed)
    parser.add_argument("--out", type=Path, default=Path(out), help="where the PNG goes")
    if file is not None:
        parser.add_argument("--file", type=Path, default=Path(file), help="where the run is saved")
        parser.add_argument("--resume", action="store_true", help="go on with the run in the file")
    options = parser.parse_args(argv)
    if options.steps < 1:
        parser.error(f"--steps: expected a positive number, found {options.steps}")
    if not options.out.absolute().parent.is_dir():
        parser.error(f"--out: there is no directory {options.out.parent}")
    options.steps = -(-options.steps // chunk) * chunk
    return options
