"""Derivatives."""

import jax
import jax.numpy as jnp

import flatlayers as fl

from .values import DENSE, ONES, PS, ST, STACKED, VECTOR


def derivatives_of_no_vector():
    return fl.hessian(lambda ps: (ps**2).sum())(ONES)


def derivatives_of_many():
    return fl.hessian(lambda ps: (ps.data**2).sum())(STACKED)


def jacobian_of_many_results():
    return fl.jacobian(lambda ps: fl.ComponentVector(jnp.stack([ps.data, ps.data]), ps.layout))(VECTOR)


def views_of_a_plain_hessian():
    return jax.eval_shape(jax.hessian(lambda ps: (ps.data**2).sum()), VECTOR).a


def one_path_of_a_matrix():
    return fl.hessian(lambda ps: (ps.data**2).sum())(VECTOR)["a"]


def jacobian_of_one_sample():
    return fl.batched_jacobian(DENSE)(ONES, PS, ST)


def forward_mode_of_a_custom_gradient():
    @jax.custom_vjp
    def double(x):
        return 2 * x

    double.defvjp(lambda x: (2 * x, None), lambda _, ct: (2 * ct,))
    return fl.jacobian_vector_product(double)(ONES, ONES, {}, {})
