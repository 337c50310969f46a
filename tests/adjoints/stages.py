"""A vector field of constants and inputs, taken apart as a stage is, and its vjp put together again."""

import jax
import jax.numpy as jnp

from flatlayers.adjoints._jaxpr import SplitField
from flatlayers.adjoints._stage import StageVjp
from tests.helpers import assert_close


def split(function, constants, inputs, moving=None):
    """Split `function(constants, inputs)`, which returns a list; `moving` constants have a gradient."""
    jaxpr, count = jax.make_jaxpr(function)(constants, inputs).jaxpr, len(constants)
    jaxpr = jaxpr.replace(constvars=jaxpr.invars[:count], invars=jaxpr.invars[count:])
    return SplitField(jaxpr, constants, inputs, [True] * count if moving is None else moving)


class Stage:
    """A split function with the values of its constants, and its vjp.

    `moving`: which constants have a gradient; `moves`: which inputs.
    """

    def __init__(self, function, constants, inputs, moving=None, moves=None):
        self.function, self.constants = function, constants
        self.moving = [True] * len(constants) if moving is None else moving
        self.moves = [True] * len(inputs) if moves is None else moves
        self.field = split(function, constants, inputs, self.moving)
        (self.plain, self.weights), fixed = self.field.prepare(constants)
        self.prepared = ((self.plain, self.weights), fixed)
        self.vjp = StageVjp(self.field, self.prepared, inputs, self.moves)

    def residuals(self, *inputs):
        return self.vjp.forward(self.prepared, inputs)[1]

    def factors(self, *inputs):
        return self.vjp.factors(self.prepared, self.residuals(*inputs))

    def gradients(self, calls, cotangents):
        """The values, and the cotangents of inputs call by call and of constants, of calls in a row."""

        def call(inputs, cotangents):
            out, residuals = self.vjp.forward(self.prepared, inputs)
            of_inputs, plain, deltas = self.vjp.pull(self.prepared, residuals, cotangents)
            return out, of_inputs, plain, deltas, self.vjp.factors(self.prepared, residuals)

        out, of_inputs, plain, deltas, factors = jax.vmap(call)(calls, cotangents)
        weights = self.field.gradients(self.weights, factors, deltas)
        _, pull = jax.vjp(lambda constants: self.field.prepare(constants)[0], self.constants)
        return out, of_inputs, pull(([x.sum(0) for x in plain], weights))[0]


def assert_is_the_vjp(stage, calls, rtol=1e-12):
    """Compare with the vjp of the function itself, for inputs with an axis for calls."""
    moving = [x for x, moves in zip(calls, stage.moves, strict=True) if moves]

    def function(constants, moving):
        fixed = jax.lax.stop_gradient(constants)
        constants = [x if moves else y for x, y, moves in zip(constants, fixed, stage.moving, strict=True)]
        values = iter(moving)
        inputs = [next(values) if moves else x for x, moves in zip(calls, stage.moves, strict=True)]
        return jax.vmap(lambda inputs: stage.function(constants, inputs))(inputs)

    out, pull = jax.vjp(function, stage.constants, moving)
    cotangents = [jnp.cos(jnp.arange(float(x.size))).reshape(x.shape) for x in out]
    of_constants, of_inputs = pull(cotangents)
    values, found_inputs, found_constants = stage.gradients(calls, cotangents)
    assert_close(values, out, rtol)
    assert_close(found_inputs, of_inputs, rtol)
    assert_close(found_constants, of_constants, rtol)
