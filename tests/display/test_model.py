import diffrax
import jax
import jax.numpy as jnp
import pytest

import flatlayers as fl
from tests.helpers import text


class Autoencoder(fl.Container):
    encoder: fl.Layer
    decoder: fl.Layer
    weight: float = 1.0

    def forward(self, x, ps, st):
        z, encoder = self.encoder(x, ps.encoder, st.encoder)
        y, decoder = self.decoder(z, ps.decoder, st.decoder)
        return y, st.replace(encoder=encoder, decoder=decoder)


def test_equal_neighbours_are_one_line():
    block = fl.Dense(32, 32, jnp.tanh)
    model = fl.Chain(fl.Dense(2, 32, jnp.tanh), block, block, fl.Dense(32, 32, jnp.tanh), fl.Dense(32, 1))
    # 2*32 + 32 = 96; 32*32 + 32 = 1056; 96 + 3*1056 + 33 = 3297; 4 bytes each
    assert str(model) == text("""
        Chain(
            layer_0=Dense(2, 32, activation=tanh),            # 96 parameters
            layer_1..layer_3=Dense(32, 32, activation=tanh),  # 3 x 1_056 parameters
            layer_4=Dense(32, 1),                             # 33 parameters
        )                                                     # 3_297 parameters, 13.2 kB
    """)
    assert fl.pformat(model) == f"{model}"
    assert "\n" not in repr(model)
    two = fl.Chain(block, block, fl.Dense(32, 1))
    assert str(two).splitlines()[1:3] == [
        "    layer_0=Dense(32, 32, activation=tanh),  # 1_056 parameters",
        "    layer_1=Dense(32, 32, activation=tanh),  # 1_056 parameters",
    ]


def test_a_nested_model_with_state():
    node = fl.NeuralODE(fl.Chain(fl.Dense(4, 4, jnp.tanh), fl.Dropout(0.1)), t1=2.0, saveat=(1.0, 2.0))
    model = Autoencoder(fl.Chain(fl.Dense(8, 4), fl.BatchNorm(4), node), fl.Dense(4, 8), weight=0.5)
    # states: 4 + 4 running values and a flag, a key and a flag of Dropout, 4 counts of the solver
    assert str(model) == text("""
        Autoencoder(
            encoder=Chain(
                layer_0=Dense(8, 4),                           # 36 parameters
                layer_1=BatchNorm(4),                          # 8 parameters
                layer_2=NeuralODE(
                    Chain(
                        layer_0=Dense(4, 4, activation=tanh),  # 20 parameters
                        layer_1=Dropout(0.1),
                    ),                                         # 20 parameters
                    t1=2.0, saveat=(1.0, 2.0),
                ),                                             # 20 parameters
            ),                                                 # 64 parameters
            decoder=Dense(4, 8),                               # 40 parameters
            weight=0.5,
        )                                                      # 104 parameters, 416 bytes, 16 states
    """)


def test_frozen_and_tied_parameters():
    tied = Autoencoder(fl.Dense(4, 4), fl.Dense(4, 4))
    shared = fl.share_parameters(tied, {"decoder.weight": "encoder.weight"})
    model = fl.Chain(features=fl.freeze(shared, "encoder.bias"), head=fl.Dense(4, 1))
    # 16 + 4 + 4 - the 4 that are frozen, and 5
    assert str(model) == text("""
        Chain(
            features=FrozenLayer(
                SharedParameters(
                    Autoencoder(
                        encoder=Dense(4, 4),  # 16 parameters, plus 4 non-trainable
                        decoder=Dense(4, 4),  # 20 parameters, 16 of them shared with features.encoder
                    ),                        # 20 parameters, plus 4 non-trainable
                    ties={'decoder.weight': 'encoder.weight'},
                ),                            # 20 parameters, plus 4 non-trainable
                names=('encoder.bias',),
            ),                                # 20 parameters, plus 4 non-trainable
            head=Dense(4, 1),                 # 5 parameters
        )                                     # 25 parameters, plus 4 non-trainable, 100 bytes
    """)
    whole = fl.Chain(fl.freeze(fl.Dense(3, 2)), fl.Dense(2, 1))
    assert str(whole) == text("""
        Chain(
            layer_0=FrozenLayer(
                Dense(3, 2),      # plus 8 non-trainable
                names=('*',),
            ),                    # plus 8 non-trainable
            layer_1=Dense(2, 1),  # 3 parameters
        )                         # 3 parameters, plus 8 non-trainable, 12 bytes
    """)


def test_neighbours_of_which_one_is_frozen_are_not_alike():
    model = fl.freeze(fl.Chain(*[fl.Dense(3, 3)] * 4), "layer_0.*")
    lines = str(model).splitlines()
    assert lines[2].split() == ["layer_0=Dense(3,", "3),", "#", "plus", "12", "non-trainable"]
    assert lines[3].split("  #")[1] == " 3 x 12 parameters"


def test_a_layer_whose_parameters_are_not_its_childs():
    """A weight that is normalised is in the vector as its direction and its length."""
    assert str(fl.WeightNorm(fl.Dense(3, 2), "weight")).splitlines() == [
        "WeightNorm(",
        "    Dense(3, 2),",
        "    names='weight',",
        ")  # 10 parameters, 40 bytes",
    ]


def test_single_layers_mappings_and_names():
    assert str(fl.Dense(3, 2)) == "Dense(3, 2)  # 8 parameters, 32 bytes"
    assert str(fl.WrappedFunction(jnp.sin)) == "WrappedFunction(sin)  # no parameters"
    assert str(fl.Dropout(0.5)) == "Dropout(0.5)  # no parameters, 2 states"
    assert str(fl.Dense(1, 1)).endswith("# 2 parameters, 8 bytes")
    mechanism = {"alpha": fl.Param((), fl.initializers.ones), "nets": {"a": fl.Dense(2, 1)}}
    assert fl.pformat(mechanism) == text("""
        (
            alpha=Param((), ones),  # 1 parameter
            nets=(
                a=Dense(2, 1),      # 3 parameters
            ),                      # 3 parameters
        )                           # 4 parameters, 16 bytes
    """)
    attention = str(fl.MultiHeadAttention(8, heads=2)).splitlines()
    assert (
        attention[1]
        == "    q_proj, k_proj, v_proj, out_proj=Dense(8, 8, use_bias=False),  # 4 x 64 parameters"
    )


def test_a_layer_made_of_a_function_has_its_name():
    @fl.compact(w1=fl.Dense(1, 32), act=jnp.tanh, scale=fl.Param((), fl.initializers.ones))
    def net(m, x):
        return m.scale * m.act(m.w1(x))

    assert str(net) == text("""
        net(
            w1=Dense(1, 32),  # 64 parameters
            act=tanh, scale=Param((), ones),
        )                     # 65 parameters, 260 bytes
    """)


def test_bytes_are_those_of_the_vector(key):
    model = fl.Dense(3, 2)
    ps = fl.initial_parameters(key, model, jnp.bfloat16)
    assert fl.pformat(model, ps).endswith("16 bytes")
    assert fl.pformat(model, jax.vmap(lambda i: ps)(jnp.arange(100))).endswith("1.6 kB")
    assert fl.pformat(fl.Dense(999, 500)).endswith("# 500_000 parameters, 2 MB")


OPTIONS = {"use_bias": False, "init_weight": fl.initializers.constant(0.123456789), "init_bias": jnp.zeros}
LONG = fl.Dense(1, 2, jnp.tanh, **OPTIONS)
SOLVE = {
    "saveat": diffrax.SaveAt(t0=True, ts=jnp.linspace(0, 1, 5)),
    "solver": diffrax.Kvaerno5(scan_kind="lax"),
    "stepsize_controller": diffrax.PIDController(rtol=1e-9, atol=1e-11, pcoeff=0.2, icoeff=0.4, dtmin=1e-3),
}


@pytest.mark.parametrize(
    "model",
    [
        fl.Chain(fl.Chain(fl.Chain(fl.Chain(a_long_name_of_a_layer_that_is_deep_inside=LONG)))),
        fl.Chain(node=fl.NeuralODE(fl.Dense(2, 2), saveat=tuple(i / 7 for i in range(50)), t1=8.0)),
        fl.NeuralODE(fl.Dense(2, 2), **SOLVE),
        fl.freeze(fl.Chain(*[fl.Conv((3, 3), 100, 100)] * 3), ("layer_0.weight", "layer_1.*") * 6),
    ],
)
def test_no_line_is_longer_than_100(model):
    lines = str(model).splitlines()
    assert len(lines) > 3
    assert max(map(len, lines)) <= 100
    assert str(model).count("(") == str(model).count(")")


def test_a_total_too_long_for_its_place_is_below():
    inner = fl.Chain(fl.Chain(fl.Dense(1000, 1000, jnp.tanh, **OPTIONS), fl.Dense(1000, 9)), fl.BatchNorm(9))
    lines = str(fl.Chain(layer=fl.freeze(inner, "layer_0.*"))).splitlines()
    assert lines[-2] == ")"
    assert lines[-1] == "# 18 parameters, plus 1_009_009 non-trainable, 72 bytes, 19 states"


def test_shared_parameters_are_counted_once():
    chain = fl.Chain(fl.Dense(3, 3), fl.Dense(3, 3), fl.Dense(3, 3, use_bias=False), fl.Dense(3, 1))
    model = fl.share_parameters(chain, {"layer_1": "layer_0", "layer_2.weight": "layer_0.weight"})
    # 9 + 3 of two layers and 9 of a third in one place, 3 + 1 of the last: 16 in all.
    assert str(model) == text("""
        SharedParameters(
            Chain(
                layer_0=Dense(3, 3),                  # 12 parameters
                layer_1=Dense(3, 3),                  # 12 parameters, shared with layer_0
                layer_2=Dense(3, 3, use_bias=False),  # 9 parameters, shared with layer_0
                layer_3=Dense(3, 1),                  # 4 parameters
            ),                                        # 16 parameters
            ties={'layer_1': 'layer_0', 'layer_2.weight': 'layer_0.weight'},
        )                                             # 16 parameters, 64 bytes
    """)
