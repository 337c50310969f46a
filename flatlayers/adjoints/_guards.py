"""Options that the adjoints do not take, and inputs that they have no gradient for, refused by name."""

from collections.abc import Callable
from dataclasses import dataclass

import diffrax
import equinox as eqx
import equinox.internal as eqxi
import jax
import optimistix

from ..types import PyTree
from ._diffrax import LoopOptions, sub_saveats


INSTEAD = "Use diffrax.RecursiveCheckpointAdjoint() instead."


@dataclass(frozen=True)
class Guard:
    """The refusals of one adjoint, which each names it and the way out.

    A forbidden gradient would otherwise be a zero: both adjoints take the sizes of steps for constants.
    """

    adjoint: str

    def check_options(self, event: diffrax.Event | None, max_steps: int | None) -> int:
        """Return `max_steps`. **Raises:** `ValueError` for events, and if it is `None`."""
        if event is not None:
            raise ValueError(f"{self.adjoint} does not support events. {INSTEAD}")
        if max_steps is None:
            raise ValueError(
                f"expected max_steps to be an integer with {self.adjoint}, which keeps the times of the "
                "steps, found None. Give a bound, or use diffrax.RecursiveCheckpointAdjoint(checkpoints=...)."
            )
        return max_steps

    @property
    def only_saved_values(self) -> str:
        """The sentence for a cotangent of anything else."""
        return f"Only saved values have a gradient with {self.adjoint}. {INSTEAD}"

    def without_gradient(self, tree: PyTree, name: str) -> PyTree:
        """Return `tree`, with an error where it has a tangent."""
        message = (
            f"{self.adjoint} gives no gradient with respect to {name}. {INSTEAD} Or take it for a constant "
            "by jax.lax.stop_gradient."
        )
        return eqxi.nondifferentiable(tree, msg=message)

    def loop_options(
        self,
        t0: PyTree,
        t1: PyTree,
        dt0: PyTree,
        controller: diffrax.AbstractStepSizeController,
        max_steps: int,
        progress_meter: diffrax.AbstractProgressMeter,
    ) -> LoopOptions:
        """Return these arguments of diffrax's loop, none of them with a gradient."""
        times = zip((t0, t1, dt0), ("t0", "t1", "dt0"), strict=True)
        t0, t1, dt0 = [self.without_gradient(time, name) for time, name in times]
        return LoopOptions(t0, t1, dt0, self.controller(controller), max_steps, progress_meter)

    def saveat(self, saveat: diffrax.SaveAt) -> diffrax.SaveAt:
        """Return `saveat`, with an error where its times have a tangent."""

        def times(saveat: diffrax.SaveAt) -> list[PyTree]:
            return [sub.ts for sub in sub_saveats(saveat)]

        constant = self.without_gradient(times(saveat), "SaveAt(ts=...)")
        return eqx.tree_at(times, saveat, constant, is_leaf=lambda x: x is None)

    def controller(self, controller: PyTree) -> PyTree:
        """Return `controller`, with an error for a tangent where diffrax's own adjoints have a gradient.

        They stop the tangents of all of a `PIDController` but its bounds, which it applies afterwards.
        """
        name = type(controller).__name__

        def constant(x: PyTree) -> PyTree:
            if type(x) is not diffrax.PIDController:
                return self.without_gradient(x, name)
            bounds = [
                self.without_gradient(getattr(x, bound), f"PIDController({bound}=...)") for bound in _BOUNDS
            ]
            return eqx.tree_at(
                lambda pid: [getattr(pid, bound) for bound in _BOUNDS],
                stop_gradient(x),
                bounds,
                is_leaf=lambda x: x is None,
            )

        return _map_parts(constant, controller, diffrax.PIDController)

    def solver(self, solver: diffrax.AbstractSolver) -> diffrax.AbstractSolver:
        """Return `solver`, with an error for a tangent of anything but the tolerances of a root finder."""
        name = type(solver).__name__

        def constant(x: PyTree) -> PyTree:
            finds_root = isinstance(x, optimistix.AbstractRootFinder)
            return stop_gradient(x) if finds_root else self.without_gradient(x, name)

        return _map_parts(constant, solver, optimistix.AbstractRootFinder)


_BOUNDS = ("dtmin", "dtmax")


def stop_gradient(tree: PyTree) -> PyTree:
    """Return `tree` with its floating and complex numbers as constants; other leaves as they are."""
    return jax.tree.map(lambda x: jax.lax.stop_gradient(x) if eqx.is_inexact_array(x) else x, tree)


def _map_parts(f: Callable[[PyTree], PyTree], tree: PyTree, kind: type) -> PyTree:
    """Apply `f` to the parts of a pytree that are of some class, and to all other leaves."""
    return jax.tree.map(f, tree, is_leaf=lambda x: isinstance(x, kind))
