"""`Start`: what a layer makes of its input for a solve."""

from dataclasses import dataclass

from ..types import PyTree, Y
from .times import Times


@dataclass(frozen=True)
class Start:
    """The start of a solve, as `SolverLayer.inputs` makes it of what the layer is called with.

    **Arguments:**

    - `y0`: the state at the start: an array, a `ComponentVector` or any pytree of arrays.
    - `data`: what else `field` is called with, a tuple of pytrees. Whatever varies goes in here: an adjoint
        does not see what a vector field closes over.
    - `each`: more of it, but with the leading axes of the batch: with `batching="each"` a sample gets its
        own part.
    - `times`: the times of the solve; `None` are those of the layer's fields.
    - `batch_axes`: the number of leading axes that `batching="each"` solves sample by sample; `None` is all
        but the last of `y0`.

    >>> import jax
    >>> import flatlayers as fl
    >>> class Cooling(fl.SolverLayer):  # of x = (temperature, surroundings)
    ...     def inputs(self, x, ps, st):
    ...         temperature, surroundings = x
    ...         return fl.Start(temperature, data=(surroundings,)), st
    ...
    ...     def field(self, t, y, surroundings, ps, st):
    ...         return surroundings - y, st
    >>> layer = Cooling(t1=10.0)
    >>> ps, st = fl.setup(jax.random.key(0), layer)
    >>> y, st = layer((90.0, 20.0), ps, st)
    >>> print(f"{y:.1f}")
    20.0
    """

    y0: Y
    data: tuple[PyTree, ...] = ()
    each: tuple[PyTree, ...] = ()
    times: Times | None = None
    batch_axes: int | None = None
