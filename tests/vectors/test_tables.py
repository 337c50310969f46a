import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flatlayers as fl
from tests.vectors.layouts import autoencoder
from tests.vectors.test_vector import LAYOUT, vector


pd = pytest.importorskip("pandas")

STACKED = fl.Layout({"rate": (), "blocks": autoencoder().tie({"decoder.weight": "encoder.weight"}).stack(2)})


@pytest.mark.parametrize("layout", [LAYOUT, STACKED, fl.Layout({})])
def test_a_series_has_each_number_under_its_name(layout):
    v = fl.ComponentVector(jnp.arange(layout.length) / 3, layout)
    series = v.to_series()
    assert list(series.index) == layout.labels()
    assert series.dtype == v.dtype
    np.testing.assert_array_equal(series.to_numpy(), v.data)
    assert pd.Series(dict(zip(layout.labels(), np.asarray(v), strict=True)), dtype=v.dtype).equals(series)


def test_a_frame_has_leading_axes_in_its_rows():
    v = vector(lead=(4,))
    frame = v.to_frame()
    assert list(frame.columns) == LAYOUT.labels()
    assert list(frame.index) == [0, 1, 2, 3]
    np.testing.assert_array_equal(frame["b.c[1]"], v.b.c[:, 1])
    np.testing.assert_array_equal(frame.iloc[2], v.lead[2].to_series())
    np.testing.assert_allclose(frame.mean(), v.data.mean(0))
    np.testing.assert_allclose(frame.corr()["a[0,0]"]["b.d"], np.corrcoef(v.a[:, 0, 0], v.b.d)[0, 1])
    one = v.lead[0].to_frame()
    assert one.shape == (1, 10)
    assert fl.ComponentVector(one.to_numpy()[0], LAYOUT) @ v.lead[0] == v.lead[0] @ v.lead[0]


@pytest.mark.parametrize("layout", [LAYOUT, STACKED])
def test_several_leading_axes_are_levels(layout):
    v = fl.ComponentVector(jax.random.normal(jax.random.key(0), (2, 3, layout.length)), layout)
    frame = v.to_frame(dims=("chain", "draw"))
    assert frame.index.names == ["chain", "draw"]
    assert list(frame.columns) == layout.labels()
    for chain, draw in np.ndindex(2, 3):
        np.testing.assert_array_equal(frame.loc[(chain, draw)], v.data[chain, draw])
    np.testing.assert_allclose(frame.groupby("chain").mean(), v.data.mean(1))
    assert v.to_frame().index.names == [None, None]
    assert v.lead[0].to_frame("draw").index.name == v.lead[0].to_frame(["draw"]).index.name == "draw"


def test_empty_leading_axes_and_groups():
    assert fl.ComponentVector(jnp.ones((0, 10)), LAYOUT).to_frame().shape == (0, 10)
    assert fl.ComponentVector(jnp.ones((0, 3, 10)), LAYOUT).to_frame().shape == (0, 10)
    assert fl.ComponentVector(jnp.ones((3, 0)), fl.Layout({})).to_frame().shape == (3, 0)
    assert list(vector(lead=(2,)).b.to_frame().columns) == ["c[0]", "c[1]", "c[2]", "d"]


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32, complex, int, bool])
def test_dtypes(dtype):
    v = fl.ComponentVector(jnp.asarray([0, 1, 1.5, 3]).astype(dtype), fl.Layout({"a": (4,)}))
    expected = np.dtype("float32") if dtype == jnp.bfloat16 else np.dtype(dtype)
    assert v.to_series().dtype == expected
    assert set(v.to_frame().dtypes) == {expected}
    np.testing.assert_array_equal(v.to_series(), np.asarray(v).astype(expected))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda v: v.to_series(), TypeError, r"leading axes \(2, 3\): `v.to_frame\(\)`"),
        (lambda v: v.to_frame(dims=("draw",)), ValueError, r"leading axes \(2, 3\), found dims=\('draw',\)"),
        (lambda v: v.to_frame(dims=("a", "a")), ValueError, "a name for each"),
        (lambda v: v.to_frame(dims=2), TypeError, r"a name for each .*, found dims=2"),
        (lambda v: v.to_frame(dims=("a", 2)), TypeError, r"a name for each .*, found dims=\('a', 2\)"),
        (
            lambda v: jax.eval_shape(lambda: v).to_frame(),
            TypeError,
            r"numbers, found float64\[2,3,10\]",
        ),
        (lambda v: jax.tree.map(lambda _: None, v).to_frame(), TypeError, "expected numbers, found NoneType"),
        (lambda v: jax.jit(lambda v: v.to_frame())(v), TypeError, "known only when it runs"),
        (lambda v: jax.tree.map(jnp.linalg.norm, v.lead[0, 0]).to_series(), ValueError, r"\(..., 10\)"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call(vector(lead=(2, 3)))


@pytest.mark.parametrize(("name", "call"), [("to_series", "v.to_series()"), ("to_frame", "v.to_frame()")])
def test_without_pandas_it_is_named(name, call, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"pandas, which is not installed: `pip install pandas`"):
        getattr(vector(), name)()
