"""A layer of one's own, written in three ways: the same layout, the same values, the same gradient.

The model is a small network with a learned gain that counts its calls:

    y = gain * readout(tanh(hidden(x))),    hidden and readout: x -> weight @ x + bias.

It is written

- as a plain `Layer`, which declares each parameter and computes the formula;
- as a `Container` of two `Linear`, a layer that is written here too;
- with `compact`, as one function.

All three declare the same names in the same order, so the vector of one is the vector of the others, number
by number: each parameter's first value depends on the key and its path alone. The script prints the layout,
the models and a table of how far their outputs and gradients are from those of the plain layer. If they do
not agree the exit code is 1. It takes about 3 seconds.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import flatlayers as fl


IN, HIDDEN, OUT = 3, 16, 2
BATCH = 32
TOLERANCE = 1e-5  # of what is computed in float32, relative to its largest number


def linear_parameters(in_dims: int, out_dims: int) -> dict[str, fl.Param]:
    return {
        "weight": fl.Param((out_dims, in_dims), fl.initializers.glorot_uniform),
        "bias": fl.Param((out_dims,), fl.initializers.zeros),
    }


# A plain layer


class PlainNetwork(fl.Layer):
    in_dims: int
    hidden_dims: int
    out_dims: int

    def parameters(self):
        return {
            "hidden": linear_parameters(self.in_dims, self.hidden_dims),
            "readout": linear_parameters(self.hidden_dims, self.out_dims),
            "gain": fl.Param((), fl.initializers.ones),
        }

    def states(self, key):
        return {"calls": 0}

    def forward(self, x, ps, st):
        hidden = jnp.tanh(x @ ps.hidden.weight.T + ps.hidden.bias)
        y = ps.gain * (hidden @ ps.readout.weight.T + ps.readout.bias)
        return y, st.replace(calls=st.calls + 1)


# A container of layers


class Linear(fl.Layer):
    in_dims: int
    out_dims: int

    def parameters(self):
        return linear_parameters(self.in_dims, self.out_dims)

    def forward(self, x, ps, st):
        return x @ ps.weight.T + ps.bias, st


class ContainerNetwork(fl.Container):
    hidden: fl.Layer
    readout: fl.Layer

    def parameters(self):
        return {**super().parameters(), "gain": fl.Param((), fl.initializers.ones)}

    def states(self, key):
        return {**super().states(key), "calls": 0}

    def forward(self, x, ps, st):
        z, hidden = self.hidden(x, ps.hidden, st.hidden)
        y, readout = self.readout(jnp.tanh(z), ps.readout, st.readout)
        return ps.gain * y, st.replace(hidden=hidden, readout=readout, calls=st.calls + 1)


# One function


@fl.compact(
    hidden=Linear(IN, HIDDEN),
    readout=Linear(HIDDEN, OUT),
    gain=fl.Param((), fl.initializers.ones),
    calls=fl.State(0),
)
def compact_network(m, x):
    m.calls = m.calls + 1
    return m.gain * m.readout(jnp.tanh(m.hidden(x)))


MODELS = (
    PlainNetwork(IN, HIDDEN, OUT),
    ContainerNetwork(Linear(IN, HIDDEN), Linear(HIDDEN, OUT)),
    compact_network,
)


class Evaluated(NamedTuple):
    """A model at its own first parameters and at some others."""

    name: str
    first: fl.ComponentVector
    output: jax.Array
    gradient: fl.ComponentVector
    calls: int


def evaluate(model: fl.Layer, key: jax.Array) -> Evaluated:
    first_key, away_key, x_key = jax.random.split(key, 3)
    first, st = fl.setup(first_key, model)
    # Away from the first values, where the biases are 0 and the gain is 1.
    ps = first + 0.3 * jax.random.normal(away_key, first.shape)
    x = jax.random.normal(x_key, (BATCH, IN))

    @jax.jit
    def loss(ps, st):
        y, st = model(x, ps, st)
        return jnp.mean(y**2), (y, st)

    gradient, (output, st) = jax.grad(loss, has_aux=True)(ps, st)
    return Evaluated(fl.display_name(model), first, output, gradient, int(st.calls))


class Comparison(NamedTuple):
    """How a model compares with the plain layer."""

    name: str
    parameters: int
    same_layout: bool
    same_values: bool
    output: float  # the largest difference, relative to the largest number
    gradient: float
    calls: int

    @property
    def agrees(self) -> bool:
        close = max(self.output, self.gradient) <= TOLERANCE
        return self.same_layout and self.same_values and close and self.calls == 1


def compare(model: Evaluated, plain: Evaluated) -> Comparison:
    return Comparison(
        model.name,
        len(model.first),
        model.first.layout == plain.first.layout,
        np.array_equal(model.first.data, plain.first.data),
        difference(model.output, plain.output),
        difference(model.gradient.data, plain.gradient.data),
        model.calls,
    )


def difference(a: jax.Array, b: jax.Array) -> float:
    """The largest difference relative to the largest number; infinite for arrays of different shapes."""
    return float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b))) if a.shape == b.shape else float("inf")


def report(comparisons: Sequence[Comparison]) -> str:
    lines = [f"{'model':16}  parameters  layout  first values  output differs  gradient differs  calls"]
    for c in comparisons:
        layout, values = (("same" if same else "differ") for same in (c.same_layout, c.same_values))
        lines += [
            f"{c.name:16}  {c.parameters:10}  {layout:>6}  {values:>12}  "
            f"{c.output:14.1e}  {c.gradient:16.1e}  {c.calls:5}"
        ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Write one model as a Layer, as a Container and with compact, and compare the three.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--seed", type=int, default=0, help="of the parameters and the input")
    options = parser.parse_args(argv)

    evaluated = [evaluate(model, jax.random.key(options.seed)) for model in MODELS]
    comparisons = [compare(one, evaluated[0]) for one in evaluated]
    print(f"{evaluated[0].first!r}\n")
    for model in MODELS:
        print(f"{model!r}\n")
    print(report(comparisons))
    agree = all(comparison.agrees for comparison in comparisons)
    print(f"\nThe three {'agree' if agree else 'do not agree'}.")
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
