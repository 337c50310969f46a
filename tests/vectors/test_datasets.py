import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flatlayers as fl
from tests.vectors.test_tables import STACKED
from tests.vectors.test_vector import LAYOUT, vector


xr = pytest.importorskip("xarray")

TIED = fl.Layout({"x": (2,), "none": (0, 2), "y": (2,), "one": (1,)}).tie({"y": "x"})


def test_a_variable_for_each_name():
    draws = vector(lead=(4, 6))
    dataset = fl.to_dataset(draws)
    assert list(dataset.data_vars) == ["a", "b.c", "b.d"]
    assert dict(dataset.sizes) == {"chain": 4, "draw": 6, "a[i]": 6, "b.c[i]": 3}
    assert dataset["a"].dims == ("chain", "draw", "a[i]")
    assert list(dataset["a[i]"].values) == ["0,0", "0,1", "0,2", "1,0", "1,1", "1,2"]
    np.testing.assert_array_equal(dataset["a"], draws.a.reshape(4, 6, 6))
    np.testing.assert_array_equal(dataset["a"].sel({"a[i]": "1,0"}), draws.a[..., 1, 0])
    np.testing.assert_array_equal(dataset["b.d"].sel(chain=2), draws.b.d[2])
    np.testing.assert_allclose(dataset.mean(("chain", "draw"))["b.c"], draws.b.c.mean((0, 1)))


@pytest.mark.parametrize("layout", [LAYOUT, STACKED, TIED, fl.Layout({})])
def test_names_with_their_indices_are_the_labels(layout):
    v = fl.ComponentVector(jnp.arange(1.0 * layout.length), layout)
    dataset = fl.to_dataset(v, dims=())
    names = [
        f"{name}[{index}]" if variable.dims else name
        for name, variable in dataset.data_vars.items()
        for index in (variable[f"{name}[i]"].values if variable.dims else [""])
    ]
    assert names == layout.labels()
    numbers = [variable.values.ravel() for variable in dataset.data_vars.values()]
    np.testing.assert_array_equal(np.concatenate([*numbers, []]), v.data)


def test_leading_axes_with_values():
    times = np.linspace(0.0, 1.0, 5)
    solution = vector(lead=(5,), dtype=jnp.float32)
    dataset = fl.to_dataset(solution, dims="time", coords={"time": times})
    assert dataset["b.d"].dtype == np.float32
    np.testing.assert_array_equal(dataset["b.c"].sel(time=0.5), solution.b.c[2])
    np.testing.assert_allclose(
        dataset["b.d"].interp(time=0.125), (solution.b.d[0] + solution.b.d[1]) / 2, rtol=1e-6
    )
    members = fl.to_dataset(vector(lead=(2,)), ("member",), {"member": ["first", "second"]})
    np.testing.assert_array_equal(members["a"].sel(member="second"), vector(lead=(2,)).a[1].ravel())
    assert fl.to_dataset(solution.map(lambda x: x.astype(jnp.bfloat16)), ["time"])["a"].dtype == np.float32


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda v: fl.to_dataset(v), ValueError, r"leading axes \(5,\), found dims=\('chain', 'draw'\)"),
        (lambda v: fl.to_dataset(v, ["a"]), ValueError, "no names of the vector, found 'a'"),
        (lambda v: fl.to_dataset(v, ["b.c[i]"]), ValueError, r"no names of the vector, found 'b.c\[i\]'"),
        (lambda v: fl.to_dataset(v, None), ValueError, r"leading axes \(5,\), found dims=\(\)"),
        (lambda v: fl.to_dataset(v, ["t"], {"s": [1]}), ValueError, r"coords of \['t'\], found \['s'\]"),
        (lambda v: fl.to_dataset(v.data, ["t"]), TypeError, r"ComponentVector, found float64\[5,10\]"),
        (lambda v: jax.jit(lambda v: fl.to_dataset(v, ["t"]))(v), TypeError, "known only when it runs"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call(vector(lead=(5,)))


def test_without_xarray_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "xarray", None)
    with pytest.raises(ImportError, match="to_dataset needs xarray, which is not installed: `pip install"):
        fl.to_dataset(vector(lead=(1, 2)))


@pytest.mark.slow
@pytest.mark.parametrize("layout", [LAYOUT, STACKED, TIED])
def test_the_summary_of_arviz_has_the_labels(layout):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import arviz

        draws = fl.ComponentVector(jax.random.normal(jax.random.key(0), (4, 50, layout.length)), layout)
        summary = arviz.summary(fl.to_dataset(draws), round_to=None)
    assert list(summary.index) == layout.labels()
    np.testing.assert_allclose(summary["mean"].astype(float), draws.data.mean((0, 1)), atol=0.06)
