"""Forward and gradient of single layers: flatlayers against flax.nnx and Equinox."""

from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from flax import nnx
from timing import Result, race

import flatlayers as fl


KEY = jax.random.key(0)
Call = Callable[[Any, jax.Array], Any]


def gradients(calls: Mapping[str, Callable[[], tuple[Call, Any, jax.Array]]], **options: Any) -> Result:
    """Race value and gradient, with respect to parameters and input, of the mean square of the output.

    Each contestant gives `(call, parameters, x)`, where `call(parameters, x)` is `(y, rest)`; what
    `rest` holds, new statistics for example, is computed too.
    """

    def prepared(make: Callable[[], tuple[Call, Any, jax.Array]]) -> Any:
        def contestant() -> Any:
            call, parameters, x = make()

            def loss(parameters: Any, x: jax.Array) -> Any:
                y, rest = call(parameters, x)
                return jnp.mean(y**2), rest

            return jax.value_and_grad(loss, (0, 1), has_aux=True), (parameters, x)

        return contestant

    return race({name: prepared(make) for name, make in calls.items()}, **options)


def _flat(layer: fl.Layer, x: jax.Array) -> Any:
    ps, st = fl.setup(KEY, layer)
    return lambda ps, x: layer(x, ps, st), ps, x


def _flax(module: Any, x: jax.Array, call: Callable[[Any, Any], Any] = lambda module, x: module(x)) -> Any:
    definition, parameters, rest = nnx.split(module, nnx.Param, ...)

    def forward(parameters: Any, x: jax.Array) -> Any:
        whole = nnx.merge(definition, parameters, rest, copy=True)
        return call(whole, x), nnx.state(whole, nnx.Not(nnx.Param))

    return forward, parameters, x


def _equinox(module: Any, x: jax.Array, call: Callable[[Any, Any], Any]) -> Any:
    arrays, rest = eqx.partition(module, eqx.is_inexact_array)
    return lambda arrays, x: (call(eqx.combine(arrays, rest), x), None), arrays, x


def conv(batch: int, size: int, inputs: int, outputs: int, **options: Any) -> Result:
    """A convolution of 3 by 3. Equinox has channels first."""
    x = jax.random.normal(KEY, (batch, size, size, inputs))
    first = jnp.moveaxis(x, -1, 1)
    return gradients(
        {
            "flatlayers": lambda: _flat(fl.Conv((3, 3), inputs, outputs), x),
            "flax.nnx": lambda: _flax(
                nnx.Conv(inputs, outputs, (3, 3), padding="VALID", rngs=nnx.Rngs(0)), x
            ),
            "equinox": lambda: _equinox(
                eqx.nn.Conv2d(inputs, outputs, 3, key=KEY), first, lambda m, x: jax.vmap(m)(x)
            ),
        },
        **options,
    )


def batch_norm(batch: int, size: int, channels: int, **options: Any) -> Result:
    """Batch normalisation in training, the new statistics included. Equinox has channels first."""
    x = jax.random.normal(KEY, (batch, size, size, channels))
    first = jnp.moveaxis(x, -1, 1)

    def equinox() -> Any:
        layer, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(channels, "batch", mode="batch")
        arrays, rest = eqx.partition(layer, eqx.is_inexact_array)

        def forward(arrays: Any, x: jax.Array) -> Any:
            call = jax.vmap(
                eqx.combine(arrays, rest), axis_name="batch", in_axes=(0, None), out_axes=(0, None)
            )
            return call(x, state)

        return forward, arrays, first

    return gradients(
        {
            "flatlayers": lambda: _flat(fl.BatchNorm(channels), x),
            "flax.nnx": lambda: _flax(nnx.BatchNorm(channels, rngs=nnx.Rngs(0)), x),
            "equinox": equinox,
        },
        **options,
    )


def lstm(batch: int, inputs: int, hidden: int, length: int = 100, **options: Any) -> Result:
    """A whole sequence through an LSTM; the loss is of all outputs."""
    x = jax.random.normal(KEY, (batch, length, inputs))

    def over_time(cell: Any, x: jax.Array) -> jax.Array:
        def sequence(x: jax.Array) -> jax.Array:
            def step(carry: Any, x: jax.Array) -> Any:
                carry = cell(x, carry)
                return carry, carry[0]

            return jax.lax.scan(step, (jnp.zeros(hidden), jnp.zeros(hidden)), x)[1]

        return jax.vmap(sequence)(x)

    return gradients(
        {
            "flatlayers": lambda: _flat(fl.LSTM(inputs, hidden, return_sequence=True), x),
            "flax.nnx": lambda: _flax(nnx.RNN(nnx.OptimizedLSTMCell(inputs, hidden, rngs=nnx.Rngs(0))), x),
            "equinox": lambda: _equinox(eqx.nn.LSTMCell(inputs, hidden, key=KEY), x, over_time),
        },
        **options,
    )


def attention(batch: int, tokens: int, dims: int, heads: int, **options: Any) -> Result:
    """Self-attention without dropout."""
    x = jax.random.normal(KEY, (batch, tokens, dims))
    return gradients(
        {
            "flatlayers": lambda: _flat(fl.MultiHeadAttention(dims, heads=heads), x),
            "flax.nnx": lambda: _flax(
                nnx.MultiHeadAttention(heads, dims, use_bias=False, decode=False, rngs=nnx.Rngs(0)), x
            ),
            "equinox": lambda: _equinox(
                eqx.nn.MultiheadAttention(heads, dims, key=KEY),
                x,
                lambda m, x: jax.vmap(lambda x: m(x, x, x))(x),
            ),
        },
        **options,
    )


def repeated(n: int, dims: int, **options: Any) -> Result:
    """Equal layers one after another: one that is scanned, against a chain of them."""
    x = jax.random.normal(KEY, (32, dims))
    layer = fl.Dense(dims, dims, jnp.tanh)
    return gradients(
        {
            "chain": lambda: _flat(fl.Chain(*[layer] * n), x),
            "Repeated": lambda: _flat(fl.Repeated(layer, n), x),
        },
        **options,
    )
