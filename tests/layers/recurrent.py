"""What the tests of cells and of recurrent layers share."""

from functools import partial

import jax

import flatlayers as fl


CELLS = [fl.RNNCell, fl.LSTMCell, fl.GRUCell]


@partial(jax.jit, static_argnums=0)
def fold(cell, xs, ps, st):
    """The outputs of a cell over a list of inputs, one call after another."""
    (y, carry), st = cell(xs[0], ps, st)
    ys = [y]
    for x in xs[1:]:
        (y, carry), st = cell((x, carry), ps, st)
        ys.append(y)
    return ys, carry, st


@partial(jax.jit, static_argnums=0)
def run(layer, x, ps, st):
    return layer(x, ps, st)
