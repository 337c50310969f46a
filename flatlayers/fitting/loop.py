"""`train_loop`: many steps of an optimiser in one compiled call."""

import dataclasses
import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import jax
import numpy as np

from ..types import Array, Params, PyTree, State
from ..vectors.names import describe
from ..vectors.record import Record, as_record
from .leafwise import differs_by_leaf


if TYPE_CHECKING:
    import optax
    import tqdm


# `loss(ps, st, batch)` gives the loss and the new state.
Loss = Callable[[Params, State, PyTree], tuple[Array, State]]
# The parameters, the state and the optimiser's state.
Carry = tuple[Params, State, PyTree]
# Takes so many steps with these batches: the new carry and the losses.
Run = Callable[[Carry, PyTree, int], tuple[Carry, Array]]


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """The result of `fl.train_loop`.

    **Attributes:**

    - `ps`, `st`: the parameters and the state after the last step.
    - `opt_state`: the optimiser's state, to go on with.
    - `losses`: the loss of each step, of shape `(steps,)`, before the step was taken.

    >>> import optax
    >>> import flatlayers as fl
    >>> ps = fl.ComponentVector.of({"a": 1.0})
    >>> result = fl.train_loop(
    ...     lambda ps, st, batch: (ps.a**2, st), ps, {}, optax.sgd(0.25), steps=3, progress=False
    ... )
    >>> result.losses.tolist(), float(result.ps.a)
    ([1.0, 0.25, 0.0625], 0.125)
    """

    ps: Params
    st: Record
    opt_state: PyTree
    losses: np.ndarray


class NonFiniteLossError(RuntimeError):
    """A loss that is not finite, found in the step `step`.

    `ps`, `st` and `opt_state` are those that gave the last finite loss; `losses` are the finite ones.

    >>> import jax.numpy as jnp
    >>> import optax
    >>> import flatlayers as fl
    >>> ps = fl.ComponentVector.of({"a": 0.5})
    >>> loss = lambda ps, st, batch: (jnp.log(ps.a), st)
    >>> try:
    ...     fl.train_loop(loss, ps, {}, optax.sgd(0.1), steps=10, progress=False)
    ... except fl.NonFiniteLossError as error:
    ...     print(error.step, error.ps.a.round(3))
    2 0.3
    """

    def __init__(self, step: int, loss: float, last: TrainResult):
        super().__init__(
            f"train_loop: expected a finite loss, found {loss} in step {step}; the exception has the last "
            "good parameters as `ps`. A smaller learning rate or `optax.clip_by_global_norm` may help"
        )
        self.step, self.ps, self.st = step, last.ps, last.st
        self.opt_state, self.losses = last.opt_state, last.losses


def train_loop(
    loss: Loss,
    ps: Params,
    st: State,
    optimizer: "optax.GradientTransformation",
    data: PyTree = None,
    *,
    steps: int,
    chunk: int = 100,
    progress: bool = True,
    callback: Callable[[int, float, Params, State], object] | None = None,
) -> TrainResult:
    """Minimise a loss: `steps` steps of an optimiser, `chunk` of them in one compiled `jax.lax.scan`.

    The vector, the state and the optimiser's state stay on the device. They are there three times: as they
    were before the last chunk and before this one, and after it. So a loss that is not finite costs no good
    parameters: the steps up to it are taken again.

    **Arguments:**

    - `loss`: a function `loss(ps, st, batch) -> (value, st)`.
    - `ps`: the parameters, a `ComponentVector` or any pytree of floating arrays.
    - `st`: the state.
    - `optimizer`: an optax optimiser that needs no more than gradients and parameters. One that works leaf by
        leaf, such as LAMB or Muon, goes into `fl.per_leaf`.
    - `data`: `None`; one batch, a pytree of arrays that is used in each step; or an iterator of batches of
        the same shapes, `chunk` of which are stacked at a time.
    - `steps`: the number of steps.
    - `chunk`: the number of steps in one call. The first and, if it is shorter, the last are compiled.
    - `progress`: whether there is a bar (tqdm) with the mean loss of the last chunk.
    - `callback`: called after each chunk as `callback(step, loss, ps, st)` with the number of steps that were
        taken and the chunk's last loss; training stops if it returns `True`.

    **Returns:** a `TrainResult` with `ps`, `st`, `opt_state` and `losses`.

    **Raises:** `NonFiniteLossError`, with the step and the last good parameters, as soon as a chunk has a
    loss that is not finite; `ValueError` if the batches come to an end before the steps do.

    **Warns:** if the optimiser works leaf by leaf and sees a vector, as far as a short trial tells.

    >>> import jax.numpy as jnp
    >>> import optax
    >>> import flatlayers as fl
    >>> ps = fl.ComponentVector.of({"a": 1.0, "b": [2.0, 3.0]})
    >>> loss = lambda ps, st, batch: ((ps.a - batch) ** 2 + (ps.b**2).sum(), st)
    >>> result = fl.train_loop(loss, ps, {}, optax.adam(0.1), 4.0, steps=300, progress=False)
    >>> print(f"{result.ps.a:.3f}")
    4.000
    >>> result.losses.shape
    (300,)
    """
    for name, value in (("steps", steps), ("chunk", chunk)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"train_loop: expected {name} to be a positive integer, found {value!r}")
    if differs_by_leaf(optimizer, ps):
        warnings.warn(_BY_LEAF, UserWarning, stacklevel=2)
    several = isinstance(data, Iterator)
    run = jax.jit(_scan_steps(loss, optimizer, several), static_argnums=2)
    carry = (ps, as_record(st), optimizer.init(ps))
    before, losses = None, []
    with _bar(steps, progress) as bar:
        for start in range(0, steps, chunk):
            length = min(chunk, steps - start)
            batches = _stacked(data, length, start) if several else data
            new, values = run(carry, batches, length)
            values = np.asarray(values)
            if not np.isfinite(values).all():
                step = int(np.argmin(np.isfinite(values)))
                ps, st, opt_state = _last_good(run, step, (carry, batches), before)
                last = TrainResult(ps, st, opt_state, np.concatenate([*losses, values[:step]]))
                raise NonFiniteLossError(start + step, float(values[step]), last)
            before, carry = (carry, batches, length), new
            losses.append(values)
            bar.set_postfix(loss=f"{values.mean():.4g}", refresh=False)
            bar.update(length)
            if callback is not None and callback(start + length, float(values[-1]), *carry[:2]) is True:
                break
    ps, st, opt_state = carry
    return TrainResult(ps, st, opt_state, np.concatenate(losses))


_BY_LEAF = (
    "train_loop: this optimiser works leaf by leaf, and a ComponentVector is one leaf: it takes other steps "
    "than on the tree of its leaves. `fl.per_leaf(optimizer)` shows it the leaves"
)


def _scan_steps(loss: Loss, optimizer: "optax.GradientTransformation", several: bool) -> Run:
    """Return `run(carry, batches, length)`, which takes so many steps: the new carry and the losses."""
    import optax  # here, so that importing the library does not cost it

    def step(carry: Carry, batch: PyTree) -> tuple[Carry, Array]:
        ps, st, opt_state = carry
        (value, new), gradient = jax.value_and_grad(loss, has_aux=True)(ps, st, batch)
        updates, opt_state = optimizer.update(gradient, opt_state, ps)
        return (optax.apply_updates(ps, updates), as_record(new), opt_state), value

    def run(carry: Carry, batches: PyTree, length: int) -> tuple[Carry, Array]:
        if several:
            return jax.lax.scan(step, carry, jax.tree.map(lambda leaf: leaf[:length], batches))
        return jax.lax.scan(lambda carry, _: step(carry, batches), carry, length=length)

    return run


def _last_good(
    run: Run, step: int, now: tuple[Carry, PyTree], before: tuple[Carry, PyTree, int] | None
) -> Carry:
    """Return the carry that gave the last finite loss, by taking the steps up to there again."""
    if step > 0:
        carry, batches = now
        steps = step - 1
    elif before is not None:
        carry, batches, length = before
        steps = length - 1
    else:
        return now[0]
    return run(carry, batches, steps)[0] if steps else carry


def _stacked(batches: Iterator[PyTree], n: int, start: int) -> PyTree:
    """Return the next `n` batches, stacked along a new first axis."""
    found = list(itertools.islice(batches, n))
    if len(found) < n:
        raise ValueError(
            f"train_loop: expected a batch for each step, found none for step {start + len(found)}"
        )
    shapes = [jax.tree.map(np.shape, batch) for batch in found]
    if any(shape != shapes[0] for shape in shapes):
        different = next(batch for batch, shape in zip(found, shapes, strict=True) if shape != shapes[0])
        raise ValueError(
            "train_loop: expected batches of the same shapes, found "
            f"{describe(found[0])} and {describe(different)}"
        )
    return jax.tree.map(lambda *leaves: np.stack(leaves), *found)


def _bar(steps: int, progress: bool) -> "tqdm.tqdm":
    """Return the bar, which is off without `progress`."""
    if progress:  # imported here, as optax
        from tqdm.auto import tqdm
    else:  # which does not look for what a notebook draws a bar with
        from tqdm import tqdm
    return tqdm(total=steps, desc="training", unit="step", disable=not progress)
