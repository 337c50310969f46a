"""The vector field at a stage: what is kept for its vjp, and that this is the vjp."""

import jax
import jax.numpy as jnp
import pytest

from tests.adjoints.stages import Stage, assert_is_the_vjp
from tests.helpers import assert_close


def arrays(seed, *shapes):
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


PERCEPTRON = arrays(0, (5, 3), (5,), (4, 5), (4,), (3, 4), (3,))


def perceptron(activation):
    def field(constants, inputs):
        (y,) = inputs
        w1, b1, w2, b2, w3, b3 = constants
        return [w3 @ activation(w2 @ activation(w1 @ y + b1) + b2) + b3]

    return field


def test_a_perceptron_leaves_its_input_and_its_hidden_layers_once():
    """The output of `tanh` is the factor of the next product, and its derivative a function of it."""
    (y,) = arrays(1, (3,))
    stage = Stage(perceptron(jnp.tanh), PERCEPTRON, [y])
    w1, b1, w2, b2, *_ = PERCEPTRON
    first = jnp.tanh(w1 @ y + b1)
    second = jnp.tanh(w2 @ first + b2)
    residuals = sorted(stage.residuals(y), key=lambda x: x.size)
    assert_close(residuals, [y, second, first], 1e-15)
    assert_close(stage.factors(y), [y, first, second], 1e-15)


def test_a_rectifier_leaves_its_argument_alone():
    """From the product they are an addition away, its value and its derivative a comparison more."""
    (y,) = arrays(1, (3,))
    w1, b1, w2, *_ = PERCEPTRON
    first = w1 @ y
    second = w2 @ jax.nn.relu(first + b1)
    stage = Stage(perceptron(jax.nn.relu), PERCEPTRON, [y])
    assert_close(sorted(stage.residuals(y), key=lambda x: x.size), [y, second, first], 1e-15)


def test_neither_constants_nor_what_is_made_of_them_are_kept():
    def field(constants, inputs):
        weight, scale = constants
        return [jnp.tanh(weight @ weight.T) @ inputs[0] * jnp.exp(scale)]

    (y,) = arrays(2, (3,))
    stage = Stage(field, arrays(3, (3, 2), (3,)), [y])
    assert sum(x.size for x in stage.residuals(y)) <= 6  # `y`, and the product that the scale multiplies


def test_a_linear_field_leaves_its_input_only_if_weights_have_a_gradient():
    weight, y = arrays(4, (3, 3), (3,))

    def field(constants, inputs):
        return [constants[0] @ inputs[0]]

    assert_close(Stage(field, [weight], [y]).residuals(y), [y])
    assert Stage(field, [weight], [y], moving=[False]).residuals(y) == []


def test_a_sum_is_kept_rather_than_what_it_is_made_of():
    """It is cheap to make again, but a hundred times smaller than that."""

    def field(constants, inputs):
        y, z = inputs
        return [y * 0.5, jnp.sum(y) * z]

    y, z = arrays(5, (100,), (1,))
    residuals = Stage(field, [], [y, z]).residuals(y, z)
    assert sum(x.size for x in residuals) == 2
    assert_close(sorted(residuals, key=jnp.sum), sorted([z, jnp.sum(y)], key=jnp.sum))


def test_a_field_that_nothing_depends_on_leaves_nothing():
    stage = Stage(lambda constants, inputs: [jnp.ones(3)], [], [jnp.ones(3)])
    assert stage.residuals(jnp.ones(3)) == []
    assert_is_the_vjp(stage, [jnp.ones((2, 3))])


@jax.custom_jvp
def rounded(x):
    return jnp.round(x)


@rounded.defjvp
def _(primals, tangents):
    return rounded(*primals), tangents[0] * jnp.cos(primals[0])


@jax.custom_vjp
def clipped(x):
    return jnp.clip(x, -1, 1)


clipped.defvjp(lambda x: (clipped(x), x), lambda x, ct: (ct / (1 + x**2),))


def scanned(w, y):
    return jax.lax.scan(lambda y, row: (jnp.sin(y * row), y @ row), y, w)[0]


FIELDS = {
    "tanh": perceptron(jnp.tanh),
    "relu": perceptron(jax.nn.relu),
    "swish": perceptron(jax.nn.swish),
    "gelu": perceptron(jax.nn.gelu),
    "softplus": perceptron(jax.nn.softplus),
    "custom jvp": perceptron(rounded),
    "custom vjp": perceptron(clipped),
    "jit": perceptron(jax.jit(lambda x: jnp.sin(x) * x)),
    "checkpoint": perceptron(jax.checkpoint(lambda x: jnp.sin(jnp.sin(x)))),
    "division": lambda c, x: [x[0] / (1 + jnp.abs(c[0] @ x[0]).sum()) + c[5]],
    "condition": lambda c, x: [jax.lax.cond(x[0][0] > 0, jnp.sin, jnp.cos, c[0].T @ (c[0] @ x[0]))],
    "scan": lambda c, x: [scanned(c[0], x[0])],
    "maximum": lambda c, x: [jnp.max(c[0] @ x[0]) * jnp.sort(x[0])],
    "same weight": lambda c, x: [c[0].T @ jnp.tanh(c[0] @ x[0] + c[1]) + jnp.sum(c[0])],
    "state times itself": lambda c, x: [jnp.outer(x[0], x[0]) @ x[0] + c[5] * x[0]],
}


@pytest.mark.long
@pytest.mark.parametrize("name", FIELDS)
def test_values_and_vjps_are_those_of_the_field(name):
    """For four calls in a row, whose gradients of weights are summed."""
    assert_is_the_vjp(Stage(FIELDS[name], PERCEPTRON, [jnp.ones(3)]), arrays(6, (4, 3)))


def test_inputs_without_a_gradient():
    """As the time, or whole numbers."""

    def field(constants, inputs):
        t, y, n = inputs
        return [jnp.sin(t) * (constants[0] @ y) * n.astype(y.dtype)]

    calls = [jnp.array([0.1, 0.5]), *arrays(7, (2, 3)), jnp.array([2, 3])]
    stage = Stage(field, PERCEPTRON[:1], [x[0] for x in calls], moves=[False, True, False])
    assert_is_the_vjp(stage, calls)


def test_only_some_constants_have_a_gradient():
    stage = Stage(
        perceptron(jnp.tanh), PERCEPTRON, [jnp.ones(3)], moving=[False, True, True, False] + 2 * [True]
    )
    assert_is_the_vjp(stage, arrays(9, (4, 3)))


def test_pulling_back_evaluates_no_activation_again():
    stage = Stage(perceptron(jnp.tanh), PERCEPTRON, [jnp.ones(3)])
    (y,) = arrays(1, (3,))
    residuals = stage.residuals(y)
    jaxpr = jax.make_jaxpr(lambda r, ct: stage.vjp.pull(stage.prepared, r, [ct]))(residuals, jnp.ones(3))
    names = [eqn.primitive.name for eqn in jaxpr.eqns]
    assert "tanh" not in names
    # Back through two layers and to the input; those of the weights are put off.
    assert names.count("dot_general") == 3
