"""Validation during training: a loss in test mode, the best parameters, and when to stop."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..core.fields import Size, checked
from ..core.setup import testmode
from ..types import Array, Params, PyTree
from ..vectors.names import describe, listing
from ..vectors.record import Record
from .data import Batches, as_arrays, several
from .placing import Placing
from .result import Best, Validation
from .steps import Loss, evaluate


class Validator:
    """Evaluates `validate=(loss, data, every)`, and keeps the values and the best parameters."""

    def __init__(self, validate: tuple[Loss, PyTree, int], patience: int | None, placing: Placing):
        if not isinstance(validate, tuple) or len(validate) != 3 or not callable(validate[0]):
            raise TypeError(f"train_loop: expected validate=(loss, data, every), found {describe(validate)}")
        self._loss, self._data, every = validate
        self.every = checked(Size, "train_loop: every, the third of validate", every)
        self._patience, self._placing = patience, placing
        if isinstance(self._data, Iterator):
            raise TypeError(
                "train_loop: expected validation data that can be gone through again and again, found an "
                f"iterator, {type(self._data).__name__}; a list of its batches would do"
            )
        if isinstance(self._data, Batches) and self._data.repeats:
            raise ValueError(
                f"train_loop: expected validation batches of a size that divides the {self._data.length} "
                f"samples, or drop_last=True, found {self._data.size}: the last batch has samples twice"
            )
        if not several(self._data):
            arrays = as_arrays(self._data, "train_loop: expected validation data to be arrays or batches")
            self._data = placing.to_validate(arrays)
        self.steps: list[int] = []
        self.values: list[float] = []
        self.metrics: dict[str, list[float]] = {}
        self.best: Best | None = None

    def __call__(self, step: int, ps: Params, st: Record) -> float:
        """Return the mean over all batches; keep copies of the best parameters and state."""
        value, means = self._means(ps, testmode(st))
        if self.steps and set(means) != set(self.metrics):
            raise ValueError(
                f"train_loop: expected the validation metrics {listing(self.metrics)} of those before, found "
                f"{listing(means)}"
            )
        self.steps.append(step)
        self.values.append(value)
        for name, metric in means.items():
            self.metrics.setdefault(name, []).append(metric)
        if np.isfinite(value) and (self.best is None or value < self.best.value):
            ps, st = jax.tree.map(jnp.copy, (ps, st))
            self.best = Best(ps, st, step, value)
        return value

    def is_due(self, step: int) -> bool:
        """Tell whether there should have been a validation after so many steps, and was none."""
        return step > 0 and step % self.every == 0 and step not in self.steps

    def restore(self, validation: Validation | None, best: Best | None) -> None:
        """Go on from the validations of a run that was saved."""
        if validation is not None:
            self.steps, self.values = validation.steps.tolist(), validation.values.tolist()
            self.metrics = {name: values.tolist() for name, values in validation.metrics.items()}
        self.best = best

    def result(self) -> Validation:
        """Return all values so far."""
        metrics = {name: np.array(values) for name, values in self.metrics.items()}
        return Validation(np.array(self.steps, int), np.array(self.values), metrics)

    def out_of_patience(self) -> bool:
        """Tell whether there were enough validations since the best, or altogether without any."""
        best = 0 if self.best is None else self.best.step
        return self._patience is not None and sum(step > best for step in self.steps) >= self._patience

    def _means(self, ps: Params, st: Record) -> tuple[float, dict[str, float]]:
        """Return the means of the loss and of its metrics."""
        evaluated = compiled_loss(self._loss, self._placing)
        found = [self._placing.settled(evaluated(ps, st, batch)) for batch in self._batches()]
        if not found:
            raise ValueError("train_loop: expected at least one batch to validate with, found none")
        metrics = {name: float(np.mean([float(one[name]) for _, one in found])) for name in found[0][1]}
        return float(np.mean([float(value) for value, _ in found])), metrics

    def _batches(self) -> Any:
        if isinstance(self._data, Batches):
            return (self._placing.to_validate(batch, is_whole=True) for batch in self._data)
        if not several(self._data):
            return [self._data]
        expected = "train_loop: expected a validation batch of arrays"
        return (self._placing.to_validate(as_arrays(batch, expected)) for batch in self._data)


def compiled_loss(loss: Loss, placing: Placing) -> Any:
    """Return a function of `(ps, st, batch)` that gives the loss, and the metrics by name."""
    try:
        hash(loss)
    except TypeError:
        return _compile(loss, placing)
    return _kept(loss, placing)


def _compile(loss: Loss, placing: Placing) -> Any:
    evaluate_loss = placing.value(functools.partial(evaluate, loss))

    def values(ps: Params, st: Record, batch: PyTree) -> tuple[Array, dict[str, Array]]:
        value, (_, metrics) = evaluate_loss(ps, st, batch)
        return value, metrics

    return jax.jit(values)


_kept = functools.lru_cache(maxsize=16)(_compile)
