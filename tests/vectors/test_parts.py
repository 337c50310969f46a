"""Parts of vectors by slices, against the positions that a layout tells."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

import flatlayers as fl
from flatlayers.vectors import parts
from tests.helpers import assert_same, counting_jit
from tests.vectors.layouts import NESTED, layouts


STACKS = fl.Layout(
    {
        "first": (3,),
        "blocks": fl.Layout(
            {"a": {"w": (2, 2), "b": (2,)}, "cells": fl.Layout({"u": (3,), "v": ()}).stack(2), "c": (2,)}
        ).stack(4),
        "last": {"x": (), "y": (2,)},
    }
)
TIED = fl.Layout({"a": {"u": (2,), "v": (3,)}, "b": {"u": (2,), "v": (3,)}}).tie({"b.u": "a.u"})


@pytest.fixture
def _as_if_long(monkeypatch):
    """As for vectors whose places JAX does not count: there is no memory for those."""
    monkeypatch.setattr(parts, "too_long", lambda length: True)


def numbers(layout, lead=()):
    return jnp.arange(np.prod((*lead, layout.length), dtype=int), dtype=float).reshape(*lead, layout.length)


def every_part(layout):
    return [*layout.view_shapes, *filter(None, layout.groups)]


@pytest.mark.long
@settings(deadline=None, max_examples=8)
@given(layouts)
def test_parts_are_where_the_layout_says(layout):
    v = fl.ComponentVector(numbers(layout, (2,)), layout)
    for path in every_part(layout):
        view = v[path]
        found = view.data if isinstance(view, fl.ComponentVector) else view.reshape(2, -1)
        assert_same(found, v.data[..., layout.indices(path)])


@pytest.mark.long
@pytest.mark.parametrize("long", [False, True])
@pytest.mark.parametrize(
    ("layout", "lead"), [(fl.Layout(NESTED), ()), (STACKS, (3,)), (STACKS.stack(3), ()), (TIED, (2,))]
)
def test_changes_are_those_of_an_index(request, layout, lead, long):
    if long:
        request.getfixturevalue("_as_if_long")
    v = fl.ComponentVector(numbers(layout, lead), layout)
    is_refused = {path: long and parts.regions_of(layout, path) is None for path in every_part(layout)}
    for path in filter(is_refused.get, is_refused):
        with pytest.raises(ValueError, match="'b' has names that are tied to places outside"):
            v.at[path].set(0.0)
    values = {path: v[path] * 0.5 + 1 for path, refused in is_refused.items() if not refused}

    def changes(v, values, methods):
        changed = {
            (path, method): getattr(v.at[path], method)(x).data
            for path, x in values.items()
            for method in methods
        }
        return changed | {(path, "number"): v.at[path].set(3.0).data for path in values}

    found = jax.jit(changes, static_argnums=2)(v, values, ("set", "add", "multiply"))
    assert_same(
        changes(v, values, ("set",)),
        {place: x for place, x in found.items() if place[1] in ("set", "number")},
    )
    for path, value in values.items():
        where, old = layout.indices(path), np.asarray(v.data)
        flat = np.asarray(getattr(value, "data", value)).reshape(*lead, -1)
        new = {"set": flat, "add": old[..., where] + flat, "multiply": old[..., where] * flat, "number": 3.0}
        for method, numbers_there in new.items():
            expected = old.copy()
            expected[..., where] = numbers_there
            assert_same(found[path, method], expected)
        assert_same(v.at[path].get(), v[path])


@pytest.mark.long
@pytest.mark.parametrize("long", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_gradient_of_a_change(request, long, key):
    if long:
        request.getfixturevalue("_as_if_long")
    v = fl.ComponentVector(jax.random.normal(key, (STACKS.length,), float), STACKS)
    weights = jax.random.normal(jax.random.key(1), (STACKS.length,), float)
    values = {path: v[path] * 2 for path in every_part(STACKS)}

    def loss(v, x, path, method):
        new = getattr(v.at[path], method)(x).data
        return jnp.sum(weights * new**2), new

    @jax.jit
    def gradients(v, values):
        differentiate = jax.grad(loss, (0, 1), has_aux=True)
        methods = ("set", "add", "multiply")
        return {(path, m): differentiate(v, x, path, m) for path, x in values.items() for m in methods}

    for (path, method), ((of_vector, of_value), new) in gradients(v, values).items():
        where, old = STACKS.indices(path), np.asarray(v.data)
        outer = 2 * np.asarray(weights * new)
        x = np.asarray(getattr(values[path], "data", values[path])).ravel()
        by_old, by_value = {"set": (0.0, 1.0), "add": (1.0, 1.0), "multiply": (x, old[where])}[method]
        expected = outer.copy()
        expected[where] *= by_old
        np.testing.assert_allclose(of_vector.data, expected, rtol=1e-12)
        found = np.asarray(getattr(of_value, "data", of_value)).ravel()
        np.testing.assert_allclose(found, outer[where] * by_value, rtol=1e-12)


def test_a_change_is_one_slice_written_into_the_vector():
    """No index, no scatter: those take many times as long."""
    v = fl.ComponentVector(numbers(STACKS), STACKS)
    for path in ("last.y", "blocks.a", "blocks.cells.u"):
        text = str(jax.make_jaxpr(lambda v, p=path: v.at[p].set(0.0))(v))
        assert "scatter" not in text
        assert "gather" not in text


def test_one_program_for_all_parts_of_a_shape(monkeypatch):
    layout = fl.Layout({f"layer_{i}": (17,) for i in range(5)})
    v = fl.ComponentVector(numbers(layout), layout)
    compiled, traced = counting_jit(parts._changed, static_argnames=("shapes", "method"))
    monkeypatch.setattr(parts, "_changed_in_place", compiled)
    for name in layout.names:
        v = v.at[name].set(1.0)
    assert len(traced) == 1
    assert v.data.sum() == layout.length


def test_dtypes_are_promoted_as_by_an_index():
    v = fl.ComponentVector(jnp.zeros(3, jnp.float32), fl.Layout({"a": (2,), "b": ()}))
    with jax.numpy_dtype_promotion("standard"):
        with pytest.warns(FutureWarning, match="incompatible types"):
            assert v.at["a"].set(jnp.ones(2, jnp.float64)).dtype == jnp.float32
        assert v.at["a"].add(jnp.ones(2, int)).a.tolist() == [1, 1]
    with pytest.raises(ValueError, match="promotion path"):
        v.at["a"].set(jnp.ones(2, jnp.float64))
    counts = fl.ComponentVector(jnp.arange(3), fl.Layout({"a": (2,), "b": ()}))
    assert counts.at["b"].add(2).data.tolist() == [0, 1, 4]
    assert v.at["a"].set(jnp.float32(2)).data.tolist() == [2, 2, 0]


# Places that JAX's integers do not count


@pytest.mark.usefixtures("_as_if_long")
def test_positions_of_a_long_vector():
    v, lead = (fl.ComponentVector(numbers(STACKS, lead), STACKS) for lead in ((), (2,)))
    n = STACKS.length
    assert (v[-1], v[0], v[np.int64(3)]) == (n - 1, 0, 3)
    for key in (slice(2, 5), slice(-3, None), slice(None), slice(5, 2)):
        assert_same(v[key], v.data[key])
        assert_same(lead[..., key], lead.data[..., key])
        assert_same(v.at[key].set(1.0).data, v.data.at[key].set(1.0))
        assert_same(lead.at[..., key].add(1.0).data, lead.data.at[..., key].add(1.0))
    assert_same(lead[..., -1], lead.data[..., -1])
    assert_same(v.at[-1].multiply(2.0).data, v.data.at[-1].multiply(2.0))
    assert_same(v[...], v.data)
    assert_same(v.at[...].set(2.0).data, jnp.full(n, 2.0))
    with pytest.raises(IndexError, match=f"position below {n}, found {n}"):
        v[n]
    for key in (slice(0, 4, 2), [1, 2], jnp.arange(2), np.ones(n, bool)):
        with pytest.raises(ValueError, match="expected a name, an integer or a slice without a step"):
            v[key]
        with pytest.raises(ValueError, match="JAX counts up to"):
            v.at[key].set(0.0)


@pytest.mark.usefixtures("_as_if_long")
def test_groups_and_picks_of_a_long_vector():
    for layout, paths in ((STACKS, ("last", "blocks.a")), (TIED, ("b", "a.u"))):
        v = fl.ComponentVector(numbers(layout, (2,)), layout)
        for path in paths:
            view = v[path]
            assert_same(getattr(view, "data", view).reshape(2, -1), v.data[..., layout.indices(path)])
        picked = v.pick(*paths)
        assert picked.layout == layout.pick(*paths)
        for path in picked.layout.view_shapes:
            assert_same(picked[path], v[path])


LONG = 2**31 + 100
LAYOUT = fl.Layout(
    {"a": (LONG - 70,), "blocks": fl.Layout({"g": {"w": (2,), "b": ()}, "c": (2,)}).stack(10), "z": (20,)}
)


def test_shapes_above_two_to_the_31():
    v = fl.ComponentVector(jax.ShapeDtypeStruct((LONG,), jnp.int8), LAYOUT)
    with jax.enable_x64(False):
        for function in (
            lambda v: v[-1],
            lambda v: v[2**31 :],
            lambda v: v.blocks.g,
            lambda v: v.pick("z", "blocks.c"),
            lambda v: v.at["z"].set(jnp.int8(1)),
            lambda v: v.at["blocks.g"].add(jnp.int8(1)),
            lambda v: v.at["blocks.c"].multiply(jnp.int8(1)),
            lambda v: v.at[-1].set(1),
        ):
            jax.eval_shape(function, v)
        with pytest.raises(ValueError, match="JAX counts up to 2147483647 only, unless jax.enable_x64"):
            jax.eval_shape(lambda v: v[jnp.arange(3)], v)
    with pytest.raises(ValueError, match="at most 100000000 numbers, found 2147483748"):
        LAYOUT.labels()
    assert LAYOUT.label(-1) == "z[19]"
    assert LAYOUT.label(LONG - 21) == "blocks[9].c[1]"


@pytest.mark.slow
def test_numbers_above_two_to_the_31():
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        v = fl.ComponentVector(jnp.zeros(LONG, jnp.int8), LAYOUT)
        assert v[2**31 :].shape == (100,)
        v = v.at["z"].set(jnp.arange(20, dtype=jnp.int8))
        assert (v[-1], v[2**31 + 99]) == (19, 19)
        v = v.at["blocks.g"].add(jnp.int8(3))
        assert v.blocks.g.w.sum() == 60
        assert v.blocks.c.sum() == 0
        assert v[2**31 + 80 :].tolist() == list(range(20))
        assert v[2**31 + 30 : 2**31 + 35].tolist() == [3, 3, 3, 0, 0]


def test_one_program_reads_all_leaves_of_a_shape(compilations):
    layout = fl.Layout({f"n{i}": {"w": (2, 3), "b": (3,)} for i in range(40)})
    v = fl.ComponentVector(np.arange(float(layout.length)), layout)
    jax.block_until_ready(v.data)
    before = len(compilations)
    found = [v[f"n{i}"].w for i in range(40)] + [v[f"n{i}.b"] for i in range(40)]
    # A group, a matrix in it, a matrix and a vector in the whole.
    assert len(compilations) - before <= 4
    expected = layout.unpack(np.asarray(v.data))
    assert_same(found, [expected[f"n{i}.w"] for i in range(40)] + [expected[f"n{i}.b"] for i in range(40)])
    before = len(compilations)
    assert_same(v.unpack(), expected)
    assert len(compilations) - before <= 1  # nor does what takes all of them


@pytest.mark.long
@pytest.mark.parametrize("lead", [(), (2,)])
def test_many_leaves_are_unpacked_as_by_a_split(lead):
    blocks = {f"n{i}": STACKS for i in range(12)}
    layout = fl.Layout(blocks).tie({"n3.last": "n1.last"})
    assert len(layout._segments) > 32
    data = np.arange(np.prod(lead, dtype=int) * layout.length, dtype=float).reshape(*lead, layout.length)
    v = fl.ComponentVector(data, layout)
    assert_same(v.unpack(), layout.unpack(data))
    assert_same(v.unpack(), jax.jit(lambda v: v.unpack())(v))
