"""`per_leaf`: an optimiser that works leaf by leaf, on the leaves of a vector."""

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, TypeGuard, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from ..dtypes import is_inexact
from ..types import Array, Params, PyTree, Shape
from ..vectors.layout import Layout
from ..vectors.names import join_path
from ..vectors.segments import Leaf, join, split
from ..vectors.sharded import ShardedVector
from ..vectors.vector import ComponentVector


if TYPE_CHECKING:
    import optax


def per_leaf(optimizer: "Optimizer") -> "optax.GradientTransformationExtraArgs":
    """Show an optimiser the leaves of a vector by name: what it does leaf by leaf is right again.

    A `ComponentVector` is one leaf of one axis. LAMB, LARS, NovoGrad, Adafactor, Muon, clipping by block
    and masks by `ndim` work leaf by leaf, and would be other algorithms on it. With `fl.per_leaf` they take
    the steps that they take on a tree of the same numbers, and what comes back is a vector.

    It sees `ps.to_dict()`, but for two things. The copies of a stack, such as those of a
    `Repeated` layer, are a list: `{"blocks": [{"weight": ..., "bias": ...}, ...]}`, so that each copy has
    leaves of its own. And of tied names there is the one that has the place. Masks and labels given to
    optax have this structure, or that of a part of it from the top, such as
    `{"blocks": True, "readout": False}`; functions of the parameters, such as
    `mask=lambda p: jax.tree.map(lambda leaf: leaf.ndim > 1, p)`, get it.

    Optimisers that need none of this, such as Adam, are faster on the vector as it is.

    **Arguments:**

    - `optimizer`: an optax optimiser, or any `optax.GradientTransformation`: one link of an `optax.chain`
        can be wrapped alone.

    **Returns:** an `optax.GradientTransformationExtraArgs` for parameters that are a `ComponentVector`, or a
    tree with vectors in it, each of which is shown as its leaves. In its state the moments are vectors,
    wherever optax keeps a tree like the parameters. Further arguments of `update` are shown in the same way,
    and functions among them, such as the `value_fn` of `optax.lbfgs`, are functions of the vector.

    **Raises:** `ValueError`, from `init` and `update`, for a vector with leading axes: the members of an
    ensemble would be one leaf together, and `jax.vmap` trains each on its own, by
    `optax.GradientTransformation(jax.vmap(opt.init), jax.vmap(opt.update))`; and if the optimiser changes
    the shape of a leaf. `TypeError` for what is no optimiser, and for a `ShardedVector`, whose parts end
    anywhere in a leaf.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import optax
    >>> import flatlayers as fl
    >>> ps = fl.ComponentVector.of({"weight": jnp.full((2, 2), 3.0), "bias": jnp.ones(2)})
    >>> optimizer = fl.per_leaf(optax.scale_by_trust_ratio())  # updates as long as the parameters, by leaf
    >>> updates, _ = optimizer.update(ps / ps, optimizer.init(ps), ps)
    >>> print(updates)
    ComponentVector(float32[6])
      weight  [[3., 3.], [3., 3.]]
      bias    [1., 1.]
    """
    import optax  # here, so that importing the library does not cost it

    inner = with_extra_args(optimizer)

    def init(params: Params) -> PyTree:
        return _Shown.of(params).hide_all(inner.init(show(params)))

    return optax.GradientTransformationExtraArgs(init, UpdateByLeaf(inner.update))


@runtime_checkable
class Optimizer(Protocol):
    """An `optax.GradientTransformation`, or what has its two functions."""

    def init(self, params: Params) -> PyTree: ...

    def update(
        self, updates: Params, state: PyTree, params: Params | None = None
    ) -> tuple[Params, PyTree]: ...


@dataclasses.dataclass(frozen=True)
class UpdateByLeaf:
    """The `update` of an optimiser that `per_leaf` has wrapped, to be known by its type."""

    inner: Callable[..., tuple[Params, PyTree]]

    def __call__(
        self, updates: Params, state: PyTree, params: Params | None = None, **extra_args: object
    ) -> tuple[Params, PyTree]:
        shown = _Shown.of(updates)
        named = {name: shown.argument(value) for name, value in extra_args.items()}
        new, state = self.inner(show(updates), show(state), show(params), **named)
        return shown.hide(new), shown.hide_all(state)


def with_extra_args(optimizer: "Optimizer") -> "optax.GradientTransformationExtraArgs":
    """Return any optimiser as one that takes further arguments."""
    import optax

    if isinstance(optimizer, optax.GradientTransformation):
        return optax.with_extra_args_support(optimizer)
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"expected an optax optimiser, found {type(optimizer).__name__}")
    # `optax.MultiSteps` is no transformation, but has its functions and passes further arguments on.
    update: Callable[..., tuple[Params, PyTree]] = optimizer.update
    known = inspect.signature(update).parameters.values()
    if any(parameter.kind == parameter.VAR_KEYWORD for parameter in known):
        return optax.GradientTransformationExtraArgs(optimizer.init, update)
    names = {parameter.name for parameter in known}

    def update_with(
        updates: Params, state: PyTree, params: Params | None = None, **extra_args: object
    ) -> tuple[Params, PyTree]:
        taken = {name: value for name, value in extra_args.items() if name in names}
        return update(updates, state, params, **taken)

    return optax.GradientTransformationExtraArgs(optimizer.init, update_with)


def show(tree: PyTree) -> Any:
    """Return a tree with each vector in it as the nested names of its leaves. Leading axes stay in front."""
    return jax.tree.map(
        lambda part: _Leaves.of(part).split(part.data) if is_vector(part) else part,
        tree,
        is_leaf=is_vector,
    )


@dataclasses.dataclass(frozen=True)
class _Shown:
    """The way from a tree with vectors to the one that is shown, and back.

    `outside` is its structure (a `PyTreeDef`) with vectors as leaves, `parts` has the leaves of each of them
    that is a vector, and `inside` is the structure that is shown.
    """

    outside: Any
    parts: "tuple[_Leaves | None, ...]"
    inside: Any

    @staticmethod
    def of(tree: PyTree) -> "_Shown":
        leaves, outside = jax.tree.flatten(
            tree, is_leaf=lambda part: is_vector(part) or isinstance(part, ShardedVector)
        )
        for leaf in leaves:
            if isinstance(leaf, ShardedVector):
                raise TypeError(
                    "per_leaf: a shard has no leaves, since its parts end anywhere in one; keep the whole "
                    "vector on each device, or take an optimiser that works number by number"
                )
            if is_vector(leaf) and leaf.ndim > 1:
                raise ValueError(
                    f"per_leaf: expected a vector of shape ({leaf.layout.length},), found {leaf!r}; for an "
                    "ensemble whose members are optimised each on its own, use `jax.vmap(opt.init)` and "
                    "`jax.vmap(opt.update)`"
                )
        parts = tuple(_Leaves.of(leaf) if is_vector(leaf) else None for leaf in leaves)
        names = [part.names if part else 0 for part in parts]
        return _Shown(outside, parts, jax.tree.structure(outside.unflatten(names)))

    def hide(self, tree: PyTree) -> Any:
        """Return what was shown, or is like it, with its vectors."""
        pieces = self.outside.flatten_up_to(tree)
        return self.outside.unflatten(
            [part.join(piece) if part else piece for part, piece in zip(self.parts, pieces, strict=True)]
        )

    def hide_all(self, tree: PyTree) -> Any:
        """Return `tree` with vectors for each part that is like what was shown: the moments in a state."""
        if not any(self.parts):
            return tree
        return jax.tree.map(lambda x: self.hide(x) if self._is_like(x) else x, tree, is_leaf=self._is_like)

    def _is_like(self, tree: PyTree) -> bool:
        """Tell whether it has the names, the shapes behind common leading axes, and one dtype per vector."""
        if jax.tree.structure(tree) != self.inside:
            return False
        pieces = self.outside.flatten_up_to(tree)
        return all(part.fits(piece) for part, piece in zip(self.parts, pieces, strict=True) if part)

    def argument(self, value: object) -> Any:
        """Return a further argument of `update`, such as `value_fn`, which takes vectors, for leaves."""
        if isinstance(value, ComponentVector) or not callable(value):
            return show(value)

        @functools.wraps(value)  # optax looks at the names of its arguments
        def of_leaves(*args: object, **named: object) -> Any:
            args, named = self.hide_all((args, named))
            return show(value(*args, **named))

        return of_leaves


@dataclasses.dataclass(frozen=True)
class _Leaves:
    """The leaves of a vector, each copy of a stack on its own.

    The copies lie one after another, so each leaf is one piece of the vector: `segments` has them in order.
    `names` is the tree that is shown, of their paths.
    """

    layout: Layout
    dtype: np.dtype
    segments: tuple[Leaf, ...]
    names: PyTree

    @staticmethod
    def of(vector: ComponentVector) -> "_Leaves":
        segments: list[Leaf] = []

        def names(group: Layout, copies: Shape, shown: str, path: str) -> Any:
            # `shown` has the number of each copy, as in "blocks.0.weight"; `path`, as in `ties`, has none.
            if copies:
                return [names(group, copies[1:], join_path(shown, str(i)), path) for i in range(copies[0])]
            below = {}
            for name, child in group.entries.items():
                own, place = join_path(shown, name), join_path(path, name)
                if isinstance(child, Layout):
                    below[name] = names(child, child.copies, own, place)
                elif place not in vector.layout.ties:
                    start = segments[-1].start + segments[-1].size if segments else 0
                    segments.append(Leaf(own, start, math.prod(child), child))
                    below[name] = own
            return below

        tree = names(vector.layout, vector.layout.copies, "", "")
        return _Leaves(vector.layout, vector.dtype, tuple(segments), tree)

    def split(self, data: Array) -> Any:
        """Return the tree of the leaves of `data`, of shape `(..., length)`."""
        leaves = split(self.segments, data, jax.lax)
        return jax.tree.map(leaves.__getitem__, self.names)

    def join(self, tree: PyTree) -> ComponentVector:
        """Return the vector of such a tree."""
        leaves = self._by_path(tree)
        lead: Shape = ()
        for number, leaf in enumerate(self.segments):
            found = _lead(leaves[leaf.path], leaf)
            if found is None or (number and found != lead):
                raise ValueError(
                    f"per_leaf: expected the optimiser to keep the shape {leaf.shape} of {leaf.path!r}, "
                    f"found {leaves[leaf.path].shape}"
                )
            lead = found
        dtype = jnp.result_type(*leaves.values()) if leaves else self.dtype
        arrays = {path: jnp.asarray(leaf, dtype) for path, leaf in leaves.items()}
        return ComponentVector(join(self.segments, arrays, lead, dtype, jnp), self.layout)

    def fits(self, tree: PyTree) -> bool:
        """Tell whether the leaves of a tree with these names can lie in one vector."""
        leaves = self._by_path(tree)
        if not all(isinstance(leaf, jax.Array | np.ndarray) for leaf in leaves.values()):
            return False
        dtypes = {leaf.dtype for leaf in leaves.values()}
        leads = {_lead(leaves[leaf.path], leaf) for leaf in self.segments}
        one_vector = len(dtypes) < 2 and len(leads) < 2 and None not in leads
        return one_vector and all(map(is_inexact, leaves.values()))

    def _by_path(self, tree: PyTree) -> dict[str, Any]:
        paths, names = jax.tree.flatten(self.names)
        return dict(zip(paths, names.flatten_up_to(tree), strict=True))


def _lead(array: Array, leaf: Leaf) -> Shape | None:
    """Return the axes in front of those of the leaf; `None` if these are others."""
    lead = array.ndim - len(leaf.shape)
    return tuple(array.shape[:lead]) if lead >= 0 and array.shape[lead:] == leaf.shape else None


def is_vector(part: object) -> TypeGuard[ComponentVector]:
    """Tell whether it is a vector of numbers: optax puts placeholders in the place of masked data."""
    return isinstance(part, ComponentVector) and isinstance(part.data, jax.Array | np.ndarray)
