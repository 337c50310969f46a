"""Differential equations and fixed points."""

import diffrax
import jax
import jax.numpy as jnp
import pytest

import flatlayers as fl
from flatlayers.adjoints import _discrete, _modes, gauss
from flatlayers.adjoints._guards import Guard
from flatlayers.equations import mechanics, options, time_gradients
from flatlayers.equilibria import implicit

from .values import DENSE, KEY, ONES, called, ones


def _node(**options):
    return called(fl.NeuralODE(DENSE, **options), ONES)


def _slope(mode, **options):
    layer = fl.NeuralODE(DENSE, **options)
    ps, st = ones(layer)
    return mode(lambda ps: layer(ONES, ps, st)[0].sum())(ps)


def _decay(rate, field=lambda t, y, rate: -rate * y, **options):
    """The end of a solve by diffrax itself, in four steps."""
    term = diffrax.ODETerm(field)
    return diffrax.diffeqsolve(term, diffrax.Euler(), 0.0, 1.0, 0.25, 1.0, rate, max_steps=4, **options).ys[0]


def forward_mode_by_gauss():
    return _slope(jax.jacfwd, adjoint=fl.GaussAdjoint())


def second_derivative_by_an_adjoint_of_diffrax():
    def cubed(x):
        adjoint, solver = diffrax.RecursiveCheckpointAdjoint(), diffrax.Tsit5()
        return options.in_its_modes(x, "NeuralODE", adjoint, solver) ** 3

    return jax.jvp(jax.grad(cubed), (1.0,), (1.0,))


def second_derivative_by_gauss():
    return jax.grad(lambda rate: gauss.differentiated_once(ONES[0], rate))(0.7)


def second_derivative_of_implicit_steps():
    return jax.grad(lambda rate: _discrete.differentiated_once(ONES[0], rate, "Kvaerno5"))(0.7)


def reverse_over_reverse():
    slope = jax.grad(lambda rate: _decay(rate, adjoint=fl.AdaptiveCheckpointAdjoint()))
    return jax.eval_shape(jax.grad(slope), 0.7)


def reverse_over_forward():
    def slope(x):
        return jax.jvp(lambda x: _modes.reversed_never(x, _discrete.NAME) ** 3, (x,), (1.0,))[1]

    return jax.eval_shape(jax.grad(slope), 1.0)


def time_behind_another():
    def carried(y, start, end):
        return time_gradients.carried(y, start, end, None, field=lambda t, y, _: -y)

    by_other = jax.grad(lambda y, end: carried(y, 0.0, end), 0)
    return jax.grad(by_other, 1)(1.0, 0.0)


def gradient_by_the_end():
    return jax.grad(lambda t1: Guard("GaussAdjoint").without_gradient(t1, "t1"))(1.0)


def field_with_a_value_inside():
    def end(rate):
        return _decay(None, field=lambda t, y, _: -rate * y, adjoint=fl.GaussAdjoint())

    return jax.eval_shape(jax.grad(end), 0.7)


def event_with_an_adjoint():
    event = diffrax.Event(lambda t, y, args, **_: y[0] > 10)
    return _slope(jax.grad, adjoint=fl.AdaptiveCheckpointAdjoint(), event=event)


def no_bound_on_the_steps():
    return _node(adjoint=fl.AdaptiveCheckpointAdjoint(), max_steps=None)


def steps_with_gauss():
    return _node(adjoint=fl.GaussAdjoint(), saveat=diffrax.SaveAt(steps=True))


def time_behind_the_end():
    return fl.NeuralODE(DENSE, saveat=[0.0, 2.0])


def time_before_the_start():
    return fl.NeuralODE(DENSE, saveat=[-1.0, 1.0])


def times_of_each_sample():
    return called(fl.NeuralODE(DENSE), (jnp.ones((3, 2)), fl.SolveTimes(jnp.ones((3, 4)))))


def nothing_saved():
    return _node(saveat=diffrax.SaveAt(subs=None, dense=True))


def array_as_a_control():
    return called(fl.NeuralCDE(fl.Dense(2, 4), channels=2), (ONES, ONES))


def noise_as_a_control():
    control = diffrax.VirtualBrownianTree(0.0, 1.0, 1e-2, (), KEY)
    return called(fl.NeuralCDE(fl.Dense(2, 4), channels=2), (ONES, control))


def sizes_of_diagonal_noise():
    return fl.NeuralSDE(DENSE, DENSE, noise="diagonal", noise_dims=2)


def start_of_another_shape():
    model = fl.Parallel(jnp.add, fl.Dense(3, 2), fl.Dense(3, 2))
    return called(fl.DeepEquilibriumNetwork(model), jnp.ones(3))


def start_that_a_layer_refuses():
    model = fl.Parallel(jnp.add, fl.Dense(4, 4), fl.Dense(3, 4))
    return called(fl.DeepEquilibriumNetwork(model), jnp.ones(3))


def name_of_a_solver():
    return fl.NeuralODE(DENSE, solver="Tsit5")


def solver_of_another_kind():
    return fl.DeepEquilibriumNetwork(DENSE, solver=diffrax.Tsit5())


def gauss_for_noise():
    return called(fl.NeuralSDE(DENSE, DENSE, adjoint=fl.GaussAdjoint()), ONES)


def linear_system_without_a_solution():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(implicit, "gmres", lambda product, b, accuracy: (b, jnp.array(False), 0))
        return implicit.ImplicitAdjoint(1e-6, 2, throw=True).linear_solve(lambda x: 0 * x, ONES)


def lagrangian_that_is_flat():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jnp.linalg, "solve", lambda matrix, vector: vector / 0)
        return mechanics._solve(jnp.zeros((2, 2)), ONES)
