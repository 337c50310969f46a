import diffrax
import jax
import jax.numpy as jnp

import flatlayers as fl
from flatlayers.equations.statistics import COUNTS, evaluations, initial_statistics


def test_the_count_of_evaluations(key):
    calls = []

    def field(y):
        jax.debug.callback(calls.append, y[0])
        return -y

    for solver in (diffrax.Tsit5(), diffrax.Heun()):
        node = fl.NeuralODE(field, solver=solver, dt0=0.01)
        _, st = node(jnp.ones(1), *fl.setup(key, node, float))
        jax.block_until_ready(st)
        assert st.stats.num_evaluations == len(calls)
        calls.clear()
    assert evaluations(diffrax.Kvaerno3(), None) == -1


def test_all_layers_have_the_same_statistics(key):
    names = {*COUNTS, "num_evaluations", "result"}
    model = fl.Dense(2, 2)
    for layer in (
        fl.NeuralODE(model),
        fl.SecondOrderNeuralODE(fl.Dense(4, 2)),
        fl.NeuralCDE(fl.Dense(2, 4), 2),
        fl.NeuralSDE(model, model),
        fl.FFJORD(model),
    ):
        stats = fl.initial_states(key, layer).stats
        assert set(stats) == names == set(initial_statistics())
        assert not any(stats.values())
