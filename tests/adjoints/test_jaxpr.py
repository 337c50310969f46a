"""A vector field split into what is done once, at each call, and after all calls."""

import jax
import jax.numpy as jnp
import pytest

import flatlayers as fl
from tests.adjoints.helpers import ADJOINT, DEFAULT, WIDE, flat_loss
from tests.adjoints.stages import Stage, assert_is_the_vjp, split
from tests.helpers import assert_close, equations, inner_jaxprs


# Programs of gradients, of which a loop over stages is the innermost one with products


def loops(jaxpr):
    return [eqn for eqn in equations(jaxpr) if eqn.primitive.name == "while"]


def inside(loop):
    return [eqn for inner in inner_jaxprs(loop) for eqn in equations(inner)]


def has(loop, name):
    return any(eqn.primitive.name == name for eqn in inside(loop))


def over_stages(jaxpr):
    return [loop for loop in loops(jaxpr) if has(loop, "dot_general") and not has(loop, "while")]


def shapes(eqns, *names):
    return {var.aval.shape for eqn in eqns if eqn.primitive.name in names for var in eqn.outvars}


def node_gradient(y0, **options):
    node = fl.NeuralODE(WIDE, **options)
    ps, st = fl.setup(jax.random.key(0), node, float)
    return jax.make_jaxpr(jax.grad(lambda ps: jnp.sum(node(y0, ps, st)[0] ** 2)))(ps).jaxpr


def test_a_flat_vector_is_taken_apart_outside_of_the_loop():
    ps, _ = fl.setup(jax.random.key(0), WIDE, float)
    jaxpr = jax.make_jaxpr(jax.grad(flat_loss(ADJOINT)))(ps, jnp.ones(24)).jaxpr
    assert [has(loop, "tanh") for loop in over_stages(jaxpr)].count(True) == 2  # forward, and made again
    assert not any(has(loop, name) for loop in loops(jaxpr) for name in ("split", "concatenate"))


def loops_in(loop):
    return [eqn for eqn in inside(loop) if eqn.primitive.name == "while"]


@pytest.mark.parametrize("keep", ["auto", 0])
def test_no_sum_over_weights_and_biases_in_the_loops_over_stages(keep):
    """Their gradients come out of the stages as one product: of a block of steps, or of a step."""
    jaxpr = node_gradient(jnp.ones((5, 24)), adjoint=fl.AdaptiveCheckpointAdjoint(keep=keep))
    stages = over_stages(jaxpr)
    # Forward, made again, and back; without residuals the starts that were left out are made again besides.
    assert [has(loop, "tanh") for loop in stages].count(False) == 1
    assert len(stages) == (3 if keep == "auto" else 4)
    of_weights, of_biases = {(40, 24), (24, 40)}, {(24,), (40,), (1, 24), (1, 40)}
    for loop in stages:
        made = shapes(inside(loop), "add", "add_any", "mul", "dot_general", "reduce_sum")
        assert {(5, 24), (5, 40)} <= made
        assert not made & (of_weights | of_biases)
    assert not any(has(loop, name) for loop in loops(jaxpr) for name in ("split", "concatenate"))


def test_sums_over_weights_are_taken_by_the_block():
    """The loop over blocks has them, and neither the one over steps in it nor that over their stages."""
    jaxpr = node_gradient(jnp.ones((5, 24)), adjoint=ADJOINT)
    (blocks,) = (
        loop for loop in loops(jaxpr) if shapes(inside(loop), "add", "add_any") & {(40, 24), (24, 40)}
    )
    steps = loops_in(blocks)
    assert len(steps) == 4  # steps that are made again and their stages, steps back and theirs
    assert not any(
        shapes(inside(loop), "add", "add_any", "dot_general") & {(40, 24), (24, 40)} for loop in steps
    )
    calls = {shape for shape in shapes(inside(blocks), "reshape") if len(shape) == 3}
    assert {(144, 5, 24), (144, 5, 40)} <= calls  # of six stages of 24 steps


def test_what_is_kept_does_not_grow_with_the_number_of_steps():
    """Only times have a place for each, and starts as many as the root of that."""

    def rows(max_steps):
        jaxpr = node_gradient(jnp.ones((5, 24)), adjoint=ADJOINT, max_steps=max_steps)
        arrays = {var.aval for eqn in loops(jaxpr) for var in eqn.outvars if var.aval.ndim > 2}
        starts = {array.shape for array in arrays if array.shape[1:] == (5, 24)}
        return {array.shape for array in arrays} - starts, max(starts)[0]

    few, starts = rows(128)
    assert few >= {(48, 6, 5, 24), (48, 6, 5, 40)}
    assert rows(1000)[0] == rows(100_000)[0] == few
    assert starts <= rows(1000)[1] < 40
    assert rows(100_000)[1] < 160


# Fields taken apart


def numbers(*shape):
    return jnp.sin(jnp.arange(float(jnp.zeros(shape).size)) + len(shape)).reshape(shape)


WEIGHT, BIAS, Y = numbers(3, 3), numbers(3), jnp.array([0.2, -0.5, 0.1])
CALLS = [numbers(4, 3)]


def tree_of(function, *constants):
    """How many arrays have a gradient call by call, how many later, and how many products are tapped."""
    field = split(function, list(constants), [Y])
    return len(field.plain), len(field.weights), len(field.taps)


CASES = {
    "a product": (lambda c, x: [c[0] @ x[0]], (WEIGHT,), (0, 1, 1)),
    "a bias": (lambda c, x: [c[0] @ x[0] + c[1]], (WEIGHT, BIAS), (0, 2, 1)),
    "a bias before": (lambda c, x: [c[1] + c[0] @ x[0]], (WEIGHT, BIAS), (0, 2, 1)),
    "a bias twice": (
        lambda c, x: [c[0] @ jnp.tanh(c[0] @ x[0] + c[1]) + c[1]],
        (WEIGHT, BIAS),
        (0, 2, 2),
    ),
    "a bias that is used by itself too": (
        lambda c, x: [(c[0] @ x[0] + c[1]) * jnp.sin(c[1]) * x[0]],
        (WEIGHT, BIAS),
        (1, 2, 1),
    ),
    "a bias that a product is not all of": (
        lambda c, x: [jnp.sin(c[0] @ x[0]) + c[1]],
        (WEIGHT, BIAS),
        (1, 1, 1),
    ),
    "a product that is used twice": (
        lambda c, x: [(z := c[0] @ x[0]) + c[1] + jnp.sin(z)],
        (WEIGHT, BIAS),
        (1, 1, 1),
    ),
    "a product that is a result itself": (
        lambda c, x: [(z := c[0] @ x[0]) + c[1], z],
        (WEIGHT, BIAS),
        (1, 1, 1),
    ),
    "a bias of a view": (
        lambda c, x: [c[0][:9].reshape(3, 3) @ x[0] + c[0][9:]],
        (numbers(12),),
        (0, 2, 1),
    ),
    "a state in place of a bias": (lambda c, x: [c[0] @ x[0] + x[0]], (WEIGHT,), (0, 1, 1)),
    "two weights in a product": (lambda c, x: [(c[0] @ c[1]) @ x[0]], (WEIGHT, WEIGHT.T), (0, 1, 1)),
    "a state with itself": (lambda c, x: [jnp.dot(x[0], x[0]) * c[0]], (BIAS,), (1, 0, 0)),
    "a weight and its transpose": (
        lambda c, x: [c[0].T @ jnp.tanh(c[0] @ x[0] + c[1]) + c[1]],
        (WEIGHT, BIAS),
        (0, 3, 2),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_gradients_that_are_put_off(name):
    function, constants, expected = CASES[name]
    assert tree_of(function, *constants) == expected
    assert_is_the_vjp(Stage(function, list(constants), [Y]), CALLS)


def test_a_bias_of_a_batch():
    """One row is added to each of those of a product: its gradient is put off as well."""

    def function(constants, inputs):
        return [inputs[0] @ constants[0].T + constants[1][None]]

    batch = numbers(2, 3)
    field = split(function, [WEIGHT, BIAS], [batch])
    assert (len(field.plain), len(field.weights)) == (0, 2)
    assert_is_the_vjp(Stage(function, [WEIGHT, BIAS], [batch]), [numbers(4, 2, 3)])


def test_a_product_larger_than_its_weight_is_as_any_other():
    """Its cotangents would take more memory than the sum."""

    def function(constants, inputs):
        return [inputs[0] @ constants[0] + constants[1][None]]

    constants, batch = [numbers(3, 2), numbers(2)], numbers(4, 3)
    field = split(function, constants, [batch])
    assert (len(field.plain), len(field.weights), field.taps) == (2, 0, [])
    assert len(split(function, constants, [batch[:3]]).taps) == 1
    assert_is_the_vjp(Stage(function, constants, [batch]), [numbers(2, 4, 3)])


def test_constants_without_a_gradient_are_fixed():
    field = split(lambda c, x: [c[0] @ x[0] + c[1]], [WEIGHT, BIAS], [Y], moving=[False, True])
    assert (len(field.plain), len(field.weights), len(field.fixed)) == (1, 0, 1)
    field = split(lambda c, x: [c[0] @ x[0] + c[1]], [WEIGHT, BIAS], [Y], moving=[True, False])
    assert (len(field.plain), len(field.weights), len(field.fixed)) == (0, 1, 1)


def test_what_is_added_in_place_of_a_bias_is_not_read():
    """The tap stands for a zero, and no addition of one is left in the program."""
    field = split(lambda c, x: [c[0] @ x[0] + c[1]], [WEIGHT, BIAS], [Y])
    prepared = field.prepare([WEIGHT, BIAS])
    taps = [jnp.full(3, jnp.nan)]
    (out,), (factor,) = field(prepared, [Y], taps)
    assert_close([out, factor], [WEIGHT @ Y + BIAS, Y])
    _, tangents = jax.jvp(lambda taps: field(prepared, [Y], taps)[0], (taps,), ([jnp.ones(3)],))
    assert_close(tangents, [jnp.ones(3)])


@pytest.mark.long
def test_a_weight_that_is_used_in_several_ways():
    # The field is a derivative of the network: each weight is in a product and in the transpose of one.
    model = fl.HamiltonianNN(fl.MLP(2, (8, 8), 1))
    y0 = jnp.array([[1.0, 0.2], [0.3, -0.5]])

    def gradient(adjoint):
        node = fl.NeuralODE(model, adjoint=adjoint)
        ps, st = fl.setup(jax.random.key(0), node, float)
        return jax.jit(jax.grad(lambda ps: jnp.sum(node(y0, ps, st)[0] ** 2)))(ps)

    assert_close(gradient(ADJOINT), gradient(DEFAULT))
