"""What the error says for a name that is not in the parameters, the state or the options of a layer."""

import pickle

import jax
import jax.numpy as jnp
import pytest

import flatlayers as fl


ONES = jnp.ones(2)


class Forgetful(fl.Container):
    net: fl.Layer

    def parameters(self):
        return {"a": fl.Param((), fl.initializers.ones)}

    def forward(self, x, ps, st):
        y, net = self.net(x, ps.net, st.net)
        return ps.a * y, st.replace(net=net)


class Plain(fl.Layer):
    net: fl.Dense

    def parameters(self):
        return {"a": fl.Param((), fl.initializers.ones)}

    def forward(self, x, ps, st):
        return self.net(x, ps.net, {})[0], st


class WithoutStates(fl.Container):
    net: fl.Layer

    def states(self, key):
        return {"seen": 0}

    def forward(self, x, ps, st):
        return self.net(x, ps.net, st.net)[0], st


class Reads(fl.Container):
    net: fl.Layer
    read: str

    def forward(self, x, ps, st):
        return eval(self.read), st


def message(model, kind=AttributeError):
    ps, st = fl.setup(jax.random.key(0), model, float)
    with pytest.raises(kind) as info:
        model(ONES, ps, st)
    assert str(pickle.loads(pickle.dumps(info.value))) == str(info.value)
    return str(info.value)


DENSE = fl.Dense(2, 2)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (
            Forgetful(DENSE),
            "no name 'net'; there are: a; looked for in `ps` of Forgetful. `net` is a layer of Forgetful, "
            "but `parameters` does not declare it: write {**super().parameters(), ...}",
        ),
        (
            Plain(DENSE),
            "no name 'net'; there are: a; looked for in `ps` of Plain. `net` is a layer of Plain, but "
            "`parameters` does not declare it: derive from fl.Container and write {**super().parameters(), "
            "...}",
        ),
        (
            WithoutStates(DENSE),
            "no name 'net'; there are: seen; looked for in `st` of WithoutStates. `net` is a layer of "
            "WithoutStates, but `states` does not declare it: write {**super().states(key), ...}",
        ),
        (
            Reads(DENSE, "ps.ned"),
            "no name 'ned'; the nearest: net; looked for in `ps` of Reads",
        ),
        (
            Reads(DENSE, "ps.net.wieght"),
            "no name 'wieght'; the nearest: weight; looked for in `ps.net` of Reads",
        ),
        (
            Reads(DENSE, "st.read"),
            "no name 'read'; there are: net; looked for in `st` of Reads",
        ),
    ],
)
def test_a_name_that_is_not_there(model, expected):
    assert message(model) == expected


def test_the_innermost_layer_says_it_once():
    found = message(fl.Chain(first=fl.NoOpLayer(), second=Forgetful(DENSE)))
    assert found == message(Forgetful(DENSE))


def test_attributes_of_other_objects_are_left_alone():
    assert message(Reads(DENSE, "x.nothing")).count("looked for") == 0


def test_a_record_that_is_not_given_says_nothing_more():
    assert message(Reads(DENSE, "fl.Record(a=1).b")) == "no name 'b'; there are: a"


class Passes(fl.Layer):
    def __init__(self, wrong):
        fl.Dense(2, 2, **wrong)


@pytest.mark.parametrize("make", [lambda: fl.Dense(2, 2, bias=False), lambda: Passes({"bias": False})])
def test_an_unknown_option_names_those_that_there_are(make):
    with pytest.raises(TypeError) as info:
        make()
    assert str(info.value).startswith("Dense.__init__() got an unexpected keyword argument 'bias'")
    options = "in_dims, out_dims, activation, use_bias, init_weight, init_bias"
    assert str(info.value).endswith(f"; the options are: {options}")
    assert str(info.value).count("options") == 1


def test_other_errors_of_a_constructor_are_left_alone():
    with pytest.raises(TypeError) as info:
        fl.Dense(2)
    assert "the options are" not in str(info.value)
