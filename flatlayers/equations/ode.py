"""`NeuralODE` and `SecondOrderNeuralODE`: layers that solve `y' = model(y)` and `q'' = model([q, q'])`."""

import jax.numpy as jnp

from ..core.composite import Wrapper
from ..core.layer import Layer
from ..types import Array, Input, Params, State, Time, Y
from ..vectors.names import describe
from .solving import SolverLayer
from .start import Start


class NeuralODE(SolverLayer, Wrapper):
    """Solve `dy/dt = model(y)` from `y0` (Chen et al., 2018), by diffrax.

    The parameter vector is unpacked once, outside the solve. During the solve the model's state is
    frozen, so that the vector field is a function; after it, the state is that of one evaluation at
    the initial point.

    The result has the dtype that `y0` and the model's output promote to, and the model sees states of
    that dtype. The solver computes in it too, times and the `t` that the model sees included, but at least in
    float32; and in float64, if x64 is on, for times that float32 does not tell apart, and where the zero of
    an event is looked for. (Plain `diffeqsolve` takes JAX's default dtype for times, so that with x64 on it
    turns a float32 `y0` into float64.) Arrays of a controller have no say. For a half precision the
    controller's `rtol` is at least a quarter of its epsilon.

    A batch is solved as one system, with the same steps for all samples, or with
    `batching="each"` sample by sample: the last axis is the state, and each sample takes its own
    steps. On an accelerator the loop runs until the last sample is done; what is gained is that no sample's
    error hides in the others'.

    **Arguments:**

    - `model`: the layer that gives `dy/dt`, with the structure and shapes of `y`.
    - The others, by keyword, are those of `SolverLayer`.

    **Inputs:** `x`, the state `y0`: an array, a `ComponentVector` or any pytree of arrays; with
    `batching="each"` of shapes `(*batch, n)`. Or a pair of it and `fl.SolveTimes`: times that are data.

    **Returns:** `(ys, st)`: the final state, with the shape of `y0`; or the saved states with time
    leading, if `saveat` has times.

    **Parameters:** the model's own. **States:** `stats` of the last solve, as of `SolverLayer`, and the
    model's states under `model`, if it has any.

    **Raises:** what `SolverLayer` raises, and `ValueError` for a model whose output is not like `y0`.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import flatlayers as fl
    >>> decay = fl.NeuralODE(lambda y: -y, t1=1.0)
    >>> ps, st = fl.setup(jax.random.key(0), decay)
    >>> y1, st = decay(jnp.array([1.0]), ps, st)
    >>> print(f"{y1[0]:.3f}")
    0.368
    """

    model: Layer

    def field(self, t: Time, y: Y, ps: Params, st: State) -> tuple[Y, State]:
        return self.model(self.at(t, y), ps, st)


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

    def inputs(self, x: Input, ps: Params, st: State) -> tuple[Start, State]:
        shapes = [jnp.shape(part) for part in x] if isinstance(x, tuple | list) else []
        if len(shapes) != 2 or shapes[0] != shapes[1] or not shapes[0]:
            raise ValueError(
                f"expected (position, velocity), arrays of the same shape (..., n), found {describe(x)}"
            )
        return Start(tuple(map(jnp.asarray, x))), st

    def field(
        self, t: Time, y: tuple[Array, Array], ps: Params, st: State
    ) -> tuple[tuple[Array, Array], State]:
        _, velocity = y
        acceleration, st = self.model(self.at(t, jnp.concatenate(y, axis=-1)), ps, st)
        if jnp.shape(acceleration) != velocity.shape:
            raise ValueError(
                f"expected a model that gives the acceleration, {describe(velocity)} as the velocity, "
                f"found {describe(acceleration)}"
            )
        return (velocity, acceleration), st
