"""Options and gradients that are refused, and by which words."""

import diffrax
import jax
import jax.numpy as jnp
import pytest

import flatlayers as fl
from tests.adjoints.helpers import ADJOINT, DEFAULT, PID, decay


def test_what_is_not_supported_says_what_is():
    with pytest.raises(ValueError, match=r"events. Use diffrax.RecursiveCheckpointAdjoint"):
        decay(event=diffrax.Event(lambda t, y, *_, **__: y - 0.5))
    with pytest.raises(ValueError, match=r"max_steps to be an integer .* diffrax.RecursiveCheckpointAdjoint"):
        decay(max_steps=None)
    for name in ("t0", "t1", "dt0"):
        with pytest.raises(RuntimeError, match=rf"no gradient with respect to {name}. Use diffrax.Recursive"):
            jax.grad(lambda x, name=name: decay(**{name: x}).ys[0])(0.1)
    with pytest.raises(RuntimeError, match=r"no gradient with respect to SaveAt\(ts=...\)"):
        jax.grad(lambda t: decay(saveat=diffrax.SaveAt(ts=t[None])).ys[0])(jnp.array(0.5))
    for every in (0, -1, 1.5):
        with pytest.raises(ValueError, match="`every` to be an integer of at least 1"):
            fl.AdaptiveCheckpointAdjoint(every=every)


@pytest.mark.long
def test_bounds_of_the_step_size_have_no_gradient():
    """The default has one: diffrax applies them to the step that it has from the error."""

    def end(x, name, clipped, adjoint=ADJOINT):
        controller = diffrax.PIDController(rtol=1e-2, atol=1e-2, **{name: x})
        if clipped:
            controller = diffrax.ClipStepSizeController(controller, step_ts=[0.3])
        return decay(stepsize_controller=controller, adjoint=adjoint).ys[0]

    assert jax.grad(end)(0.15, "dtmax", False, DEFAULT) != 0
    for name, clipped in [("dtmax", False), ("dtmin", False), ("dtmax", True)]:
        message = rf"no gradient with respect to PIDController\({name}=...\). Use .*lax.stop_gradient"
        with pytest.raises(RuntimeError, match=message):
            jax.grad(end)(0.15, name, clipped)
    rest = {"rtol": 1e-2, "pcoeff": 0.1, "icoeff": 0.9, "dcoeff": 0.05, "factormin": 0.2, "factormax": 5.0}
    for name, value in rest.items():

        def tolerant(x, adjoint, name=name):
            controller = diffrax.PIDController(**({"rtol": 1e-2, "atol": 1e-2} | {name: x}))
            return decay(stepsize_controller=controller, adjoint=adjoint).ys[0]

        assert jax.grad(tolerant)(value, ADJOINT) == jax.grad(tolerant)(value, DEFAULT) == 0


def test_steps_that_are_given_have_no_gradient():
    def to(x):
        return decay(
            dt0=None, stepsize_controller=diffrax.StepTo(jnp.array([0.0, 1.0]).at[1].set(x)), t1=x
        ).ys[0]

    def clipped(x):
        return decay(stepsize_controller=diffrax.ClipStepSizeController(PID, jump_ts=x[None])).ys[0]

    with pytest.raises(RuntimeError, match="no gradient with respect to (StepTo|t1)"):
        jax.grad(to)(jnp.array(1.0))
    with pytest.raises(RuntimeError, match="no gradient with respect to ClipStepSizeController"):
        jax.grad(clipped)(jnp.array(0.4))
