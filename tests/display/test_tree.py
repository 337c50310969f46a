import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flatlayers as fl


MODEL = fl.Chain(fl.Dense(2, 16, jnp.tanh), fl.Dropout(0.5), fl.Dense(16, 1))


@pytest.mark.parametrize(("lead", "dtype"), [((), jnp.float32), ((7,), jnp.float64), ((), jnp.bfloat16)])
def test_numbers_are_those_of_numpy(key, dtype, lead):
    layout = MODEL.layout
    v = fl.ComponentVector(jax.random.normal(key, (*lead, layout.length), dtype), layout)
    rows = fl.tree(v).rows
    assert [row.path for row in rows] == [path for path, _ in layout.slots()]
    for row in rows:
        numbers = np.asarray(v[row.path]).astype(float)
        assert (row.shape, row.dtype) == (numbers.shape, str(jnp.dtype(dtype)))
        expected = numbers.min(), numbers.max(), numbers.mean(), numbers.std()
        np.testing.assert_allclose((row.min, row.max, row.mean, row.std), expected, rtol=1e-12)
        assert (row.nan, row.inf) == (0, 0)


def test_text_of_a_vector():
    v = fl.ComponentVector.of({"net": {"weight": [[3.0, -1], [1, 1]], "bias": [0.0]}, "rate": 1234.5678})
    # mean 1; deviations 2, -2, 0, 0: spread sqrt(8 / 4)
    assert str(fl.tree(v)).splitlines() == [
        "ComponentVector(float64[6])",
        "name        shape   dtype     min   max  mean    std",
        "─" * 52,
        "net.weight  (2, 2)  float64    -1     3     1  1.414",
        "net.bias    (1,)    float64     0     0     0      0",
        "rate        ()      float64  1235  1235  1235      0",
    ]


def test_what_is_not_finite_is_counted():
    v = fl.ComponentVector.of({"a": [1.0, jnp.nan, jnp.inf, 3.0, -jnp.inf], "b": [jnp.nan], "c": 2.0})
    a, b, c = fl.tree(v).rows
    assert (a.min, a.max, a.mean, a.std, a.nan, a.inf) == (1.0, 3.0, 2.0, 1.0, 1, 2)
    assert (b.min, b.mean, b.nan, b.inf) == (None, None, 1, 0)
    assert (c.nan, c.inf) == (0, 0)
    text = str(fl.tree(v)).splitlines()
    assert text[3].endswith("1 nan, 2 inf")
    assert text[4].endswith("1 nan")


def test_states_and_other_trees(key):
    ps, st = fl.setup(key, MODEL)
    rows = {row.path: row for row in fl.tree(fl.testmode(st)).rows}
    assert list(rows) == ["layer_1.key", "layer_1.training"]
    assert rows["layer_1.training"].note == "False"
    assert rows["layer_1.key"].min is None
    integers = fl.tree(
        {"count": 3, "on": np.array([True, False]), "z": 1j, "empty": np.zeros((0, 2)), "f": abs}
    )
    assert [row.mean for row in integers.rows] == [3.0, 0.5, None, None, None]
    moments = [row.path for row in fl.tree(optax.adam(0.1).init(ps)).rows]
    assert "0.mu.layer_0.weight" in moments
    assert "0.count" in moments
    assert str(fl.tree(fl.Record())) == "Record"


def test_tied_names_say_so(key):
    model = fl.share_parameters(fl.Chain(a=fl.Dense(2, 2), b=fl.Dense(2, 2)), {"b.weight": "a.weight"})
    rows = {row.path: row for row in fl.tree(fl.initial_parameters(key, model)).rows}
    assert rows["b.weight"].note == "is a.weight"
    assert rows["b.weight"].mean == rows["a.weight"].mean
    assert rows["b.bias"].note == ""


@pytest.mark.parametrize("transform", [jax.jit, jax.vmap, lambda f: lambda v: jax.eval_shape(f, v)])
def test_traced_numbers_are_shown_by_shape(key, transform):
    v = jax.tree.map(lambda x: jnp.stack([x] * 3), fl.initial_parameters(key, MODEL, float))
    seen = []
    transform(lambda v: seen.append(fl.tree(v)) or v)(v)
    (found,) = seen
    assert all(row.mean is None for row in found.rows)
    assert found.rows[0].path == "layer_0.weight"
    assert found.rows[0].shape[-2:] == (16, 2)
    assert "float64" in str(found)
    assert "<svg" not in found._repr_html_()


def test_shapes_alone():
    v = fl.ComponentVector(jax.ShapeDtypeStruct((65,), jnp.float32), MODEL.layout)
    assert [row.shape for row in fl.tree(v).rows] == [(16, 2), (16,), (1, 16), (1,)]


def test_a_norm_is_shown_as_a_number(key):
    v = fl.initial_parameters(key, MODEL, float)
    (row,) = fl.tree(jax.tree.map(jnp.linalg.norm, v)).rows
    np.testing.assert_allclose(row.mean, np.linalg.norm(np.asarray(v)))
    assert (row.shape, row.note) == ((), "not the 65 numbers of the layout")
    (row,) = fl.tree({"moments": jax.tree.map(lambda x: float(x.sum()), v)}).rows
    assert (row.path, row.mean) == ("moments", float(v.data.sum()))


def test_lines_are_within_100():
    deep = fl.Chain(the_encoder=fl.Chain(with_a_long_name=fl.Chain(of_many_words_inside=fl.Dense(2, 2))))
    text = str(fl.tree(fl.ComponentVector(jnp.full(6, -1.2345678e-30), deep.layout)))
    assert max(map(len, text.splitlines())) <= 100
    assert "the_encoder.with_a_long_name.of_many" in text
