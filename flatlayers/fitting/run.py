"""`Run`: the chunks of a training loop, one after another, and what was reached so far."""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from ..types import Array, Params, PyTree
from ..vectors.names import listing
from ..vectors.record import Record
from .data import Chunk, Source, Stacked
from .interrupts import deferred_interrupts
from .result import (
    NonFiniteLossError,
    Stopped,
    TrainResult,
    attach,
    loss_not_finite,
    parameters_not_finite,
    told_plainly,
)
from .steps import FINE, LOSS, Carry, Log, Steps, changed_types, differences
from .validation import Validator


if TYPE_CHECKING:
    import tqdm


# Below it, the arrays that a chunk starts from are kept: an error in its steps then loses no others.
_SMALL_BYTES = 2**26


@dataclasses.dataclass(frozen=True)
class Plan:
    """The ends of the chunks of a run, and the things to do between them."""

    end: int
    chunk: int
    validator: Validator | None = None
    save: Callable[[TrainResult], None] | None = None
    save_every: int | None = None
    callback: Callable[..., object] | None = None

    @property
    def longest(self) -> int:
        """The most steps in a chunk."""
        every = (self.validator.every if self.validator else None, self.save_every)
        return min([self.chunk, *(n for n in every if n is not None)])

    def next_stop(self, step: int) -> int:
        """Return the number of steps at the end of the chunk that starts after `step` of them."""
        every = [self.validator.every if self.validator else None, self.save_every]
        multiples = [n * (step // n + 1) for n in every if n is not None]
        return min(self.end, step + self.chunk, *multiples)


@dataclasses.dataclass(frozen=True)
class _InFlight:
    """A chunk that was started: the places of its log from `first` to `last`, and what it started from."""

    log: Log
    first: int
    last: int
    before: Carry | None


class Run:
    """A run of `plan`: `step` steps were taken, and `carry` is what they made.

    The arrays in `lent` belong to the caller, as do the first parameters and the first state.
    """

    def __init__(
        self,
        steps: Steps,
        source: Source,
        plan: Plan,
        bar: "tqdm.tqdm",
        carry: Carry,
        step: int,
        lent: PyTree = None,
    ):
        self.steps, self.source, self.plan, self.bar = steps, source, plan, bar
        self.placing = steps.placing
        self.carry: Carry | None = carry
        self.step = self.start = step
        # At least two: a program with one place is another one, with other bits. Batches that are stacked
        # fill all places; other data have as many in each call, for which nothing is then compiled again.
        stacked = isinstance(source, Stacked)
        self.size = max(2, min(plan.longest, plan.end - step) if stacked else plan.longest)
        self.losses: list[np.ndarray] = []
        self.metrics: dict[str, list[np.ndarray]] = {}
        self._saved = step
        self._restored: TrainResult | None = None
        # The types that the state has to have after the first step of a run that is gone on with.
        self._given_to_check: Carry | None = None
        self.in_place = sum(x.nbytes for x in jax.tree.leaves(carry[:3])) > _SMALL_BYTES
        self._given = (carry.ps, carry.st)
        self._lent = lent
        # The first steps before which only what was given had a finite loss.
        self._given_until = step
        self._in_flight: _InFlight | None = None
        self._is_first = True
        self._told = "training"  # as the bar starts

    def go(self) -> Stopped:
        """Take the steps of the plan, those of the next chunk's batches fetched while a chunk runs."""
        end, validator = self.plan.end, self.plan.validator
        # A run that was stopped between a chunk and its validation.
        if self._restored and validator and validator.is_due(self.step):
            self._validate()
            self._saved = -1
        if validator and validator.out_of_patience():
            return "patience"
        wanted, chunk = self._fetch(self.step)
        while self.step < end:
            after = self.step + chunk.count
            complete = chunk.count == wanted
            if chunk.count:
                self._dispatch(chunk)
            if complete and after < end:
                wanted, chunk = self._fetch(after)
            self.settle()
            if not complete:
                empty = "; data that can be gone through again were empty" if not self.step else ""
                raise ValueError(
                    f"train_loop: expected a batch for each step, found none for step {self.step}{empty}"
                )
            if stopped := self._between_chunks():
                return stopped
        return "steps"

    def _fetch(self, step: int) -> tuple[int, Chunk]:
        """Return the number of steps of the next chunk, and its data."""
        count = self.plan.next_stop(step) - step
        return count, self.source.take(step, count, self.size) if count > 0 else Chunk(None, 0)

    def _dispatch(self, chunk: Chunk) -> None:
        """Start the steps of a chunk."""
        if self._given_to_check is not None:
            self._check_restored(self._given_to_check, chunk.data)
        first = self._settle_types(chunk.data) if self._is_first else 0
        if first == chunk.count or self.carry is None:
            return
        if self.steps.is_new(self.carry, chunk.data, self.size):
            self._tell("compiling")
        program = self.steps.in_place if self.in_place else self.steps.beside
        with deferred_interrupts():
            before = None if self.in_place else self.carry
            with told_plainly(self._steps_text(chunk.count - first)):
                self.carry, log = program(self.carry, chunk.data, first, chunk.count, self.size)
            self._in_flight = _InFlight(log, first, chunk.count, before)
        self._tell("training")

    def _tell(self, doing: str) -> None:
        """Say on the bar what the run does, if that is another thing than before."""
        if doing != self._told:
            self._told = doing
            self.bar.set_description(doing)

    def _check_restored(self, given: Carry, data: PyTree) -> None:
        """Raise unless the state of the file is what a first step makes of the given one."""
        self._given_to_check = None
        assert self.carry is not None
        if problem := differences(self.steps.after_one(given, data).st, self.carry.st):
            raise ValueError(
                "train_loop: expected the file to have the state of this model after its first step, found "
                f"another (before: that of the model, after: that of the file): {problem}"
            )

    def _settle_types(self, data: PyTree) -> int:
        """Take the first step alone if it changes the types of the carry. Return whether, as a number."""
        self._is_first = False
        assert self.carry is not None
        taken = 0
        if changed_types(self.carry, self.steps.after_one(self.carry, data)):
            with deferred_interrupts():
                before = self.carry
                with told_plainly(self._steps_text(1)):
                    self.carry, log = self.steps.alone(before, data)
                log = jax.tree.map(lambda x: x[None], log)
                self._in_flight = _InFlight(log, 0, 1, before)
            self.settle()
            self._given_until = self.step
            assert self.carry is not None
            ps, st, opt_state, old = self.carry
            self.carry = Carry(ps, st, opt_state, (old[0], st))
            self._expect_fixed_types(before, data)
            taken = 1
        if self.in_place:
            self.carry = _owned(self.carry, (self._given, self._lent))
        return taken

    def _expect_fixed_types(self, given: Carry, data: PyTree) -> None:
        """Raise unless a further step keeps the types, after one that changed those of what was given."""
        assert self.carry is not None
        problem, cause = "", None
        try:
            problem = changed_types(self.carry, self.steps.after_one(self.carry, data))
        except Exception as error:  # of the loss, in words that do not tell that it is the second step
            changed = changed_types(given, self.carry)
            problem, cause = f"one that the loss does not take in the second step: {changed}", error
        if problem:
            raise TypeError(
                "train_loop: expected the state to keep its names, shapes and dtypes from the second step "
                f"on, found {problem}"
            ) from cause

    def settle(self) -> None:
        """Wait for the chunk in flight. **Raises:** `NonFiniteLossError`."""
        pending, self._in_flight = self._in_flight, None
        if pending is None:
            return
        with deferred_interrupts():
            try:
                with told_plainly(self._steps_text(pending.last - pending.first)):
                    log: Any = jax.device_get(pending.log)
            except Exception:
                self.carry = pending.before
                raise
            failures = log.failure[pending.first : pending.last]
            failed = np.flatnonzero(failures != FINE)
            taken = int(failed[0]) if failed.size else len(failures)
            of_loss = failed.size > 0 and failures[taken] == LOSS
            places = slice(pending.first, pending.first + taken + (failed.size > 0 and not of_loss))
            if self._restored and set(log.metrics) != set(self._restored.metrics):
                raise ValueError(
                    f"train_loop: expected the metrics {listing(self._restored.metrics)} of the run that is "
                    f"resumed, found {listing(log.metrics)}"
                )
            self.losses.append(log.value[places])
            for name, values in log.metrics.items():
                self.metrics.setdefault(name, []).append(values[places])
            self.step += taken
        if failed.size:
            raise self._failure(of_loss, float(log.value[pending.first + taken]))
        self.bar.set_postfix(self._shown(), refresh=False)
        self.bar.update(taken)

    def _steps_text(self, count: int) -> str:
        """Return the words for the next steps."""
        return (
            f"one of the steps {self.step} to {self.step + count - 1}" if count > 1 else f"step {self.step}"
        )

    def _validate(self) -> None:
        assert self.plan.validator is not None
        with told_plainly(f"the validation after {self.step} steps"):
            self.plan.validator(self.step, *self._reached())

    def _failure(self, of_loss: bool, value: float) -> NonFiniteLossError:
        """Return the error for the step that is not finite."""
        assert self.carry is not None
        _, _, opt_state, (ps, st) = self.carry
        if self.step <= (self._given_until if of_loss else self.start):
            ps, st = self._given
        failed, self.carry = self.step, Carry(ps, st, opt_state, (ps, st))
        if of_loss:
            self.step = max(self.step - 1, self.start)
        result = self.result("error")
        assert result is not None
        return loss_not_finite(failed, value, result) if of_loss else parameters_not_finite(failed, result)

    def _shown(self) -> dict[str, str]:
        """Return what the bar shows: the means of the last chunk, and the last validation."""
        numbers = {"loss": self.losses[-1].mean(), **self._chunk_metrics()}
        if self.plan.validator and self.plan.validator.values:
            numbers["validation"] = self.plan.validator.values[-1]
        return {name: f"{number:.4g}" for name, number in numbers.items()}

    def _chunk_metrics(self) -> dict[str, float]:
        return {name: float(values[-1].mean()) for name, values in self.metrics.items()}

    def _between_chunks(self) -> Stopped | None:
        """Validate, save and call back, each at its time. Return why to stop."""
        plan, stopped = self.plan, None
        ps, st = self._reached()
        if plan.validator and self.step % plan.validator.every == 0:
            self._validate()
            self.bar.set_postfix(self._shown(), refresh=False)
            stopped = "patience" if plan.validator.out_of_patience() else None
        if plan.save_every and self.step % plan.save_every == 0:
            self.save()
        if plan.callback is not None:
            if self.in_place:  # the next chunk is written in its place, and a callback may keep this one
                ps, st = jax.tree.map(jnp.copy, (ps, st))
            ps, metrics = self.placing.given_back(ps), [self._chunk_metrics()] if self.metrics else []
            answer = plan.callback(self.step, float(self.losses[-1][-1]), ps, st, *metrics)
            if self.placing.agreed(_is_true(answer)):
                stopped = "callback"
        return stopped

    def restore(self, result: TrainResult, given: Carry, *, is_saved: bool) -> None:
        """Go on from a result: with its losses, metrics and validations.

        `given`: the types of the script's, whose state may be that before the first step. `is_saved`: whether
        the file that it is from is the one to be written.
        """
        self._restored = result
        self._saved = result.step if is_saved else -1
        if differences(given.st, result.st):
            self._given_to_check = given
        self.losses.append(result.losses)
        self.metrics = {name: [values] for name, values in result.metrics.items()}
        if self.plan.validator:
            self.plan.validator.restore(result.validation, result.best)

    def save(self) -> None:
        """Write what was reached to the file, if there is one and it does not have it."""
        result = self._result("steps")
        if self.plan.save and result is not None and self.step > self._saved:
            self.plan.save(result)
            self._saved = self.step

    def _reached(self) -> tuple[Params, Record]:
        """Return the parameters and the state."""
        assert self.carry is not None
        return self.carry.ps, self.carry.st

    def result(self, stopped: Stopped) -> TrainResult | None:
        """Return what was reached, with vectors of the kind that was given; `None` if it was lost."""
        result = self._result(stopped)
        if result is None:
            return None
        give, best = self.placing.given_back, result.best
        return dataclasses.replace(
            result,
            ps=give(result.ps),
            opt_state=give(result.opt_state),
            best=best and dataclasses.replace(best, ps=give(best.ps)),
        )

    def _result(self, stopped: Stopped) -> TrainResult | None:
        """Return what was reached, as it lies; `None` if it was lost."""
        carry, validator = self.carry, self.plan.validator
        if carry is None or any(x.is_deleted() for x in jax.tree.leaves(carry)):
            return None
        return TrainResult(
            *carry[:3],
            losses=np.concatenate(self.losses) if self.losses else np.zeros(0),
            step=self.step,
            metrics={name: np.concatenate(values) for name, values in self.metrics.items()},
            validation=validator.result() if validator else self._restored and self._restored.validation,
            best=validator.best if validator else self._restored and self._restored.best,
            stopped=stopped,
        )

    def attach_to(self, error: Exception) -> None:
        """Let an exception carry what was reached, the chunk in flight included."""
        with contextlib.suppress(Exception):
            self.settle()
        # Of several processes the others may not have come to this error: nothing is gathered.
        alone = self.placing.processes == 1
        attach(error, self.result("error") if alone else self._result("error"))


def _owned(carry: Carry, given: PyTree) -> Carry:
    """Return a carry that can be given up: with copies of what is given or is in it twice."""
    seen = set(map(_place, jax.tree.leaves(given)))

    def own(x: Array) -> Array:
        if _place(x) in seen:
            return jnp.copy(x)
        seen.add(_place(x))
        return x

    return jax.tree.map(own, carry)


def _place(x: Array) -> int:
    """Return the place of an array in memory, or a number of the object where there is no single one."""
    try:
        return x.unsafe_buffer_pointer()
    except Exception:  # keys, and arrays on several devices
        return id(x)


def _is_true(answer: object) -> bool:
    """Tell whether a callback wants to stop: `True`, of Python, NumPy or JAX."""
    if isinstance(answer, jax.Array | np.ndarray):
        return answer.ndim == 0 and answer.dtype == bool and bool(answer)
    return isinstance(answer, bool | np.bool_) and bool(answer)
