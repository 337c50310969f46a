import ast
import dataclasses
import pickle

import jax
import jax.numpy as jnp
import pytest

import flatlayers as fl
from flatlayers.vectors import names
from flatlayers.vectors.names import RESERVED_NAMES, as_path, describe


@pytest.mark.parametrize("name", ["_a", "a.b", "1a", "", "a b", *sorted(RESERVED_NAMES)])
def test_refuses_bad_and_reserved_names(name):
    with pytest.raises(ValueError, match=repr(name)):
        fl.Layout({"inner": {name: (2,)}})


# The micro sign is read as the Greek letter, the ligature as two letters, the others as plain ones.
@pytest.mark.parametrize(
    ("name", "read"),
    [("\u00b5", "\u03bc"), ("\ufb01t", "fit"), ("\U0001d465", "x"), ("\u017fine", "sine"), ("k\u00aa", "ka")],
)
def test_names_that_python_reads_as_others_are_refused(name, read):
    assert list(ast.parse(f"{name} = 1").body[0].targets[0].id) == list(read)
    for make in (lambda: fl.Layout({"inner": {name: (2,)}}), lambda: fl.Record({name: 1.0})):
        with pytest.raises(ValueError, match=rf"{name!r} \(U\+.* for {read!r} \(U\+") as found:
            make()
        assert f"U+{ord(name[0]):04X}" in str(found.value)
    assert fl.Layout({read: (2,)}).names == (read,)
    with pytest.raises(ValueError, match=repr(name)):
        fl.setup(jax.random.key(0), {"rates": {name: fl.Param((), fl.initializers.ones)}})


@pytest.mark.parametrize("name", ["lambda", "class", "None", "True", "def", "await"])
def test_keywords_are_refused(name):
    with pytest.raises(ValueError, match=f"{name!r} is a keyword of Python.*'{name}_'"):
        fl.Layout({"inner": {name: (2,)}})
    with pytest.raises(ValueError, match="keyword"):
        fl.setup(jax.random.key(0), fl.Chain(**{name: fl.Dense(1, 1)}))
    assert fl.Layout({f"{name}_": ()}).length == 1


@pytest.mark.parametrize("name", ["match", "type", "case", "\u03bc", "\u03b1_1", "s\u00f8", "\u6570"])
def test_other_words_and_letters_are_names(name):
    v = fl.ComponentVector.of({name: 2.0})
    assert float(eval(f"v.{name}", {"v": v})) == 2.0


def test_a_path_takes_places_in_a_tuple():
    assert as_path(("experts", 0, "weight")) == as_path("experts.layer_0.weight")
    assert as_path((1, "bias")) == "layer_1.bias"
    for key in ((0, 1), (), ("a", -1), ("a", True), ("a", 1.0), 0):
        with pytest.raises(TypeError, match="a path is a string"):
            as_path(key)


def test_reserved_names_are_exactly_the_attributes_of_a_vector_and_the_methods_of_a_mapping():
    attributes = {name for name in dir(fl.ComponentVector) if not name.startswith("_")}
    assert attributes | {"keys", "values", "items", "get"} == RESERVED_NAMES


def test_values_are_described_by_their_parts():
    @dataclasses.dataclass
    class Pair:
        first: object
        second: object

    number = jnp.ones((2, 3), jnp.float32)
    assert describe({"a": number, "b": [1.0, None]}) == "{a: float32[2,3], b: [1.0, None]}"
    assert describe((fl.ComponentVector.of({"a": number}),)) == "(ComponentVector(float32[6]))"
    assert describe(Pair(number, describe)) == "Pair(first: float32[2,3], second: function)"
    assert describe(Pair) == "type"


def test_the_nearest_names_are_looked_for_when_a_message_is_read(monkeypatch):
    def never(*args, **options):
        raise AssertionError

    v = fl.ComponentVector.of({"weight": 1.0, "inner": {"bias": 2.0}})
    record = v.unpack()
    with monkeypatch.context() as patched:
        patched.setattr(names.difflib, "get_close_matches", never)
        for part in (v, record):
            assert "wieght" not in part
            assert not hasattr(part, "wieght")
            assert not hasattr(part.inner, "bais")
        assert record.get("wieght") is None
        with pytest.raises(KeyError) as info:
            record["inner.bais"]
    assert str(info.value) == "no name 'bais'; the nearest: bias"
    assert repr(pickle.loads(pickle.dumps(info.value))) == repr(info.value)
