import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flatlayers as fl
from flatlayers.display import summary
from tests.helpers import text


def by_path(found):
    return {row.path: row for row in found.rows}


def struct(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def test_exact_text():
    block = fl.Dense(16, 16)
    model = fl.Chain(
        embed=fl.Dense(2, 16), blocks=fl.Chain(block, block, block), none=fl.NoOpLayer(), head=fl.Dense(16, 1)
    )
    # A batch of 5: 2*5*in*out for each product and 5*out for each bias, so 400, 3 times 2640, and 165;
    # parameters: 48, 3 times 272, and 17, which are 5.4, 92.6 and 1.9 per cent of 881.
    assert str(fl.summary(model, jnp.ones((5, 2)))) == text("""
        path                     layer          output shape  parameters    place   share  FLOPs
        ────────────────────────────────────────────────────────────────────────────────────────
        embed                    Dense(2, 16)   (5, 16)               48     0:48    5.4%    400
        blocks                   Chain          (5, 16)              816   48:864   92.6%  7_920
        blocks.layer_0..layer_2  Dense(16, 16)  (5, 16)              816   48:864   92.6%  7_920
        none                     NoOpLayer()    (5, 16)                                        0
        head                     Dense(16, 1)   (5, 1)                17  864:881    1.9%    165
        ────────────────────────────────────────────────────────────────────────────────────────
        total                    Chain          (5, 1)               881    0:881  100.0%  8_485
        881 parameters, 3.52 kB
    """)


def test_numbers_of_dense_layers():
    model = fl.Chain(fl.Dense(3, 4), fl.Dense(4, 2, use_bias=False))
    found = fl.summary(model, struct(5, 3))
    first, second = found.rows
    assert (first.path, first.layer, first.output_shape) == ("layer_0", fl.Dense(3, 4), (5, 4))
    assert (first.parameters, first.place, first.flops) == (16, "0:16", 2 * 5 * 3 * 4 + 5 * 4)
    assert (second.parameters, second.place, second.flops) == (8, "16:24", 2 * 5 * 4 * 2)
    assert (first.share, second.share) == (100 * 16 / 24, 100 * 8 / 24)
    assert (found.total.parameters, found.total.output_shape) == (24, (5, 2))
    assert found.total.flops == first.flops + second.flops


def test_a_convolution():
    layer = fl.Conv((3, 3), 3, 8)
    (row,) = fl.summary(layer, struct(2, 10, 10, 3)).rows
    assert row.path == ""
    assert row.output_shape == (2, 8, 8, 8)
    np.testing.assert_allclose(row.flops, 2 * (2 * 8 * 8 * 8) * (3 * 3 * 3) + 2 * 8 * 8 * 8, rtol=0.01)


@pytest.mark.long
def test_layers_in_solvers_and_scans_are_seen_in_one_step():
    cell, field = fl.GRUCell(4, 6), fl.Chain(fl.Dense(6, 6, jnp.tanh), fl.Dense(6, 6))
    model = fl.Chain(
        rnn=fl.Recurrence(cell, return_sequence=True),
        ode=fl.NeuralODE(field, saveat=(0.5, 1.0)),
        deep=fl.Repeated(fl.Dense(6, 6), 3),
    )
    rows = by_path(fl.summary(model, struct(2, 7, 4)))
    assert list(rows) == ["rnn", "ode", "ode.layer_0", "ode.layer_1", "deep", "deep.layer"]
    # The last row of a path is the layer inside of its wrappers.
    assert rows["rnn"].output_shape == ((2, 6), ((2, 6),))
    assert rows["ode"].output_shape == (2, 7, 6)
    assert rows["ode.layer_0"].output_shape == (2, 7, 6)
    assert rows["deep"].output_shape == rows["deep.layer"].output_shape == (2, 2, 7, 6)
    assert rows["deep.layer"].parameters == 3 * 42
    assert fl.summary(model, struct(2, 7, 4)).total.parameters == model.layout.length


def test_tied_parameters_count_once_in_the_total():
    inside = fl.Chain(a=fl.Dense(3, 3), b=fl.Dense(3, 3))
    found = fl.summary(fl.share_parameters(inside, {"b.weight": "a.weight"}), struct(3))
    rows = by_path(found)
    assert (rows["a"].parameters, rows["a"].place) == (12, "0:12")
    assert (rows["b"].parameters, rows["b"].place) == (12, "0:9, 12:15")
    assert found.total.parameters == 15
    assert found.total.share == 100


def test_frozen_parameters_are_not_in_the_vector():
    found = fl.summary(fl.Chain(fl.freeze(fl.Dense(3, 2), "weight"), fl.Dense(2, 1)), struct(3))
    frozen, inner, head = found.rows
    assert frozen.parameters == inner.parameters == 2
    assert inner.output_shape == (2,)
    assert head.place == "2:5"
    assert "plus 6 non-trainable" in str(found)


def test_a_wrapper_with_parameters_of_its_own_has_one_row():
    (row,) = fl.summary(fl.WeightNorm(fl.Dense(3, 2), "weight"), struct(3)).rows
    assert row.parameters == 2 * 3 + 2 + 2


def test_children_that_cannot_be_told_apart_are_in_one_row():
    found = fl.summary(fl.Chain(fl.BidirectionalRNN(fl.RNNCell(2, 3)), fl.MLP(6, (4,), 1)), struct(5, 2))
    assert [row.path for row in found.rows] == ["layer_0", "layer_1"]
    assert found.rows[0].output_shape == (5, 6)


def test_a_layer_may_ask_for_the_numbers_of_its_child():
    class Scaled(fl.Container):
        inner: fl.Layer

        def __post_init__(self):
            assert self.inner.out_dims == 2

        def forward(self, x, ps, st):
            y, inner = self.inner(x, ps.inner, st.inner)
            return y / self.inner.out_dims, st.replace(inner=inner)

    found = fl.summary(Scaled(fl.Dense(3, 2)), struct(3))
    assert [row.path for row in found.rows] == ["inner"]
    assert len(str(fl.summary(fl.Dense(3, 2), struct(3))).splitlines()) == 4


def test_one_layer_used_twice_has_two_rows():
    layer = fl.Dense(2, 2)
    found = fl.summary(fl.Chain(layer, jnp.ones_like, layer), struct(7, 2))
    assert [row.place for row in found.rows] == ["0:6", "", "6:12"]


def test_inputs_of_any_structure_and_outputs_too():
    cell = fl.LSTMCell(3, 2)
    found = fl.summary(cell, (struct(5, 3), (struct(5, 2), struct(5, 2))))
    assert found.total.output_shape == ((5, 2), ((5, 2), (5, 2)))
    table = fl.summary(fl.Embedding(10, 4), struct(3, dtype=jnp.int32))
    assert table.total.output_shape == (3, 4)
    state = fl.ComponentVector.of({"p": 1.0, "q": [1.0, 2.0]})
    assert fl.summary(fl.NeuralODE(fl.Dense(3, 3)), state).total.output_shape == (3,)


def test_a_layer_that_is_not_called_says_so():
    class First(fl.Container):
        a: fl.Layer
        b: fl.Layer

        def forward(self, x, ps, st):
            y, a = self.a(x, ps.a, st.a)
            return y, st.replace(a=a)

    found = fl.summary(First(fl.Dense(2, 2), fl.Dense(2, 3)), struct(2))
    assert found.rows[1].output_shape is None
    assert "not called" in str(found)
    assert "not called" in found._repr_html_()


def test_the_operations_of_a_chain_are_those_of_its_program():
    class Counted(fl.Chain):
        """Not only a chain, so that its own program is counted."""

    block = (fl.Dense(6, 6, jnp.tanh), fl.BatchNorm(6), fl.Dropout(0.3))
    rest = (fl.Repeated(fl.Dense(6, 6), 3), fl.NeuralODE(fl.Dense(6, 6)), jnp.sin)
    found, expected = (
        fl.summary(kind(kind(*block), *rest, kind(*block)), struct(5, 6)).total.flops
        for kind in (fl.Chain, Counted)
    )
    assert found == expected > 0


def test_chains_in_chains_are_counted_once(monkeypatch):
    counted, model = [], fl.Dense(3, 3, jnp.tanh)
    for _ in range(20):
        model = fl.Chain(model, fl.Dense(3, 3))
    monkeypatch.setattr(summary, "flops", lambda layer, *arguments: counted.append(layer) or 1.0)
    assert fl.summary(model, struct(2, 3)).total.flops == 21
    assert counted == [fl.Dense(3, 3, jnp.tanh), fl.Dense(3, 3)]


def test_without_a_cost_analysis_there_is_a_question_mark(monkeypatch):
    monkeypatch.setattr(jax.stages.Lowered, "cost_analysis", lambda self: None)
    found = fl.summary(fl.Dense(2, 2), struct(2))
    assert found.total.flops is None
    assert str(found).splitlines()[-2].endswith("?")


def test_nothing_is_computed():
    huge = fl.Chain(fl.Dense(100_000, 100_000), fl.Dense(100_000, 1))
    found = fl.summary(huge, struct(64, 100_000))
    assert found.total.parameters == 10_000_200_001
    np.testing.assert_allclose(found.total.flops, 2 * 64 * 1e10, rtol=1e-3)
    assert "40 GB" in str(found)


def test_errors_are_those_of_the_layer():
    with pytest.raises(ValueError, match=r"\(..., 4\), found shape \(5, 2\)"):
        fl.summary(fl.Chain(fl.Dense(3, 2), fl.Dense(4, 1)), struct(5, 3))


def test_lines_are_within_100():
    long = fl.Dense(2, 2, jnp.tanh, init_weight=fl.initializers.constant(0.123456789), use_bias=False)
    model = fl.Chain(a_first_name_that_is_long=fl.Chain(another_one_inside=fl.Chain(and_the_last=long)))
    lines = str(fl.summary(model, struct(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 2))).splitlines()
    assert max(map(len, lines)) <= 100
    assert any("and_the_last" in line for line in lines)


@pytest.mark.long
def test_a_chain_nested_a_hundred_deep():
    model = fl.Dense(2, 2)
    for _ in range(100):
        model = fl.Chain(model, jnp.tanh)
    total = fl.summary(model, jnp.ones(2, jnp.float32)).total
    assert total.parameters == 6
    assert total.children[0].output_shape == (2,)


def test_an_error_has_no_word_of_how_a_layer_is_watched():
    class Experts(fl.Container):
        experts: tuple

        def forward(self, x, ps, st):
            return ps.experts["last"] * x, st

    with pytest.raises(KeyError) as info:
        fl.summary(Experts((fl.Dense(2, 2),)), jnp.ones(2))
    assert (
        info.value.__notes__[0]
        == "in the layer Experts: Experts((Dense(2, 2),))\n  called with x: float64[2]"
    )
