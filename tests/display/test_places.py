import flatlayers as fl
from flatlayers.display.places import alike, joined, leaves_in_order, runs_of, span_text


def test_a_leaf_has_a_place_in_each_copy():
    layout = fl.Layout({"rate": (), "block": fl.Layout({"a": (2,), "b": (3,)}).stack(3)})
    assert list(runs_of(layout["rate"])) == [(0, 1)]
    assert list(runs_of(layout["block.a"])) == [(1, 3), (6, 8), (11, 13)]
    assert [run for run, path in leaves_in_order(layout) if path == "block.b"] == [(3, 6), (8, 11), (13, 16)]


def test_places_come_in_vector_order_and_ties_once():
    layout = fl.Layout({"a": (2,), "b": (3,), "c": (2,)}).tie({"c": "a"})
    assert leaves_in_order(layout) == [((0, 2), "a"), ((2, 5), "b")]


def test_neighbours_are_joined():
    assert joined([(4, 6), (0, 2), (2, 4)]) == ((0, 6),)
    assert joined([(0, 2), (5, 5), (3, 4), (0, 1)]) == ((0, 2), (3, 4))
    assert joined([]) == ()


def test_three_equal_neighbours_are_alike():
    assert list(alike({"a": 1, "b": 1, "c": 2, "d": 2, "e": 2, "f": 1})) == [
        ("a",),
        ("b",),
        ("c", "d", "e"),
        ("f",),
    ]


def test_a_span_of_names():
    assert span_text(("layer_9", "layer_10", "layer_11")) == "layer_9..layer_11"
    assert span_text(("layer_1", "layer_3")) == "layer_1, layer_3"
    assert span_text(("q", "k", "v")) == "q, k, v"
    assert span_text(("layer_1",)) == "layer_1"
