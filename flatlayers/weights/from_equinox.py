"""`FromEquinox`: any Equinox module as a layer."""

import dataclasses
import keyword
from collections.abc import Mapping
from dataclasses import KW_ONLY
from typing import Annotated, Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import wadler_lindig as wl

from ..core.declaration import Param
from ..core.fields import Check, Count, Flag
from ..core.layer import Layer
from ..core.values import ArrayContent, Value
from ..dtypes import is_traced
from ..initializers import GivenArray
from ..types import Array, Input, Key, Output, Params, PyTree, State
from ..vectors.names import RESERVED_NAMES, describe
from .modules import name_of_step


@dataclasses.dataclass(frozen=True)
class _Kept:
    """A parameter or an array of JAX by content; a constant array of NumPy is an `ArrayContent`."""

    content: ArrayContent


@dataclasses.dataclass(frozen=True, eq=False)
class KeptModule(Value):
    """A module without its arrays: they are kept by content, so that layers can be compared.

    `names` has our path for each leaf that is a parameter, and `None` for all others.
    """

    kind: str
    leaves: tuple[Any, ...]
    names: tuple[str | None, ...]
    structure: Any

    @staticmethod
    def of(module: eqx.Module) -> "KeptModule":
        states = jax.tree.leaves(module, is_leaf=lambda part: isinstance(part, eqx.nn.StateIndex))
        if any(isinstance(part, eqx.nn.StateIndex) for part in states):
            raise TypeError(
                f"FromEquinox.module: expected a module without eqx.nn.State, found one in {_kind(module)}; "
                "there are fl.BatchNorm and fl.SpectralNorm"
            )
        paths, structure = jax.tree_util.tree_flatten_with_path(module)
        names = [_own_path(path) if eqx.is_inexact_array(leaf) else None for path, leaf in paths]
        given = [name for name in names if name is not None]
        if twice := [name for name in given if given.count(name) > 1]:
            raise ValueError(f"FromEquinox.module: expected different names, found {twice[0]!r} twice")
        return KeptModule(_kind(module), tuple(_kept(*part) for part in paths), tuple(names), structure)

    def parameters(self) -> dict[str, Any]:
        """Return the declaration of the inexact arrays."""
        found: dict[str, Any] = {}
        for name, leaf in zip(self.names, self.leaves, strict=True):
            if name is not None:
                *above, last = name.split(".")
                group = found
                for part in above:
                    group = group.setdefault(part, {})
                group[last] = Param(leaf.content.shape, GivenArray(leaf.content))
        return found

    def with_parameters(self, ps: Params) -> Any:
        """Return the module with these numbers."""
        leaves = [
            _found(leaf) if name is None else _at(ps, name)
            for name, leaf in zip(self.names, self.leaves, strict=True)
        ]
        return jax.tree.unflatten(self.structure, leaves)

    def __repr__(self) -> str:
        return self.kind

    def __pdoc__(self, **options: object) -> wl.AbstractDoc:
        return wl.TextDoc(self.kind)


def _kind(module: object) -> str:
    return type(module).__name__


def _kept(path: Any, leaf: Any) -> Any:
    """Return a leaf that can be compared: an array by its content."""
    if isinstance(leaf, jax.ShapeDtypeStruct) or is_traced(leaf):
        raise TypeError(
            "FromEquinox.module: expected a module whose numbers are known, found "
            f"{describe(leaf)} at {_own_path(path)!r}; they are the initial values"
        )
    if eqx.is_inexact_array(leaf):
        return _Kept(ArrayContent.of(leaf))
    if isinstance(leaf, np.ndarray):
        return ArrayContent.of(leaf)
    if not isinstance(leaf, jax.Array):
        return leaf
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        raise TypeError(
            f"FromEquinox.module: expected a module without PRNG keys, found one at {_own_path(path)!r}; "
            "`with_key=True` gives one at each call"
        )
    return _Kept(ArrayContent.of(leaf))


def _found(leaf: Any) -> Any:
    if isinstance(leaf, _Kept):
        return jnp.asarray(leaf.content.array())
    return leaf.array() if isinstance(leaf, ArrayContent) else leaf


def _at(ps: Params, path: str) -> Array:
    for name in path.split("."):
        ps = getattr(ps, name)
    return ps


def _own_path(path: Any) -> str:
    """Return our names for the steps to a leaf, with dots."""
    return ".".join(map(_own_name, map(name_of_step, path)))


def _own_name(name: str) -> str:
    if name.isdecimal():
        return f"layer_{name}"
    name = name.lstrip("_") + "_" * name.startswith("_")
    return f"{name}_" if name in RESERVED_NAMES or keyword.iskeyword(name) else name


def _module(module: object) -> object:
    if isinstance(module, KeptModule):
        return module
    if not isinstance(module, eqx.Module) or not callable(module):
        raise TypeError
    return KeptModule.of(module)


def _checked(module: object) -> object:
    # The errors of a module that is refused say why, which those of a check do not.
    if isinstance(module, eqx.Module) and callable(module):
        return module
    return _module(module)


Module = Annotated[Any, Check("an Equinox module that can be called", _checked)]


class FromEquinox(Layer):
    """An Equinox module as a layer: `y = module(x)`, with its numbers in the vector.

    The parameters are the module's inexact arrays, those that `eqx.is_inexact_array` finds. All else is
    fixed: arrays of integers and bools, Python's numbers, functions, options. A module that draws random
    numbers gets them with `with_key=True`. A module with `eqx.nn.State`, as `eqx.nn.BatchNorm`, or with a
    PRNG key among its arrays is refused.

    **Arguments:**

    - `module`: the module; its numbers are the initial values, whatever the key. One array that is in two
        places is two parameters.
    - `sample_ndim`: the number of axes of one sample, over whose leading axes the module is mapped by
        `jax.vmap`; without it the module gets `x` as it is.
    - `with_key`: whether the module is called as `module(x, key=key)`, each time, and for each sample, with
        another key. In test mode it is called without one, as `eqx.nn.inference_mode` makes it.

    **Inputs:** `x`, what the module takes; a tuple has its arguments. **Returns:** `(y, st)` with what the
    module returns.

    **Parameters:** the inexact arrays under the names of their attributes, `layer_0` for the first of a tuple
    or list, `name_` for `_name` and for names that are reserved. **States:** `key` and the flag `training`,
    with `with_key`.

    **Raises:** `TypeError` for what is no module, for one that is refused and for numbers that are not known,
    as under `jax.jit` and of `eqx.filter_eval_shape`; `ValueError` for a key of a dictionary that is no name.

    >>> import equinox as eqx
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import flatlayers as fl
    >>> module = eqx.nn.MLP(2, "scalar", 8, 1, key=jax.random.key(0))
    >>> layer = fl.FromEquinox(module, sample_ndim=1)
    >>> ps, st = fl.setup(jax.random.key(0), layer)
    >>> ps.layers.layer_0.weight.shape
    (8, 2)
    >>> layer(jnp.ones((5, 2)), ps, st)[0].shape
    (5,)
    """

    module: Module
    _: KW_ONLY
    sample_ndim: Count | None = None
    with_key: Flag = False

    def check_fields(self) -> None:
        self.module = _module(self.module)
        # A name that cannot be one is an error where the layer is made.
        _ = self.layout

    def parameters(self) -> Mapping[str, Any]:
        return self.module.parameters()

    def states(self, key: Key) -> Mapping[str, Any]:
        return {"key": key, "training": True} if self.with_key else {}

    def forward(self, x: Input, ps: Params, st: State) -> tuple[Output, State]:
        module, inputs, key = self.module.with_parameters(ps), x if type(x) is tuple else (x,), None
        if self.with_key and st.training:
            key, new = jax.random.split(st.key)
            st = st.replace(key=new)
        elif self.with_key:
            module = eqx.nn.inference_mode(module)
        lead = () if self.sample_ndim is None else leading_axes(inputs, self.sample_ndim)
        keys = key if key is None or not lead else jax.random.split(key, lead)

        def call(key: Key | None, inputs: tuple[Any, ...]) -> Output:
            return module(*inputs) if key is None else module(*inputs, key=key)

        for _ in lead:
            call = jax.vmap(call)
        return call(keys, inputs), st


def leading_axes(inputs: PyTree, ndim: int) -> tuple[int, ...]:
    """Return the axes in front of samples. **Raises:** `ValueError` if they are not those of all inputs."""
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(inputs)]
    found = {shape[: len(shape) - ndim] if len(shape) >= ndim else None for shape in shapes}
    if len(found) != 1 or None in found:
        raise ValueError(
            f"expected x of {ndim} axes for a sample, behind the same axes for all, found {describe(inputs)}"
        )
    return found.pop() or ()
