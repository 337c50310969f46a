import re
import xml.etree.ElementTree as ElementTree

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flatlayers as fl


SMALL = fl.Chain(fl.Dense(2, 16, jnp.tanh), fl.Dropout(0.5), fl.Dense(16, 1))
DEEP = fl.Chain(
    embed=fl.Dense(2, 8),
    blocks=fl.Chain(*[fl.Chain(fl.LayerNorm(8), fl.Dense(8, 8))] * 40),
    small=fl.MLP(8, (8, 8), 8),
    head=fl.Dense(8, 1),
)


def parsed(shown):
    """The HTML, which has to be well-formed, name no resource and run no script."""
    page = shown._repr_html_()
    assert not re.search(r"<script|<style|<link|<img|https?:|url\(|\son\w+=", page)
    return ElementTree.fromstring(page), page


def bars(page):
    """The sizes of the parts in each row of the bar."""
    rows = []
    for row in page.iter("div"):
        sizes = [re.match(r"flex:(\d+);", part.get("style", "")) for part in row]
        if sizes and all(sizes):
            rows.append([int(size[1]) for size in sizes if size])
    return rows


def words(page):
    return "".join(page.itertext())


def vectors():
    ps = fl.initial_parameters(jax.random.key(0), SMALL)
    return [
        ps,
        jax.vmap(lambda i: ps)(jnp.arange(3)),
        ps.layer_0,
        fl.ComponentVector.zeros(DEEP.layout, jnp.float32),
    ]


@pytest.mark.parametrize(
    "shown", [*vectors(), SMALL, DEEP, fl.Dense(3, 2), fl.WrappedFunction(jnp.sin), fl.Chain()]
)
def test_it_is_well_formed_and_whole(shown):
    page, source = parsed(shown)
    layout = shown.layout
    rows = bars(page)
    assert bool(rows) == bool(layout.length)
    assert all(sum(row) == layout.length for row in rows)
    assert len(source) < 60_000


def test_a_vector_has_its_names_numbers_and_values():
    ps = fl.ComponentVector.of({"encoder": {"weight": [[1.5, 2.5]], "bias": [0.25]}, "rate": 7.0})
    page, _ = parsed(ps)
    text = words(page)
    assert "ComponentVector float64[4] 32 bytes" in " ".join(text.split())
    assert re.search(r"rate +7\.", text)
    titles = [part.get("title") for part in page.iter("div") if part.get("title")]
    assert "encoder: 3 (75.0 %), 0:3" in titles
    assert "encoder.weight: 2 (50.0 %), 0:2" in titles
    assert "rate: 1 (25.0 %), 3:4" in titles
    assert bars(page) == [[3, 1], [2, 1, 1]]


def test_a_model_shows_its_tree_beside_the_colours_of_the_bar():
    page, source = parsed(SMALL)
    for line in str(SMALL).splitlines():
        assert line in words(page)
    first = re.findall(r"border-left:4px solid (#\w+)", source)[0]
    assert f"background:{first}" in source


def test_a_stack_lies_copy_after_copy():
    model = fl.Repeated(fl.Dense(2, 2), 3)
    page, _ = parsed(model)
    assert bars(page)[-1] == [4, 2] * 3


def test_tied_parameters_lie_once():
    model = fl.share_parameters(fl.Chain(a=fl.Dense(2, 2), b=fl.Dense(2, 2)), {"b.weight": "a.weight"})
    page, _ = parsed(model)
    assert bars(page)[0] == [6, 2]


def test_names_are_escaped():
    class Odd(fl.Layer):
        label: str

        def parameters(self):
            return {"weight": fl.Param((2,), fl.initializers.zeros)}

    model = fl.Chain(Odd("<b>&\"'"), name="<script>alert(1)</script>")
    page, source = parsed(model)
    assert "<script" not in source
    assert "name='<script>alert(1)</script>'" in words(page)
    assert "<b>&" in words(page)
    parsed(fl.summary(fl.Chain(lambda x: x, name="<i>"), jnp.ones(2)))
    parsed(fl.tree({"<b>": np.ones(2)}))


def test_a_summary_is_a_table():
    found = fl.summary(DEEP, jax.ShapeDtypeStruct((5, 2), jnp.float32))
    page, source = parsed(found)
    rows = [[words(cell) for cell in row] for row in page.iter("tr")]
    assert rows[0][0] == "path"
    assert rows[1][:5] == ["embed", "Dense(2, 8)", "(5, 8)", "24", "0:24"]
    assert rows[-1][0] == "total"
    assert rows[-1][3] == f"{DEEP.layout.length:_}"
    assert any(part.get("title") == "blocks.layer_0..layer_39.layer_1" for part in page.iter("span"))
    assert len(source) < 60_000


def test_a_tree_draws_its_ranges():
    v = fl.ComponentVector.of({"a": [-1.0, 1.0], "b": [jnp.nan, 0.5], "c": {"d": 0.0}})
    page, _ = parsed(fl.tree(v))
    a, b, c = (row for row in list(page.iter("tr"))[1:])
    line = next(part for part in list(a.iter("line")) if part.get("y1") == "7")
    # the widest range takes the width, 80 being zero
    assert (float(line.get("x1")) - 80, float(line.get("x2")) - 80) == (-75, 75)
    assert "1 nan" in words(b)
    assert words(c).startswith("c.d")


def test_large_vectors_are_short():
    layers = {f"layer_{i}": {"weight": (3, 3), "bias": (3,)} for i in range(2000)}
    page, source = parsed(fl.ComponentVector.zeros(fl.Layout(layers), jnp.float32))
    assert len(source) < 80_000
    assert sum(bars(page)[0]) == 24_000


def test_traced_vectors_have_no_values():
    seen = []
    jax.jit(lambda v: seen.append(parsed(v)[1]) or v)(fl.ComponentVector.zeros(SMALL.layout))
    assert "details" not in seen[0]
    assert "layer_0" in seen[0]
    axes = jax.tree.map(lambda x: 0, fl.ComponentVector.zeros(SMALL.layout))
    assert "ComponentVector" in parsed(axes)[1]
