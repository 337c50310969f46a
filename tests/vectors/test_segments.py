from hypothesis import given, settings

import flatlayers as fl
from flatlayers.vectors.segments import label_at, labels_of
from tests.vectors.layouts import layouts


@settings(deadline=None, max_examples=30)
@given(layouts)
def test_one_label_is_that_of_the_list(layout):
    labels = list(labels_of(layout._segments))
    assert [label_at(layout._segments, i) for i in range(layout.length)] == labels


def test_labels_in_stacks_of_stacks():
    layout = fl.Layout({"n": fl.Layout({"c": fl.Layout({"w": (2, 2)}).stack(2), "b": ()}).stack(3)})
    assert layout.label(9) == "n[1].c[0].w[0,0]"
    assert layout.label(-1) == "n[2].b"
    assert fl.Layout({"a": (0,), "b": ()}).label(0) == "b"
