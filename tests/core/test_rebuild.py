import jax.numpy as jnp
import pytest

import flatlayers as fl
from flatlayers.core.rebuild import replaceable, shared_names, with_children
from tests.core.models import Linear, net


def test_children_that_stand_in_fields_can_be_replaced():
    model = net()
    assert list(replaceable(model)) == [
        *("encoder", "hidden.layer_0", "hidden.layer_1", "heads.mean", "heads.spread")
    ]
    new = with_children(model, {"hidden.layer_0": fl.NoOpLayer(), "heads.spread": Linear(4, 2)})
    assert new.hidden == (fl.NoOpLayer(), model.hidden[1])
    assert new.heads["spread"] == Linear(4, 2)
    assert (new.encoder, new.heads["mean"], new.scale) == (model.encoder, model.heads["mean"], model.scale)
    assert with_children(new, replaceable(model)) == model


def test_the_child_of_a_wrapper_has_an_empty_path():
    model = fl.Recurrence(fl.GRUCell(3, 2))
    assert replaceable(model) == {"": model.cell}
    assert with_children(model, {"": fl.LSTMCell(3, 2)}) == fl.Recurrence(fl.LSTMCell(3, 2))


def test_children_that_a_layer_makes_itself_cannot():
    assert replaceable(fl.MLP(2, (3,), 1)) == {}


def test_a_layer_used_twice_is_told_apart_by_order():
    layer = fl.Dense(2, 2)
    model = fl.Chain(layer, jnp.tanh, layer)
    new = with_children(model, {"layer_2": fl.NoOpLayer()})
    assert new == fl.Chain(layer, jnp.tanh, fl.NoOpLayer())


def test_names_of_one_field_change_together():
    model = fl.BidirectionalRNN(fl.RNNCell(3, 2))
    assert shared_names(model) == dict.fromkeys(("forward", "backward"), "forward|backward")
    both = dict.fromkeys(("forward", "backward"), fl.GRUCell(3, 2))
    assert with_children(model, both) == fl.BidirectionalRNN(fl.GRUCell(3, 2))
    with pytest.raises(ValueError, match=r"'backward': expected GRUCell\(3, 2\), which the same field has"):
        with_children(model, {"forward": fl.GRUCell(3, 2), "backward": fl.LSTMCell(3, 2)})


def test_a_rebuilt_layer_is_checked():
    class Same(fl.Container):
        layer: fl.Layer
        size: int | None = None

        def check_fields(self):
            self.size = fl.parameter_length(self.layer)
            if self.size > 10:
                raise ValueError(f"expected at most 10 parameters, found {self.size}")

    model = Same(fl.Dense(2, 2))
    assert with_children(model, {"layer": fl.Dense(2, 1)}).size == 3
    with pytest.raises(ValueError, match="found 12"):
        with_children(model, {"layer": fl.Dense(3, 3)})
