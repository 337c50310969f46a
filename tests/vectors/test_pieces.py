import math
import time

import numpy as np
from hypothesis import given, settings

import flatlayers as fl
from flatlayers.vectors.pieces import piece_count, pieces
from tests.vectors.layouts import layouts


@settings(deadline=None, max_examples=50)
@given(layouts)
def test_they_are_the_vector_in_order(layout):
    end, data = 0, np.arange(float(layout.length))
    record = layout.unpack(data)
    found = list(pieces(layout))
    assert piece_count(layout) == len(found) == len({name for name, _, _ in found})
    for name, start, shape in found:
        assert start == end
        end = start + math.prod(shape)
        # Numbers among the names are copies of stacks, which are the first axes of views.
        parts = name.split(".")
        path = ".".join(part for part in parts if not part.isdigit())
        index = tuple(int(part) for part in parts if part.isdigit())
        np.testing.assert_array_equal(record[path][index], data[start:end].reshape(shape))
    assert end == layout.length


def test_tied_names_are_there_once():
    layout = fl.Layout({"a": (2,), "b": {"c": (2,), "d": ()}}).tie({"b.c": "a"})
    assert list(pieces(layout)) == [("a", 0, (2,)), ("b.d", 2, ())]


def test_copies_of_nothing_are_not_walked_through():
    start = time.perf_counter()
    layout = fl.Layout({"a": fl.Layout({"b": {}}).stack(10**9).stack(10**9)})
    assert list(pieces(layout)) == []
    assert piece_count(fl.Layout({"b": (0,)}).stack(10**9).stack(10**9)) == 10**18
    assert time.perf_counter() - start < 0.1
