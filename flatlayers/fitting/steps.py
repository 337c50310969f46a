"""The compiled part of the training loop: a number of steps, known at run time only, in one call."""

import functools
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ..types import Array, Params, PyTree, State
from ..vectors.names import describe, listing
from ..vectors.record import Record, as_record
from .checks import metrics_as_arrays
from .per_leaf import Optimizer, with_extra_args
from .placing import OneDevice, Placing


# `loss(ps, st, batch)` gives `(value, st)` or `(value, (st, metrics))`.
Loss = Callable[[Params, State, PyTree], tuple[Array, Any]]
# The batch of the i-th step of a call, out of the data of the call.
Pick = Callable[[PyTree, Array], PyTree]


class Carry(NamedTuple):
    """The numbers that a step makes anew. `before` are parameters and state of the last finite loss."""

    ps: Params
    st: Record
    opt_state: PyTree
    before: tuple[Params, Record]


class Log(NamedTuple):
    """The record of a step: its loss, the metrics, and `FINE`, `LOSS` or `PARAMETERS`."""

    value: Array
    metrics: dict[str, Array]
    failure: Array


_HERE = OneDevice()

# What is not finite.
FINE, LOSS, PARAMETERS = 0, 1, 2


def evaluate(
    loss: Loss, ps: Params, st: State, batch: PyTree
) -> tuple[Array, tuple[Record, dict[str, Array]]]:
    """Return the value of a loss, the new state and the metrics; say what is wrong with what it returns."""
    found = loss(ps, st, batch)
    if not isinstance(found, tuple) or len(found) != 2:
        raise TypeError(
            f"train_loop: expected the loss to return (value, st) or (value, (st, metrics)), found "
            f"{describe(found)}"
        )
    value, rest = found
    value = jnp.asarray(value)
    if value.shape or not jnp.issubdtype(value.dtype, jnp.floating):
        raise TypeError(f"train_loop: expected the loss to be one floating number, found {describe(value)}")
    # A state is no tuple, but `None`, a record or another mapping.
    st, metrics = rest if isinstance(rest, tuple) and len(rest) == 2 else (rest, {})
    return value, (as_record(st), metrics_as_arrays(metrics))


class Steps:
    """The compiled steps of a loss and an optimiser, for one way to pick the batches.

    `placing` says where values lie. A call takes up to `size` steps. The number is known at run time only, so
    that chunks of any length are one program and a run that is cut into other chunks has the same bits.
    """

    def __init__(self, loss: Loss, optimizer: Optimizer, pick: Pick, placing: Placing = _HERE):
        self._step = jax.jit(functools.partial(_step, loss, with_extra_args(optimizer), placing))
        self._pick, self.placing = pick, placing
        self._seen: set[Hashable] = set()
        self.in_place = jax.jit(self._many, static_argnums=4, donate_argnums=0)
        self.beside = jax.jit(self._many, static_argnums=4)
        self.alone = jax.jit(lambda carry, data: self._step(carry, pick(data, jnp.array(0))))

    def _many(self, carry: Carry, data: PyTree, first: Array, last: Array, size: int) -> tuple[Carry, Log]:
        """Take the steps from `first` to before `last`, or up to one that is not finite.

        The log has `size` places, of which these are filled.
        """
        _, log = jax.eval_shape(lambda: self._step(carry, self._pick(data, jnp.array(0))))
        logs = jax.tree.map(lambda x: jnp.zeros((size, *x.shape), x.dtype), log)

        def more(loop: tuple[Array, Array, Carry, Log]) -> Array:
            i, failure, _, _ = loop
            return (i < last) & (failure == FINE)

        def step(loop: tuple[Array, Array, Carry, Log]) -> tuple[Array, Array, Carry, Log]:
            i, _, carry, logs = loop
            carry, log = self._step(carry, self._pick(data, i))
            return i + 1, log.failure, carry, jax.tree.map(lambda all, x: all.at[i].set(x), logs, log)

        start = (first, jnp.full((), FINE, jnp.int8), carry, logs)
        return jax.lax.while_loop(more, step, start)[2:]

    def after_one(self, carry: Carry, data: PyTree) -> Carry:
        """Return the types of what the next step makes. Nothing is computed."""
        return jax.eval_shape(self.alone, carry, data)[0]

    def is_new(self, carry: Carry, data: PyTree, size: int) -> bool:
        """Tell whether a call with such arguments is the first, which is compiled."""
        leaves, structure = jax.tree.flatten((carry, data))
        call = (structure, size, *((x.shape, x.dtype) for x in leaves))
        new = call not in self._seen
        self._seen.add(call)
        return new


def _step(loss: Loss, optimizer: Any, placing: Placing, carry: Carry, batch: PyTree) -> tuple[Carry, Log]:
    import optax  # here, so that importing the library does not cost it

    ps, st, opt_state, before = carry
    evaluate_loss = functools.partial(evaluate, loss)
    (value, (new_st, metrics)), gradient = placing.value_and_grad(evaluate_loss)(ps, st, batch)
    fine = jnp.isfinite(value)

    def value_fn(ps: Params) -> Array:
        return placing.value(evaluate_loss)(ps, st, batch)[0]

    gradient, shown = placing.shown((gradient, ps))
    extra = {"value": value, "grad": gradient, "value_fn": value_fn}
    updates, new_opt_state = optimizer.update(gradient, placing.shown(opt_state), shown, **extra)
    # With a loss that is finite these are `ps`, and else the sum is not used. Added to `ps`, it could not be
    # written in its place: nothing would say that `ps` was copied to `before` by then.
    before = _select(fine, (ps, st), before)
    new_ps = placing.hidden(strong(optax.apply_updates(placing.shown(before[0]), updates)))
    finite = functools.reduce(jnp.logical_and, map(_all_finite, jax.tree.leaves(new_ps)), fine)
    failure = jnp.where(fine, jnp.where(finite, FINE, PARAMETERS), LOSS).astype(jnp.int8)
    return placing.hidden(
        (
            Carry(new_ps, strong(new_st), strong(new_opt_state), before),
            Log(strong(value), strong(metrics), failure),
        )
    )


def _all_finite(x: Array) -> Array:
    """Tell whether all numbers are finite: their maximum takes half the time of `isfinite(x).all()`."""
    return jnp.max(jnp.abs(x), initial=0) < jnp.inf


def _select(fine: Array, new: PyTree, old: PyTree) -> PyTree:
    return jax.tree.map(lambda a, b: jax.lax.select(fine, a, b), new, old)


def strong(tree: PyTree) -> PyTree:
    """Return a tree of arrays none of which is weakly typed, as a number of Python is."""

    def one(x: Any) -> Array:
        x = jnp.asarray(x)
        return jax.lax.convert_element_type(x, x.dtype) if getattr(x, "weak_type", False) else x

    return jax.tree.map(one, tree)


def _differ(a: PyTree, b: PyTree) -> bool:
    """Tell whether two trees have other names, shapes or dtypes."""
    return jax.tree.structure(a) != jax.tree.structure(b) or _leaves(a) != _leaves(b)


def _leaves(tree: PyTree) -> dict[str, str]:
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): describe(x) for path, x in flat}


def differences(a: PyTree, b: PyTree) -> str:
    """Return what differs between the types of two trees; nothing if they are the same."""
    if not _differ(a, b):
        return ""
    old, new = _leaves(a), _leaves(b)
    pairs = {
        path: f"{old.get(path, 'nothing')} before and {new.get(path, 'nothing')} after"
        for path in {**old, **new}
        if old.get(path) != new.get(path)
    }
    return listing(pairs.items()) if pairs else f"{describe(a)} before and {describe(b)} after"


def changed_types(a: Carry, b: Carry) -> str:
    """Return what differs between the types of two carries: paths in the state, or else in the others."""
    return differences(a.st, b.st) or differences(*({"ps": x.ps, "opt_state": x.opt_state} for x in (a, b)))


def compiled_steps(loss: Loss, optimizer: Optimizer, pick: Pick, placing: Placing = _HERE) -> Steps:
    """Return the compiled steps: the same object in each call, as long as it is one of the last few."""
    try:
        hash((loss, optimizer))
    except TypeError:
        return Steps(loss, optimizer, pick, placing)
    return _kept_steps(loss, optimizer, pick, placing)


# Few, since each holds what its loss closes over.
_kept_steps = functools.lru_cache(maxsize=16)(Steps)
