import flatlayers as fl
from flatlayers.vectors.text import as_html, as_text


class Point:
    def __repr__(self):
        return "Point()"


class Place(Point):
    pass


def test_nothing_is_registered_for_other_objects():
    assert as_text(Point()) == "Point()"
    assert as_html(Point()) is None


def test_a_kind_is_shown_as_it_was_registered():
    as_text.register(Place, lambda place: "here")
    as_html.register(Place, lambda place: "<b>here</b>")
    assert (as_text(Place()), as_html(Place())) == ("here", "<b>here</b>")
    assert as_text(Point()) == "Point()"


def test_layers_and_vectors_ask_there():
    layer = fl.Dense(3, 2)
    assert str(layer) == as_text(layer) == fl.pformat(layer)
    assert layer._repr_html_() == as_html(layer)
    vector = fl.ComponentVector.of({"a": 1.0})
    assert vector._repr_html_() == as_html(vector)
