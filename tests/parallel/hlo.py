"""Reading what XLA made of a program: its collectives, their bytes, and which of them are in a loop."""

import math
import re

import jax

from tests.helpers import compiled_by_default


KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
BYTES = {"pred": 1, "s8": 1, "u8": 1, "f16": 2, "bf16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8}
BYTES |= {"f64": 8, "c64": 8, "c128": 16}
_CALL = re.compile(rf"\s*(?:ROOT )?\S+ = (.*?) ({'|'.join(KINDS)})(?:-start)?\(")
_COMPUTATION = re.compile(r"^(?:ENTRY )?(%?[\w.\-]+) .*\{$")
_USED = re.compile(r"(?:body|condition|to_apply|calls|branch_computations)=(?:\{([^}]*)\}|(%?[\w.\-]+))")


def optimized(function, *args):
    """The program that XLA runs, as text."""
    return compiled_by_default(jax.jit(function).lower(*args)).as_text()


def collectives(text):
    """For each kind the bytes of the results of each: `{"all-gather": [102176]}`."""
    found = {}
    for match in filter(None, map(_CALL.match, text.splitlines())):
        sizes = (
            BYTES[kind] * math.prod(int(n) for n in dims.split(",") if n)
            for kind, dims in re.findall(r"(\w+)\[([\d,]*)\]", match[1])
        )
        found.setdefault(match[2], []).append(sum(sizes))
    return found


def collectives_in_loops(text):
    """The collectives inside of `while` loops, and inside of anything called there."""
    lines_of, name = {}, None
    for line in text.splitlines():
        if start := _COMPUTATION.match(line):
            name = start[1].lstrip("%")
            lines_of[name] = []
        elif name is not None:
            lines_of[name].append(line)
    loops = [line for lines in lines_of.values() for line in lines if re.search(r"\bwhile\(", line)]
    todo, inside = _called(loops), set()
    while todo:
        name = todo.pop()
        if name not in inside:
            inside.add(name)
            todo |= _called(lines_of[name])
    return collectives("\n".join(line for name in inside for line in lines_of[name]))


def _called(lines):
    """The names of the computations that these lines use."""
    found = (names or name for line in lines for names, name in _USED.findall(line))
    return {name.strip().lstrip("%") for names in found for name in names.split(",")}
