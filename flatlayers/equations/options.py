"""The options of a solve, as fields of a layer: values with a hash, checked when they are assigned."""

import math
from collections.abc import Sequence
from typing import Annotated, TypeVar

import diffrax
import numpy as np
from jax.core import Tracer

from ..adjoints import _diffrax, _modes
from ..adjoints._discrete import stages_in
from ..adjoints.checkpoint import AdaptiveCheckpointAdjoint
from ..adjoints.gauss import GaussAdjoint
from ..core.data_axis import current_data_axis
from ..core.fields import Check
from ..core.values import Hashable, hashable, plain
from ..types import PyTree


T = TypeVar("T", bound=PyTree)


def option(kind: type, expected: str) -> Check:
    """Return the check of a field that holds an object of diffrax; one with arrays in it becomes hashable."""

    def accept(value: object) -> object:
        if not isinstance(plain(value), kind):
            raise TypeError
        return hashable(value)

    return Check(expected, accept)


def _end(value: float) -> float:
    if isinstance(value, bool | np.bool_ | str | Tracer) or np.ndim(value):
        raise TypeError
    if math.isnan(value):
        raise ValueError
    return float(value)


# The end of a solve, which is infinite if an event ends it.
End = Annotated[float, Check("a finite number, or an infinite one with an event", _end)]
Solver = Annotated[
    diffrax.AbstractSolver | Hashable,
    option(diffrax.AbstractSolver, "a solver of diffrax, such as diffrax.Tsit5()"),
]
Controller = Annotated[
    diffrax.AbstractStepSizeController | Hashable,
    option(
        diffrax.AbstractStepSizeController,
        "a step size controller of diffrax, such as diffrax.PIDController(rtol=1e-4, atol=1e-6)",
    ),
]
Adjoint = Annotated[
    diffrax.AbstractAdjoint | Hashable,
    option(diffrax.AbstractAdjoint, "an adjoint of diffrax, such as fl.AdaptiveCheckpointAdjoint()"),
]
Event = Annotated[
    diffrax.Event | Hashable, option(diffrax.Event, "an event of diffrax, such as diffrax.Event(function)")
]
SaveAt = diffrax.SaveAt | Sequence[float] | np.ndarray | Hashable


def with_tolerances(
    where: str, controller: PyTree, default: PyTree, rtol: float | None, atol: float | None
) -> PyTree:
    """Return the controller of tolerances, in the place of a default one.

    **Raises:** `ValueError` if another controller is given too, which has tolerances of its own.
    """
    if plain(controller) != plain(default):
        raise ValueError(f"{where}: expected rtol and atol, or a stepsize_controller, found both")
    # Those of the default of all solver layers.
    return diffrax.PIDController(rtol=1e-4 if rtol is None else rtol, atol=1e-6 if atol is None else atol)


class Throwing(diffrax.AbstractAdjoint):
    """An adjoint whose solve on the way back, if it has one, raises if it fails.

    Diffrax's `throw=True` says so too, but sends the solution through a callback, to one device.
    """

    adjoint: diffrax.AbstractAdjoint

    def loop(self, **options: PyTree) -> PyTree:
        """Run the solve. Called by `diffrax.diffeqsolve`."""
        return self.adjoint.loop(**{**options, "throw": True})


def default_adjoint(event: diffrax.Event | None, max_steps: int | None) -> diffrax.AbstractAdjoint:
    """Return the adjoint of a solve whose layer names none.

    It is `AdaptiveCheckpointAdjoint`, and diffrax's own default where that does not apply.
    """
    if event is not None or max_steps is None or not _diffrax.is_tested():
        return diffrax.RecursiveCheckpointAdjoint()
    return AdaptiveCheckpointAdjoint()


def in_its_modes(tree: T, layer: str, adjoint: diffrax.AbstractAdjoint, solver: diffrax.AbstractSolver) -> T:
    """Return what a solve starts from, with an error for a derivative that its adjoint does not have.

    `layer`: the name of the layer, which is in the error.
    """
    name, kind = type(solver).__name__, type(adjoint)
    if isinstance(adjoint, AdaptiveCheckpointAdjoint):
        if adjoint.has_forward_mode(solver):
            return tree
        where = f"{layer} with {name} and fl.{kind.__name__}"
        return _modes.reverse_only(tree, where, stages_in(name))
    if isinstance(adjoint, GaussAdjoint):
        return _modes.reverse_only(tree, f"{layer} with fl.{kind.__name__}")
    if isinstance(adjoint, diffrax.RecursiveCheckpointAdjoint | diffrax.BacksolveAdjoint):
        return _modes.reverse_only(tree, f"{layer} with diffrax.{kind.__name__}", once=True)
    return tree


def check_divides(adjoint: diffrax.AbstractAdjoint, chosen: bool) -> None:
    """Raise if a loss has its batch divided and the adjoint, `chosen` by the user or not, cannot do so."""
    axis = current_data_axis()
    if axis is not None and isinstance(adjoint, diffrax.RecursiveCheckpointAdjoint):
        raise ValueError(
            "expected an adjoint with a gradient in jax.shard_map, such as fl.AdaptiveCheckpointAdjoint(), "
            f"fl.GaussAdjoint() or diffrax.DirectAdjoint(), for a loss whose batch is divided over {axis!r}, "
            "found diffrax.RecursiveCheckpointAdjoint()"
            + ("" if chosen else ", the default with an event or without max_steps")
        )
