"""`train_loop`: many steps of an optimiser in one compiled call."""

import functools
import os
import sys
import warnings
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Annotated, Any

import jax
import numpy as np

from ..core.fields import Count, Flag, Size, checked, integer
from ..io.files import Path
from ..types import Params, PyTree, State
from ..vectors.record import Record, as_record
from .checkpoint import load_result, save_result
from .checks import check_arguments
from .data import source_of
from .leafwise import differs_by_leaf
from .per_leaf import Optimizer
from .placing import Placing, placing_of
from .result import NonFiniteLossError, P, Stopped, TrainResult
from .run import Plan, Run
from .steps import Carry, Loss, compiled_steps, differences, strong
from .validation import Validator


if TYPE_CHECKING:
    import optax
    import tqdm


def train_loop(
    loss: Loss,
    ps: P,
    st: State,
    optimizer: "optax.GradientTransformation",
    data: PyTree = None,
    *,
    steps: int,
    opt_state: PyTree = None,
    start: int = 0,
    chunk: int = 100,
    progress: bool = True,
    callback: Callable[..., object] | None = None,
    validate: tuple[Loss, PyTree, int] | None = None,
    patience: int | None = None,
    save: Path | None = None,
    save_every: int | None = None,
    resume: Path | None = None,
    mesh: "jax.sharding.Mesh | None" = None,
    axis: str = "data",
    per_device: bool = False,
) -> TrainResult[P]:
    """Minimise a loss: `steps` steps of an optimiser, `chunk` of them in one compiled call.

    The vector, the state and the optimiser's state stay on the device, with the parameters of the step
    before: a loss that is not finite costs no good parameters. Above 64 MiB each chunk is written in the
    place of the one before: with Adam there are five vectors at most beside the one that is given.

    A further call with the same loss and the same optimiser compiles nothing, whatever its number of steps,
    if batches do not come one by one and fewer than a chunk.

    **Arguments:**

    - `loss`: a function `loss(ps, st, batch)` that returns `(value, st)`, or `(value, (st, metrics))` with a
        mapping of names to numbers.
    - `ps`: the parameters, a `ComponentVector` or any pytree of floating arrays.
    - `st`: the state. If the first step changes its names, shapes or dtypes, it is taken alone.
    - `optimizer`: an optax optimiser. `value`, `grad` and `value_fn` are passed on to those that need them,
        such as `optax.lbfgs()`. One that works leaf by leaf, such as LAMB or Muon, goes into `fl.per_leaf`.
        `optax.lookahead`, `contrib.sam` and `contrib.sophia` are none of them: they want more than a loss.
    - `data`: `None`; one batch that is used in each step, an array, a tuple, a mapping or another registered
        pytree; `fl.batches`; an iterator of batches, which is consumed as it comes; or any other iterable of
        them, a list or a DataLoader of PyTorch, which is gone through again when it ends. Batches have the
        same shapes. The next chunk's are fetched while a chunk runs.
    - `steps`: the number of steps taken by this call; with `resume`, that of the whole run.
    - `opt_state`: the optimiser's state to go on with; `None` makes a new one.
    - `start`: the number of steps taken before. Callbacks, errors and the place in the data count from there.
        An iterator is taken to be at this place.
    - `chunk`: the number of steps in one call. A validation or a file to be written ends one early.
    - `progress`: whether there is a bar (tqdm) with the mean loss and metrics of the last chunk; it says so
        while a program is compiled. Without a terminal it is a line every ten seconds.
    - `callback`: called after each chunk as `callback(step, loss, ps, st)` with the number of steps that were
        taken and the chunk's last loss, and with the means of the metrics in this chunk as a fifth argument
        if the loss returns metrics. Training stops if it returns `True`.
    - `validate`: `(loss, data, every)`: after each so many steps this loss is evaluated in test mode, and its
        mean over all batches of the data is kept. They are like `data`, but no iterator.
    - `patience`: stop after so many validations in a row without a lower value.
    - `save`: a file, written by `fl.save` at the end of the call, after Ctrl-C too, and every `save_every`
        steps: the parameters, the states, the number of steps, the losses and metrics, the validations and
        the best parameters. Nothing is written in which parameters are not finite.
    - `resume`: such a file to go on from: the steps up to `steps` that are left are taken. If it does not
        exist, the run starts anew. Usually it is the path of `save`, and the same script can be killed and
        run again. `opt_state` and `start` come from it, and an iterator of batches is taken to be at its
        start. It may have been written on another number of devices.
    - `mesh`: the devices to train on, such as `jax.make_mesh((8,), ("data",))`. Vectors of parameters and
        moments lie in even parts on them, batches are cut along their samples, and the result is that of one
        device. `ps` may be a `ShardedVector` of `fl.shard`: then results have such vectors.
    - `axis`: the axis of the mesh along which vectors and batches are cut.
    - `per_device`: whether each device evaluates the loss for its part of the batch, as
        `fl.sharded_value_and_grad` says: with fewer collectives, and steps of its own in a solve.

    With several processes, all of which call this with the same arguments, host arrays and iterators have
    this process's part of a batch, `fl.batches` all data; arrays over all devices are taken as they are. The
    first process shows the bar and writes the file; Ctrl-C is an ordinary one.

    **Returns:** a `TrainResult`. Ctrl-C ends the run early, with a warning: the result is that of the steps
    up to the end of the chunk.

    **Raises:** `NonFiniteLossError`, with the step and the last good parameters, for a loss or new parameters
    that are not finite; `ValueError` if the batches come to an end before the steps do, differ in shape, or
    have a number of samples that devices do not divide, and for processes with other parameters or states;
    `TypeError` for a state that changes its type in each step, for data that are no batches of arrays, and
    for parameters that are not floating; `RuntimeError` for a solve that fails, with its message and the
    steps among which it was.
    These, and exceptions of the callback, the data and the validation, have the result so far as `result`.

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
    check_arguments(loss, ps, optimizer, callback)
    steps = checked(Size, "train_loop: steps", steps)
    start = checked(Count, "train_loop: start", start)
    if resume is not None and (start or opt_state is not None):
        raise ValueError("train_loop: expected no start and no opt_state with resume, which has its own")
    chunk = checked(Size, "train_loop: chunk", chunk)
    progress = checked(Flag, "train_loop: progress", progress)
    placing = placing_of(mesh, axis, checked(Flag, "train_loop: per_device", per_device), ps)
    validator = _validator(validate, patience, placing)
    plan = Plan(start + steps, chunk, validator, *_writer(save, save_every), callback)
    ps, st = placing.parameters(strong(ps)), placing.everywhere(strong(as_record(st)))
    types = jax.eval_shape(lambda: ps)
    if _sees_no_leaves(optimizer, placing.types_shown(types)):
        warnings.warn(_BY_LEAF, UserWarning, stacklevel=2)
    saved = None if resume is None else load_result(resume, types, st, optimizer, placing)
    if saved is None:
        carry = _first_carry(ps, st, optimizer, placing, opt_state)
    else:
        start = _expect_steps(saved.step, steps)
        carry = _first_carry(saved.ps, saved.st, optimizer, placing, saved.opt_state)
    placing.expect_same_plan(
        start=start,
        steps=plan.end,
        chunk=chunk,
        save_every=plan.save_every,
        validate=validator and validator.every,
        patience=patience,
    )
    source = source_of(data, start, saved is not None, placing)
    with _bar(plan.end, start, progress and placing.is_first) as bar:
        program = compiled_steps(loss, optimizer, source.pick, placing)
        run = Run(program, source, plan, bar, carry, start, opt_state)
        if saved is not None and resume is not None:
            given = jax.eval_shape(lambda: _first_carry(saved.ps, st, optimizer, placing))
            run.restore(saved, given, is_saved=save is not None and _same(save, resume))
        return _through(run)


def _through(run: Run) -> TrainResult:
    """Return the result of a run, also of one that is interrupted."""
    stopped: Stopped
    try:
        stopped = run.go()
        run.save()
    except KeyboardInterrupt:
        if run.placing.processes > 1:  # the others are elsewhere
            raise
        run.settle()
        run.save()
        stopped = "interrupt"
    except NonFiniteLossError:
        raise
    except Exception as error:
        run.attach_to(error)
        raise
    result = run.result(stopped)
    if result is None:
        raise KeyboardInterrupt("train_loop: the parameters were lost")
    if stopped == "interrupt":
        run.bar.set_description(f"interrupted after step {run.step}")
        warnings.warn(
            f"train_loop: interrupted after step {run.step} of {run.plan.end}; this is the result so far",
            UserWarning,
            stacklevel=3,
        )
    return result


def _validator(
    validate: tuple[Loss, PyTree, int] | None, patience: int | None, placing: Placing
) -> Validator | None:
    if patience is not None:
        patience = checked(Annotated[int, integer(1)], "train_loop: patience", patience)
        if validate is None:
            raise ValueError("train_loop: expected validate with patience, found none")
    return None if validate is None else Validator(validate, patience, placing)


def _writer(
    save: Path | None, save_every: int | None
) -> tuple[Callable[[TrainResult], None] | None, int | None]:
    """Return what writes the file, and after how many steps."""
    if save_every is not None:
        save_every = checked(Size, "train_loop: save_every", save_every)
        if save is None:
            raise ValueError("train_loop: expected save with save_every, found none")
    if save is not None and not os.path.isdir(folder := os.path.dirname(os.path.abspath(save))):
        raise FileNotFoundError(f"train_loop: expected a folder for the file to save, found none: {folder}")
    return None if save is None else functools.partial(save_result, save), save_every


def _same(a: Path, b: Path) -> bool:
    return os.path.abspath(a) == os.path.abspath(b)


def _expect_steps(found: int, steps: int) -> int:
    if found > steps:
        raise ValueError(
            f"train_loop: expected a file of at most {steps} steps to resume, found one of {found}; steps is "
            "the number of steps of the whole run"
        )
    return found


def _first_carry(
    ps: Params, st: Record, optimizer: Optimizer, placing: Placing, opt_state: PyTree = None
) -> Carry:
    """Return the carry of the first step. **Raises:** `ValueError` for the state of another optimiser."""
    if opt_state is None:
        opt_state = strong(placing.optimizer_state(optimizer, ps))
    else:
        opt_state = placing.parameters(strong(opt_state))
        expected = jax.eval_shape(lambda: strong(placing.optimizer_state(optimizer, ps)))
        if jax.tree.structure(opt_state) != jax.tree.structure(expected) or differences(expected, opt_state):
            raise ValueError(
                "train_loop: expected the opt_state of this optimiser and these parameters, found another "
                f"(before: as the optimiser makes it, after: as given): {differences(expected, opt_state)}"
            )
    return Carry(ps, st, opt_state, (ps, st))


_BY_LEAF = (
    "train_loop: this optimiser works leaf by leaf, and a ComponentVector is one leaf: it takes other steps "
    "than on the tree of its leaves. `fl.per_leaf(optimizer)` shows it the leaves"
)


def _sees_no_leaves(optimizer: Optimizer, types: Params) -> bool:
    """Tell whether to warn. The trial is compiled, so its answer is kept."""
    leaves, structure = jax.tree.flatten(types)
    try:
        return _tried(optimizer, structure, tuple(leaves))
    except TypeError:  # an optimiser that cannot be hashed
        return _try(optimizer, structure, leaves)


def _try(optimizer: Optimizer, structure: Any, leaves: Iterable[jax.ShapeDtypeStruct]) -> bool:
    # One number each, seen as an array of this shape.
    zeros = [np.broadcast_to(np.zeros((), x.dtype), x.shape) for x in leaves]
    return differs_by_leaf(optimizer, structure.unflatten(zeros))


_tried = functools.lru_cache(maxsize=64)(_try)


def _bar(steps: int, start: int, progress: bool) -> "tqdm.tqdm":
    """Return the bar, which is off without `progress`, and lines every ten seconds without a terminal."""
    if progress:  # imported here, as optax
        from tqdm.auto import tqdm
    else:  # which does not look for what a notebook draws a bar with
        from tqdm import tqdm
    in_notebook = any(kind.__module__ == "tqdm.notebook" for kind in tqdm.__mro__)
    to_a_file = progress and not in_notebook and not sys.stderr.isatty()
    options: dict[str, Any] = {"file": _Lines(), "mininterval": 10.0} if to_a_file else {}
    disable = not progress
    return tqdm(total=steps, initial=start, desc="training", unit="step", disable=disable, **options)


class _Lines:
    """A file in which each state of a bar is a line: a log does not go back to the start of one."""

    def write(self, text: str) -> None:
        if text := text.strip("\r\n "):
            sys.stderr.write(text + "\n")

    def flush(self) -> None:
        sys.stderr.flush()
