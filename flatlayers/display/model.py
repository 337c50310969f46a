"""Models as text."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import wadler_lindig as wl

from ..core.composite import Wrapper
from ..core.declaration import Param, as_declared, contains_layer
from ..core.layer import Layer, constructor_name
from ..core.setup import frozen_length, parameter_length, state_length
from ..core.values import FrozenDict, Hashable, value_text
from ..vectors.layout import Layout
from ..vectors.names import join_path
from ..vectors.vector import ComponentVector
from ..wrappers.compact import State
from ..wrappers.layer_map import Model
from .places import alike, span_text
from .table import WIDTH, bytes_text, counted


# A model and each part of it that may stand on a line of its own.
Shown: TypeAlias = Model | Param

_INDENT = 4
_LONGEST_TUPLE = 8
_UNBROKEN = 1_000_000


def pformat(model: Model, ps: ComponentVector | None = None) -> str:
    """Write a model as the tree of its layers, with names and numbers of parameters.

    `print(layer)` prints it. Three or more equal neighbours are one line, as in
    `layer_1..layer_3=Dense(32, 32),  # 3 x 1_056 parameters`. A layer inside is shown with its own number of
    parameters, and where these are tied to others', with the names of those, which a layer around both counts
    once; the last line has the length of the vector.

    **Arguments:**

    - `model`: a layer, or a mapping of layers and `Param`s as `fl.setup` takes it.
    - `ps`: its parameters, to tell the number of bytes; it is that of float32 without them.

    **Returns:** the text, at most 100 columns wide.

    >>> import jax.numpy as jnp
    >>> import flatlayers as fl
    >>> print(fl.pformat(fl.Chain(fl.Dense(2, 16, jnp.tanh), fl.Dense(16, 1), fl.Dropout(0.5))))
    Chain(
        layer_0=Dense(2, 16, activation=tanh),  # 48 parameters
        layer_1=Dense(16, 1),                   # 17 parameters
        layer_2=Dropout(0.5),
    )                                           # 65 parameters, 260 bytes, 2 states
    """
    return "\n".join(line.text for line in written(model, ps))


def totals(model: Model, ps: ComponentVector | None = None) -> str:
    """Tell the numbers of parameters, of bytes and of states."""
    length, frozen, states = parameter_length(model), frozen_length(model), state_length(model)
    size = 4 * length if ps is None else ps.size * ps.dtype.itemsize
    rest = [bytes_text(size)] * bool(length) + [counted(states - frozen, "state")] * (states > frozen)
    return ", ".join([_numbers(length, frozen) or "no parameters", *rest])


def value_doc(value: object) -> wl.AbstractDoc:
    """Return the constructor form of a layer or another value, to be broken between arguments."""
    return wl.pdoc(value, indent=_INDENT, custom=_custom)


def one_line(value: object) -> str:
    """Return the constructor form on one line."""
    return wl.pformat(value_doc(value), width=_UNBROKEN)


# Lines


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of the display, and the path of the layer which it begins, ends or is."""

    text: str
    path: str


@dataclasses.dataclass(frozen=True)
class _Piece:
    """A piece of the display that begins a line: a layer, or the start, an argument or the end of one."""

    depth: int
    path: str
    doc: wl.AbstractDoc
    comment: str = ""


def written(model: Model, ps: ComponentVector | None = None) -> list[Line]:
    """Return the lines of the display, with their comments aligned."""
    *first, last = _Pieces(bool(frozen_length(model)), getattr(as_declared(model).layout, "ties", {})).of(
        model
    )
    last = dataclasses.replace(last, comment=totals(model, ps))
    widest = max((len(piece.comment) for piece in first), default=0)
    room = WIDTH - len("  # ") - widest
    blocks = [(piece, _broken(piece, room if piece.comment else WIDTH)) for piece in (*first, last)]
    column = max((len(lines[-1]) for piece, lines in blocks if piece.comment), default=0)
    done: list[Line] = []
    for piece, lines in blocks:
        *above, text = lines
        comment = [f"# {piece.comment}"] if piece.comment else []
        if piece is last and column + 2 + len(comment[0]) > WIDTH:
            above, text, comment = [*above, text], comment[0], []
        done += [Line(line, piece.path) for line in above]
        done.append(Line("  ".join([text.ljust(column), *comment]) if comment else text, piece.path))
    return done


def _broken(piece: _Piece, width: int) -> list[str]:
    margin = " " * (_INDENT * piece.depth)
    return [margin + line for line in wl.pformat(piece.doc, width=width - len(margin)).split("\n")]


class _Pieces:
    """The pieces of the display of a model, from the first line to the last."""

    def __init__(self, has_frozen: bool, ties: Mapping[str, str]):
        self.has_frozen = has_frozen
        self.ties = ties

    def of(
        self,
        part: Shown,
        *,
        names: tuple[str, ...] = (),
        path: str = "",
        depth: int = 0,
        left_out: frozenset[str] = frozenset(),
        counts: bool = True,
    ) -> Iterator[_Piece]:
        """Give the pieces of a part of the model.

        **Arguments:**

        - `part`: a layer, a `Param` or a mapping of them.
        - `names`: its name, or those of equal neighbours.
        - `path`: its path, the first one's of equal neighbours.
        - `depth`: how many layers it is in.
        - `left_out`: the paths of parameters that a layer around it has frozen.
        - `counts`: whether its parameters are parameters of the model.
        """
        label, end = f"{span_text(names)}=" if any(names) else "", "," if depth else ""
        comment = self.comment(part, path, left_out, max(len(names), 1)) if counts else ""
        children = _parts_of(part)
        if not children:
            doc = wl.TextDoc(label) + value_doc(part) + wl.TextDoc(end)
            yield _Piece(depth, path, doc, comment)
            return
        title = constructor_name(part) if isinstance(part, Layer) else ""
        yield _Piece(depth, path, wl.TextDoc(f"{label}{title}("))
        if isinstance(part, Wrapper):
            left_out, counts = left_out | _frozen_by(part, path), counts and sees_through(part)
        # Equal layers are alike if the same of their parameters are frozen, and shared with the same others.
        keys = {
            name: (child, _below(path, name, left_out), self.shared(child, join_path(path, name)))
            for name, child in children.items()
        }
        for same in alike(keys):
            yield from self.of(
                children[same[0]],
                names=same,
                path=join_path(path, same[0]),
                depth=depth + 1,
                left_out=left_out,
                counts=counts,
            )
        if options := list(_options(part)):
            yield _Piece(depth + 1, path, wl.join(wl.comma, options).group() + wl.TextDoc(","))
        yield _Piece(depth, path, wl.TextDoc(f"){end}"), comment)

    def comment(self, part: Shown, path: str, left_out: frozenset[str], copies: int) -> str:
        """Tell the numbers of parameters of a part, or of equal neighbours, without those left out."""
        length, frozen = parameter_length(part), 0
        if self.has_frozen:
            layout = as_declared(part).layout
            leaves = layout.view_shapes if isinstance(layout, Layout) else {"": layout}
            absent = sum(
                math.prod(shape)
                for leaf, shape in leaves.items()
                if join_path(path, leaf) in left_out and leaf not in getattr(layout, "ties", ())
            )
            length, frozen = length - absent, frozen_length(part) + absent
        twice, shared = self.shared(part, path)
        return _numbers(length - twice, frozen, copies) + shared

    def shared(self, part: Shown, path: str) -> tuple[int, str]:
        """Tell how many parameters of a part are there twice, and which others have the place of some."""
        layout = as_declared(part).layout if self.ties else ()
        leaves = layout.view_shapes if isinstance(layout, Layout) else {"": layout}
        own = layout.ties if isinstance(layout, Layout) else {}
        sizes = {join_path(path, leaf): math.prod(shape) for leaf, shape in leaves.items() if leaf not in own}
        tied = {leaf: self.ties[leaf] for leaf in sizes if leaf in self.ties}
        inside = [leaf for leaf, place in tied.items() if place in sizes]
        outside = [leaf for leaf in tied if leaf not in inside]
        if not outside:
            return sum(sizes[leaf] for leaf in inside), ""
        # The part that they belong to, if all of them are in one.
        parts = {tied[leaf].removesuffix(leaf.removeprefix(path)) for leaf in outside}
        number = sum(sizes[leaf] for leaf in outside)
        some = "" if number == sum(sizes.values()) else f"{number:_} of them "
        with_ = parts.pop() if len(parts) == 1 else tied[outside[0]]
        return sum(sizes[leaf] for leaf in inside), f", {some}shared with {with_}" + ", ..." * bool(parts)


def _numbers(length: int, frozen: int, copies: int = 1) -> str:
    times = f"{copies} x " if copies > 1 else ""
    trained = [times + counted(length, "parameter")] if length else []
    return ", ".join(trained + ([f"plus {times}{frozen:_} non-trainable"] if frozen else []))


def _parts_of(part: Shown) -> Mapping[str, Any]:
    if isinstance(part, Mapping):
        return part
    return part.children() if isinstance(part, Layer) else {}


def sees_through(wrapper: Wrapper) -> bool:
    """Tell whether the parameters of a wrapper are parameters of its child, under the same names."""
    return wrapper.layout.view_shapes.keys() <= wrapper.child.layout.view_shapes.keys()


def _frozen_by(wrapper: Wrapper, path: str) -> set[str]:
    """Return the paths of the child's parameters that a wrapper has frozen."""
    if not sees_through(wrapper):
        return set()
    names = wrapper.child.layout.view_shapes.keys() - wrapper.layout.view_shapes.keys()
    return {join_path(path, name) for name in names}


def _below(path: str, name: str, paths: frozenset[str]) -> frozenset[str]:
    prefix = join_path(path, name) + "."
    return frozenset(path.removeprefix(prefix) for path in paths if path.startswith(prefix))


# Values


def _options(part: Shown) -> Iterator[wl.AbstractDoc]:
    """Give the hyper-parameters of a layer with children."""
    if isinstance(part, Layer):
        for name, value, _ in part.constructor_arguments():
            if value is not None and not contains_layer(value):
                yield wl.TextDoc(f"{name}=") + value_doc(value)


def _custom(value: object) -> wl.AbstractDoc | None:
    """Write what wadler-lindig would write in another way. `None` leaves a value to it."""
    if isinstance(value, Layer):
        inside = [
            wl.TextDoc(f"{name}=" if named else "") + value_doc(argument)
            for name, argument, named in value.constructor_arguments()
        ]
        return wl.bracketed(
            wl.TextDoc(f"{constructor_name(value)}("), inside, wl.comma, wl.TextDoc(")"), _INDENT
        )
    if isinstance(value, Hashable):
        return value_doc(value.value)
    if isinstance(value, FrozenDict):
        return value_doc(dict(value))
    if type(value) is tuple and len(value) > _LONGEST_TUPLE:
        return value_doc((*value[:3], ..., value[-1]))
    if isinstance(value, tuple | dict) or value is ... or hasattr(type(value), "__pdoc__"):
        return None
    is_options = dataclasses.is_dataclass(value) and not isinstance(value, Param | State | Callable)
    return None if is_options else wl.TextDoc(value_text(value))
