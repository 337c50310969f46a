"""`SecondOrderNeuralODE`: a layer that solves `d2q/dt2 = model([q, v])`."""

from dataclasses import dataclass
from typing import Any

import diffrax
import jax.numpy as jnp

from ..vectors.names import describe
from ..vectors.record import Record
from .ode import Field, NeuralODE


class SecondOrderNeuralODE(NeuralODE):
    """Solve `dq/dt = v, dv/dt = model([q, v])` from a position and a velocity (Norcliffe et al., 2020).

    In all else as `NeuralODE`.

    **Arguments:**

    - `model`: the layer that gives the acceleration, from the position and the velocity, one after the
        other along the last axis.
    - The others are those of `NeuralODE`. With `with_time` the model is called with `(t, [q, v])`.

    **Inputs:** `(position, velocity)`, two arrays of the same shape `(..., n)`.

    **Returns:** `((position, velocity), st)`: the final ones, of shape `(..., n)`; or those that are saved,
    both with time leading, if `saveat` has times.

    **Parameters:** the model's own. **States:** as of `NeuralODE`.

    **Raises:** as `NeuralODE`, and `ValueError` for an input that is not a pair of arrays of one shape.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import flatlayers as fl
    >>> spring = fl.SecondOrderNeuralODE(lambda state: -state[..., :1], t1=jnp.pi)
    >>> ps, st = fl.setup(jax.random.key(0), spring)
    >>> (position, velocity), st = spring((jnp.array([1.0]), jnp.array([0.0])), ps, st)
    >>> print(f"{position[0]:.3f}")
    -1.000
    """

    @property
    def field(self) -> Field:
        """The vector field that the solver sees."""
        return SecondOrderField(self.model, self.with_time)

    def _solve(self, x: Any, ps: Any, st: Any) -> tuple[diffrax.Solution, Record]:
        shapes = [jnp.shape(part) for part in x] if isinstance(x, tuple | list) else []
        if len(shapes) != 2 or shapes[0] != shapes[1] or not shapes[0]:
            raise ValueError(
                f"expected (position, velocity), arrays of the same shape (..., n), found {describe(x)}"
            )
        return super()._solve(tuple(map(jnp.asarray, x)), ps, st)


@dataclass(frozen=True)
class SecondOrderField(Field):
    """`(v, model([q, v]))` for the state `(q, v)`."""

    def inputs(self, t: Any, y: Any) -> Any:
        return super().inputs(t, jnp.concatenate(y, axis=-1))

    def __call__(self, t: Any, y: Any, args: Any) -> Any:
        _, velocity = y
        acceleration, _ = self.model(self.inputs(t, y), *args)
        if jnp.shape(acceleration) != velocity.shape:
            raise ValueError(
                f"expected a model that gives the acceleration, {describe(velocity)} as the velocity, "
                f"found {describe(acceleration)}"
            )
        return velocity, acceleration
