"""Layouts for tests, some by hand and some drawn, and trees of numbers for them."""

import numpy as np
from hypothesis import strategies as st

import flatlayers as fl
from flatlayers.vectors.names import check_name


NESTED = {"weight": (4, 2), "bias": (4,), "inner": {"w": (2, 3), "gain": ()}}


def is_name(text):
    try:
        return bool(check_name(text))
    except ValueError:
        return False


names = st.text("abcdefgh_", min_size=1, max_size=4).filter(is_name)
shapes = st.lists(st.integers(0, 3), max_size=3).map(tuple)


def groups(children):
    layouts = st.dictionaries(names, children, max_size=3).map(fl.Layout)
    return layouts | st.tuples(layouts, st.integers(0, 3)).map(lambda pair: pair[0].stack(pair[1]))


layouts = st.dictionaries(names, st.recursive(shapes, groups, max_leaves=8), max_size=4).map(fl.Layout)


def tree_of(layout, lead=()):
    """A tree with the shapes of the views, every number different."""
    rng = np.random.default_rng(0)
    leaves = {path: rng.normal(size=(*lead, *shape)) for path, shape in layout.view_shapes.items()}
    return layout.nest(leaves).to_dict()


def autoencoder():
    return fl.Layout(
        {"encoder": {"weight": (4, 2), "bias": (4,)}, "decoder": {"weight": (4, 2), "bias": (2,)}}
    )
