"""Linear and nonlinear solvers: optimistix and lineax take a vector as the unknown."""

import jax
import lineax
import numpy as np
import optax
import optimistix
import pytest

import flatlayers as fl

from .gaussian import MEAN, PRECISION, START, energy, line


@pytest.mark.parametrize(
    "solver",
    [
        optimistix.BFGS(rtol=1e-8, atol=1e-10),
        optimistix.LBFGS(rtol=1e-8, atol=1e-10),
        optimistix.NonlinearCG(rtol=1e-8, atol=1e-10),
        optimistix.OptaxMinimiser(optax.adam(0.1), rtol=1e-8, atol=1e-10),
    ],
    ids=lambda solver: type(solver).__name__,
)
def test_minimise(solver):
    solution = optimistix.minimise(lambda v, _: energy(v), solver, START, max_steps=2000)
    assert solution.value.layout == MEAN.layout
    np.testing.assert_allclose(solution.value, MEAN, atol=1e-4)


@pytest.mark.long
def test_nelder_mead_does_what_it_does_on_an_array():
    # It stops early on this problem, with or without names.
    def search(function, start):
        solver = optimistix.NelderMead(rtol=1e-8, atol=1e-8)
        return optimistix.minimise(function, solver, start, max_steps=2000).value

    named = search(lambda v, _: energy(v), START)
    plain = search(lambda data, _: energy(fl.ComponentVector(data, MEAN.layout)), START.data)
    assert named.layout == MEAN.layout
    np.testing.assert_allclose(named, plain, rtol=1e-12)
    assert energy(named) < energy(START)


@pytest.mark.long
@pytest.mark.parametrize(
    "solver",
    [
        optimistix.LevenbergMarquardt(rtol=1e-10, atol=1e-10),
        optimistix.GaussNewton(rtol=1e-10, atol=1e-10),
        optimistix.Dogleg(rtol=1e-10, atol=1e-10),
    ],
    ids=lambda solver: type(solver).__name__,
)
def test_least_squares(solver, key):
    A, b, expected = line(key)
    solution = optimistix.least_squares(lambda v, _: A @ v.data - b, solver, START)
    assert solution.value.layout == MEAN.layout
    np.testing.assert_allclose(solution.value, expected, atol=1e-8)


def test_fixed_point():
    def half(v, target):
        return (v + target) / 2

    solver = optimistix.FixedPointIteration(rtol=1e-10, atol=1e-10)
    solution = optimistix.fixed_point(half, solver, START, MEAN)
    assert solution.value.layout == MEAN.layout
    np.testing.assert_allclose(solution.value, MEAN, atol=1e-8)


def test_lineax_solves_for_a_vector():
    def apply(v):
        return fl.ComponentVector(PRECISION @ v.data, v.layout)

    operator = lineax.FunctionLinearOperator(
        apply, jax.eval_shape(lambda: MEAN), lineax.positive_semidefinite_tag
    )
    right = apply(MEAN)
    for solver in (lineax.CG(rtol=1e-10, atol=1e-10), lineax.GMRES(rtol=1e-10, atol=1e-10)):
        solution = lineax.linear_solve(operator, right, solver)
        assert solution.value.layout == MEAN.layout
        np.testing.assert_allclose(solution.value, np.linalg.solve(PRECISION, right), atol=1e-8)


@pytest.mark.long
def test_lineax_takes_a_jacobian(key):
    A, b, expected = line(key)
    operator = lineax.JacobianLinearOperator(lambda v, _: A @ v.data, START)
    solver = lineax.Normal(lineax.CG(rtol=1e-12, atol=1e-12))
    solution = lineax.linear_solve(operator, b, solver, throw=False)
    assert solution.value.layout == MEAN.layout
    np.testing.assert_allclose(solution.value, expected, atol=1e-8)
