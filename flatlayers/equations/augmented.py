"""`AugmentedNDE`: more dimensions for a neural differential equation."""

import jax
import jax.numpy as jnp
import numpy as np

from ..core.composite import Container
from ..core.fields import Size
from ..core.layer import Layer, call
from ..types import Input, Output, Params, PyTree, State
from ..vectors.names import describe
from ..vectors.vector import ComponentVector


# A tuple is an input beside its times, as `((z0, control), SolveTimes(ts))`.
_WITH_ARRAYS = (jax.Array, np.ndarray, ComponentVector, tuple)


class AugmentedNDE(Container):
    """Solve a differential equation with dimensions added that start at zero: `y = model([x, 0])`.

    Trajectories do not cross, so that some maps are no flow; with more dimensions they are (Dupont et al.,
    2019). The result has the extra dimensions as well, for the layers that follow.

    **Arguments:**

    - `model`: the layer that solves, such as `NeuralODE`, in the larger dimension.
    - `extra`: the number of dimensions that are added.

    **Inputs:** an array `(..., n)`, or a tuple, such as `(position, velocity)` or `(z0, control)`, each
    array of which gets them. **Returns:** what `model` returns for `(..., n + extra)`: all dimensions, and
    time leading if it saves at times.

    **Parameters and states:** those of the equation, under `model`.

    **Raises:** `ValueError` for an `extra` below 1 and for an input without an axis.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import flatlayers as fl
    >>> layer = fl.AugmentedNDE(fl.NeuralODE(fl.Dense(3, 3)), 1)
    >>> ps, st = fl.setup(jax.random.key(0), layer)
    >>> layer(jnp.ones((5, 2)), ps, st)[0].shape
    (5, 3)
    """

    model: Layer
    extra: Size

    def forward(self, x: Input, ps: Params, st: State) -> tuple[Output, State]:
        y, new = self.model(self._augmented(x), ps.model, st.model)
        return y, st.replace(model=new)

    def solve(self, x: Input, ps: Params, st: State) -> tuple[PyTree, State]:
        """Solve, and return `(solution, st)` with the solver's own solution object.

        **Arguments:** as for a call of the layer.
        """
        return call(self, self._solve, x, ps, st)

    def _solve(self, x: Input, ps: Params, st: State) -> tuple[PyTree, State]:
        solution, new = self.model.solve(self._augmented(x), ps.model, st.model)  # pyright: ignore
        return solution, st.replace(model=new)

    def _augmented(self, x: Input) -> Input:
        if isinstance(x, tuple):
            return tuple(self._augmented(part) if isinstance(part, _WITH_ARRAYS) else part for part in x)
        if not jnp.ndim(x):
            raise ValueError(f"expected x of shape (..., n), found {describe(x)}")
        x = jnp.asarray(x)
        return jnp.concatenate([x, jnp.zeros((*x.shape[:-1], self.extra), x.dtype)], axis=-1)
