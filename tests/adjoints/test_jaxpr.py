"""A vector field split into what is done once, at each call, and after all calls."""

import jax
import jax.numpy as jnp

import flatlayers as fl
from tests.adjoints.helpers import ADJOINT, DEFAULT, WIDE, flat_loss
from tests.helpers import assert_close, equations, inner_jaxprs


def test_a_flat_vector_is_taken_apart_outside_of_the_loop():
    ps, _ = fl.setup(jax.random.key(0), WIDE, float)
    jaxpr = jax.make_jaxpr(jax.grad(flat_loss(ADJOINT)))(ps, jnp.ones(24)).jaxpr
    *_, backward = (eqn for eqn in equations(jaxpr) if eqn.primitive.name == "while" and _has_scan(eqn))
    names = [eqn.primitive.name for inner in inner_jaxprs(backward) for eqn in equations(inner)]
    assert "dot_general" in names
    assert "split" not in names
    assert "concatenate" not in names


def _has_scan(loop):
    return any(eqn.primitive.name == "scan" for inner in inner_jaxprs(loop) for eqn in equations(inner))


def test_no_sum_over_the_weights_in_the_loop_over_stages():
    """The gradient of the weights comes out of the stages as one product a step."""
    node = fl.NeuralODE(WIDE, adjoint=ADJOINT)
    ps, st = fl.setup(jax.random.key(0), node, float)
    jaxpr = jax.make_jaxpr(jax.grad(lambda ps: jnp.sum(node(jnp.ones(24), ps, st)[0] ** 2)))(ps).jaxpr
    loops = [eqn for eqn in equations(jaxpr) if eqn.primitive.name == "while"]
    stages = [eqn for loop in loops for inner in inner_jaxprs(loop) for eqn in equations(inner)]
    stages = [eqn for eqn in stages if eqn.primitive.name == "scan"]
    inside = [eqn for scan in stages for inner in inner_jaxprs(scan) for eqn in equations(inner)]
    assert inside
    assert not [eqn for eqn in inside for var in eqn.outvars if var.aval.shape in ((40, 24), (24, 40))]
    assert not [
        eqn
        for loop in loops
        for i in inner_jaxprs(loop)
        for eqn in equations(i)
        if eqn.primitive.name == "split"
    ]


def test_a_weight_that_is_used_in_several_ways():
    # The field is a derivative of the network: each weight is in a product and in the transpose of one.
    model = fl.HamiltonianNN(fl.MLP(2, (8, 8), 1))
    y0 = jnp.array([[1.0, 0.2], [0.3, -0.5]])

    def gradient(adjoint):
        node = fl.NeuralODE(model, adjoint=adjoint)
        ps, st = fl.setup(jax.random.key(0), node, float)
        return jax.jit(jax.grad(lambda ps: jnp.sum(node(y0, ps, st)[0] ** 2)))(ps)

    assert_close(gradient(ADJOINT), gradient(DEFAULT))
