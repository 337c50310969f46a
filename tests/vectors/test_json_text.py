import json
import time

import pytest

import flatlayers as fl


def text(tree, ties=None, **more):
    return json.dumps({"flatlayers_layout": 1, "tree": tree, "ties": ties or {}, **more})


def leaf(shape):
    return text({"names": {"a": shape}})


def nested(depth):
    tree = {"names": {"a": [2]}}
    for _ in range(depth):
        tree = {"names": {"a": tree}}
    return text(tree)


TWO = {"names": {"a": [2], "b": [2], "c": [3]}}
BAD = {
    "deep lists": "[" * 100_000,
    "deep objects": '{"a":' * 100_000,
    "deep groups": nested(101),
    "a name twice": '{"flatlayers_layout":1,"tree":{"names":{"a":[2],"a":[2]}},"ties":{}}',
    "a field twice": '{"flatlayers_layout":1,"tree":{"names":{}},"ties":{},"ties":{}}',
    "an unknown field": text({"names": {}}, more=1),
    "an unknown field of a group": text({"names": {}, "more": 1}),
    "a field missing": '{"flatlayers_layout":1,"tree":{"names":{}}}',
    "a group without names": text({"copies": [2]}),
    "version true": text({"names": {}}, flatlayers_layout=True),
    "version 1.0": text({"names": {}}, flatlayers_layout=1.0),
    "a bool as size": leaf([True]),
    "a float as size": leaf([2.0]),
    "text as size": leaf(["2"]),
    "a negative size": leaf([-1]),
    "a huge size": leaf([2**63]),
    "NaN": '{"flatlayers_layout":1,"tree":{"names":{"a":[NaN]}},"ties":{}}',
    "many axes": leaf([1] * 65),
    "a number as shape": leaf(2),
    "text as shape": leaf("2"),
    "nothing as shape": leaf(None),
    "a bool as copies": text({"names": {}, "copies": [True]}),
    "negative copies": text({"names": {}, "copies": [-1]}),
    "a number as copies": text({"names": {}, "copies": 2}),
    "a bad name": text({"names": {"a.b": []}}),
    "a keyword": text({"names": {"lambda": []}}),
    "a name that is read as another": text({"names": {"\u00b5": []}}),
    "a reserved name": text({"names": {"shape": []}}),
    "an empty name": text({"names": {"": []}}),
    "ties a list": text(TWO, []) .replace('"ties": {}', '"ties": []'),
    "a tie to nothing": text(TWO, {"a": "x"}),
    "a tie of nothing": text(TWO, {"x": "a"}),
    "a tie to itself": text(TWO, {"a": "a"}),
    "a circle": text(TWO, {"a": "b", "b": "a"}),
    "a tie of other shapes": text(TWO, {"c": "a"}),
    "a tie to no text": text(TWO, {"a": ["b"]}),
    "long paths": text({"names": {"a" * 100_000: {"names": {f"b{i}": [] for i in range(5000)}}}}),
    "bytes": b"{}",
    "nothing": None,
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_other_texts_are_refused_at_once(name):
    times = []
    for _ in range(3):
        start = time.perf_counter()
        with pytest.raises(ValueError, match="this is not the JSON text of a Layout: "):
            fl.Layout.from_json(BAD[name])
        times.append(time.perf_counter() - start)
    assert min(times) < 0.05


def test_what_is_deep_but_not_too_deep():
    layout = fl.Layout.from_json(nested(100))
    assert layout.length == 2
    assert fl.Layout.from_json(layout.to_json()) == layout
    with pytest.raises(ValueError, match="at most 100 groups"):
        fl.Layout({"a": layout}).to_json()


def test_stacks_of_nothing_cost_nothing():
    layout = fl.Layout.from_json(text({"names": {"s": {"names": {}, "copies": [2**62, 2**62]}}}))
    assert layout.length == 0


def seconds(number):
    layout = fl.Layout({f"a{i}": (2,) for i in range(number)}).tie({"a1": "a0"})
    plain = json.loads(layout.to_json())
    plain["ties"] = {f"a{i}": "a0" for i in range(1, number)}
    many = json.dumps(plain)
    start = time.perf_counter()
    assert fl.Layout.from_json(many).length == 2
    return time.perf_counter() - start


def test_many_ties_are_not_quadratic():
    """Twenty thousand were seconds when each one went through all that were there."""
    assert min(seconds(20_000) for _ in range(2)) < 1.0


def test_ties_in_stacks_come_back():
    base = fl.Layout({"w": (2, 2), "v": (2, 2), "b": (2,)})
    inside = fl.Layout({"s": base.tie({"v": "w"}).stack(3), "t": base.stack(3)}).tie({"t.w": "s.w"})
    for layout in (inside, inside.stack(2).stack(3), fl.Layout({"deep": inside})):
        assert fl.Layout.from_json(layout.to_json()) == layout
