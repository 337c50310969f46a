"""Vectors and chains as tables: pandas, xarray, ArviZ; and as arrays of others, by DLPack."""

import jax.numpy as jnp
import numpy as np
import pytest

import flatlayers as fl

from .gaussian import COVARIANCE, MEAN


CHAINS = fl.ComponentVector(
    jnp.asarray(np.random.default_rng(0).multivariate_normal(np.asarray(MEAN), COVARIANCE, (4, 500))),
    MEAN.layout,
)
LABELS = ["rates.growth", "rates.death", "net[0]"]


def by_name(chains):
    """Return a mapping of what each name has, with the leading axes."""
    return {path: np.asarray(chains[path]) for path, _ in chains.layout.slots()}


def test_a_series_of_pandas():
    pandas = pytest.importorskip("pandas", reason="pandas is an optional package")
    series = pandas.Series(np.asarray(MEAN), MEAN.layout.labels())
    assert list(series.index) == LABELS
    assert series["rates.death"] == -2.0
    again = fl.ComponentVector(jnp.asarray(series.to_numpy()), MEAN.layout)
    np.testing.assert_array_equal(again, MEAN)


def test_a_frame_of_pandas():
    pandas = pytest.importorskip("pandas", reason="pandas is an optional package")
    frame = pandas.DataFrame(np.asarray(CHAINS.lead[0]), columns=CHAINS.layout.labels())
    assert frame.shape == (500, 3)
    np.testing.assert_allclose(frame.cov(), np.cov(np.asarray(CHAINS.lead[0]).T))
    np.testing.assert_array_equal(frame["net[0]"], CHAINS.lead[0].net[:, 0])


def test_a_dataset_of_xarray():
    xarray = pytest.importorskip("xarray", reason="xarray is an optional package")
    data = {name: (("chain", "draw", *map(str, range(v.ndim - 2))), v) for name, v in by_name(CHAINS).items()}
    dataset = xarray.Dataset(data)
    assert dict(dataset.sizes) == {"chain": 4, "draw": 500, "0": 1}
    np.testing.assert_allclose(dataset["rates.growth"].mean(), CHAINS.rates.growth.mean())


def test_a_summary_of_arviz():
    pytest.importorskip("xarray", reason="xarray is an optional package")
    arviz = pytest.importorskip("arviz", reason="ArviZ is an optional package")
    posterior = by_name(CHAINS)
    old = arviz.__version__.startswith("0.")
    inference = arviz.from_dict(posterior=posterior) if old else arviz.from_dict({"posterior": posterior})
    table = arviz.summary(inference, round_to=None if old else "none")
    assert list(table.index) == LABELS
    np.testing.assert_allclose(
        table["mean"], np.asarray(CHAINS).reshape(-1, 3).mean(axis=0), atol=1e-3 if old else 1e-12
    )
    assert (abs(table["r_hat"] - 1) < 0.02).all()


def test_dlpack():
    shared = np.from_dlpack(MEAN.data)
    np.testing.assert_array_equal(shared, np.asarray(MEAN))
    again = fl.ComponentVector(jnp.asarray(shared), MEAN.layout)
    assert again.rates.death == -2.0
    # Writable memory of NumPy goes the same way back.
    lent = fl.ComponentVector(jnp.from_dlpack(np.array([1.0, 2.0, 3.0])), MEAN.layout)
    assert lent.net == 3.0


def test_dlpack_to_torch():
    torch = pytest.importorskip("torch", reason="PyTorch is an optional package")
    tensor = torch.from_dlpack(MEAN.data)
    assert tensor.tolist() == [1.0, -2.0, 0.5]
    again = fl.ComponentVector(jnp.from_dlpack(tensor), MEAN.layout)
    np.testing.assert_array_equal(again, MEAN)
