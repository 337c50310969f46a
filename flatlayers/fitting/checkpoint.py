"""Checkpoints of a training loop: a run in a file, and a run that goes on from one."""

import dataclasses
import os
from typing import Any

import jax

from ..io.errors import LayoutMismatchError
from ..io.files import Path, describe_file, load, save
from ..types import Params, PyTree, State
from ..vectors.names import listing
from .per_leaf import Optimizer
from .placing import Placing
from .result import Best, TrainResult, Validation
from .steps import strong


_PARTS = {"ps", "st", "opt_state", "step", "losses", "metrics", "validation", "best"}


def save_result(path: Path, result: TrainResult) -> None:
    """Write a result to a file, all or nothing. Of several processes all have to call it."""
    validation, best = result.validation, result.best
    save(
        path,
        ps=result.ps,
        st=result.st,
        opt_state=result.opt_state,
        step=result.step,
        losses=result.losses,
        metrics=dict(result.metrics),
        validation=None if validation is None else dataclasses.asdict(validation),
        best=None if best is None else {f.name: getattr(best, f.name) for f in dataclasses.fields(best)},
    )


def load_result(
    path: Path, ps: Params, st: State, optimizer: Optimizer, placing: Placing
) -> TrainResult | None:
    """Return the result in a file, in the types of these parameters, in place; `None` if there is no file.

    **Raises:** `LayoutMismatchError` for another model or another optimiser, `ValueError` for a file that is
    not of a run.
    """
    if not os.path.exists(path):
        return None
    types = describe_file(path)
    if missing := _PARTS - set(types):
        raise ValueError(
            f"train_loop: expected a file of train_loop to resume, found no {listing(missing)} in it"
        )
    opt_state = jax.eval_shape(lambda ps: strong(placing.optimizer_state(optimizer, ps)), ps)
    try:
        parts = _load(path, types["best"] is not None, ps, st, opt_state)
    except LayoutMismatchError:  # of a state that has changed its type in the first step
        parts = load(path, ps=ps, opt_state=opt_state)
    validation, best = parts["validation"], parts["best"]
    if best is not None:
        best = {**best, "ps": placing.parameters(best["ps"]), "st": placing.everywhere(best["st"])}
    return TrainResult(
        placing.parameters(parts["ps"]),
        placing.everywhere(parts["st"]),
        placing.parameters(parts["opt_state"]),
        *(parts["losses"], parts["step"]),
        metrics=parts["metrics"],
        validation=None if validation is None else Validation(**validation),
        best=None if best is None else Best(**best),
    )


def _load(path: Path, has_best: bool, ps: Params, st: State, opt_state: PyTree) -> dict[str, Any]:
    best: dict[str, Any] = {"best": {"ps": ps, "st": st, "step": 0, "value": 0.0}} if has_best else {}
    return load(path, ps=ps, st=st, opt_state=opt_state, **best)  # pyright: ignore[reportArgumentType]
