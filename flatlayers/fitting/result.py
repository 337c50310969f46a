"""`TrainResult`, and the errors that carry one."""

import contextlib
import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Generic, Literal, TypeVar

import jax
import numpy as np

from ..types import PyTree
from ..vectors.record import Record


# Why a call of `train_loop` took no more steps.
Stopped = Literal["steps", "callback", "patience", "interrupt", "error"]
# Parameters keep their type: a `ComponentVector`, or any pytree.
P = TypeVar("P")


@dataclasses.dataclass(frozen=True)
class Best(Generic[P]):
    """The parameters and the state with the lowest validation value, and the number of steps to them.

    >>> import flatlayers as fl
    >>> ps = fl.ComponentVector.of({"a": 1.0})
    >>> fl.Best(ps, fl.Record(), step=100, value=0.5).step
    100
    """

    ps: P
    st: Record
    step: int
    value: float


@dataclasses.dataclass(frozen=True)
class Validation:
    """The validations of a run: after how many steps each was, its value and its metrics.

    >>> import numpy as np
    >>> import flatlayers as fl
    >>> fl.Validation(np.array([10, 20]), np.array([0.5, 0.3]), {}).steps.tolist()
    [10, 20]
    """

    steps: np.ndarray
    values: np.ndarray
    metrics: Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True, repr=False)
class TrainResult(Generic[P]):
    """The result of `fl.train_loop`. Its text is one line.

    **Attributes:**

    - `ps`, `st`: the parameters and the state after the last step.
    - `opt_state`: the optimiser's state. `train_loop(..., opt_state=result.opt_state, start=result.step)`
        goes on.
    - `losses`: the loss of each step of this call, before the step was taken; after `resume`, of the steps
        before it too.
    - `step`: the number of steps taken altogether, those before this call included.
    - `metrics`: a mapping of names to arrays like `losses`, if the loss returns metrics.
    - `validation`: a `Validation` with `steps`, `values` and `metrics`; `None` without `validate`.
    - `best`: a `Best` with the `ps`, `st`, `step` and `value` of the lowest validation value; `None` as long
        as there is none.
    - `stopped`: why there were no more steps: `"steps"`, `"callback"`, `"patience"`, `"interrupt"`, or
        `"error"` in the result that an exception carries.

    >>> import optax
    >>> import flatlayers as fl
    >>> ps = fl.ComponentVector.of({"a": 1.0})
    >>> result = fl.train_loop(
    ...     lambda ps, st, batch: (ps.a**2, st), ps, {}, optax.sgd(0.25), steps=3, progress=False
    ... )
    >>> result.losses.tolist(), float(result.ps.a), result.step
    ([1.0, 0.25, 0.0625], 0.125, 3)
    >>> result
    TrainResult(step=3, last loss 0.0625, 1 parameter, stopped='steps')
    """

    ps: P
    st: Record
    opt_state: PyTree
    losses: np.ndarray
    step: int
    metrics: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    validation: Validation | None = None
    best: Best[P] | None = None
    stopped: Stopped = "steps"

    def __repr__(self) -> str:
        size = sum(np.size(leaf) for leaf in jax.tree.leaves(self.ps))
        parts = [f"step={self.step}"]
        parts += [f"last loss {self.losses[-1]:.4g}"] if len(self.losses) else []
        parts += [f"best {self.best.value:.4g} in step {self.best.step}"] if self.best is not None else []
        parts += [f"{size:_} parameter{'s' * (size != 1)}", f"stopped={self.stopped!r}"]
        return f"TrainResult({', '.join(parts)})"


class NonFiniteLossError(RuntimeError):
    """A loss, or new parameters, that are not finite, made in the step `step`.

    The message says which of the two. `result` is a `TrainResult`, and `ps`, `st`, `opt_state` and `losses`
    are its own:

    - `ps`, `st`: those that gave the last finite loss. If that of the first step of the call is not finite,
        those that were given.
    - `opt_state`: the optimiser's state after the step, in which there may be NaN: of two states of this
        size only one is kept. Go on with a new one, or with that of a file.
    - `losses`: the finite ones.

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

    def __init__(self, message: str, step: int, result: TrainResult):
        super().__init__(message)
        self.step, self.result = step, result
        self.ps, self.st = result.ps, result.st
        self.opt_state, self.losses = result.opt_state, result.losses

    def __reduce__(self) -> tuple[type, tuple[str, int, TrainResult]]:
        return type(self), (str(self), self.step, self.result)


_ADVICE = "A smaller learning rate or `optax.clip_by_global_norm` may help"


def loss_not_finite(step: int, value: float, result: TrainResult) -> NonFiniteLossError:
    """Return the error for a loss."""
    return NonFiniteLossError(
        f"train_loop: expected a finite loss, found {value} in step {step}; the exception has the "
        f"parameters of the last finite one as `ps`. {_ADVICE}",
        step,
        result,
    )


def parameters_not_finite(step: int, result: TrainResult) -> NonFiniteLossError:
    """Return the error for parameters."""
    return NonFiniteLossError(
        f"train_loop: expected finite parameters, found NaN or infinity after step {step}, whose loss is "
        f"finite: {result.losses[-1]:.6g}; the exception has the parameters before it as `ps`. {_ADVICE}",
        step,
        result,
    )


@contextlib.contextmanager
def told_plainly(place: str) -> Iterator[None]:
    """Let a check that raises in a compiled program be a `RuntimeError` of its message, with the `place`."""
    try:
        yield
    except Exception as error:  # of JAX: a `JaxRuntimeError` or a `ValueError`
        message = _message_at_run_time(error)
        if message is None:
            raise
        raise RuntimeError(f"{message}\ntrain_loop: this was raised in {place}") from error


def _message_at_run_time(error: Exception) -> str | None:
    """Return the message of a check that raised in a compiled program; `None` if none did.

    JAX has it as text alone, between the traceback of the callback and Equinox's advice.
    """
    found = re.search(r"EquinoxRuntimeError: (.*?)\s*\n-{20}\n", str(error), re.DOTALL)
    return found and found[1]


def attach(error: BaseException, result: TrainResult | None) -> None:
    """Let an exception carry what was reached before it."""
    if result is None:
        error.add_note(
            "train_loop: the parameters were lost, since a large vector is trained in place; "
            "`save=` and `save_every=` keep them in a file"
        )
        return
    error.result = result  # pyright: ignore[reportAttributeAccessIssue]
    if len(result.losses):
        error.add_note(f"train_loop: `error.result` of this exception has what {result.step} steps reached")
