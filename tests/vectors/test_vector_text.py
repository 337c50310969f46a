import jax
import jax.numpy as jnp

import flatlayers as fl
from tests.vectors.test_vector import LAYOUT


def test_text_is_short_and_names_everything():
    v = fl.ComponentVector(jnp.arange(10.0), LAYOUT)
    assert repr(v) == "ComponentVector(float64[10], a=(2, 3), b=(c=(3,), d=()))"
    assert str(v).splitlines() == [
        "ComponentVector(float64[10])",
        "  a    [[0., 1., 2.], [3., 4., 5.]]",
        "  b.c  [6., 7., 8.]",
        "  b.d  9.",
    ]
    big = fl.ComponentVector.zeros(fl.Layout({f"layer_{i}": {"weight": (10, 10)} for i in range(1000)}))
    assert len(repr(big)) < 500
    assert len(str(big).splitlines()) < 30
    assert "a=(2, 3)" in jax.jit(lambda v: (str(v), v)[1])(v).__repr__()
    tied = fl.ComponentVector.zeros(fl.Layout({"x": (2,), "y": (2,)}).tie({"y": "x"}))
    assert "the same as x" in str(tied)


def test_a_group_without_names_is_no_number():
    layout = fl.Layout({"number": (), "flat": {}, "inner": {"pool": {}, "b": (2,)}, "n": fl.Layout({})})
    assert repr(layout) == "Layout(number=(), flat={}, inner=(pool={}, b=(2,)), n={})"
    assert repr(fl.Layout({})) == "Layout()"
    stacked = fl.Layout({"pools": fl.Layout({}).stack(3), "nets": fl.Layout({"b": ()}).stack(3)})
    assert repr(stacked) == "Layout(pools={}.stack(3), nets=(b=()).stack(3))"


def test_what_is_not_the_numbers_is_shown_as_what_it_is():
    v = fl.ComponentVector(jnp.arange(10.0), LAYOUT)
    norm = jax.tree.map(jnp.linalg.norm, v)
    names = "not the 10 numbers of its layout a=(2, 3), b=(c=(3,), d=())"
    assert repr(norm) == f"ComponentVector(float64[], {names})"
    assert str(norm).splitlines() == [repr(norm), f"  {285**0.5:.4f}"]
    number = jax.tree.map(lambda x: float(x.sum()), v)
    assert repr(number) == str(number) == f"ComponentVector(45.0, {names})"
    other = jax.tree.map(lambda x: x[:2], v)
    assert str(other).splitlines() == [f"ComponentVector(float64[2], {names})", "  [0., 1.]"]
    html = norm._repr_html_()
    assert "16.8819" in html
    assert "not the 10 numbers" in html
    assert "<svg" not in html
