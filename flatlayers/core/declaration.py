"""The parts of a declaration, `Param`, `Stacked`, `Tied` and mappings, and the questions that all answer."""

import abc
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..transforms import Interval, Transform
from ..types import Array, DType, Key, PyTree, Shape
from ..vectors.layout import Layout
from ..vectors.names import describe, join_path
from ..vectors.record import Record
from .drawing import Drawing, Keys, fold_in_name
from .values import value_text


class Declared(abc.ABC):
    """A part of a declaration: a `Param`, a `Layer`, a `Stacked`, a `Tied`, or a mapping as a `Group`.

    `as_declared` makes one of what a user writes.
    """

    @property
    @abc.abstractmethod
    def layout(self) -> Layout | Shape:
        """The layout of the parameters; the shape, where it is one parameter without a name."""

    @abc.abstractmethod
    def drawings(self, path: str = "", folds: tuple[str | int, ...] = ()) -> Iterator[Drawing]:
        """Return how the leaves are drawn, by the dotted path that each has below `path`.

        Each name on the way folds the key once more, after those in `folds`.
        """

    def initial_leaves(self, key: Key, dtype: DType, path: str = "") -> dict[str, Array]:
        """Draw the initial values of all leaves, by path: as layers see them."""
        keys = Keys(key)
        return {drawing.path: drawing.whole(keys, dtype) for drawing in self.drawings(path)}

    @abc.abstractmethod
    def declared_transforms(self, path: str = "") -> dict[str, Transform]:
        """Return the transforms of the parameters that have one, by their paths below `path`."""

    @abc.abstractmethod
    def declared_states(self, key: Key) -> dict[str, Any] | None:
        """Return the states, made with the key that the parameters' keys are folded from.

        A parameter has none, `None`: its name does not occur among the states.
        """

    @abc.abstractmethod
    def declared_parts(self) -> Mapping[str, Any]:
        """Return what is directly inside, by path. The path of what has no name of its own is empty."""

    @abc.abstractmethod
    def as_child(self) -> Any:
        """Return what it is among the children of a layer: a layer or a mapping of them, or `None`."""

    @abc.abstractmethod
    def declared_where(self, keep: Callable[[str], bool], path: str = "") -> "Declared | None":
        """Return the part whose leaves are kept, by their paths below `path`; `None` if none is."""

    def key_name_under(self, name: str) -> str:
        """Return the name that a key is folded with for what is declared under a name."""
        return name


def as_declared(declared: object) -> Declared:
    """Return what answers for a part of a declaration: it itself, or a mapping as a `Group`.

    **Raises:** `TypeError` for anything else.
    """
    if isinstance(declared, Declared):
        return declared
    if isinstance(declared, Mapping):
        return Group(declared)
    raise TypeError(f"expected a Param, a Layer or a mapping of them, found {describe(declared)}")


@dataclasses.dataclass(frozen=True)
class Param(Declared):
    """The declaration of one parameter.

    **Arguments:**

    - `shape`: its shape, a tuple of integers.
    - `init`: a function `init(key, shape, dtype)` that makes its initial value, such as those
        of `flatlayers.initializers`.
    - `fan_in`, `fan_out`: the numbers of inputs and outputs that `init` scales by, where the
        shape does not tell. They are used by an `init` that has a method
        `with_fans(fan_in, fan_out)`.
    - `output_axis`: the axis of the outputs, where the shape does not tell: 0 for a vector and for
        `(out, in)`, -1 for `(*kernel, in, out)`.
    - `key_name`: the name that its key is folded with, if not its own: two parameters of a layer
        with one `key_name` are drawn with the same key.
    - `bounds`: `(low, high)`, either of which may be `None`: the vector holds a free number, and layers see
        its value inside of the bounds (`fl.transforms.Interval`). `init` gives a value, not a free number.
    - `transform`: a transform of another kind (`fl.transforms`), in the place of `bounds`.

    **Raises:** `TypeError` and `ValueError` for what cannot be an initializer, bounds or a transform;
    `fl.setup` raises `ValueError` for an initial value that is on or outside of the bounds, where numbers are
    known: not under `jax.jit`.

    >>> import flatlayers as fl
    >>> fl.Param((3, 2), fl.initializers.glorot_uniform).shape
    (3, 2)
    >>> fl.Param((), fl.initializers.constant(0.5), bounds=(0, None))
    Param((), constant(value=0.5), bounds=(0, None))
    """

    shape: Shape
    init: Callable[..., Any]
    fan_in: int | None = None
    fan_out: int | None = None
    output_axis: int | None = None
    key_name: str | None = None
    bounds: tuple[float | None, float | None] | None = None
    transform: Transform | None = None

    def __post_init__(self) -> None:
        shape = self.shape if isinstance(self.shape, tuple | list) else (self.shape,)
        object.__setattr__(self, "shape", tuple(shape))
        if not callable(self.init):
            raise TypeError(f"expected an initializer `init(key, shape, dtype)`, found {self.init!r}")
        if self.bounds is not None:
            if not isinstance(self.bounds, tuple | list) or len(self.bounds) != 2:
                raise TypeError(f"Param.bounds: expected a pair (low, high), found {self.bounds!r}")
            object.__setattr__(self, "bounds", tuple(self.bounds))
            if self.bounds == (None, None):
                raise ValueError("Param.bounds: expected a lower or an upper bound, found (None, None)")
            if self.transform is not None:
                raise ValueError("Param: expected bounds or a transform, found both")
        if not isinstance(self.transform, Transform | None):
            raise TypeError(f"Param.transform: expected a transform, found {self.transform!r}")
        _ = self.declared_transforms()

    @property
    def layout(self) -> Shape:
        """Its shape."""
        return self.shape

    def initial(self, key: Key, dtype: DType) -> Array:
        """Draw the initial value, as layers see it.

        **Raises:** `ValueError` if `init` returns another shape.
        """
        value = self._init_with_fans()(key, self.shape, dtype)
        if np.shape(value) != self.shape:
            raise ValueError(
                f"expected an initial value of shape {self.shape}, found shape {np.shape(value)}"
            )
        return value

    def drawings(self, path: str = "", folds: tuple[str | int, ...] = ()) -> Iterator[Drawing]:
        init = self._init_with_fans()
        part = functools.partial(init.part, self.shape) if getattr(init, "by_number", False) else None
        yield Drawing(path, self.shape, folds, self.initial, part)

    def _init_with_fans(self) -> Any:
        if (self.fan_in, self.fan_out) != (None, None) and hasattr(self.init, "with_fans"):
            return self.init.with_fans(self.fan_in, self.fan_out)  # pyright: ignore[reportFunctionMemberAccess]
        return self.init

    def declared_transforms(self, path: str = "") -> dict[str, Transform]:
        if self.bounds is not None:
            return {path: Interval(*self.bounds)}
        return {} if self.transform is None else {path: self.transform}

    def declared_states(self, key: Key) -> None:
        return None

    def declared_parts(self) -> Mapping[str, Any]:
        return {}

    def as_child(self) -> None:
        return None

    def declared_where(self, keep: Callable[[str], bool], path: str = "") -> "Param | None":
        return self if keep(path) else None

    def key_name_under(self, name: str) -> str:
        return self.key_name or name

    def __repr__(self) -> str:
        names = ("fan_in", "fan_out", "output_axis", "key_name", "bounds", "transform")
        options = {name: getattr(self, name) for name in names}
        given = "".join(f", {name}={value!r}" for name, value in options.items() if value is not None)
        return f"Param({self.shape}, {value_text(self.init)}{given})"


class Group(Declared, Mapping[str, Any]):
    """A mapping of names to what is declared. The names are those of the vector, in its order."""

    def __init__(self, declared: Mapping[str, Any]):
        self.declared = declared

    @property
    def layout(self) -> Layout:
        layouts = {}
        for name, part in self.declared.items():
            try:
                layouts[name] = as_declared(part).layout
            except (TypeError, ValueError) as error:
                raise type(error)(f"below {name!r}: {error}") from None
        return Layout(layouts)

    def drawings(self, path: str = "", folds: tuple[str | int, ...] = ()) -> Iterator[Drawing]:
        for name, part in self.declared.items():
            inner = as_declared(part)
            yield from inner.drawings(join_path(path, name), (*folds, inner.key_name_under(name)))

    def declared_transforms(self, path: str = "") -> dict[str, Transform]:
        found: dict[str, Transform] = {}
        for name, part in self.declared.items():
            found |= as_declared(part).declared_transforms(join_path(path, name))
        return found

    def declared_states(self, key: Key) -> dict[str, Any]:
        inner = {
            name: as_declared(part).declared_states(fold_in_name(key, name))
            for name, part in self.declared.items()
        }
        return {name: states for name, states in inner.items() if states is not None}

    def declared_parts(self) -> Mapping[str, Any]:
        return self.declared

    def as_child(self) -> dict[str, Any] | None:
        known = {n: part for n, part in self.declared.items() if isinstance(part, Declared | Mapping)}
        inner = {name: as_declared(part).as_child() for name, part in known.items()}
        return {name: child for name, child in inner.items() if child is not None} or None

    def declared_where(self, keep: Callable[[str], bool], path: str = "") -> "Group | None":
        inner = {
            name: as_declared(part).declared_where(keep, join_path(path, name))
            for name, part in self.declared.items()
        }
        kept = {name: part for name, part in inner.items() if part is not None}
        return Group(kept) if kept else None

    def __getitem__(self, name: str) -> Any:
        return self.declared[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.declared)

    def __len__(self) -> int:
        return len(self.declared)


class Tied(Group):
    """A mapping in which some names have one place, as `Layout.tie` does it for a layout.

    `parameters` may return one, or give one as a value. It reads as the mapping it is made of.

    **Arguments:**

    - `declared`: a mapping of names to `Param`s, layers, `Stacked` and mappings.
    - `ties`: which name goes to the place of which other, as dotted paths.
    """

    def __init__(self, declared: Mapping[str, Any], ties: Mapping[str, str]):
        super().__init__(declared)
        self.ties = ties

    @property
    def layout(self) -> Layout:
        return as_declared(self.declared).layout.tie(self.ties)  # pyright: ignore[reportAttributeAccessIssue]

    def declared_transforms(self, path: str = "") -> dict[str, Transform]:
        """Return those inside. **Raises:** `ValueError` if names of one place have different ones."""
        found = super().declared_transforms(path)
        for name, place in self.layout.ties.items():
            one, other = (found.get(join_path(path, leaf)) for leaf in (name, place))
            if one != other:
                raise ValueError(
                    f"cannot tie {name!r} to {place!r}: expected the same bounds, found {one} and {other}"
                )
        return found


@dataclasses.dataclass(frozen=True)
class Stacked(Declared):
    """`n` copies of what is declared, each with a key of its own: what `jax.lax.scan` runs over.

    `parameters` may give one as a value. A parameter then has shape `(n, *shape)`, and so have the
    states of a layer; copy `i` is drawn with the key folded with `i`.

    **Arguments:**

    - `declared`: a `Layer`, a `Param` or a mapping of them.
    - `n`: how many copies.

    >>> import jax
    >>> import flatlayers as fl
    >>> ps, st = fl.setup(jax.random.key(0), {"blocks": fl.Stacked(fl.Dense(3, 3), 4)})
    >>> ps.blocks.weight.shape
    (4, 3, 3)
    """

    declared: Any
    n: int

    @property
    def layout(self) -> Layout | Shape:
        one = as_declared(self.declared).layout
        return one.stack(self.n) if isinstance(one, Layout) else (self.n, *one)

    def drawings(self, path: str = "", folds: tuple[str | int, ...] = ()) -> Iterator[Drawing]:
        return as_declared(self.declared).drawings(path, (*folds, self.n))

    def declared_transforms(self, path: str = "") -> dict[str, Transform]:
        return as_declared(self.declared).declared_transforms(path)

    def declared_states(self, key: Key) -> dict[str, Any] | None:
        """Return each copy's own states; those declared by a `Param` are a `Param` of all copies."""
        declared = as_declared(self.declared)

        def parts(key: Key) -> list[Any]:
            return jax.tree.leaves(Record(declared.declared_states(key) or {}))

        def draw(position: int) -> Callable[..., Array]:
            return lambda _, shape, dtype: self._for_each(
                lambda key: parts(key)[position].initial(key, dtype), key
            )

        states = declared.declared_states(key)
        if states is None:
            return None
        one, structure = jax.tree.flatten(Record(states))
        arrays = [i for i, part in enumerate(one) if not isinstance(part, Param)]
        values = self._for_each(lambda key: [parts(key)[i] for i in arrays], key)
        drawn = {i: Param((self.n, *p.shape), draw(i)) for i, p in enumerate(one) if isinstance(p, Param)}
        found = drawn | dict(zip(arrays, values, strict=True))
        return dict(jax.tree.unflatten(structure, [found[i] for i in range(len(one))]))

    def declared_parts(self) -> Mapping[str, Any]:
        return {"": self.declared}

    def as_child(self) -> Any:
        """Return one copy."""
        return as_declared(self.declared).as_child()

    def declared_where(self, keep: Callable[[str], bool], path: str = "") -> "Stacked | None":
        inner = as_declared(self.declared).declared_where(keep, path)
        return None if inner is None else Stacked(inner, self.n)

    def _for_each(self, make: Callable[[Key], PyTree], key: Key) -> Any:
        """Stack what `make` gives for each copy's key: the given one folded with 0, 1, ..."""
        return jax.vmap(lambda i: make(jax.random.fold_in(key, i)))(jnp.arange(self.n))


def contains_layer(x: object) -> bool:
    """Tell whether `x` is a layer, or a mapping, tuple or list with one at any depth.

    >>> import flatlayers as fl
    >>> fl.contains_layer({"a": [1, fl.Dense(2, 2)]}), fl.contains_layer((1, 2))
    (True, False)
    """
    if isinstance(x, Mapping):
        return any(map(contains_layer, x.values()))
    if isinstance(x, tuple | list):
        return any(map(contains_layer, x))
    return isinstance(x, Declared) and x.as_child() is not None
